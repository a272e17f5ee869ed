// The feature dashboard: the list, and a panel that is drawn for the feature of the address.

const described = new Map(data.features.map((one) => [one.feature, one]));
const list = document.getElementById("features");
const rows = [...list.tBodies[0].rows];
const panel = document.getElementById("panel");
const tip = document.getElementById("tip");

const share = (value) => (!isNumber(value) ? UNDEFINED
  : `${value < 0.1 ? Number((100 * value).toPrecision(2)) : Math.round(100 * value)}%`);
const short = (value) => (!isNumber(value) ? UNDEFINED : minus(Math.abs(value) >= 100
  ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)))));
const node = (tag, className, ...parts) => {
  const element = make(tag, undefined, className);
  element.append(...parts);
  return element;
};
// A token with its blanks shown faintly, as the page's own.
function token(number, className = "tok") {
  const element = make("span", undefined, className), text = data.words[number];
  for (const part of text.split(/([\p{Z}\p{C}])/u).filter(Boolean)) {
    element.append(/^[\p{Z}\p{C}]$/u.test(part) ? make("span", visible(part), "blank") : part);
  }
  if (!text) element.append(make("span", "∅", "blank"));
  return element;
}
function svg(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  Object.entries(attributes).forEach(([name, value]) => element.setAttribute(name, value));
  if (text !== undefined) element.textContent = text;
  return element;
}

// What is pointed at

function showTip(x, y, ...parts) {
  tip.replaceChildren(...parts);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(x - width / 2, innerWidth - width - 8))}px`;
  tip.style.top = `${y - height - 10 > 0 ? y - height - 10 : y + 26}px`;
}
const hideTip = () => { tip.hidden = true; };
function aboutToken(element) {
  const { top, left, width } = element.getBoundingClientRect();
  const { word, value, at } = element.dataset;
  const said = value === "" ? "excluded: not encoded" : `activation ${short(Number(value))}`;
  showTip(left + width / 2, top, make("code", visible(data.words[word])), ` ${said} · position ${at}`);
}

// Parts of a panel

function histogram(one) {
  const width = 480, height = 150, left = 44, bottom = 34, top = 8, right = 8;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "hist", role: "img" });
  const step = Math.log(data.ratio), places = one.histogram.map(([edge]) => Math.round(Math.log(edge) / step));
  const first = places[0] - 1, last = places.at(-1) + 2;
  const most = Math.max(...one.histogram.map(([, count]) => count));
  const x = (value) => left + ((value - first) / (last - first)) * (width - left - right);
  const y = (count) => height - bottom - (count / most) * (height - bottom - top);
  picture.setAttribute("aria-label", `Histogram of ${one.n_on} activations from ${short(one.histogram[0][0])} to ${short(one.largest)}; mean ${short(one.mean)}`);
  one.histogram.forEach(([edge, count], i) => {
    const from = x(places[i]), to = x(places[i] + 1);
    picture.append(svg("rect", { x: from + 0.5, y: y(count), width: Math.max(1, to - from - 1), height: height - bottom - y(count) }));
    const touch = svg("rect", { class: "touch", x: from, y: top, width: to - from, height: height - bottom - top });
    touch.addEventListener("pointerenter", () => {
      const box = touch.getBoundingClientRect();
      showTip(box.left + box.width / 2, box.top + 20, `${short(edge)} to ${short(edge * data.ratio)}: ${count.toLocaleString("en")} tokens`);
    });
    touch.addEventListener("pointerleave", hideTip);
    picture.append(touch);
  });
  picture.append(svg("line", { x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
  const mean = x(Math.log(one.mean) / step);
  picture.append(svg("line", { class: "mean", x1: mean, x2: mean, y1: top, y2: height - bottom }));
  const octaves = [...Array(40).keys()].map((i) => i - 12).filter((i) => i * Math.log(2) / step >= first && i * Math.log(2) / step <= last);
  const skip = Math.ceil(octaves.length / 8);
  octaves.filter((_, i) => i % skip === 0).forEach((i) => {
    picture.append(svg("text", { x: x(i * Math.log(2) / step), y: height - bottom + 15, "text-anchor": "middle" }, short(2 ** i)));
  });
  picture.append(svg("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, "activation (log scale); dashed: mean"));
  for (const count of [0, most]) {
    picture.append(svg("text", { x: left - 6, y: y(count) + 4, "text-anchor": "end" }, count.toLocaleString("en")));
  }
  return picture;
}

function meter(value, most, mark) {
  const bar = make("span", undefined, "meter"), fill = make("i");
  fill.style.width = `${100 * Math.min(1, Math.abs(value) / most)}%`;
  bar.append(fill);
  if (isNumber(mark) && mark <= most) {
    const line = make("b");
    line.style.left = `calc(${100 * mark / most}% - 1px)`;
    bar.append(line);
  }
  return bar;
}

function tokenTable(one) {
  const table = make("table", undefined, "rates"), head = table.createTHead().insertRow(), body = table.createTBody();
  ["token", "share of the activation", "", "on at … of its occurrences"].forEach((name) => {
    const cell = make("th", name);
    cell.scope = "col";
    head.append(cell);
  });
  one.tokens.forEach(([number, part, rate], i) => {
    const row = body.insertRow();
    row.insertCell().append(token(number));
    row.insertCell().append(meter(part, 1, i ? undefined : one.random_token_share));
    const cells = [row.insertCell(), row.insertCell()];
    [cells[0].textContent, cells[1].textContent] = [share(part), share(rate)];
    cells.forEach((cell) => { cell.className = "number"; });
  });
  const note = make("p", `The line marks the largest share of a feature that is on as often, at random: ${share(one.random_token_share)}.`, "prose small");
  return node("div", undefined, table, note);
}

function logits(one, side) {
  const listed = make("ol", undefined, `logits ${side === "promoted" ? "up" : "down"}`);
  const most = Math.max(...[...one.promoted, ...one.suppressed].map(([, value]) => Math.abs(value)), one.random_logit);
  one[side].forEach(([number, value]) => {
    listed.append(node("li", undefined, token(number), meter(value, most, one.random_logit), make("span", minus(value.toFixed(2)), "number")));
  });
  return listed;
}

function neighbours(one) {
  const listed = make("ul", undefined, "near");
  one.neighbours.forEach(([number, cosine]) => {
    const chip = make(described.has(number) ? "a" : "span", String(number));
    if (described.has(number)) chip.href = `#feature-${number}`;
    else chip.title = "not in this page";
    chip.append(make("small", minus(cosine.toFixed(2))));
    listed.append(node("li", undefined, chip));
  });
  return listed;
}

// One stretch of text. Arrow keys walk through its tokens.
function stretch(one, [peak, number, position, middle, tokens, values]) {
  const text = make("p");
  tokens.forEach((word, i) => {
    const piece = token(word, "t"), value = values[i];
    piece.dataset.word = word;
    piece.dataset.value = value ?? "";
    piece.dataset.at = position - middle + i;
    if (value === null) piece.classList.add("out");
    else if (value > 0) piece.style.setProperty("--a", `${(8 + 92 * Math.min(1, value / one.largest)).toFixed(1)}%`);
    if (i === middle) piece.classList.add("peak");
    text.append(piece, make("wbr"));
  });
  text.tabIndex = 0;
  text.setAttribute("aria-label", `${tokens.map((word) => data.words[word]).join("")}; activation ${short(peak)} at ${data.words[tokens[middle]]}. Left and right: token by token`);
  return node("div", "stretch", node("span", "of", make("b", short(peak)), `document ${number}`), text);
}

function walk(event) {
  const text = event.target.closest(".stretch p");
  if (!text || !["ArrowLeft", "ArrowRight"].includes(event.key)) return;
  event.preventDefault();
  event.stopPropagation();
  const pieces = [...text.querySelectorAll(".t")];
  const here = pieces.findIndex((piece) => piece.classList.contains("here"));
  const start = here < 0 ? pieces.findIndex((piece) => piece.classList.contains("peak")) : here;
  const next = here < 0 ? start : Math.max(0, Math.min(pieces.length - 1, start + (event.key === "ArrowRight" ? 1 : -1)));
  pieces.forEach((piece, i) => piece.classList.toggle("here", i === next));
  aboutToken(pieces[next]);
}

const QUARTERS = ["lowest quarter", "second quarter", "third quarter", "highest quarter"];
function examples(one) {
  const listed = make("div", undefined, "quarters");
  for (let band = data.bands - 1; band >= 0; band--) {
    const inside = one.examples.filter((row) => row[6] === band);
    if (inside.length) listed.append(make("p", QUARTERS[band], "quarter"), ...inside.map((row) => stretch(one, row)));
  }
  return listed;
}

// The panel

function part(title, note, ...content) {
  const heading = make("h3", title);
  if (note) heading.append(make("small", note));
  return node("div", undefined, heading, ...content);
}

function tile(name, value, note) {
  const number = make("dd", value);
  if (note) number.append(make("small", note));
  return node("div", undefined, make("dt", name), number);
}

function tiles(one) {
  const made = make("dl", undefined, "tiles");
  made.append(
    tile("density", share(one.density), isNumber(one.density_low) ? `95% ${share(one.density_low)} to ${share(one.density_high)}, over documents` : `${one.n_on} tokens`),
    tile("documents", `${one.n_documents}`, `of ${data.n_documents}`),
    tile("activation", short(one.mean), `mean; largest ${short(one.largest)}`),
    tile("top token", share(one.tokens.length ? one.tokens[0][1] : null), `of the activation; at random ${share(one.random_token_share)}`),
  );
  if (data.same_site) made.append(tile("encoder · decoder", isNumber(one.encoder_cosine) ? minus(one.encoder_cosine.toFixed(2)) : UNDEFINED, "cosine"));
  return made;
}

function scale(one) {
  return node("span", "scale", "0", make("i"), short(one.largest), make("span", "· underlined: the peak"));
}

function draw(one) {
  const card = make("article", undefined, "card"), heading = make("h2", `Feature ${one.feature}`);
  heading.append(make("span", one.drawn ? "random draw" : "", "kind"));
  const steps = node("span", "steps", step("← previous", -1), step("next →", 1));
  card.append(node("div", "bar", heading, steps), tiles(one));
  const near = part("Nearest decoder directions", "cosine", neighbours(one));
  near.className = "whole";
  if (!one.n_on) {
    card.append(make("p", `Never on in these ${data.n_tokens.toLocaleString("en")} tokens.`, "prose small"));
  }
  const parts = make("div", undefined, "parts");
  if (one.n_on) parts.append(part("Activations", `${one.n_on.toLocaleString("en")} tokens`, histogram(one)), part("Tokens that it is on at", "", tokenTable(one)));
  if (one.promoted.length) {
    const at = one.n_on ? "direct logits at the mean activation" : "direct logits for an activation of 1";
    parts.append(part("Promotes", at, logits(one, "promoted")), part("Suppresses", `line: a random direction's largest, ${one.random_logit.toFixed(2)}`, logits(one, "suppressed")));
  }
  parts.append(near);
  if (!one.promoted.length) parts.append(make("p", `No direct logit effects: ${data.no_logits}.`, "prose small"));
  card.append(parts);
  if (one.n_on) {
    card.append(
      node("div", "texts", node("div", "bar", make("h3", "Largest activations"), scale(one)), ...one.contexts.map((row) => stretch(one, row))),
      node("div", "texts", node("div", "bar", part("Random examples", "of each quarter of its activations"), scale(one)), examples(one)),
    );
    card.querySelector(".texts h3").append(make("small", "one a document"));
  }
  panel.replaceChildren(card);
}

function step(text, by) {
  const button = make("button", text, "quiet");
  button.type = "button";
  button.addEventListener("click", () => move(by));
  return button;
}

// The list and the address

const shown = () => [...list.tBodies[0].rows].filter((row) => !row.hidden); // in the order that it is sorted by
let current = null;
function open(number) {
  if (!described.has(number)) return;
  current = number;
  hideTip();
  draw(described.get(number));
  rows.forEach((row) => {
    if (Number(row.dataset.feature) === number) row.setAttribute("aria-current", "true");
    else row.removeAttribute("aria-current");
  });
  const row = rows.find((one) => Number(one.dataset.feature) === number), frame = list.parentElement;
  const above = row.offsetTop - 44, below = row.offsetTop + row.offsetHeight - frame.clientHeight;
  if (frame.scrollTop > above) frame.scrollTop = above;
  if (frame.scrollTop < below) frame.scrollTop = below;
}
const go = (number) => { history.replaceState(null, "", `#feature-${number}`); open(number); };
function move(by) {
  const listed = shown(), at = listed.findIndex((row) => Number(row.dataset.feature) === current);
  const next = listed[Math.max(0, Math.min(listed.length - 1, at + by))];
  if (next) go(Number(next.dataset.feature));
}
function fromAddress() {
  const found = /^#feature-(\d+)$/.exec(location.hash);
  if (!found) return false;
  open(Number(found[1]));
  return described.has(Number(found[1]));
}

const search = document.getElementById("search"), found = document.getElementById("found");
let kind = "";
function filter() {
  const wanted = search.value.toLowerCase();
  rows.forEach((row) => {
    row.hidden = !(row.dataset.search.includes(wanted) && (!kind || row.dataset.kind === kind));
  });
  const count = shown().length;
  found.textContent = count === rows.length ? `${count} features` : `${count} of ${rows.length} features`;
  document.querySelector(".none").hidden = count > 0;
}
search.addEventListener("input", filter);
const kinds = [...document.querySelectorAll(".kinds button")];
document.querySelector(".kinds").hidden = new Set(rows.map((row) => row.dataset.kind)).size < 2;
kinds.forEach((one) => one.addEventListener("click", () => {
  kind = one.dataset.kind;
  kinds.forEach((other) => other.setAttribute("aria-pressed", String(other === one)));
  filter();
}));
list.addEventListener("click", (event) => {
  const row = event.target.closest("tbody tr");
  if (!row || event.target.closest("a")) return;
  go(Number(row.dataset.feature));
});
list.parentElement.addEventListener("keydown", (event) => {
  const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!by) return;
  event.preventDefault();
  move(by);
});
search.addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown") { event.preventDefault(); list.parentElement.focus(); move(shown().some((row) => Number(row.dataset.feature) === current) ? 1 : 0); }
});
panel.addEventListener("keydown", walk);
panel.addEventListener("pointerover", (event) => {
  const piece = event.target.closest(".t");
  if (piece) aboutToken(piece);
});
panel.addEventListener("pointerout", (event) => { if (event.target.closest(".t")) hideTip(); });
panel.addEventListener("focusout", () => {
  panel.querySelectorAll(".here").forEach((piece) => piece.classList.remove("here"));
  hideTip();
});
addEventListener("scroll", hideTip, { passive: true });
addEventListener("hashchange", () => { if (fromAddress()) panel.scrollIntoView({ block: "nearest" }); });

filter();
if (fromAddress()) panel.scrollIntoView();
else if (rows.length) open(Number(rows[0].dataset.feature));
