// A figure with its details, its table and its downloads.

const NAMES = {
  label: "cell", ci_low: "95% low", ci_high: "95% high", passes: "passes its controls", text: "token in the cell", x_label: "label", inclusion: "inclusion probability",
};
const NOUNS = { bars: "bar", curve: "point", network: "node" };
const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
const clamp = (value, length) => Math.min(Math.max(value, 0), length - 1);

// Which of a trace's columns say where a number stands: a cell's name; a line, its x and the label of that x.
const places = (trace) => (kindOf(trace) === "curve" ? 3 : 1);
const valueColumn = (trace) => trace.meta.value || "effect"; // reports of older versions hold effects only
const shownName = (trace, column) => (column === "control" && trace.meta.control) || NAMES[column] || column;
// Effects are compared with each other: three decimals each. Probabilities, KLs and ranks span orders of magnitude.
function shownValue(trace, column, value) {
  if (column === "text" && value !== null) return visible(value);
  if (kindOf(trace) === "curve" && column === trace.meta.columns[1] && value !== null) return shortest(value);
  const effects = ["effect", "bars"].includes(kindOf(trace)) && [valueColumn(trace), "ci_low", "ci_high", "control"];
  return effects && effects.includes(column) ? fixed(value) : number(value);
}

function headingOf(trace, cell) {
  if (kindOf(trace) !== "curve") return cell[0];
  return `${cell[0]} · ${trace.meta.columns[1]} ${shortest(cell[1])}${cell[2] === null ? "" : ` (${cell[2]})`}`;
}

class Plot {
  constructor(element, figure) {
    this.element = element;
    this.figure = figure;
    this.title = (figure.layout.title && figure.layout.title.text) || "";
    this.canvas = element.querySelector(".canvas");
    this.details = element.querySelector(".details");
    this.selection = null;
    this.withNumbers = figure.data
      .map((trace, index) => ({ trace, index }))
      .filter(({ trace }) => trace.meta && trace.meta.columns);
    this.noun = (this.withNumbers.length && NOUNS[kindOf(this.withNumbers[0].trace)]) || "cell";
    this.describe();
    this.draw();
    this.canvas.on("plotly_click", (event) => this.click(event.points));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    element.querySelector('[data-save="svg"]').addEventListener("click", () => this.saveSvg());
    element.querySelector('[data-save="csv"]')?.addEventListener("click", () => this.saveCsv());
    element.querySelector(".numbers")?.addEventListener("toggle", (event) => this.fillTable(event.target), { once: true });
  }

  describe() {
    const decoder = document.createElement("textarea");
    decoder.innerHTML = this.title; // the title was escaped for plotly: decode it as text
    this.element.querySelector("figcaption").textContent = this.name = decoder.value;
    const { max_width: most, min_width: least } = this.figure.layout.meta || {};
    if (most) this.canvas.style.maxWidth = `${most}px`;
    if (least) this.canvas.style.minWidth = `${least}px`;
    if (most > 780) this.element.querySelector(".split").classList.add("wide"); // the details lie below
    this.canvas.setAttribute("aria-label", `${this.name || "Figure"}. Use the arrow keys to move between ${this.noun}s.`);
    this.details.append(make("p", `Click a ${this.noun}, or focus the figure and use the arrow keys, to read its numbers here.`));
    if (!this.withNumbers.length) {
      this.details.remove();
      this.element.querySelector(".numbers").remove();
      this.element.querySelector('[data-save="csv"]').remove();
    }
  }

  draw(width = undefined) {
    const shown = themed(this.figure, root.dataset.theme, this.selection);
    if (width) shown.layout.width = Math.min(width, this.canvas.clientWidth);
    if (this.title) { // the page shows the title above the figure
      delete shown.layout.title;
      const legend = shown.layout.showlegend, panels = (shown.layout.annotations || []).length;
      const top = legend ? 34 : panels ? 28 : 10;
      shown.layout.height -= shown.layout.margin.t - top;
      shown.layout.margin.t = top;
    }
    // No double click: plotly would swallow the second of two quick clicks, on two cells.
    const config = { displayModeBar: false, responsive: true, doubleClick: false, doubleClickDelay: 1 };
    return Plotly.react(this.canvas, shown.data, shown.layout, config);
  }

  // ---- the selected number ------------------------------------------------------------------------------------

  cell({ trace, row, column }) {
    const numbers = this.figure.data[trace].customdata;
    return isGrid(this.figure.data[trace]) ? numbers[row][column] : numbers[row];
  }

  click(points) {
    for (const point of points) {
      let index = point.curveNumber;
      if (kindOf(this.figure.data[index]) === "undefined") { // its numbers are those of the heatmap it lies on
        index = this.withNumbers.filter((one) => one.index <= index).at(-1).index;
      } else if (!this.withNumbers.some((one) => one.index === index)) continue;
      const [row, column] = Array.isArray(point.pointNumber) ? point.pointNumber : [point.pointNumber, 0];
      this.select({ trace: index, row, column });
      return;
    }
  }

  key(event) {
    const step = ARROWS[event.key];
    if (!step || !this.withNumbers.length) return;
    event.preventDefault();
    const first = this.withNumbers[0];
    if (!this.selection) this.select({ trace: first.index, row: 0, column: 0 });
    else if (isGrid(first.trace)) this.moveInGrid(step);
    else if (kindOf(first.trace) === "curve") this.moveOnCurve(step);
    else this.moveBar(step[0] || step[1]);
  }

  // Past the last column lies the next panel.
  moveInGrid([down, right]) {
    let place = this.withNumbers.findIndex((one) => one.index === this.selection.trace);
    const size = () => [this.withNumbers[place].trace.customdata.length, this.withNumbers[place].trace.customdata[0].length];
    let { row, column } = this.selection;
    const yaxis = (this.withNumbers[place].trace.yaxis || "y").replace("y", "yaxis");
    const [bottom, top] = this.figure.layout[yaxis].range;
    row += bottom > top ? down : -down; // the first row may be the lowest one
    column += right;
    if (column >= size()[1] && place + 1 < this.withNumbers.length) { place += 1; column = 0; }
    else if (column < 0 && place > 0) { place -= 1; column = size()[1] - 1; }
    this.select({ trace: this.withNumbers[place].index, row: clamp(row, size()[0]), column: clamp(column, size()[1]) });
  }

  // Along a line, and to the next line above or below at this x; what is undefined there is below all others.
  moveOnCurve([down, right]) {
    const row = clamp(this.selection.row + right, this.figure.data[this.selection.trace].x.length);
    const height = ({ trace }) => trace.y[row] ?? -Infinity;
    const lines = [...this.withNumbers].sort((a, b) => height(b) - height(a) || 0);
    const now = lines.findIndex((one) => one.index === this.selection.trace);
    this.select({ trace: lines[clamp(now + down, lines.length)].index, row, column: 0 });
  }

  moveBar(step) {
    const bars = this.withNumbers.flatMap(({ trace, index }) => trace.y.map((y, row) => ({ trace: index, row, column: 0, y })));
    bars.sort((a, b) => a.y - b.y);
    const now = bars.findIndex((bar) => bar.trace === this.selection.trace && bar.row === this.selection.row);
    this.select(bars[clamp(now + step, bars.length)]);
  }

  select(selection) {
    this.selection = selection;
    this.draw();
    const trace = this.figure.data[selection.trace], columns = trace.meta.columns, numbers = this.cell(selection);
    const cell = Object.fromEntries(columns.map((name, i) => [name, numbers[i]]));
    const shown = (name) => shownValue(trace, name, cell[name]);
    const list = make("dl");
    const add = (parent, name, value, className) => {
      const pair = make("div", undefined, className);
      pair.append(make("dt", name), make("dd", value));
      parent.append(pair);
    };
    add(list, valueColumn(trace), shown(valueColumn(trace)), "first");
    if (cell.ci_low !== null && cell.ci_high !== null) add(list, "95% interval", `${shown("ci_low")} to ${shown("ci_high")}`);
    const rest = columns.slice(places(trace)).filter((name) => ![valueColumn(trace), "ci_low", "ci_high"].includes(name));
    for (const name of rest) {
      if (name === "passes" && cell.passes !== null) add(list, NAMES.passes, cell.passes === "yes" ? "● yes" : "○ no");
      else if (cell[name] !== null || !["control", "passes"].includes(name)) add(list, shownName(trace, name), shown(name));
    }
    const parts = [make("h3", headingOf(trace, numbers)), list];
    if (trace.meta.facts.length) {
      const facts = make("dl", undefined, "facts");
      trace.meta.facts.forEach(([name, value]) => add(facts, name, value));
      parts.push(facts);
    }
    this.details.replaceChildren(...parts);
  }

  // ---- all numbers --------------------------------------------------------------------------------------------

  // The columns that hold something, after the panel where there are several.
  rows() {
    const { trace: first } = this.withNumbers[0];
    const several = isGrid(first) && this.withNumbers.length > 1;
    const rows = this.withNumbers.flatMap(({ trace }) =>
      (isGrid(trace) ? trace.customdata.flat() : trace.customdata).map((cell) => (several ? [trace.meta.title, ...cell] : cell)));
    const all = several ? ["panel", ...first.meta.columns] : first.meta.columns;
    const used = all.map((_, i) => i).filter((i) => all[i] === valueColumn(first) || rows.some((row) => row[i] !== null));
    return { first, columns: used.map((i) => all[i]), rows: rows.map((row) => used.map((i) => row[i])) };
  }

  fillTable(details) {
    const { first, columns, rows } = this.rows();
    const table = tableOf(columns.map((name) => shownName(first, name)), rows, (value, i) => shownValue(first, columns[i], value));
    details.querySelector(".scroll").append(table);
  }

  fileName() {
    return (this.name || "figure").toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "") || "figure";
  }

  saveCsv() {
    const { columns, rows } = this.rows();
    const quote = (value) => (value === null ? "" : /[",\r\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
    save(`${this.fileName()}.csv`, "text/csv", [columns, ...rows].map((row) => row.map(quote).join(",")).join("\r\n") + "\r\n");
  }

  async saveSvg() {
    const figure = themed(this.figure, "light", null); // for a paper: dark text, whatever the page's theme
    figure.layout.paper_bgcolor = "#ffffff";
    figure.layout.width = Math.max(this.canvas.clientWidth, 480);
    const url = await Plotly.toImage(figure, { format: "svg", width: figure.layout.width, height: figure.layout.height, imageDataOnly: true });
    save(`${this.fileName()}.svg`, "image/svg+xml", url);
  }
}
