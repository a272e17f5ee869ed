// Attention patterns: thumbnails to choose a head by, its pattern drawn by CircuitsVis, and the largest weights as a table.

class Attention {
  constructor(element, view, index) {
    this.element = element;
    this.view = view;
    this.index = index;
    this.n = view.tokens.length;
    this.weights = Uint8Array.from(atob(view.patterns), (character) => character.charCodeAt(0));
    this.labels = view.tokens.map(visible);
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
    this.element.querySelector(".numbers .scroll").append(tableOf(["head", "query", "key with the largest weight", "weight"], rows, fixed));
  }
}
