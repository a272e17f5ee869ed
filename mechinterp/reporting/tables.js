// What the parts of the page share: elements, numbers as text, downloads, and tables that can be sorted.
const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;

const make = (tag, text, className) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
};
const UNDEFINED = "undefined";
const minus = (text) => text.replaceAll("-", "\u2212");
const isNumber = (value) => typeof value === "number";
const fixed = (value) => (isNumber(value) ? minus(value.toFixed(3)) : String(value ?? UNDEFINED));
// Whole numbers as they are, and small ones with their exponent.
const number = (value) => (!isNumber(value) || (!Number.isInteger(value) && Math.abs(value) >= 0.0005) ? fixed(value)
  : minus(Number.isInteger(value) ? String(value) : value.toExponential(2)));
const shortest = (value) => minus(String(Number(value.toPrecision(6))));
// A token with its blanks and its control characters visible, as in the figures (cells.py).
const BLANKS = { " ": "·", "\n": "↵", "\t": "⇥" };
const code = (character) => `\\x${character.codePointAt(0).toString(16).padStart(2, "0")}`;
const visible = (token) => token.replace(/[\p{Z}\p{C}]/gu, (one) => BLANKS[one] || code(one)) || "∅";

function save(name, type, text) {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function sortable(table) {
  const heads = [...table.querySelectorAll("thead th")];
  const body = table.tBodies[0];
  const value = (row, column) => {
    const cell = row.cells[column];
    const text = cell.textContent.replace("\u2212", "-");
    return cell.dataset.value !== undefined ? Number(cell.dataset.value)
      : text !== "" && !Number.isNaN(Number(text)) ? Number(text) : text;
  };
  heads.forEach((head, column) => {
    const button = make("button", head.textContent);
    button.type = "button";
    head.replaceChildren(button);
    if (body.rows.length && body.rows[0].cells[column].classList.contains("number")) head.classList.add("number");
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].sort((a, b) => {
        const x = value(a, column), y = value(b, column);
        if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1; // "undefined" always last
        const order = typeof x === "number" ? x - y : x.localeCompare(y);
        return down ? -order : order;
      });
      body.append(...rows);
    });
  });
}

function tableOf(columns, rows, shown) {
  const table = make("table", undefined, "sortable");
  const head = table.createTHead().insertRow();
  columns.forEach((name) => {
    const cell = make("th", name);
    cell.scope = "col";
    head.append(cell);
  });
  const body = table.createTBody();
  rows.forEach((row) => {
    const line = body.insertRow();
    row.forEach((value, i) => {
      const cell = line.insertCell();
      cell.textContent = shown(value, i);
      if (isNumber(value)) { cell.className = "number"; cell.dataset.value = value; }
    });
  });
  sortable(table);
  return table;
}
