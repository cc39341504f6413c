// Verdict, facts, evaluations, reward-model pages, lineage, events, environment.

function bannerOf(run) {
  const v = run.verdict;
  return el("section", { class: `banner ${v.state}`, id: "verdict", "aria-label": "Verdict" },
    el("h2", {}, v.title), el("ul", {}, v.because.map((b) => el("li", {}, visible(b)))));
}

function last(run, key) {
  const y = (run.curves.values[key] || []).filter(known);
  return y.length ? y[y.length - 1] : null;
}

function factsOf(run) {
  const stage = { sft: "supervised fine-tuning", rm: "reward model", rl: "reinforcement learning" }[run.stage] || run.stage;
  const held = last(run, "held_out");
  const facts = [
    ["stage", stage], ["steps", run.planned && run.planned !== run.steps ? `${number(run.steps)} of ${number(run.planned)}` : number(run.steps)],
    ["time in steps", duration(last(run, "clock/elapsed"))],
    ["held-out score", known(held) ? `${known(run.before.all) ? `${percent(run.before.all)} → ` : ""}${percent(held)}` : null],
    ["reward, last", known(last(run, "reward")) ? number(last(run, "reward")) : null],
    ["loss, last", run.stage !== "rl" && known(last(run, "loss")) ? number(last(run, "loss")) : null],
    ["held-out pairs right", known(last(run, "eval_accuracy")) ? percent(last(run, "eval_accuracy")) : null],
    ["status", run.status],
  ];
  return el("dl", { class: "facts" }, facts.filter(([, v]) => v !== null).map(([k, v]) => el("div", {}, el("dt", {}, k), el("dd", {}, v))));
}

function intervalOf(low, middle, high, from, to) {
  if (![low, middle, high].every(known)) return "";
  const at = (x) => 4 + 172 * Math.min(Math.max((x - from) / (to - from), 0), 1);
  return svg("svg", { class: "interval c0", viewBox: "0 0 180 16", "aria-hidden": "true" },
    from < 0 ? svg("line", { class: "grid", x1: at(0), x2: at(0), y1: 0, y2: 16 }) : null,
    svg("line", { x1: at(low), x2: at(high), y1: 8, y2: 8 }), svg("circle", { cx: at(middle), cy: 8, r: 3.5 }));
}

const points = (x) => (known(x) ? signed(100 * x) : "–");
const whole = (text) => el("td", { class: "whole" }, text);

// The directory that several models lie in, which need not be said for each.
function directoryOf(models) {
  const parts = models[0].split("/");
  let n = models.length > 1 ? parts.length - 1 : 0;
  while (n && !models.every((m) => m.startsWith(parts.slice(0, n).join("/") + "/"))) n -= 1;
  return n ? parts.slice(0, n).join("/") + "/" : "";
}

function evaluationOf(job) {
  const found = job && job.eval;
  if (!found || !found.evaluations.length) return null;
  const rows = [], directory = directoryOf(found.evaluations.map((e) => String(e.model)));
  for (const domain of Object.keys(found.evaluations[0].domains || {})) {
    for (const e of found.evaluations) {
      const d = (e.domains || {})[domain], m = d && d.mean, p = (e.against_first || {})[domain];
      if (!m) continue;
      const rates = Object.entries(d).filter(([k]) => k.includes("@")).map(([k, v]) => `${k} ${percent(v)}`).join(", ");
      rows.push([domain, visible(String(e.model).slice(directory.length) + (known(e.thinking) ? ` (thinking ${e.thinking})` : "")), percent(m.mean),
        p ? el("td", { class: `whole ${known(p.low) && p.low > 0 ? "good" : known(p.high) && p.high < 0 ? "bad" : ""}` }, `${points(p.difference)} points [${points(p.low)}, ${points(p.high)}], p ${number(p.p)}`) : "",
        intervalOf(m.low, m.mean, m.high, 0, 1), whole(`${percent(m.low)} – ${percent(m.high)}`), el("td", { class: "wrap rates" }, rates)]);
    }
  }
  return section("evaluation", "Before and after, on held-out tasks",
    el("div", { class: "panel" }, directory ? el("p", { class: "faint" }, "models in ", visible(directory)) : null, table(["domain", "model", "mean score", "against the first", "", "95 % interval", "of several answers"], rows, [2])));
}

// Confidence in ten bins against how often the answer was right: on the diagonal where the score can be taken at its word.
function reliabilityOf(bins) {
  const found = Object.values(bins).filter((b) => b && known(b.confidence) && known(b.right) && known(b.count));
  if (!found.length) return null;
  const side = 250, at = (v) => 36 + v * (side - 54), up = (v) => side - 24 - v * (side - 36);
  const most = Math.max(...found.map((b) => b.count));
  const label = `Share right by confidence: ${found.map((b) => `${percent(b.confidence)} sure, ${percent(b.right)} right, of ${b.count}`).join("; ")}`;
  return el("figure", {}, el("figcaption", { class: "faint" }, "right, by how sure it was; a larger dot is more answers; the line is perfect calibration"),
    svg("svg", { role: "img", class: "square c0", viewBox: `0 0 ${side} ${side}`, "aria-label": label },
      [0, 0.5, 1].map((v) => [svg("line", { class: "grid", x1: at(0), x2: at(1), y1: up(v), y2: up(v) }),
        svg("text", { x: 31, y: up(v) + 3.5, "text-anchor": "end" }, `${100 * v}%`), svg("text", { x: at(v), y: side - 8, "text-anchor": "middle" }, `${100 * v}%`)]),
      svg("line", { class: "at", x1: at(0), x2: at(1), y1: up(0), y2: up(1) }),
      found.map((b) => svg("line", { class: "gap-line", x1: at(b.confidence), x2: at(b.confidence), y1: up(b.confidence), y2: up(b.right) })),
      found.map((b) => svg("circle", { class: "dot", cx: at(b.confidence), cy: up(b.right), r: 2.5 + 6 * Math.sqrt(b.count / most) },
        svg("title", {}, `${percent(b.confidence)} sure, ${percent(b.right)} right, of ${b.count}`)))));
}

function promptText(prompt) {
  return Array.isArray(prompt) ? prompt.map((m) => (m && m.content !== undefined ? `${m.role}: ${m.content}` : plainly(m))).join("\n") : plainly(prompt);
}

// What `cabochon rm eval` wrote: numbers, reliability, attacks, and the answers it was surest to get wrong.
function modelEvaluation(name, value) {
  const { reliability, attacks, disagreements, ...numbers } = value;
  const isMap = (x) => x && typeof x === "object" && !Array.isArray(x);
  const share = (x) => (known(x) ? percent(x) : "–");
  return [
    el("div", { class: "panel" }, el("h3", {}, visible(name)), evidenceOf(numbers)),
    isMap(reliability) && Object.keys(reliability).length ? el("div", { class: "panel" }, el("h3", {}, "Calibration, ", visible(name)), reliabilityOf(reliability)) : null,
    isMap(attacks) && Object.keys(attacks).length ? el("div", { class: "panel" }, el("h3", {}, "Attacks on wrong answers, ", visible(name)),
      table(["what was added", "rise of P(right)", "now held right"], Object.entries(attacks).filter(([, a]) => isMap(a)).map(([k, a]) => [visible(k), share(a.gained), share(a.flipped)]), [1, 2])) : null,
    Array.isArray(disagreements) && disagreements.length ? el("div", { class: "panel wide" }, el("h3", {}, "Surest disagreements with the labels, ", visible(name)),
      table(["P(right)", "label", "prompt", "answer"], disagreements.filter(isMap).map((d) => [percent(d.p_right),
        el("td", { class: d.right ? "whole good" : "whole bad" }, d.right ? "right" : "wrong"), el("td", { class: "wrap mono", dir: "auto" }, visible(promptText(d.prompt))),
        el("td", { class: "wrap mono", dir: "auto" }, visible(plainly(d.response)))]), [0])) : null,
  ];
}

function rewardModelOf(run) {
  const files = Object.entries(run.evaluations || {});
  const lengths = {};
  for (const name of Object.keys(run.curves.values)) {
    const found = name.match(/^eval_by_length\/(.*)\/(pairs|accuracy)$/);
    if (found) (lengths[found[1]] = lengths[found[1]] || {})[found[2]] = last(run, name);
  }
  const parts = [];
  if (Object.keys(lengths).length) {
    parts.push(el("div", { class: "panel" }, el("h3", {}, "Accuracy by which answer is longer"),
      table(["the better answer", "pairs", "accuracy"], Object.entries(lengths).map(([k, v]) => [k, number(v.pairs), percent(v.accuracy)]), [1, 2])));
  }
  const told = [["held-out accuracy", "eval_accuracy", percent], ["mean margin", "eval_difference", number], ["calibration error", "eval_ece", percent],
    ["… after temperature scaling", "eval_ece_scaled", percent], ["temperature", "eval_temperature", number], ["correlation with length", "eval_length_correlation", number]]
    .filter(([, k]) => known(last(run, k)));
  if (told.length) parts.push(el("div", { class: "panel" }, el("h3", {}, "On held-out pairs, last"), table(["", ""], told.map(([n, k, f]) => [n, f(last(run, k))]), [1])));
  for (const [name, value] of files) parts.push(...modelEvaluation(name, value).filter(Boolean));
  return parts.length ? section("reward-model", "Reward model", el("div", { class: "cards" }, parts)) : null;
}

function stageCard(r, current) {
  const results = Object.entries(r.results || {}).filter(([, v]) => known(v)).slice(0, 4);
  return el("div", { class: "panel" }, el("h3", {}, current ? `${r.stage || "?"} (this run)` : r.stage || "a model"),
    el("p", { class: "faint mono" }, visible(r.address || "")),
    el("p", { class: "faint" }, [r.steps ? `${number(r.steps)} step${r.steps === 1 ? "" : "s"}` : null, r.seconds ? duration(r.seconds) : null, r.finished_at].filter(Boolean).join(", ")),
    results.map(([k, v]) => el("p", { class: "faint" }, `${k.replaceAll("_", " ")} ${number(v)}`)));
}

function lineageOf(data, run) {
  const own = { stage: run.stage, address: run.dir, ...(run.manifest || {}), steps: run.steps };
  const chain = [...run.ancestors].reverse();
  const flow = [];
  for (const [i, r] of [...chain, own].entries()) {
    if (i) flow.push(el("span", { class: "arrow", "aria-hidden": "true" }, "→"));
    flow.push(stageCard(r, r === own));
  }
  const stages = data.job && data.job.stages;
  const rows = data.differences.map((d) => [el("td", { class: "mono" }, d.key), ...d.values.map((v) => el("td", { class: "mono wrap" }, v === null ? "" : visible(v)))]);
  return section("lineage", "Lineage", el("div", { class: "flow" }, flow),
    stages ? folding("commands", {}, el("summary", {}, `Commands of the job's ${Object.keys(stages).length} stages`), el("div", { class: "in" },
      table(["stage", "seconds", "command"], Object.entries(stages).filter(([, s]) => s).map(([n, s]) => [visible(n), number(Math.round(s.seconds)), el("td", { class: "mono wrap" }, visible(`cabochon ${[s.command || []].flat().join(" ")}`))]), [1]))) : null,
    rows.length ? folding("differences", { open: data.runs.length > 1 && rows.length <= 25 }, el("summary", {}, `${rows.length} ${rows.length === 1 ? "setting that differs" : "settings that differ"} between the runs`),
      el("div", { class: "in" }, table(["setting", ...data.runs.map((r) => r.name)], rows))) : null);
}

function eventsOf(run, frame) {
  if (!run.events.length) return null;
  const rows = run.events.map((e) => [
    known(e.time) && Math.abs(e.time) < 1e11 ? new Date(1000 * e.time).toISOString().slice(0, 19).split("T").map((part) => [el("span", { class: "whole" }, part), " "]) : "",
    known(e.step) && e.step > 0 ? el("button", { type: "button", class: "link", onclick: () => frame.choose(e.step) }, number(e.step)) : "",
    el("td", { class: e.event === "alarm" || e.event === "failed" ? "bad" : "" }, visible(String(e.event))), el("td", { class: "wrap", dir: "auto" }, visible(String(e.message || "")))]);
  return section("events", "Events", el("div", { class: "panel" }, table(["time (UTC)", "step", "what", ""], rows, [1])));
}

function environmentOf(run) {
  const m = run.manifest || {};
  const versions = Object.entries(m.versions || {}).map(([k, v]) => [k, visible(plainly(v))]);
  const files = (Array.isArray(m.data) ? m.data : []).filter(Boolean).map((f) => [el("td", { class: "wrap" }, visible(String(f.path))), whole(`${number(Math.round(f.bytes / 1000))} kB`), el("td", { class: "mono whole" }, String(f.sha256).slice(0, 12))]);
  return section("environment", "Environment", el("div", { class: "cards" },
    versions.length ? el("div", { class: "panel" }, el("h3", {}, "Versions"), table(["", ""], versions)) : null,
    files.length ? el("div", { class: "panel" }, el("h3", {}, "Data, by content"), table(["file", "size", "sha-256"], files, [1])) : null,
    el("div", { class: "panel" }, el("h3", {}, "Settings"), folding("settings", {}, el("summary", {}, "config.yaml, as it was resolved"), el("pre", { class: "in", tabindex: "0" }, visible(JSON.stringify(run.config, null, 1)))))));
}
