// Heat maps of one head on one text, side by side: the cell that is pointed at is marked in all of them, and said.

import { fill, h } from "../dom.js";
import { token } from "../tokens.js";
import { difference, share } from "./colour.js";
import { HeatMap, legend } from "./heatmap.js";

export class Maps {
  /**
   * `kinds` are {name: [title, note]}; `values(i, j)` is what is said of a cell, {name: text}; `onPick(i, j, event)` is
   * told a cell that is clicked. Until `signal`, the maps are drawn anew when the page's colours change.
   */
  constructor(kinds, { values, onPick, signal, ...attributes }) {
    this.values = values;
    this.tip = h("div", { class: "tip", hidden: true });
    const on = { onHover: (i, j, event) => this.#point(i, j, event), onPick };
    this.maps = Object.fromEntries(Object.entries(kinds).map(([name, words]) => [name, new HeatMap(...words, on)]));
    const row = h("div", { class: "maps", ...attributes }, Object.values(this.maps).map((map) => map.node));
    this.nodes = [legend(), row, this.tip];
    this.row = row;
    const drawn = () => Object.values(this.maps).forEach((map) => map.draw()); // their axes are in the page's colours
    addEventListener("themechange", drawn, { signal });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawn, { signal });
  }

  /** Show a head's patterns of a text; those that are null are hidden. `value(i, j)` is a share of attention. */
  show({ tokens, causal, ...kinds }) {
    Object.assign(this, { tokens, causal });
    for (const [name, value] of Object.entries(kinds)) {
      this.maps[name].node.hidden = !value;
      const colour = name === "difference" ? difference : share;
      if (value) this.maps[name].set({ tokens, causal, value, colour });
    }
  }

  /** Mark a cell as chosen. */
  choose(i, j) {
    this.chosen = { i, j };
    this.#mark();
  }

  #mark(pointed = null) {
    for (const map of Object.values(this.maps)) map.mark(this.chosen, pointed);
  }

  #point(i, j, event) {
    this.tip.hidden = j === null;
    this.#mark(j === null ? null : { i, j });
    if (j === null) return;
    const at = (n) => [`${n} `, token(this.tokens[n])];
    fill(this.tip, h("div", null, at(i), " → ", at(j)), h("div", { class: "values" }, told(this.values(i, j))));
    const room = document.documentElement.clientWidth - this.tip.offsetWidth - 8;
    this.tip.style.setProperty("left", `${Math.max(8, Math.min(event.clientX + 14, room))}px`);
    this.tip.style.setProperty("top", `${event.clientY + 18}px`);
  }
}

/** What is said of a cell, {name: text}, as nodes. */
export function told(values) {
  return Object.entries(values).map(([name, value]) => [" ", h("span", null, `${name} `, h("b", null, value))]);
}
