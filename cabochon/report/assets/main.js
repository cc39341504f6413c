// One state, one cursor; sections are made anew when the run or its data change, and moved when the cursor does.

const app = {
  data: JSON.parse(document.getElementById("data").textContent),
  state: { run: 0, step: null, atEnd: true, compare: false, colour: "logprob", layer: 0, group: 0, held: null, open: new Map() },
  moving: [], completions: null, shown: null,
  run() { return this.data.runs[this.state.run]; },
  rolloutSteps() { const r = this.run(); return this.data.live ? r.rollout_steps : Object.keys(r.rollouts || {}).map(Number); },
  async groups(step) {
    if (!this.data.live) return this.run().rollouts[step];
    try {
      const got = await fetch(`/api/runs/${this.state.run}/rollouts/${step}`);
      return got.ok ? await got.json() : { groups: [], of: 0, odd: 0 };
    } catch {
      return { groups: [], of: 0, odd: 0 };
    }
  },
};
app.state.run = Math.max(app.data.runs.findLastIndex((r) => r.stage === "rl" && r.steps), 0);

function header() {
  const { data, state } = app;
  const run = app.run(), steps = run.curves.step;
  const others = data.runs.filter((r) => r !== run && r.stage === run.stage);
  const range = el("input", { type: "range", id: "cursor", min: 0, max: Math.max(steps.length - 1, 0), value: Math.max(nearest(steps, state.step), 0), "aria-label": "Step",
    oninput: (e) => choose(steps[Number(e.target.value)]) });
  const output = el("output", { for: "cursor" });
  document.getElementById("top").replaceChildren(el("div", { class: "bar" },
    el("span", { class: "brand" }, "◆ cabochon"), el("h1", {}, visible(data.title)),
    data.live ? el("span", { class: "live", id: "live" }, "● live") : null,
    el("nav", { class: "runs", "aria-label": "Runs" }, data.runs.length > 1 ? data.runs.map((r, i) =>
      el("button", { type: "button", id: `run-${i}`, "aria-pressed": String(i === state.run), onclick: () => select(i) }, visible(r.name))) : null),
    others.length ? el("label", {}, el("input", { type: "checkbox", id: "compare", checked: state.compare, onchange: (e) => { state.compare = e.target.checked; render(); } }), "compare") : null,
    el("div", { class: "cursor" }, range, output),
    el("button", { type: "button", id: "help", "aria-label": "Keyboard help", onclick: help }, "?")));
  return { moveTo(step) { range.value = String(Math.max(nearest(steps, step), 0)); range.setAttribute("aria-valuetext", `step ${step}`); output.textContent = steps.length ? `step ${number(step)}` : "no step yet"; } };
}

function render() {
  const { data, state } = app;
  const focused = document.activeElement && document.activeElement.id, scrolled = scrollY;
  const run = app.run(), steps = run.curves.step;
  if (state.atEnd || state.step === null || !steps.length) state.step = steps[steps.length - 1] || 0;
  const others = state.compare ? data.runs.filter((r) => r !== run && r.stage === run.stage && r.curves.step.length) : [];
  const ends = [run, ...others].map((r) => r.curves.step[r.curves.step.length - 1] || 1);
  const frame = {
    first: known(run.before.all) ? 0 : Math.min(...[run, ...others].map((r) => r.curves.step[0] || 1)), last: Math.max(...ends), choose, step: () => state.step,
    alarms: [...new Set(run.events.filter((e) => e.event === "alarm" && known(e.step)).map((e) => e.step))].slice(0, 60),
  };
  const top = header();
  const [curves, rest] = curvesOf(run, others, frame);
  const time = attempt(() => timeOf(run, frame)), experts = attempt(() => expertsOf(run, frame, state)), agreement = attempt(() => agreementOf(run, frame));
  const groups = completionsOf(run);
  const more = rest.length ? folding("more", { id: "more", ontoggle: () => { rest.forEach((c) => { c.draw(); c.moveTo(state.step); }); } }, el("summary", {}, `${rest.length} other readings`), el("div", { class: "charts in" }, rest)) : null;
  const sections = [
    bannerOf(run), attempt(() => factsOf(run)), attempt(() => evaluationOf(data.job)),
    section("curves", "Curves", el("div", { class: "charts" }, curves), more),
    section("time", "Where the time goes", el("div", { class: "charts" }, time)),
    section("experts", "Experts", experts, agreement ? el("div", { class: "charts" }, agreement) : null),
    groups, attempt(() => rewardModelOf(run)), attempt(() => lineageOf(data, run)), attempt(() => eventsOf(run, frame)), attempt(() => environmentOf(run)),
  ].filter(Boolean);
  if (!steps.length) sections.splice(1, 0, el("p", { class: "soft" }, "No step has been written yet."));
  if (app.shown !== run.dir) document.getElementById("main").replaceChildren(); // nothing of another run is kept, however alike
  app.shown = run.dir;
  settle(document.getElementById("main"), sections);
  document.getElementById("foot").replaceChildren();
  fill(document.getElementById("foot"), {}, [el("p", {}, `Made ${data.made} by cabochon. Nothing on this page is fetched from anywhere.`),
    run.left_out.length ? [el("p", {}, "Left out or drawn together:"), el("ul", {}, run.left_out.map((t) => el("li", {}, visible(t))))] : null]);
  document.title = `${run.name} · cabochon`;
  app.moving = [top, ...curves, time, experts, agreement, groups, ...rest].filter((x) => x && x.moveTo);
  for (const each of [...curves, time, experts, agreement, ...rest]) if (each && each.draw) each.draw();
  app.redraw = () => { for (const each of [...curves, time, experts, agreement, ...rest]) if (each && each.draw) each.draw(); move(); };
  move();
  scrollTo(0, scrolled); // while charts have no size yet, the page is shorter
  if (focused && document.getElementById(focused)) document.getElementById(focused).focus({ preventScroll: true });
}

// Kept while the run is looked at; what it shows is asked for again, and drawn again if it is not the same.
function completionsOf(run) {
  if (!app.rolloutSteps().length) return (app.completions = null);
  if (!app.completions || app.completions.place !== run.dir) app.completions = groupsSection(app);
  app.completions.stale = true;
  return app.completions;
}

function move() {
  for (const each of app.moving) each.moveTo(app.state.step);
}

let waiting = false;
function choose(step) {
  const steps = app.run().curves.step;
  if (!steps.length) return;
  app.state.held = null;
  app.state.step = steps[nearest(steps, step)];
  app.state.atEnd = app.state.step === steps[steps.length - 1];
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; move(); });
}

function select(index) {
  const count = app.data.runs.length;
  app.state = { ...app.state, run: (index + count) % count, atEnd: true, group: 0, held: null };
  render();
  say(`run ${app.run().name}`);
}

function help() {
  const rows = [["← →", "step back and forth"], ["Shift ← →", "ten at a time"], ["Home End", "first and last step"], ["[ ]", "run before and after"],
    ["c", "colour tokens by something else"], ["?", "this"], ["Esc", "close"]];
  const box = el("dialog", { "aria-label": "Keyboard", onclose: () => box.remove() }, el("h3", {}, "Keyboard"),
    el("table", {}, el("tbody", {}, rows.map(([k, t]) => el("tr", {}, el("td", {}, k.split(" ").map((x) => [el("kbd", {}, x), " "])), el("td", {}, t))))),
    el("form", { method: "dialog" }, el("button", { autofocus: true }, "close")));
  document.body.append(box);
  box.querySelector("form").addEventListener("submit", (e) => { e.preventDefault(); box.close(); });
  box.showModal();
}

document.addEventListener("keydown", (e) => {
  if (e.ctrlKey || e.metaKey || e.altKey || document.querySelector("dialog[open]")) return;
  if (e.target.matches("select, textarea, pre, .text, .prompt, input:not([type=range]):not([type=checkbox])")) return;
  const steps = app.run().curves.step, at = nearest(steps, app.state.step), by = e.shiftKey ? 10 : 1;
  const go = { ArrowLeft: at - by, ArrowRight: at + by, Home: 0, End: steps.length - 1 }[e.key];
  if (go !== undefined && steps.length) {
    choose(steps[Math.min(Math.max(go, 0), steps.length - 1)]);
    e.preventDefault();
  } else if (e.key === "?") {
    help();
    e.preventDefault();
  } else if (e.key === "[" || e.key === "]") {
    select(app.state.run + (e.key === "]" ? 1 : -1));
  } else if (e.key === "c" && document.getElementById("groups")) {
    const ways = [...document.querySelectorAll("#groups [data-way]:not([hidden])")];
    const next = ways[(ways.findIndex((b) => b.ariaPressed === "true") + 1) % ways.length];
    if (!next) return;
    next.click();
    say(`coloured by ${next.textContent}`);
  }
});

let resized = 0;
addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(() => app.redraw(), 120); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => app.redraw());

function follow() {
  const source = new EventSource("/api/events");
  let busy = false, wanted = null;
  const light = (on) => { const dot = document.getElementById("live"); if (dot) { dot.className = on ? "live" : "live off"; dot.textContent = on ? "● live" : "○ not connected"; } };
  const refresh = async () => {
    if (busy) return;
    busy = true;
    while (wanted !== null && wanted !== app.data.version) {
      try {
        const got = await fetch("/api/data");
        if (got.ok) { app.data = await got.json(); render(); }
        light(got.ok);
      } catch { break; }
      await new Promise((done) => setTimeout(done, 1500));
    }
    busy = false;
  };
  source.onmessage = (e) => { light(true); wanted = Number(e.data); refresh(); };
  source.onerror = () => light(false);
}

render();
if (app.data.live) follow();
