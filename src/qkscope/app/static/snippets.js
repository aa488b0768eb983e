// Examples in text: tokens shaded by activation, and the two ends of a pair with an arc from query to key.

import { h, s } from "./dom.js";
import { number } from "./format.js";
import { token } from "./tokens.js";

/** One example of a feature; `top` is the activation of full shade. */
export function example(row, side, top) {
  return h(
    "li",
    { class: `example on-${side}` },
    h("span", { class: "value", title: `document ${row.document}, position ${row.position}` }, number(row.activation)),
    h(
      "p",
      { class: "tokens", dir: "auto" },
      row.tokens.map((text, i) => {
        const act = row.activations[i] ?? 0;
        const center = i === row.center ? "center" : "";
        if (!(act > 0)) return [h("wbr"), token(text, { class: center })];
        const shaded = {
          class: `fires ${center}`,
          style: { "--shade": Math.min(act / top, 1).toFixed(3) },
          "data-tip": `activation ${act} at position ${row.position - row.center + i} of document ${row.document}`,
        };
        return [h("wbr"), token(text, shaded)];
      }),
    ),
  );
}

/** One place where a pair is at work: windows around both tokens, or one where they overlap. */
export function pairExample(row) {
  const first = { query: row.query_position - row.query_center, key: row.key_position - row.key_center };
  const last = { query: first.query + row.query_tokens.length - 1, key: first.key + row.key_tokens.length - 1 };
  const apart = last.key + 1 < first.query || last.query + 1 < first.key;
  const parts = apart
    ? (first.key < first.query ? ["key", "query"] : ["query", "key"]).map((side) => [side])
    : [["query", "key"]];
  const nodes = {};
  const words = parts.map((sides, part) => {
    const from = Math.min(...sides.map((side) => first[side]));
    const to = Math.max(...sides.map((side) => last[side]));
    const gap = part ? Math.max(first.query, first.key) - Math.min(last.query, last.key) - 1 : 0;
    return [
      part ? h("span", { class: "gap", title: `${gap} tokens are left out` }, ` … ${gap} … `) : null,
      Array.from({ length: to - from + 1 }, (_, i) => {
        const at = from + i;
        const side = sides.find((one) => at >= first[one] && at <= last[one]);
        if (!side) return null;
        const ends = [at === row.query_position && "query", at === row.key_position && "key"].filter(Boolean);
        const node = token(row[`${side}_tokens`][at - first[side]], {
          class: ends.map((end) => `end ${end}`).join(" "),
          "data-tip": ends.length ? `${ends.join(" and ")}, position ${at} of document ${row.document}` : null,
        });
        for (const end of ends) nodes[end] = node;
        return [h("wbr"), node];
      }),
    ];
  });
  const sign = row.effect < 0 ? "minus" : "plus";
  const arc = s("svg", { class: `arc ${sign}`, "aria-hidden": "true" }, s("path"), s("circle", { r: 2.5 }));
  const box = h("p", { class: "tokens arced", dir: "auto" }, words, arc);
  new ResizeObserver(() => draw(box, arc, nodes)).observe(box);
  return h(
    "li",
    { class: "example pair" },
    h(
      "span",
      { class: `value ${sign}`, "data-tip": `what the pair does to the pattern here, to first order: ${row.effect}; the pruned map's pattern is ${row.pattern}` },
      `${row.effect > 0 ? "+" : ""}${number(row.effect)}`,
      h("small", null, ` of ${number(row.pattern)}`),
    ),
    box,
  );
}

/** The arc, from the query's token to the key's, above them. */
function draw(box, arc, { query, key }) {
  if (!query || !key) return;
  const around = box.getBoundingClientRect();
  const top = (node) => {
    const { left, width, top: y } = node.getBoundingClientRect();
    return [left + width / 2 - around.left, y - around.top + 1];
  };
  const [[x1, y1], [x2, y2]] = [top(query), top(key)];
  const high = Math.min(y1, y2) - Math.min(4 + Math.abs(x1 - x2) / 14, 12);
  arc.querySelector("path").setAttribute("d", `M${x1} ${y1}C${x1} ${high} ${x2} ${high} ${x2} ${y2}`);
  arc.querySelector("circle").setAttribute("cx", x2);
  arc.querySelector("circle").setAttribute("cy", y2);
}
