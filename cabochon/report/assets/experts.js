// Expert loads: layer x expert at the cursor, and one layer's experts over the steps. 1 is an equal share.

function heatColor(level, fair, dark) {
  if (level === 0) return dark ? [255, 70, 170] : [190, 0, 110];
  const middle = dark ? [38, 42, 50] : [244, 242, 237];
  const low = dark ? [84, 150, 225] : [38, 98, 170];
  const high = dark ? [255, 160, 60] : [214, 92, 10];
  const x = level / fair;
  const t = x < 1 ? 1 - x : Math.min(Math.log(x) / Math.log(4), 1);
  return middle.map((m, i) => Math.round(m + (x < 1 ? low : high)[i] * t - m * t));
}

function paint(canvas, width, height, levelAt, fair) {
  canvas.width = width;
  canvas.height = height;
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) image.data.set([...heatColor(levelAt(x, y), fair, dark), 255], 4 * (y * width + x));
  }
  context.putImageData(image, 0, 0);
}

function expertsOf(run, frame, state) {
  const moe = run.moe;
  if (!moe) return null;
  const bytes = Uint8Array.from(atob(moe.load), (c) => c.charCodeAt(0));
  const { layers, experts, fair } = moe;
  const level = (i, layer, expert) => bytes[(i * layers + layer) * experts + expert];
  const times = (x) => (x === 0 ? "no token" : `${x >= 255 ? "over " : ""}${number(x / fair)} ×`);
  const grid = el("canvas", { role: "img" }), over = el("canvas", { role: "img" });
  const line = el("div", { class: "line" }), ring = el("div", { class: "row" });
  const gridSaid = el("p", { class: "faint" }), overSaid = el("p", { class: "faint" });
  const pick = el("select", { id: "layer", "aria-label": "Layer", onchange: (e) => { state.layer = Number(e.target.value); draw(); moveTo(frame.step()); } },
    Array.from({ length: layers }, (_, l) => el("option", { value: l }, `layer ${l + 1} of ${layers}`)));
  const gridBox = el("div", { class: "field" }, grid, ring), overBox = el("div", { class: "field" }, over, line);
  const at = (event, box) => { const r = box.getBoundingClientRect(); return [(event.clientX - r.left) / r.width, (event.clientY - r.top) / r.height]; };
  gridBox.addEventListener("click", (e) => { state.layer = Math.min(Math.floor(at(e, gridBox)[1] * layers), layers - 1); draw(); moveTo(frame.step()); });
  overBox.addEventListener("click", (e) => frame.choose(moe.step[Math.min(Math.floor(at(e, overBox)[0] * moe.step.length), moe.step.length - 1)]));

  const scale = el("canvas", { role: "img", "aria-label": "colours: blue is less than an equal share, orange more" });
  const box = el("div", { class: "heat" },
    el("figure", { class: "panel" }, el("figcaption", {}, el("h3", {}, "Layers × experts at the cursor")), gridBox, gridSaid),
    el("figure", { class: "panel" }, el("figcaption", { class: "tools" }, el("h3", {}, "Experts × steps"), pick), overBox, overSaid),
    el("div", { class: "scale" }, "0.25 ×", scale, "4 × an equal share; magenta: no token at all"));

  function draw() {
    state.layer = Math.min(state.layer, layers - 1);
    pick.value = String(state.layer);
    const n = moe.step.length;
    paint(over, n, experts, (x, y) => level(x, state.layer, y), fair);
    paint(scale, 64, 1, (x) => Math.max(1, Math.round(fair * 4 ** (2 * x / 63 - 1))), fair);
    over.style.height = `${Math.min(Math.max(experts * 14, 90), 260)}px`;
    grid.style.height = `${Math.min(Math.max(layers * 22, 90), 260)}px`;
    ring.style.top = `${100 * state.layer / layers}%`;
    ring.style.height = `${100 / layers}%`;
  }

  function moveTo(step) {
    const i = nearest(moe.step, step);
    paint(grid, experts, layers, (x, y) => level(i, y, x), fair);
    line.style.left = `${100 * (i + 0.5) / moe.step.length}%`;
    const loads = Array.from({ length: experts }, (_, e) => level(i, state.layer, e));
    const most = Math.max(...loads), least = Math.min(...loads), dead = loads.filter((x) => x === 0).length;
    const said = `Step ${number(moe.step[i])}, layer ${state.layer + 1}: busiest expert ${loads.indexOf(most) + 1} with ${times(most)}, idlest ${loads.indexOf(least) + 1} with ${times(least)}${dead ? `; ${dead} unused` : ""}`;
    gridSaid.textContent = said;
    grid.setAttribute("aria-label", said);
    over.setAttribute("aria-label", `Loads of ${experts} experts of layer ${state.layer + 1} over ${moe.step.length} columns of steps`);
    overSaid.textContent = moe.width > 1 ? `Rows are experts, 1 at the top. A column is ${moe.width} steps.` : "Rows are experts, 1 at the top.";
  }

  box.draw = draw;
  box.moveTo = moveTo;
  return box;
}

function agreementOf(run, frame) {
  const moe = run.moe;
  if (!moe || !moe.agreement.some(Boolean)) {
    return chart("Replay agreement", [seriesOf(run, "moe/agreement", "mean of layers", 0)], frame, { zero: false });
  }
  const lines = [];
  if (moe.layers <= 6) {
    for (let l = 0; l < moe.layers; l++) lines.push({ label: `layer ${l + 1}`, color: l, x: moe.step, y: moe.agreement.map((a) => a && a[l]) });
  } else {
    const of = (f) => moe.agreement.map((a) => { const some = (a || []).filter(known); return some.length ? f(some) : null; });
    lines.push({ label: "mean of layers", color: 0, x: moe.step, y: of((a) => a.reduce((t, x) => t + x, 0) / a.length) });
    lines.push({ label: "worst layer", color: 1, x: moe.step, y: of((a) => Math.min(...a)) });
  }
  return chart("Tokens routed as when they were drawn", lines, frame, { wide: true });
}
