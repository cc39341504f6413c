// Completions of a step, a group side by side; tokens coloured by what was measured of them; the verifier's evidence.

const COLOURS = {
  logprob: ["surprise (log-prob)", "the stronger the colour, the less likely it was when it was drawn"],
  entropy: ["entropy", "the stronger the colour, the more the policy wavered here, measured in the update; uncoloured: in no update of this step"],
  advantage: ["advantage", "green: made likelier; red: made less likely"],
  clip: ["clipping", "green: trained; red: clipping took its gradient; uncoloured: in no update of this step"],
  mask: ["who wrote it", "green: drawn by the policy; underlined: forced, or a tool's, and never trained on"],
  none: ["plain", ""],
};

function tokenText(piece) {
  return visible(piece.replaceAll("\n", "⏎\n"));
}

function tokensOf(c) {
  const box = el("div", { class: "text", dir: "auto" });
  if (!c.pieces) {
    box.append(...visible(c.text || ""));
    return box;
  }
  c.pieces.forEach((piece, i) => {
    if (c.skipped && i === c.skipped[0]) box.append(el("span", { class: "gap" }, `${number(c.skipped[1])} tokens left out`));
    const own = c.mask[i] === "1";
    const advantage = c.advantages ? c.advantages[i] : c.advantage;
    const sign = !own || !advantage ? "" : advantage > 0 ? " plus" : " minus";
    const clip = !own || !c.clipped ? "" : { 0: " trained", 1: " clipped" }[c.clipped[i]] || "";
    const token = el("span", { class: `t ${own ? "own" : "forced"}${sign}${clip}` }, tokenText(piece));
    const entropy = own && c.entropy ? c.entropy[i] : null;
    token.title = own ? `log-prob ${c.logprobs[i]}, advantage ${signed(advantage)}${known(entropy) ? `, entropy ${entropy}` : ""}${clip === " clipped" ? ", clipped" : ""}`
      : "not sampled by the policy: forced, or a tool's";
    token.dataset.logprob = own ? Math.min(-c.logprobs[i] / 5, 0.85).toFixed(2) : "0";
    token.dataset.entropy = known(entropy) ? Math.min(entropy / 3, 0.85).toFixed(2) : "0";
    token.dataset.advantage = own ? Math.min(Math.abs(advantage || 0) / 2.5, 0.6).toFixed(2) : "0";
    box.append(token);
  });
  return box;
}

function colour(box, by) {
  box.className = `by-${by}`;
  for (const token of box.querySelectorAll(".t")) {
    if (by in token.dataset) token.style.setProperty("--strength", token.dataset[by]);
    else token.style.removeProperty("--strength");
  }
}

function evidenceOf(value) {
  const rows = Object.entries(value).filter(([, v]) => v !== null && v !== "" && !(typeof v === "object" && !Object.keys(v).length));
  return el("dl", { class: "evidence" }, rows.map(([name, v]) => [
    el("dt", {}, visible(name.replaceAll("_", " "))),
    v && typeof v === "object" && !Array.isArray(v) ? el("dd", { class: "nest" }, evidenceOf(v)) : el("dd", { dir: "auto" }, visible(plainly(v))),
  ]));
}

function copyable(text) {
  const code = el("code", {}, text);
  const button = el("button", { type: "button", "aria-label": "Copy the command", onclick: async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "copied";
      say("copied");
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "selected";
    }
  } }, "copy");
  return el("div", { class: "command" }, code, button);
}

// What each reward model said of it, and whether it orders it against the verifier: some answer of the group that the
// verifier scored lower is rated at least as high, or one scored higher at most as high.
function modelTags(c, all) {
  const judged = (x) => x.verdict && known(x.verdict.score);
  return Object.entries(c.scores || {}).filter(([, s]) => s && known(s.value)).map(([name, s]) => {
    const against = judged(c) && all.some((x) => {
      const other = judged(x) && x.scores && x.scores[name] && x.scores[name].value;
      return known(other) && (c.verdict.score - x.verdict.score) * (s.value - other) <= 0 && c.verdict.score !== x.verdict.score;
    });
    return el("span", { class: `tag${against ? " other" : ""}`, title: against ? "orders this answer and another of the group otherwise than the verifier" : "orders this answer as the verifier does" },
      visible(name), ` ${number(s.value)}${against ? ", against the verifier" : ""}`);
  });
}

function cardOf(c, n, all, key) {
  const status = (c.verdict && c.verdict.status) || "no verdict";
  const tone = status === "ok" ? "ok" : status === "wrong" ? "wrong" : "other";
  const parts = Object.entries(c.components || {});
  return el("article", { class: "panel card", "aria-label": `Completion ${n + 1}, reward ${number(c.reward)}` },
    el("header", {},
      el("b", {}, number(c.reward)), el("span", { class: `tag ${tone}` }, visible(status)),
      el("span", {}, "advantage ", el("span", { class: c.advantage > 0 ? "good" : c.advantage < 0 ? "bad" : "" }, signed(c.advantage))),
      c.finish && c.finish !== "stop" ? el("span", { class: "tag other" }, c.finish === "length" ? "cut off" : visible(String(c.finish))) : null, modelTags(c, all)),
    tokensOf(c),
    c.verdict && c.verdict.detail ? el("p", { class: "faint", dir: "auto" }, visible(c.verdict.detail)) : null,
    folding(`${key} ${c.line}`, {}, el("summary", {}, "Evidence"), el("div", { class: "in" },
      evidenceOf({ ...(parts.length > 1 ? { components: c.components } : {}), ...(c.evidence || {}), ...(c.scores ? { "reward models": c.scores } : {}),
        seconds: c.verdict && c.verdict.seconds, "policy version": [...new Set(c.versions)].join(" to ") }),
      c.again ? [el("p", { class: "faint" }, "Judge it again:"), copyable(c.again)] : null)));
}

function groupsSection(app) {
  const picker = el("select", { id: "rollout-step", "aria-label": "Step of the completions" });
  const chips = el("div", { class: "chips", role: "group", "aria-label": "Groups of this step" });
  const ways = el("div", { class: "chips", role: "group", "aria-label": "Colour tokens by" });
  const meaning = el("span", { class: "faint", id: "meaning" });
  const body = el("div", {});
  const node = section("groups", "Completions, group by group",
    el("div", { class: "tools" }, el("label", {}, "step ", picker), el("span", { class: "soft" }, "colour by"), ways, meaning), chips, body);
  let shownStep = null, loaded = null, told = "";

  for (const [key, [label]] of Object.entries(COLOURS)) {
    ways.append(el("button", { type: "button", "data-way": key, onclick: () => setColour(key) }, label));
  }
  // Whoever picks a step, or clicks into what it shows, keeps it until the cursor is moved.
  const hold = () => { app.state.held = shownStep; };
  picker.addEventListener("change", () => { load(Number(picker.value)); hold(); });
  for (const read of [chips, body]) read.addEventListener("click", hold);

  function setColour(key) {
    app.state.colour = key;
    paint();
  }

  function paint() {
    const there = loaded.groups[app.state.group].completions; // older runs have no entropy, nor groups that were in no update
    const without = { entropy: !there.some((c) => c.entropy), clip: !there.some((c) => c.clipped) };
    const key = without[app.state.colour] ? "logprob" : app.state.colour;
    for (const b of ways.children) b.hidden = Boolean(without[b.dataset.way]);
    meaning.textContent = COLOURS[key][1];
    for (const b of ways.children) b.setAttribute("aria-pressed", String(b.dataset.way === key));
    colour(body, key);
  }

  async function load(step) {
    shownStep = step;
    picker.value = String(step);
    const found = await app.groups(step);
    if (shownStep !== step || !node.isConnected) return; // another was asked for meanwhile
    const text = JSON.stringify([step, found]);
    if (text === told) return; // what is read, selected or opened stays
    [loaded, told] = [found, text];
    show(Math.min(app.state.group, Math.max(found.groups.length - 1, 0)));
  }

  function show(index) {
    app.state.group = index;
    const { groups, of, odd } = loaded;
    chips.replaceChildren(...groups.map((g, i) => el("button", { type: "button", "aria-pressed": i === index, onclick: () => { show(i); chips.children[i].focus(); } },
      visible(g.domain), ` ${number(g.reward)}`)), el("span", { class: "faint" }, of > groups.length ? `${groups.length} of ${of} groups` : "",
      odd ? ` ${odd} completions shown have tokens or a form that cannot be read as such` : ""));
    for (const [i, b] of [...chips.querySelectorAll("button")].entries()) b.setAttribute("aria-pressed", String(i === index));
    const g = groups[index];
    if (!g) return void body.replaceChildren(el("p", { class: "soft" }, "No completions were kept of this step."));
    const prompts = g.prompt.map((m) => el("div", { class: "prompt", dir: "auto" }, g.prompt.length > 1 || m.role !== "user" ? el("b", {}, visible(`${m.role}: `)) : null, visible(m.content)));
    body.replaceChildren(
      el("p", { class: "faint" }, visible(`${g.task}, judged by ${g.verifier || "?"}`), g.of > g.completions.length ? `; ${g.completions.length} of ${g.of} completions` : ""),
      ...prompts, el("div", { class: "cards" }, g.completions.map((c, n, all) => cardOf(c, n, all, `${shownStep} ${g.task}`))));
    paint();
  }

  node.moveTo = (step) => {
    const steps = app.rolloutSteps();
    if (picker.options.length !== steps.length || (steps.length && picker.options[steps.length - 1].value !== String(steps[steps.length - 1]))) {
      picker.replaceChildren(...steps.map((s) => el("option", { value: s }, number(s))));
      if (shownStep !== null) picker.value = String(shownStep);
    }
    const at = steps.includes(app.state.held) ? app.state.held : steps[nearest(steps, step)];
    if (at === undefined || (at === shownStep && !node.stale)) return;
    node.stale = false;
    load(at);
  };
  node.place = app.run().dir;
  return node;
}
