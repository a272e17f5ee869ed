// A circuit: choose a node to light up its edges, read their numbers, and see where a head looks.

const STRONGEST = 6; // edges that the details list, into a node and out of it

class GraphPlot extends Plot {
  constructor(element, figure) {
    super(element, figure);
    element.classList.add("network");
    this.nodes = figure.data.findIndex((trace) => kindOf(trace) === "node");
    this.numbers = figure.data.findIndex((trace) => kindOf(trace) === "network");
    this.attention = null; // of the same section, if it shows any
  }

  click(points) {
    for (const { data: trace, pointNumber: at } of points) { // drawn for the page, and not all of the figure
      const again = this.selection && this.selection.trace === this.nodes && this.selection.row === at;
      if (kindOf(trace) === "node" && again) this.clear();
      else if (kindOf(trace) === "node") this.select({ trace: this.nodes, row: at });
      if (kindOf(trace) === "touch") this.select({ trace: this.numbers, row: trace.customdata[at] });
    }
  }

  // Up and down to the nearest node of the next row, left and right along a row.
  key(event) {
    if (event.key === "Escape") this.clear();
    const step = ARROWS[event.key];
    if (!step) return;
    event.preventDefault();
    const { x, y } = this.figure.data[this.nodes];
    const all = x.map((_, i) => i);
    if (!this.selection || this.selection.trace !== this.nodes) {
      this.select({ trace: this.nodes, row: all.reduce((best, i) => (y[i] < y[best] ? i : best), 0) });
      return;
    }
    const [down, right] = step, now = this.selection.row;
    const ahead = all.filter((i) => (right ? y[i] === y[now] && (x[i] - x[now]) * right > 0 : (y[now] - y[i]) * down > 0));
    const far = (i) => (right ? Math.abs(x[i] - x[now]) : Math.abs(y[i] - y[now]) * 1e4 + Math.abs(x[i] - x[now]));
    if (ahead.length) this.select({ trace: this.nodes, row: ahead.reduce((best, i) => (far(i) < far(best) ? i : best)) });
  }

  clear() {
    this.selection = null;
    this.draw();
    this.details.replaceChildren(make("p", "Click a node or an edge, or use the arrow keys."));
  }

  select(selection) {
    if (selection.trace !== this.nodes) {
      super.select(selection);
      return;
    }
    this.selection = selection;
    this.draw();
    const { names, views } = this.figure.data[this.nodes].meta;
    const { customdata, meta } = this.figure.data[this.numbers];
    const parts = [make("h3", names[selection.row])];
    for (const [end, heading] of [[1, "into it"], [0, "out of it"]]) {
      const rows = customdata.filter((_, i) => meta.ends[i][end] === selection.row);
      rows.sort((a, b) => Math.abs(b[1] ?? 0) - Math.abs(a[1] ?? 0));
      parts.push(...this.listed(rows, heading, end));
    }
    parts.push(...this.pattern(views[selection.row]), make("p", "Esc, or a second click, shows all edges again."));
    this.details.replaceChildren(...parts);
  }

  listed(rows, heading, end) {
    const list = make("dl", undefined, "edges");
    for (const [label, score, low, high] of rows.slice(0, STRONGEST)) {
      const pair = make("div");
      const value = make("dd", score === null ? "" : number(score));
      if (low !== null && high !== null) value.append(make("small", `${number(low)} to ${number(high)}`));
      const [source, rest] = label.split("->");
      const input = (rest.match(/<.*>/) || [""])[0], place = (rest.match(/@.*/) || [""])[0];
      pair.append(make("dt", end === 1 ? `${source} ${input}${place}` : rest), value);
      list.append(pair);
    }
    const more = rows.length > STRONGEST ? `, the ${STRONGEST} strongest` : "";
    return [make("h4", `${rows.length} ${rows.length === 1 ? "edge" : "edges"} ${heading}${more}`), list];
  }

  // A small pattern here, and the panel of the section set to this head.
  pattern(view) {
    const head = view && this.attention ? this.attention.view.heads.indexOf(view) : -1;
    if (head < 0) return [];
    this.attention.show(head);
    const button = make("button", undefined, "pattern-of");
    button.type = "button";
    button.append(this.attention.thumbnail(head), make("span", `Attention of ${view}: open`));
    button.addEventListener("click", () => {
      this.attention.element.scrollIntoView({ block: "center" });
      this.attention.buttons[head].focus({ preventScroll: true });
    });
    return [make("h4", "where it looks (query down, key across)"), button];
  }
}

const NEAR = 18; // pixels from the middle of a node: there the pointer means the node

// What the pointer finds of the edges (of some of them): a clear curve, with the number of its edge at each point.
function touchable(figure, lit) {
  const { x: across, y: up } = figure.data.find((one) => kindOf(one) === "node");
  const labels = figure.data.find((one) => kindOf(one) === "network").text;
  const x = [], y = [], customdata = [];
  for (const trace of figure.data.filter((one) => kindOf(one) === "edge")) {
    const { edges, points } = trace.meta;
    trace.x.forEach((here, k) => {
      const edge = edges[Math.floor(k / points)], there = trace.y[k];
      if (lit && !lit.has(edge)) return;
      if (here !== null && across.some((_, i) => Math.hypot(across[i] - here, up[i] - there) < NEAR)) return;
      x.push(here); y.push(there); customdata.push(edge);
    });
  }
  return {
    type: "scatter", mode: "lines", x, y, customdata, text: customdata.map((edge) => labels[edge]), opacity: 0,
    hovertemplate: "%{text}<extra></extra>", showlegend: false, meta: { kind: "touch" },
  };
}

// The edges of a node, or one edge, over all others, which fade; and the nodes that they join.
function lightUp(figure, { trace: index, row }, colour, traces) {
  const { ends } = figure.data.find((one) => kindOf(one) === "network").meta;
  const isNode = kindOf(figure.data[index]) === "node";
  const lit = new Set(ends.map((_, i) => i).filter((i) => (isNode ? ends[i].includes(row) : i === row)));
  const joined = new Set([...lit].flatMap((i) => ends[i]));
  if (isNode) joined.add(row);
  const above = [];
  for (const trace of traces.filter((one) => kindOf(one) === "edge")) {
    const { edges, points } = trace.meta;
    const chosen = edges.map((edge, i) => [edge, i]).filter(([edge]) => lit.has(edge));
    const part = (values) => chosen.flatMap(([, i]) => values.slice(i * points, (i + 1) * points));
    const meta = { ...trace.meta, edges: chosen.map(([edge]) => edge) };
    if (chosen.length) above.push({ ...trace, x: part(trace.x), y: part(trace.y), meta, opacity: 1 });
    trace.opacity = 0.1;
  }
  for (const trace of traces.filter((one) => kindOf(one) === "said")) {
    above.push({ ...trace, text: trace.text.map((name, i) => (lit.has(trace.meta.edges[i]) ? name : "")) });
    trace.text = "";
  }
  const nodes = traces.find((one) => kindOf(one) === "node");
  const over = clone(nodes);
  const shown = (i) => (joined.has(i) ? 1 : 0.25);
  over.marker.opacity = over.x.map((_, i) => shown(i));
  over.marker.line.color = over.x.map((_, i) => (isNode && i === row ? colour : nodes.marker.line.color));
  over.marker.line.width = over.x.map((_, i) => (isNode && i === row ? 3 : nodes.marker.line.width));
  over.textfont.color = over.x.map((_, i) => (joined.has(i) ? nodes.textfont.color : "rgba(128,134,145,.7)"));
  Object.assign(nodes, { mode: "markers", opacity: 0, hoverinfo: "skip" });
  delete nodes.hovertemplate;
  traces.push(...above, over, touchable(figure, lit));
}
