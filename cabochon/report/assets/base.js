// Elements, numbers and model text. Text only ever becomes text nodes; nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg";

function el(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat(3).filter((c) => c !== null && c !== undefined && c !== false));
  return node;
}

const known = (x) => typeof x === "number" && Number.isFinite(x);

function number(x) {
  if (!known(x)) return "–";
  const size = Math.abs(x);
  if (Number.isInteger(x) && size < 1e6) return x.toLocaleString("en-US");
  if (size >= 1e6) return x.toExponential(2);
  if (size >= 100) return x.toFixed(1);
  if (size >= 0.01 || x === 0) return String(Number(x.toPrecision(3)));
  return x.toExponential(1);
}

const percent = (x) => (known(x) ? `${(100 * x).toFixed(1)} %` : "–");
const signed = (x) => (known(x) ? (x > 0 ? "+" : x < 0 ? "−" : "") + number(Math.abs(x)) : "–");

function duration(seconds) {
  if (!known(seconds)) return "–";
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const minutes = Math.floor(seconds / 60);
  return minutes < 60 ? `${minutes} min ${Math.round(seconds % 60)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// Characters that would command a terminal, turn text around or hide are shown as marks; lines, tabs and emoji stay.
const HIDDEN = /(?!\ufe0f)[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Default_Ignorable_Code_Point}\u2028\u2029\u2800]/gu;
const NAMES = {
  0x200b: "ZWSP", 0x200c: "ZWNJ", 0x200d: "ZWJ", 0x200e: "LRM", 0x200f: "RLM", 0x202a: "LRE", 0x202b: "RLE", 0x202c: "PDF",
  0x202d: "LRO", 0x202e: "RLO", 0x2028: "LS", 0x2029: "PS", 0x2066: "LRI", 0x2067: "RLI", 0x2068: "FSI", 0x2069: "PDI",
  0x61c: "ALM", 0xfeff: "BOM", 0x2060: "WJ", 0xad: "SHY",
  0x34f: "CGJ", 0x115f: "HANGUL FILLER", 0x1160: "HANGUL FILLER", 0x3164: "HANGUL FILLER", 0x2800: "BLANK",
};

const COMMANDS = "NUL SOH STX ETX EOT ENQ ACK BEL BS HT LF VT FF CR SO SI DLE DC1 DC2 DC3 DC4 NAK SYN ETB CAN EM SUB ESC FS GS RS US".split(" ");

function mark(character) {
  const code = character.codePointAt(0);
  if (code < 0x20) return COMMANDS[code];
  if (code === 0x7f) return "DEL";
  return NAMES[code] || `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
}

function visible(value) {
  const text = plainly(value), out = [];
  let done = 0;
  for (const found of text.matchAll(HIDDEN)) {
    if (found[0] === "\n" || found[0] === "\t") continue;
    out.push(text.slice(done, found.index), el("span", { class: "mark", title: "shown, not obeyed" }, mark(found[0])));
    done = found.index + found[0].length;
  }
  out.push(text.slice(done));
  return out;
}

function plainly(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "number") return number(value);
  if (typeof value === "string") return value;
  return JSON.stringify(value);
}

function table(head, rows, numeric = []) {
  const cell = (tag, i, content) => el(tag, { class: numeric.includes(i) ? "num" : null, scope: tag === "th" ? "col" : null }, content);
  return el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, head.map((h, i) => cell("th", i, h)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((c, i) => (c instanceof HTMLTableCellElement ? c : cell("td", i, c))))))));
}

function section(id, title, ...content) {
  const some = content.flat(3).filter(Boolean);
  return some.length ? el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title` }, title), some) : null;
}

// What the reader opened or closed stays so when the page is made anew. `key`: the same for the same thing of a run.
function folding(key, attributes, ...children) {
  const { state } = app, name = `${app.run().dir} ${key}`;
  const node = el("details", { ...attributes, open: state.open.has(name) ? state.open.get(name) : attributes.open }, ...children);
  node.addEventListener("toggle", () => state.open.set(name, node.open));
  return node;
}

// One odd value in a file must not take the rest of the page away.
function attempt(make) {
  try {
    return make();
  } catch (error) {
    console.error(error);
    return el("p", { class: "soft" }, "A part of the page cannot be drawn: ", visible(error.message));
  }
}

// These children and no others. What stays is not touched, so that a selection and a scrolled box in it stay as well.
function settle(parent, nodes) {
  const wanted = nodes.map((node) => [...parent.children].find((old) => old === node || (old.id && old.isEqualNode(node))) || node);
  for (const old of [...parent.childNodes]) if (!wanted.includes(old)) old.remove();
  wanted.forEach((node, i) => { if (parent.children[i] !== node) parent.insertBefore(node, parent.children[i] || null); });
}

function say(text) {
  document.getElementById("said").textContent = text;
}
