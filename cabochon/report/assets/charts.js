// Small multiples over the same steps with one cursor. A chart is a figure with `moveTo(step)`.

const HEIGHT = 118, LEFT = 38, RIGHT = 8, TOP = 6, BOTTOM = 17;

function ticks(low, high, count) {
  const rough = (high - low) / Math.max(count, 1);
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * ([1, 2, 5, 10].find((m) => m * unit >= rough) || 10);
  const out = [];
  for (let x = Math.ceil(low / step - 1e-9) * step; x <= high + step * 1e-6; x += step) out.push(Math.abs(x) < step / 1e6 ? 0 : x);
  return out;
}

function rangeOf(series, options) {
  const all = series.flatMap((s) => [...s.y, ...(s.low || []), ...(s.high || [])]).filter(known);
  let low = Math.min(...all), high = Math.max(...all);
  if (options.share) [low, high] = [Math.min(0, low), Math.max(options.share === "tight" ? 0.05 : 1, high)];
  else if (options.zero) low = Math.min(0, low);
  if (high - low < 1e-12) [low, high] = [low - (Math.abs(low) * 0.1 || 0.5), high + (Math.abs(high) * 0.1 || 0.5)];
  return [low, high];
}

function nearest(steps, step) {
  let best = -1;
  steps.forEach((s, i) => { if (best < 0 || Math.abs(s - step) < Math.abs(steps[best] - step)) best = i; });
  return best;
}

// series: [{label, x, y, low?, high?, color}]; frame: {first, last, alarms, choose(step)}
function chart(title, series, frame, options = {}) {
  series = series.filter((s) => s.y.some(known));
  if (!series.length) return null;
  const keys = series.map((s) => el("span", { class: "key" }, el("i", { class: `c${s.color % 8}` }), series.length > 1 || s.label !== title ? `${s.label} ` : "", el("b", {}, "")));
  const box = el("figure", { class: "panel chart" + (options.wide ? " wide" : "") }, el("figcaption", {}, el("h3", {}, title), keys));
  const canvas = svg("svg", { role: "img", height: HEIGHT });
  box.append(canvas);
  const format = options.share ? percent : number;
  const [low, high] = rangeOf(series, options);
  let atLine = null, scaleX = null, dots = [];

  function draw() {
    const width = Math.max(canvas.clientWidth || 290, 120);
    canvas.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const inner = width - LEFT - RIGHT, tall = HEIGHT - TOP - BOTTOM;
    scaleX = (s) => LEFT + (frame.last > frame.first ? (s - frame.first) / (frame.last - frame.first) : 0.5) * inner;
    const scaleY = (v) => TOP + (1 - (v - low) / (high - low)) * tall;
    const parts = [];
    for (const v of ticks(low, high, 3)) {
      parts.push(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: scaleY(v), y2: scaleY(v) }));
      parts.push(svg("text", { x: LEFT - 5, y: scaleY(v) + 3.5, "text-anchor": "end" }, options.share ? `${Math.round(100 * v)}%` : number(v)));
    }
    for (const s of ticks(frame.first, frame.last, Math.max(2, width / 90)).filter(Number.isInteger)) {
      parts.push(svg("text", { x: scaleX(s), y: HEIGHT - 4, "text-anchor": "middle" }, number(s)));
    }
    for (const s of series) parts.push(...curve(s, scaleX, scaleY));
    for (const step of frame.alarms) parts.push(svg("path", { class: "alarm", d: `M${scaleX(step)} ${HEIGHT - BOTTOM - 5}l3.5 6h-7z` }));
    atLine = svg("line", { class: "at", y1: TOP, y2: HEIGHT - BOTTOM });
    dots = series.map((s) => svg("circle", { class: `dot c${s.color % 8}`, r: 3 }));
    canvas.replaceChildren(...parts, atLine, ...dots);
    dots.scaleY = scaleY;
  }

  function moveTo(step) {
    const said = [];
    series.forEach((s, i) => {
      const at = nearestKnown(s, step);
      keys[i].lastChild.textContent = format(s.y[at]);
      dots[i].setAttribute("cx", scaleX(s.x[at]));
      dots[i].setAttribute("cy", dots.scaleY(s.y[at]));
      said.push(`${s.label} ${format(s.y[at])}`);
    });
    atLine.setAttribute("x1", scaleX(step));
    atLine.setAttribute("x2", scaleX(step));
    canvas.setAttribute("aria-label", `${title}, steps ${frame.first} to ${frame.last}; near step ${step}: ${said.join(", ")}`);
  }

  const follow = (event) => {
    const inside = canvas.getBoundingClientRect();
    const share = (event.clientX - inside.left - LEFT) / (inside.width - LEFT - RIGHT);
    frame.choose(frame.first + Math.min(Math.max(share, 0), 1) * (frame.last - frame.first));
  };
  canvas.addEventListener("pointermove", (e) => { if (e.pointerType === "mouse") follow(e); });
  canvas.addEventListener("pointerdown", follow);
  box.draw = draw;
  box.moveTo = moveTo;
  return box;
}

function nearestKnown(s, step) {
  let best = -1;
  for (let i = 0; i < s.x.length; i++) {
    if (known(s.y[i]) && (best < 0 || Math.abs(s.x[i] - step) < Math.abs(s.x[best] - step))) best = i;
  }
  return best;
}

function curve(s, scaleX, scaleY) {
  const points = s.x.map((x, i) => [scaleX(x), s.y[i], i]).filter((p) => known(p[1]));
  const color = `c${s.color % 8}`;
  const out = [];
  if (s.low && points.length > 1) {
    const upper = points.map(([x, , i]) => `${x.toFixed(1)} ${scaleY(s.high[i]).toFixed(1)}`);
    const lower = points.map(([x, , i]) => `${x.toFixed(1)} ${scaleY(s.low[i]).toFixed(1)}`).reverse();
    out.push(svg("path", { class: `band ${color}`, d: `M${[...upper, ...lower].join("L")}Z` }));
  }
  out.push(svg("path", { class: `curve ${color}`, d: `M${points.map(([x, y]) => `${x.toFixed(1)} ${scaleY(y).toFixed(1)}`).join("L")}` }));
  if (points.length <= 14) out.push(...points.map(([x, y]) => svg("circle", { class: `dot ${color}`, cx: x, cy: scaleY(y), r: 2 })));
  return out;
}

// Where the seconds of a step went: shares of the whole, one on the other.
function stacked(title, x, parts, frame) {
  const names = Object.keys(parts).filter((n) => parts[n].some((v) => known(v) && v > 0));
  if (!names.length) return null;
  const keys = names.map((n, i) => el("span", { class: "key" }, el("i", { class: `c${i % 8}` }), `${n} `, el("b", {}, "")));
  const box = el("figure", { class: "panel chart wide" }, el("figcaption", {}, el("h3", {}, title), keys));
  const canvas = svg("svg", { role: "img", height: HEIGHT });
  box.append(canvas);
  const sums = x.map((_, i) => names.reduce((t, n) => t + (parts[n][i] || 0), 0));
  const sorted = [...sums].sort((a, b) => a - b);
  const most = sorted[sorted.length - 1] || 1, usual = 1.6 * sorted[Math.floor(0.97 * (sorted.length - 1))];
  const top = usual > 0 && usual < most ? usual : most; // a compile or a pause would flatten all the rest
  if (top < most) box.querySelector("h3").append(el("span", { class: "key" }, ` peaks to ${duration(most)}`));
  let atLine = null, scaleX = null;
  box.draw = () => {
    const width = Math.max(canvas.clientWidth || 290, 120);
    canvas.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const inner = width - LEFT - RIGHT, tall = HEIGHT - TOP - BOTTOM;
    scaleX = (s) => LEFT + (frame.last > frame.first ? (s - frame.first) / (frame.last - frame.first) : 0.5) * inner;
    const scaleY = (v) => TOP + (1 - Math.min(v / top, 1)) * tall;
    const below = x.map(() => 0), out = [];
    names.forEach((n, c) => {
      const edge = () => x.flatMap((s, i) => (x.length > 1 ? [scaleX(s)] : [LEFT, width - RIGHT]).map((at) => `${at.toFixed(1)} ${scaleY(below[i]).toFixed(1)}`));
      const lower = edge().reverse(); // a single step is as wide as the chart
      x.forEach((_, i) => { below[i] += parts[n][i] || 0; });
      const upper = edge();
      out.push(svg("path", { class: `area c${c % 8}`, d: `M${[...upper, ...lower].join("L")}Z` }));
    });
    for (const v of ticks(0, top, 3)) out.push(svg("text", { x: LEFT - 5, y: scaleY(v) + 3.5, "text-anchor": "end" }, `${number(v)} s`));
    for (const s of ticks(frame.first, frame.last, Math.max(2, width / 90)).filter(Number.isInteger)) {
      out.push(svg("text", { x: scaleX(s), y: HEIGHT - 4, "text-anchor": "middle" }, number(s)));
    }
    atLine = svg("line", { class: "at", y1: TOP, y2: HEIGHT - BOTTOM });
    canvas.replaceChildren(...out, atLine);
  };
  box.moveTo = (step) => {
    const i = nearest(x, step);
    names.forEach((n, c) => { keys[c].lastChild.textContent = duration(parts[n][i] || 0); });
    atLine.setAttribute("x1", scaleX(step));
    atLine.setAttribute("x2", scaleX(step));
    canvas.setAttribute("aria-label", `${title}, near step ${step}: ${names.map((n) => `${n} ${duration(parts[n][i] || 0)}`).join(", ")}`);
  };
  return box;
}

// -- what is drawn of a run: [title, keys or a pattern of them, options] ------------------------------------------------

const PANELS = [
  ["Reward", ["reward", "score"], { only: "rl" }],
  ["Reward by component", /^parts\/(.*)/, {}],
  ["Score by domain", /^domains\/(.*)\/score$/, { share: true }],
  ["Held-out score", /^held_out_domains\/(.*)/, { share: true, before: true }],
  ["Groups", /^groups_(solved|mixed|failed)$/, { share: true }],
  ["Loss", ["eval_loss", "loss", "ranking", "centring"], {}],
  ["Accuracy on pairs", ["accuracy", "eval_accuracy"], { share: true }],
  ["Margin and score", ["difference", "eval_difference", "score"], { only: "rm" }],
  ["Calibration error", ["eval_ece", "eval_ece_scaled"], { share: "tight" }],
  ["KL, nats per token", ["kl_reference", "kl_reward", "kl_proximal"], {}],
  ["Entropy, nats per token", ["entropy"], { zero: true }],
  ["Length, tokens", ["tokens", "longest"], { zero: true, only: "rl" }],
  ["Cut off or empty", ["truncated", "empty"], { share: "tight", only: "rl" }],
  ["Sampler against learner", ["w_gap", "w_kl", "w_refused"], { zero: true }],
  ["Clipped", ["clip_fraction", "w_clipped"], { share: "tight" }],
  ["Verdicts", /^status\/(.*)/, { share: true }],
  ["Models ordering as the verifier", /^agreement\/(.*)/, { share: true }],
  ["Policy and value loss", /^loss_(.*)/, {}],
  ["Gradient norm", ["grad_norm", "critic_grad_norm"], { zero: true }],
  ["Learning rate", ["learning_rate"], { zero: true }],
  ["Effective sample size", ["effective_samples"], { share: true }],
  ["Age of tokens, updates", ["lag/mean", "lag/max"], { zero: true }],
  ["Router: load above the mean", ["moe/max_violation"], { zero: true }],
  ["Router: experts in effect", ["moe/effective_experts"], {}],
  ["Router: entropy, nats", ["moe/router_entropy"], {}],
  ["Tokens per second", ["clock/tokens_per_second"], { zero: true }],
];

function seriesOf(run, key, label, color) {
  const c = run.curves;
  return { label, color, x: c.step, y: c.values[key] || [], low: c.low && c.low[key], high: c.high && c.high[key] };
}

function panelSeries(run, keys, options) {
  const names = Object.keys(run.curves.values);
  const found = keys instanceof RegExp ? names.filter((n) => keys.test(n)).map((n) => [n, n.match(keys)[1]]) : keys.filter((n) => names.includes(n)).map((n) => [n, n]);
  return found.map(([name, label], i) => {
    const s = seriesOf(run, name, label.replace(/^(moe|lag|clock)\//, "").replace(/^eval_/, "held-out ").replaceAll("_", " "), i);
    const before = options.before && run.before[label];
    return known(before) ? { ...s, x: [0, ...s.x], y: [before, ...s.y], low: s.low && [before, ...s.low], high: s.high && [before, ...s.high] } : s;
  });
}

function curvesOf(run, others, frame) {
  const used = new Set();
  const out = [];
  const make = (title, keys, options) => {
    if (options.only && options.only !== run.stage) return;
    const own = panelSeries(run, keys, options);
    if (!own.some((s) => s.y.some((y) => y))) return; // nothing but zeros: among the other readings
    const names = keys instanceof RegExp ? Object.keys(run.curves.values).filter((n) => keys.test(n)) : keys;
    names.forEach((n) => used.add(n));
    if (!others.length) return void out.push(chart(title, own, frame, options));
    for (const s of own) {
      const same = others.map((o, i) => ({ ...panelSeries(o, keys, options).find((t) => t.label === s.label), label: o.name, color: i + 1 }));
      const head = own.length > 1 ? `${title}: ${s.label}` : title;
      const all = [{ ...s, label: run.name, color: 0 }, ...same.filter((t) => t.y)];
      out.push(chart(head, all.map((t) => ({ ...t, low: null, high: null })), frame, options));
    }
  };
  for (const [title, keys, options] of PANELS) make(title, keys, options);
  const rest = Object.keys(run.curves.values).filter((n) => !used.has(n) && !n.startsWith("clock/"));
  return [out.filter(Boolean), rest.map((n) => chart(n, [seriesOf(run, n, n, 7)], frame)).filter(Boolean)];
}

function timeOf(run, frame) {
  const parts = {};
  for (const [name, y] of Object.entries(run.curves.values)) {
    const found = name.match(/^clock\/(?:time\/)?(.+?)(_seconds)?$/);
    if (found && (found[2] || name.startsWith("clock/time/")) && found[1] !== "verify") parts[found[1].replaceAll("_", " ")] = y;
  }
  if (!Object.keys(parts).length && run.curves.values["clock/seconds"]) parts.step = run.curves.values["clock/seconds"];
  return stacked("Seconds of a step", run.curves.step, parts, frame);
}
