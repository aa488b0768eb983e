// The most probable next tokens as bars, one a token, or a pair of them before and after an edit.

import { h } from "../dom.js";
import { token } from "../tokens.js";

/** A table of `rows` {token, probability, edited?}. */
export function nextTokens(rows) {
  const edited = rows.some((row) => row.edited !== undefined);
  const most = Math.max(...rows.flatMap((row) => [row.probability, row.edited ?? 0]), 1e-9);
  const cells = (p, kind) => [
    h("span", { class: `grown ${kind}`, style: { "--share": `${(100 * p) / most}%` }, "aria-hidden": "true" }),
    h("span", { class: "number" }, percent(p)),
  ];
  return h("table", { class: edited ? "next edited" : "next" },
    edited
      ? h("thead", null, h("tr", null, h("th", null, "token"), h("th", null, h("i", { class: "grown before" }), "model ", h("i", { class: "grown after" }), "pairs off")))
      : null,
    h("tbody", null,
      rows.map((row) =>
        h("tr", null, h("th", { scope: "row" }, token(row.token)),
          h("td", null, cells(row.probability, "before")),
          edited ? h("td", null, cells(row.edited, "after")) : null)),
    ),
  );
}

/** A probability for a person: 91 %, 4.2 %, 0.31 %, <0.01 %. */
export function percent(p) {
  const value = 100 * p;
  if (value < 0.01) return value > 0 ? "<0.01 %" : "0 %";
  return `${value.toFixed(value < 1 ? 2 : value < 10 ? 1 : 0)} %`;
}
