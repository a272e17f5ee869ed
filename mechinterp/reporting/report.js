"use strict";
// The page's behaviour: theme, figures with their details, tables and downloads, attention patterns.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const NAMES = {
    label: "cell", effect: "effect", ci_low: "95% low", ci_high: "95% high", control: "donor control",
    passes: "passes both controls", panel: "panel",
  };
  const HINT = "Click a cell, or focus the figure and use the arrow keys, to read its numbers here.";
  // Dark pages need a dark centre: a near-white zero would outshine the effects.
  const DARK_SCALE = [
    [0, "#a9d3ff"], [0.15, "#5ba3f0"], [0.32, "#2f6fb8"], [0.43, "#23456e"], [0.5, "#20252d"],
    [0.57, "#6b3328"], [0.68, "#b84f38"], [0.85, "#ef7f5c"], [1, "#ffc7ad"],
  ];
  const INK = { light: { text: "#2b3039", line: "#cfd5dd" }, dark: { text: "#d4d9e1", line: "#3b434f" } };

  const make = (tag, text, className) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (className) element.className = className;
    return element;
  };
  const number = (value) => {
    if (value === null || value === undefined) return "undefined";
    return typeof value === "number" ? value.toFixed(3).replace("-", "\u2212") : String(value);
  };
  const clone = (value) => JSON.parse(JSON.stringify(value));

  function save(name, type, text) {
    const link = make("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  // ---- tables ---------------------------------------------------------------------------------------------------

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

  function tableOf(columns, rows) {
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
      row.forEach((value) => {
        const cell = line.insertCell();
        cell.textContent = number(value);
        if (typeof value === "number") { cell.className = "number"; cell.dataset.value = value; }
      });
    });
    sortable(table);
    return table;
  }

  // ---- figures --------------------------------------------------------------------------------------------------

  function themed(figure, theme, selection) {
    const { data: traces, layout } = clone(figure);
    const ink = INK[theme];
    layout.font = { ...layout.font, color: ink.text };
    layout.hoverlabel = {
      bgcolor: theme === "dark" ? "#2a303a" : "#ffffff", bordercolor: ink.line,
      font: { color: ink.text, family: layout.font.family, size: 13 }, align: "left",
    };
    for (const key of Object.keys(layout).filter((name) => /^[xy]axis/.test(name))) {
      Object.assign(layout[key], { gridcolor: ink.line, zerolinecolor: ink.text, linecolor: ink.line });
    }
    for (const trace of traces) {
      const kind = trace.meta && trace.meta.kind;
      if (kind === "effect" && theme === "dark") trace.colorscale = DARK_SCALE;
      if (kind === "control") trace.marker.color = ink.text;
      if (trace.error_x) trace.error_x.color = ink.text;
    }
    if (selection) {
      const trace = figure.data[selection.trace];
      const grid = Array.isArray(trace.customdata[0][0]);
      const row = grid ? selection.row : trace.y[selection.row];
      const x = (trace.xaxis || "x"), y = (trace.yaxis || "y");
      layout.shapes = [...(layout.shapes || []), {
        type: "rect", xref: grid ? x : "paper", yref: y, line: { color: theme === "dark" ? "#ffffff" : "#111827", width: 2 },
        x0: grid ? selection.column - 0.5 : 0, x1: grid ? selection.column + 0.5 : 1, y0: row - 0.5, y1: row + 0.5,
      }];
    }
    return { data: traces, layout };
  }

  const isGrid = (trace) => Array.isArray(trace.customdata[0]) && Array.isArray(trace.customdata[0][0]);

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
      const caption = element.querySelector("figcaption");
      caption.innerHTML = ""; // the title was escaped for plotly: decode it as text
      const decoder = document.createElement("textarea");
      decoder.innerHTML = this.title;
      caption.textContent = this.name = decoder.value;
      const width = figure.layout.meta && figure.layout.meta.max_width;
      if (width) this.canvas.style.maxWidth = `${width}px`;
      if (figure.layout.meta?.min_width) this.canvas.style.minWidth = `${figure.layout.meta.min_width}px`;
      if (width > 780) element.querySelector(".split").style.gridTemplateColumns = "minmax(0, 1fr)";
      this.canvas.setAttribute("aria-label", `${this.name || "Figure"}. Use the arrow keys to move between cells.`);
      this.details.append(make("p", HINT));
      if (!this.withNumbers.length) {
        this.details.remove();
        element.querySelector(".numbers").remove();
        element.querySelector('[data-save="csv"]').remove();
      }
      this.draw();
      this.canvas.on("plotly_click", (event) => this.click(event.points));
      this.canvas.addEventListener("keydown", (event) => this.key(event));
      element.querySelector('[data-save="svg"]').addEventListener("click", () => this.saveSvg());
      element.querySelector('[data-save="csv"]')?.addEventListener("click", () => this.saveCsv());
      element.querySelector(".numbers")?.addEventListener("toggle", (event) => this.fillTable(event.target), { once: true });
    }

    draw(width = undefined) {
      const shown = themed(this.figure, root.dataset.theme, this.selection);
      if (width) shown.layout.width = Math.min(width, this.canvas.clientWidth);
      if (this.title) { // the page shows the title above the figure
        delete shown.layout.title;
        const legend = shown.layout.showlegend, panels = (shown.layout.annotations || []).length;
        shown.layout.margin.t = legend ? 34 : panels ? 28 : 10;
      }
      // No double click: plotly would swallow the second of two quick clicks, on two cells.
      const config = { displayModeBar: false, responsive: true, doubleClick: false, doubleClickDelay: 1 };
      return Plotly.react(this.canvas, shown.data, shown.layout, config);
    }

    cell({ trace, row, column }) {
      const numbers = this.figure.data[trace].customdata;
      return isGrid(this.figure.data[trace]) ? numbers[row][column] : numbers[row];
    }

    click(points) {
      for (const point of points) {
        let index = point.curveNumber;
        const trace = this.figure.data[index];
        if (trace.meta && trace.meta.kind === "undefined") { // its numbers are those of the heatmap it lies on
          index = this.withNumbers.filter((one) => one.index <= index).at(-1).index;
        } else if (!this.withNumbers.some((one) => one.index === index)) continue;
        const [row, column] = Array.isArray(point.pointNumber) ? point.pointNumber : [point.pointNumber, 0];
        this.select({ trace: index, row, column });
        return;
      }
    }

    key(event) {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step || !this.withNumbers.length) return;
      event.preventDefault();
      const first = this.withNumbers[0];
      if (!this.selection) { this.select({ trace: first.index, row: 0, column: 0 }); return; }
      if (!isGrid(first.trace)) { this.moveBar(step[0] || step[1]); return; }
      let place = this.withNumbers.findIndex((one) => one.index === this.selection.trace);
      let { row, column } = this.selection;
      const size = (one) => [one.trace.customdata.length, one.trace.customdata[0].length];
      row += step[0];
      column += step[1];
      let [rows, columns] = size(this.withNumbers[place]);
      if (column >= columns && place + 1 < this.withNumbers.length) { place += 1; column = 0; }
      else if (column < 0 && place > 0) { place -= 1; column = size(this.withNumbers[place])[1] - 1; }
      [rows, columns] = size(this.withNumbers[place]);
      row = Math.min(Math.max(row, 0), rows - 1);
      column = Math.min(Math.max(column, 0), columns - 1);
      this.select({ trace: this.withNumbers[place].index, row, column });
    }

    moveBar(step) {
      const bars = this.withNumbers.flatMap(({ trace, index }) => trace.y.map((y, row) => ({ trace: index, row, column: 0, y })));
      bars.sort((a, b) => a.y - b.y);
      const now = bars.findIndex((bar) => bar.trace === this.selection.trace && bar.row === this.selection.row);
      this.select(bars[Math.min(Math.max(now + step, 0), bars.length - 1)]);
    }

    select(selection) {
      this.selection = selection;
      this.draw();
      const trace = this.figure.data[selection.trace];
      const cell = Object.fromEntries(trace.meta.columns.map((name, i) => [name, this.cell(selection)[i]]));
      const list = make("dl");
      const add = (parent, name, value, className) => {
        const pair = make("div", undefined, className);
        pair.append(make("dt", name), make("dd", value));
        parent.append(pair);
      };
      add(list, NAMES.effect, number(cell.effect), "first");
      if (cell.ci_low !== null && cell.ci_high !== null) add(list, "95% interval", `${number(cell.ci_low)} to ${number(cell.ci_high)}`);
      if (cell.control !== null) add(list, NAMES.control, number(cell.control));
      if (cell.passes !== null) add(list, NAMES.passes, cell.passes === "yes" ? "● yes" : "○ no");
      const known = new Set(["label", "effect", "ci_low", "ci_high", "control", "passes"]);
      trace.meta.columns.filter((name) => !known.has(name)).forEach((name) => add(list, name, number(cell[name])));
      const parts = [make("h3", cell.label), list];
      if (trace.meta.facts.length) {
        const facts = make("dl", undefined, "facts");
        trace.meta.facts.forEach(([name, value]) => add(facts, name, value));
        parts.push(facts);
      }
      this.details.replaceChildren(...parts);
    }

    rows() {
      const several = isGrid(this.withNumbers[0].trace) && this.withNumbers.length > 1;
      const columns = this.withNumbers[0].trace.meta.columns;
      const rows = this.withNumbers.flatMap(({ trace }) =>
        (isGrid(trace) ? trace.customdata.flat() : trace.customdata).map((cell) => (several ? [trace.meta.title, ...cell] : cell)));
      const all = several ? ["panel", ...columns] : columns;
      const used = all.map((_, i) => i).filter((i) => i < (several ? 3 : 2) || rows.some((row) => row[i] !== null));
      return { columns: used.map((i) => all[i]), rows: rows.map((row) => used.map((i) => row[i])) };
    }

    fillTable(details) {
      const { columns, rows } = this.rows();
      details.querySelector(".scroll").append(tableOf(columns.map((name) => NAMES[name] || name), rows));
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

  // ---- attention ------------------------------------------------------------------------------------------------

  class Attention {
    constructor(element, view, index) {
      this.element = element;
      this.view = view;
      this.index = index;
      this.n = view.tokens.length;
      this.weights = Uint8Array.from(atob(view.patterns), (character) => character.charCodeAt(0));
      this.labels = view.tokens.map((token) => token.replaceAll("\n", "↵").replaceAll("\t", "⇥"));
      this.buttons = view.heads.map((name, head) => this.button(name, head));
      element.querySelector(".heads").append(...this.buttons);
      element.querySelector(".numbers").addEventListener("toggle", () => this.fillTable(), { once: true });
      this.show(0);
    }

    weight(head, query, key) { return this.weights[(head * this.n + query) * this.n + key] / 255; }

    button(name, head) {
      const button = make("button", undefined);
      button.type = "button";
      button.setAttribute("role", "radio");
      button.append(this.thumbnail(head), make("span", name));
      button.addEventListener("click", () => this.show(head));
      button.addEventListener("keydown", (event) => {
        const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
        if (!step) return;
        event.preventDefault();
        const next = (head + step + this.buttons.length) % this.buttons.length;
        this.show(next);
        this.buttons[next].focus();
      });
      return button;
    }

    thumbnail(head) {
      const canvas = make("canvas");
      canvas.width = canvas.height = this.n;
      canvas.setAttribute("aria-hidden", "true");
      const context = canvas.getContext("2d");
      for (let query = 0; query < this.n; query++) {
        for (let key = 0; key < this.n; key++) {
          const w = this.weight(head, query, key);
          context.fillStyle = key > query ? "#eceef1" : `rgb(${255 - 224 * w}, ${255 - 160 * w}, ${255 - 81 * w})`;
          context.fillRect(key, query, 1, 1);
        }
      }
      return canvas;
    }

    show(head) {
      this.buttons.forEach((button, i) => {
        button.setAttribute("aria-checked", i === head);
        button.tabIndex = i === head ? 0 : -1;
      });
      const note = this.view.notes[head];
      this.element.querySelector(".note").replaceChildren(make("strong", this.view.heads[head]), note ? ` · ${note}` : "");
      const holder = this.element.querySelector(".pattern");
      const id = `attention-${this.index}-${head}`;
      let panel = document.getElementById(id);
      [...holder.children].forEach((child) => { child.hidden = child.id !== id; });
      if (panel) return;
      panel = make("div"); // drawn at first sight: a hidden canvas has no size
      panel.id = id;
      panel.setAttribute("role", "img");
      panel.setAttribute("aria-label", `Attention pattern of ${this.view.heads[head]}, query by key`);
      holder.append(panel);
      const range = [...Array(this.n).keys()];
      const attention = range.map((query) => range.map((key) => Math.round(this.weight(head, query, key) * 1000) / 1000));
      CircuitsVis.render(id, CircuitsVis.AttentionPattern, {
        tokens: this.labels, attention, minValue: -1, maxValue: 1, positiveColor: "#1f5fae", upperTriColor: "#eceef1",
        zoomed: true, maskUpperTri: true, showAxisLabels: true,
      });
    }

    fillTable() {
      const rows = [];
      this.view.heads.forEach((name, head) => this.labels.forEach((token, query) => {
        let best = 0;
        for (let key = 1; key <= query; key++) if (this.weight(head, query, key) > this.weight(head, query, best)) best = key;
        rows.push([name, `${token}_${query}`, `${this.labels[best]}_${best}`, this.weight(head, query, best)]);
      }));
      this.element.querySelector(".numbers .scroll").append(tableOf(["head", "query", "key with the largest weight", "weight"], rows));
    }
  }

  // ---- the page -------------------------------------------------------------------------------------------------

  document.querySelectorAll("table.sortable").forEach(sortable);
  const plots = [...document.querySelectorAll(".plot")].map((element) => new Plot(element, data.figures[element.dataset.figure]));
  document.querySelectorAll(".attention").forEach((element) => new Attention(element, data.attention[element.dataset.attention], element.dataset.attention));

  const button = document.getElementById("theme");
  function setTheme(theme, width) {
    root.dataset.theme = theme;
    button.textContent = theme === "dark" ? "Light theme" : "Dark theme";
    plots.forEach((plot) => plot.draw(width));
  }
  button.addEventListener("click", () => {
    setTheme(root.dataset.theme === "dark" ? "light" : "dark");
    try { localStorage.setItem("mechinterp-theme", root.dataset.theme); } catch (error) { /* not kept, then */ }
  });
  setTheme(root.dataset.theme);

  let before = null; // paper is white, and 680 px wide where it is narrow
  addEventListener("beforeprint", () => { before = root.dataset.theme; setTheme("light", 680); });
  addEventListener("afterprint", () => { if (before) setTheme(before); before = null; });

  const copy = document.getElementById("copy");
  copy.addEventListener("click", async () => {
    const code = document.querySelector(".command code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      copy.textContent = "Copied";
    } catch (error) { // a browser that keeps the clipboard from local files: select it for the user
      getSelection().selectAllChildren(code);
    }
  });
})();
