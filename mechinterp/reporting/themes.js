// How a figure looks on a light and on a dark page, and where the selection is drawn.

// Dark pages need a dark zero: a near-white one would outshine the numbers.
const DARK_SCALES = {
  effect: [
    [0, "#a9d3ff"], [0.15, "#5ba3f0"], [0.32, "#2f6fb8"], [0.43, "#23456e"], [0.5, "#20252d"],
    [0.57, "#6b3328"], [0.68, "#b84f38"], [0.85, "#ef7f5c"], [1, "#ffc7ad"],
  ],
  amount: [[0, "#1b2027"], [0.15, "#1d3242"], [0.35, "#1f5470"], [0.6, "#2f8a9e"], [0.8, "#6cc3b4"], [1, "#d6f5d0"]],
};
// The lines of curves.py, lighter, where the page is dark.
const DARK_LINES = {
  "#1a6fd4": "#6db3fa", "#b5502d": "#e5794f", "#10a36e": "#33c98f", "#a5559f": "#d384cc", "#9b8900": "#c9b52e",
  "#8046f0": "#9068f5", "#6b7280": "#9aa4b2",
};
// The edges of a circuit, by the sign of their score, where the page is dark.
const DARK_EDGES = { "1": "#ef7f5c", "0": "#9aa4b2", "-1": "#5ba3f0" };
const INK = {
  light: { text: "#2b3039", line: "#cfd5dd", select: "#111827", paper: "#ffffff" },
  dark: { text: "#d4d9e1", line: "#3b434f", select: "#ffffff", paper: "#191d24" },
};

const clone = (value) => JSON.parse(JSON.stringify(value));
const kindOf = (trace) => trace.meta && trace.meta.kind;
const isGrid = (trace) => Array.isArray(trace.customdata[0]) && Array.isArray(trace.customdata[0][0]);

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
  for (const trace of [...traces]) {
    const scale = DARK_SCALES[kindOf(trace)];
    if (scale && theme === "dark") trace.colorscale = scale;
    if (kindOf(trace) === "curve" && theme === "dark") {
      for (const part of [trace.line, trace.marker]) part.color = DARK_LINES[part.color] || part.color;
    }
    if (kindOf(trace) === "network") { // the whole curve answers, not its middle alone
      trace.hoverinfo = "skip";
      delete trace.hovertemplate;
      if (!selection) traces.push(touchable(figure));
    }
    if (["edge", "key"].includes(kindOf(trace)) && theme === "dark") trace.line.color = DARK_EDGES[trace.meta.sign];
    if (kindOf(trace) === "node") {
      Object.assign(trace.marker, { color: ink.paper, line: { ...trace.marker.line, color: ink.text } });
      trace.textfont.color = ink.text;
    }
    if (kindOf(trace) === "said") { // on a line, so with a rim
      const rim = [[-1, 0], [1, 0], [0, -1], [0, 1], [-1, -1], [1, 1], [-1, 1], [1, -1]];
      const shadow = rim.map(([x, y]) => `${2 * x}px ${2 * y}px 1px ${ink.paper}`).join(", ");
      trace.textfont = { ...trace.textfont, color: ink.text, shadow };
    }
    if (kindOf(trace) === "control") trace.marker.color = ink.text;
    if (trace.error_x) trace.error_x.color = ink.text;
  }
  if (selection) select(figure, selection, ink.select, traces, layout);
  return { data: traces, layout };
}

// The frame of a cell or of a bar's row; the ring of a point, and the line at its x.
function select(figure, { trace: index, row, column }, colour, traces, layout) {
  const trace = figure.data[index];
  if (["node", "network"].includes(kindOf(trace))) {
    lightUp(figure, { trace: index, row }, colour, traces); // in graph.js
    return;
  }
  const xref = trace.xaxis || "x", yref = trace.yaxis || "y";
  const frame = { type: "rect", xref, yref, line: { color: colour, width: 2 } };
  let shape;
  if (kindOf(trace) === "curve") {
    const x = trace.x[row], y = trace.y[row];
    shape = { ...frame, type: "line", yref: "paper", x0: x, x1: x, y0: 0, y1: 1, line: { color: colour, width: 1, dash: "dot" } };
    const marker = { symbol: "circle-open", size: 16, color: colour, line: { width: 2 } };
    traces.push({ type: "scatter", mode: "markers", x: [x], y: [y], marker, hoverinfo: "skip", showlegend: false });
  } else if (isGrid(trace)) {
    shape = { ...frame, x0: column - 0.5, x1: column + 0.5, y0: row - 0.5, y1: row + 0.5 };
  } else {
    shape = { ...frame, xref: "paper", x0: 0, x1: 1, y0: trace.y[row] - 0.5, y1: trace.y[row] + 0.5 };
  }
  layout.shapes = [...(layout.shapes || []), shape];
}
