// The page: its figures, its theme, its print and its command.

document.querySelectorAll("table.sortable").forEach(sortable);
const plots = [...document.querySelectorAll(".plot")].map((element) => {
  const figure = data.figures[element.dataset.figure];
  return new (figure.data.some((trace) => kindOf(trace) === "network") ? GraphPlot : Plot)(element, figure);
});
document.querySelectorAll(".attention").forEach((element) => {
  const view = new Attention(element, data.attention[element.dataset.attention], element.dataset.attention);
  const beside = plots.filter((plot) => plot instanceof GraphPlot && plot.element.parentElement === element.parentElement);
  beside.forEach((plot) => { plot.attention = view; });
});

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
