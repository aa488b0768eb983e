// One pattern as a heat map: queries down, keys across, tokens on both axes where there is room.
//
// The cells are painted once on a canvas of one pixel a cell and scaled; what follows the pointer is a canvas above.

import { h } from "../dom.js";
import { quoted } from "../tokens.js";

const LABELS = 64; // pixels for tokens on an axis
const NUMBERS = 26; // for positions, where tokens do not fit
const READABLE = 8.5; // pixels a cell from which on every token is written
const LONGEST = 9; // characters of a token on an axis

export class HeatMap {
  /** `onHover(i, j, event)` (j null: left) and `onPick(i, j, event)` are told cells. */
  constructor(title, note, { onHover, onPick }) {
    this.cells = h("canvas", { "aria-hidden": "true" });
    this.above = h("canvas", { class: "above", role: "img", "aria-label": title });
    const resize = () => this.node.classList.toggle("large"); // what observes its size draws it anew
    const words = `${title}: larger or smaller`;
    const enlarge = h("button", { type: "button", class: "quiet", "aria-label": words, onclick: resize }, "⤢");
    this.node = h(
      "figure",
      { class: "map" },
      h("figcaption", null, h("b", null, title), " ", h("span", { class: "note" }, note), enlarge),
      h("div", { class: "plot" }, this.cells, this.above),
    );
    this.onHover = onHover;
    this.above.addEventListener("pointermove", (event) => this.#told(event, onHover));
    this.above.addEventListener("pointerleave", () => onHover(null, null));
    this.above.addEventListener("click", (event) => this.#told(event, onPick));
    new ResizeObserver(() => this.draw()).observe(this.above.parentElement);
  }

  /** Show other values: `value(i, j)` is 0 … 1 or −1 … 1, `colour(value)` [red, green, blue, opacity]. */
  set({ tokens, causal, value, colour }) {
    Object.assign(this, { tokens, causal, value, colour });
    this.#paint();
    this.draw();
  }

  /** Mark a cell as chosen and one as pointed at, each {i, j} or null. */
  mark(chosen, pointed) {
    Object.assign(this, { chosen, pointed });
    this.#drawAbove();
  }

  #paint() {
    const n = this.tokens.length;
    this.image = new OffscreenCanvas(n, n);
    const context = this.image.getContext("2d");
    const data = context.createImageData(n, n);
    for (let i = 0, at = 0; i < n; i++)
      for (let j = 0; j < n; j++, at += 4) {
        if (this.causal && j > i) continue; // masked: left clear
        data.data.set(this.colour(this.value(i, j)), at);
      }
    context.putImageData(data, 0, 0);
  }

  draw() {
    const width = this.above.parentElement.clientWidth;
    if (!width || !this.image) return;
    const n = this.tokens.length;
    const labelled = (width - LABELS) / n >= READABLE;
    this.margin = labelled ? LABELS : NUMBERS;
    this.cell = (width - this.margin) / n;
    const ratio = devicePixelRatio || 1;
    for (const canvas of [this.cells, this.above]) {
      canvas.width = canvas.height = Math.round(width * ratio);
      canvas.getContext("2d").setTransform(ratio, 0, 0, ratio, 0, 0);
    }
    const context = this.cells.getContext("2d");
    const side = width - this.margin;
    context.imageSmoothingEnabled = this.cell * ratio < 1; // many cells a pixel: their mean, not one of them
    context.drawImage(this.image, this.margin, 0, side, side);
    const style = getComputedStyle(this.cells);
    context.fillStyle = context.strokeStyle = style.color;
    context.globalAlpha = 0.25;
    context.strokeRect(this.margin, 0.5, side - 0.5, side);
    context.globalAlpha = 1;
    context.font = `${Math.min(11, Math.max(8.5, this.cell))}px ${style.fontFamily}`;
    if (labelled) this.#tokens(context, side);
    else this.#positions(context, side);
    this.#drawAbove();
  }

  #tokens(context, side) {
    this.tokens.forEach((token, n) => {
      const text = shortened(token);
      const middle = (n + 0.5) * this.cell;
      written(context, text, this.margin - 4, middle, 0);
      written(context, text, this.margin + middle, side + 4, -Math.PI / 2);
    });
  }

  #positions(context, side) {
    const step = d3.tickStep(0, this.tokens.length, Math.max(2, side / 50));
    for (let n = 0; n < this.tokens.length; n += step) {
      const middle = (n + 0.5) * this.cell;
      written(context, String(n), this.margin - 4, Math.max(middle, 5), 0);
      context.textAlign = "center";
      context.textBaseline = "top";
      context.fillText(String(n), this.margin + Math.min(Math.max(middle, 4), side - 9), side + 4);
    }
  }

  #drawAbove() {
    if (!this.cell) return;
    const context = this.above.getContext("2d");
    context.save();
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.above.width, this.above.height);
    context.restore();
    const style = getComputedStyle(this.above);
    const side = this.cell * this.tokens.length;
    const size = Math.max(this.cell, 3);
    if (this.chosen) {
      const { i, j } = this.chosen;
      context.strokeStyle = style.color;
      context.globalAlpha = 0.45;
      context.strokeRect(this.margin, i * this.cell, side, size);
      context.globalAlpha = 1;
      context.lineWidth = 2;
      context.strokeStyle = style.outlineColor;
      context.strokeRect(this.margin + j * this.cell - 1, i * this.cell - 1, size + 2, size + 2);
      context.lineWidth = 1;
    }
    if (this.pointed) {
      const { i, j } = this.pointed;
      context.fillStyle = style.color;
      context.globalAlpha = 0.13;
      context.fillRect(this.margin, i * this.cell, j * this.cell, size);
      context.fillRect(this.margin + j * this.cell, i * this.cell, size, side - i * this.cell);
      context.globalAlpha = 1;
    }
  }

  /** Tell a listener of the cell under the pointer, where there is one that the query sees. */
  #told(event, listener) {
    const box = this.above.getBoundingClientRect();
    const j = Math.floor((event.clientX - box.left - this.margin) / this.cell);
    const i = Math.floor((event.clientY - box.top) / this.cell);
    const n = this.tokens?.length ?? 0;
    if (i >= 0 && j >= 0 && i < n && j < n && !(this.causal && j > i)) listener(i, j, event);
    else if (listener === this.onHover) listener(null, null);
  }
}

function written(context, text, x, y, angle) {
  context.save();
  context.translate(x, y);
  context.rotate(angle);
  context.textAlign = "right";
  context.textBaseline = "middle";
  context.fillText(text, 0, 0);
  context.restore();
}

function shortened(token) {
  const text = [...quoted(token).slice(1, -1).replaceAll("␣", "·")];
  return text.length > LONGEST ? `${text.slice(0, LONGEST - 1).join("")}…` : text.join("");
}

/** A head's pattern as a picture of `size` × `size` bytes, on a canvas; what a causal mask hides is left clear. */
export function thumbnail(canvas, cells, size, causal, share) {
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d");
  const data = context.createImageData(size, size);
  cells.forEach((byte, n) => {
    if (!causal || n % size <= n / size) data.data.set(share(byte / 255), 4 * n);
  });
  context.putImageData(data, 0, 0);
}

/** What the colours mean. */
export function legend() {
  const ramp = (kind) => h("i", { class: `ramp ${kind}` });
  const [share, difference] = [ramp("share"), ramp("difference")];
  return h(
    "div",
    { class: "ramps", "aria-hidden": "true" },
    h("span", null, "0 ", share, " 1 attention (√)"),
    h("span", null, "−1 ", difference, " +1 difference (√): orange where the map attends too much"),
  );
}
