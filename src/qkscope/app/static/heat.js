// A pattern as a heat map on a canvas, cell by cell, with what is under the pointer said beside it.

import { h } from "./dom.js";
import { number } from "./format.js";
import { quoted } from "./tokens.js";

const SIZE = 10; // pixels of a cell, at most 640 of the map
const BELOW = "0, 114, 178"; // blue and orange, the fainter the nearer to 0, on light ground as on dark
const ABOVE = "230, 110, 0";

/** Weights [Q, K] of a text's tokens; `signed`: around 0, to ±`most`. Colour goes with the square root. */
export function heatMap(title, weights, tokens, { signed = false, most = 1 } = {}) {
  const n = weights.length;
  const side = Math.max(Math.min(SIZE, Math.floor(640 / Math.max(n, 1))), 1);
  const canvas = h("canvas", { width: n * side, height: n * side, role: "img", "aria-label": title });
  const pen = canvas.getContext("2d");
  const shade = (value) => {
    const size = Math.sqrt(Math.min(Math.abs(value) / most, 1));
    return signed ? `rgba(${value < 0 ? BELOW : ABOVE}, ${size})` : d3.interpolateViridis(size);
  };
  weights.forEach((row, q) =>
    row.forEach((value, k) => {
      if (k > q && value === 0) return; // not visible: the page's own ground
      pen.fillStyle = shade(value);
      pen.fillRect(k * side, q * side, side, side);
    }),
  );
  const said = h("p", { class: "read", "aria-live": "polite" }, "Point at a cell.");
  canvas.addEventListener("pointermove", (event) => {
    const around = canvas.getBoundingClientRect();
    const k = Math.floor(((event.clientX - around.left) / around.width) * n);
    const q = Math.floor(((event.clientY - around.top) / around.height) * n);
    if (weights[q]?.[k] === undefined) return;
    said.textContent = `${q} ${quoted(tokens[q])} → ${k} ${quoted(tokens[k])}: ${number(weights[q][k])}`;
  });
  return h("figure", { class: "heat" }, h("figcaption", null, title), canvas, said);
}
