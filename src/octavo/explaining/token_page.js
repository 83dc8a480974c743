"use strict";
// Draws what the JSON of the page holds; token_page.py says how it is laid out.

const page = JSON.parse(document.getElementById("data").textContent);
const bytes = (name) => Uint8Array.from(atob(page[name]), (c) => c.charCodeAt(0));
const ints = (name) => new Int32Array(bytes(name).buffer);
const floats = (name) => new Float32Array(bytes(name).buffer);
const [ids, rank, topIds, lensIds] = ["ids", "rank", "top_ids", "lens_ids"].map(ints);
const [probability, entropy, topP, lensBest, lensP] =
  ["probability", "entropy", "top_probability", "lens_best", "lens_probability"].map(floats);
const attention = bytes("attention");
const N = ids.length, A = topIds.length / N, L = page.layers, H = page.heads;
const MEAN = H; // in place of a head: the mean of all

const box = document.getElementById("text"), panel = document.getElementById("panel");
const tokens = []; // an element each, and one more for what would come next
let here = -1, pinned = false, layer = L - 1, head = MEAN, preview = false;
let flip = 1; // the shade from which text is light on dark, or dark on light

// --- words and numbers

const said = (id) => page.texts[id];
const sign = (c) => ({ "\n": "↵", "\t": "⇥" })[c] ?? String.fromCharCode(0x2400 + c.charCodeAt(0));
const label = (id) => said(id).replace(/ /g, "␣").replace(/[\x00-\x1f]/g, sign);
const percent = (p) =>
  p >= 0.9995 ? "100 %" : p >= 0.0995 ? (100 * p).toFixed(1) + " %"
  : p >= 0.0001 ? (100 * p).toPrecision(2) + " %" : p.toExponential(1);

function el(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// --- attention: of each of the first tokens, layers x heads x keys

const start = new Int32Array(N), offset = new Int32Array(page.attended + 1);
for (const [from, first, end] of page.windows) start.fill(from, first, end);
for (let i = 0; i < page.attended; i++) offset[i + 1] = offset[i] + L * H * (i - start[i] + 1);

function weights(i, l, h) { // what token i looks at: from the start of its window to itself
  const keys = i - start[i] + 1, row = new Float32Array(keys);
  for (const one of h === MEAN ? Array(H).keys() : [h]) {
    const at = offset[i] + (l * H + one) * keys;
    for (let k = 0; k < keys; k++) row[k] += (attention[at + k] / 255) ** 2;
  }
  return h === MEAN ? row.map((w) => w / H) : row;
}

// --- the text, and its shades from 0 to 1

const clip = (v) => Math.min(Math.max(v, 0), 1);
const MODES = {
  surprise: { of: (r) => -Math.log10(probability[r]) / 4,
    scale: ["100 %", "10 %", "1 %", "0.1 %", "≤ 0.01 %"], caption: "probability" },
  entropy: { of: (r) => entropy[r] / Math.log2(page.vocab),
    scale: [0, 1, 2, 3, 4].map((q) => (q * Math.log2(page.vocab) / 4).toFixed(1) + " bits"), caption: "uncertain by" },
  rank: { of: (r) => Math.log10(rank[r]) / 4, scale: ["1st", "10th", "100th", "1,000th", "10,000th"],
    caption: "guess" },
  attention: { scale: ["0 %", "6 %", "25 %", "56 %", "100 %"], caption: "weight" },
};
const mode = () => preview ? "attention" : document.querySelector("[name=mode]:checked").value;

function shade(element, value) {
  const v = clip(Number.isNaN(value) ? 0 : value);
  element.style.setProperty("--v", v.toFixed(3));
  element.classList.toggle("strong", v >= flip);
}

function paint() {
  flip = parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--flip"));
  const chosen = MODES[mode()];
  const looks = chosen.of ? -1 : here; // the token whose attention is shown; its window is full ink
  tokens.forEach((token, i) => token.classList.toggle("out", looks >= 0 && (i > looks || i < start[looks])));
  if (chosen.of) {
    tokens.forEach((token, i) => shade(token, i ? chosen.of(i - 1) : 0));
  } else {
    const row = here >= 0 && here < page.attended ? weights(here, layer, head) : [];
    tokens.forEach((token, i) => shade(token, Math.sqrt(row[i - start[here]] ?? 0)));
  }
  const caption = el("span", { class: "soft" }, chosen.caption);
  document.getElementById("scale").replaceChildren(caption, ...chosen.scale.map((text, n) => {
    const swatch = el("span", { class: "t" }, text);
    shade(swatch, n / 4);
    return swatch;
  }));
}

function write() {
  for (let i = 0; i <= N; i++) {
    if (i === N && !page.complete) break;
    const token = el("span", { class: "t", role: "option", id: "t" + i });
    if (i === N) {
      token.classList.add("next");
      token.append("next?");
    } else {
      for (const part of said(ids[i]).split(/([\x00-\x1f])/)) {
        if (/^[\x00-\x1f]$/.test(part)) token.append(el("span", { class: "sign" }, sign(part)), /[\n\t]/.test(part) ? part : "");
        else token.append(part);
      }
      if (page.written && i === N - page.written) box.append(el("span", { class: "from" }, "▸"));
    }
    token.dataset.i = i;
    tokens.push(token);
    box.append(token);
  }
  for (const [from, to] of page.spans) for (let i = from; i < to; i++) tokens[i].classList.add("v");
  const legend = [];
  if (page.spans.length) legend.push("Underlined: stands word for word in the training text.");
  if (page.written) legend.push("▸: from here on the model wrote.");
  document.getElementById("legend").textContent = legend.join(" ");
}

// --- one token

const bar = (p) => el("td", { class: "bar" }, el("i", { style: `width:${(100 * p).toFixed(2)}%` }));
const number = (text) => el("td", { class: "number" }, text);
const short = (text) => text.length > 20 ? text.slice(0, 19) + "…" : text;
const tokenCell = (id) => el("td", { class: "token" }, short(label(id)));

function select(i) {
  tokens[here]?.classList.remove("here");
  tokens[here]?.removeAttribute("aria-selected");
  here = i;
  tokens[here].classList.add("here");
  tokens[here].setAttribute("aria-selected", "true");
  if (here > 0 && here < N)
    tokens[here].setAttribute("aria-label", `${label(ids[here])}, ${percent(probability[here - 1])}`);
  box.setAttribute("aria-activedescendant", "t" + here);
  const parts = [heading()];
  if (here > 0) parts.push(...expected(), ...lens());
  if (here < N) parts.push(...heads());
  panel.replaceChildren(...parts);
  panel.scrollTop = 0;
  if (mode() === "attention") paint();
}

function heading() {
  const row = here - 1, title = el("h2", {});
  if (here === N) title.append("What comes next?");
  else title.append(el("span", { class: "token" }, label(ids[here])));
  const facts = el("p", { class: "soft" });
  if (here === 0) facts.append("The first token: given, nothing comes before it.");
  else if (here === N) facts.append(`Before it, entropy ${entropy[row].toFixed(2)} bits.`);
  else facts.append(
    `Token ${(here + 1).toLocaleString("en")} of ${N.toLocaleString("en")}: probability ${percent(probability[row])}, ` +
    `rank ${rank[row].toLocaleString("en")}, surprise ${(-Math.log2(probability[row])).toFixed(2)} bits; ` +
    `entropy before it ${entropy[row].toFixed(2)} bits.`);
  return el("div", {}, title, facts);
}

function expected() {
  const row = here - 1, body = el("tbody", {});
  let came = false;
  for (let n = row * A; n < (row + 1) * A; n++) {
    const isIt = here < N && topIds[n] === ids[here];
    came ||= isIt;
    body.append(el("tr", isIt ? { class: "came" } : {}, tokenCell(topIds[n]), bar(topP[n]), number(percent(topP[n]))));
  }
  if (here < N && !came) {
    const cells = [tokenCell(ids[here]), bar(probability[row]), number(percent(probability[row]))];
    body.append(el("tr", { class: "came" }, ...cells));
  }
  return [el("h3", {}, "Expected here" + (here < N ? " (bold: what came)" : "")), el("table", {}, body)];
}

function lens() {
  const row = here - 1, body = el("tbody", {}), names = ["", "would say", "", here < N ? "what came" : ""];
  body.append(el("tr", {}, ...names.map((name) => el("th", { scope: "col" }, name))));
  for (let n = 0; n <= L; n++) {
    const at = row * (L + 1) + n, name = n ? "layer " + (n - 1) : "embedding";
    body.append(el("tr", here < N && lensIds[at] === ids[here] ? { class: "came" } : {},
      el("th", { scope: "row" }, name), tokenCell(lensIds[at]),
      number(percent(lensBest[at])), number(here < N ? percent(lensP[at]) : "")));
  }
  return [el("h3", {}, "Layer by layer, if it ended there"), el("table", {}, body)];
}

function heads() {
  const title = el("h3", {}, "What this token looks at");
  if (here >= page.attended) return [title, el("p", { class: "soft" }, "Left out of this page.")];
  const grid = el("div", { class: "heads", style: `grid-template-columns: max-content repeat(${H + 1}, minmax(1rem, 1.6rem))` });
  grid.append(el("span", {}, "head"), ...Array.from({ length: H }, (_, h) => el("span", {}, h)), el("span", {}, "all"));
  for (let l = 0; l < L; l++) {
    grid.append(el("span", {}, "layer " + l));
    for (let h = 0; h <= H; h++) {
      const button = el("button", { type: "button", "aria-label": named(l, h) });
      button.dataset.head = `${l} ${h}`;
      button.style.setProperty("--v", Math.sqrt(Math.max(...weights(here, l, h))).toFixed(3));
      button.classList.toggle("chosen", l === layer && h === head);
      grid.append(button);
    }
  }
  return [title, el("div", { class: "scroll" }, grid), el("p", { id: "looked" }, looked()),
    el("p", { class: "soft" }, "The stronger its shade, the more of a head's attention a single token holds. Hover shades the text, a click keeps it.")];
}

const named = (l, h) => `layer ${l}, ` + (h === MEAN ? "all heads" : `head ${h}`);

function looked() {
  const row = weights(here, layer, head);
  const best = [...row.keys()].sort((a, b) => row[b] - row[a]).slice(0, 3);
  const what = best.map((k) => `${short(label(ids[start[here] + k]))} ${percent(row[k])}`).join(", ");
  return `${named(layer, head)}: ${what}`;
}

// --- hover, tap, keys

const under = (event) => event.target.closest("[data-i]");

box.addEventListener("mouseover", (event) => {
  if (!pinned && under(event)) select(+under(event).dataset.i);
});
box.addEventListener("click", (event) => {
  if (!under(event)) return;
  const i = +under(event).dataset.i;
  pinned = !(pinned && i === here);
  select(i);
});
box.addEventListener("focus", () => { if (here < 0) select(0); });
box.addEventListener("keydown", (event) => {
  const last = tokens.length - 1;
  const to = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: last,
    ArrowDown: beside(1), ArrowUp: beside(-1) }[event.key];
  if (event.key === "Escape") pinned = false;
  if (to === undefined) return;
  event.preventDefault();
  pinned = true;
  select(Math.min(Math.max(to, 0), last));
  tokens[here].scrollIntoView({ block: "nearest" });
});

function beside(direction) { // the token above or below
  const from = tokens[Math.max(here, 0)].getBoundingClientRect();
  let best = here, least = Infinity;
  for (let i = here + direction; i >= 0 && i < tokens.length; i += direction) {
    const rect = tokens[i].getBoundingClientRect();
    const rows = direction * (rect.top - from.top) / from.height;
    if (rows > 3) break;
    const far = Math.abs(rect.left - from.left) + 1e4 * Math.round(Math.max(rows - 0.5, 0));
    if (rows > 0.5 && far < least) [best, least] = [i, far];
  }
  return best;
}

function choose(event, keep) {
  const button = event.target.closest("[data-head]");
  if (!button) return;
  [layer, head] = button.dataset.head.split(" ").map(Number);
  preview = true;
  if (keep) document.querySelector("[value=attention]").checked = true;
  panel.querySelector(".chosen")?.classList.remove("chosen");
  button.classList.add("chosen");
  document.getElementById("looked").textContent = looked();
  paint();
}
function unpreview() {
  if (preview) { preview = false; paint(); }
}
panel.addEventListener("mouseover", (event) => choose(event, false));
panel.addEventListener("focusin", (event) => choose(event, false));
panel.addEventListener("click", (event) => choose(event, true));
panel.addEventListener("mouseleave", unpreview);
panel.addEventListener("focusout", unpreview);
document.getElementById("modes").addEventListener("change", paint);
document.addEventListener("click", (event) => {
  const link = event.target.closest("[data-token]");
  if (!link) return;
  pinned = true;
  select(+link.dataset.token);
  tokens[here].scrollIntoView({ block: "center" });
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);

write();
paint();
if (matchMedia("(min-width: 60rem)").matches && N > 1) { // show at once what there is: an early surprise
  let most = 0;
  for (let r = 1; r < Math.min(N - 1, 300, page.attended); r++) if (probability[r] < probability[most]) most = r;
  select(most + 1);
}
