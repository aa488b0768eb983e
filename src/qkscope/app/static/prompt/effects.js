// What is edited, and what the model then does: its next tokens as bars, before and after.

import { h } from "../dom.js";
import { token } from "../tokens.js";
import { factorField } from "./account.js";

const NONE = "None. The switch before a pair takes what it adds off the model’s own scores, in its head; the number behind × scales that.";

/** The pairs that are edited; `name(pair, side)` and `link(pair)` say which, `onScale(pair, factor)`, `onReset()` undo it. */
export function editedPairs(pairs, { name, link, onScale, onReset }) {
  if (!pairs.length) return h("p", { class: "hint" }, NONE);
  const listed = (pair) => {
    const [query, key] = ["query", "key"].map((side) => name(pair, side));
    const place = `list.${pair.layer}.${pair.query}.${pair.key}.${pair.head}`;
    const scale = factorField(pair.scale, { words: `${query} → ${key}`, place, onScale: (factor) => onScale(pair, factor) });
    return h(
      "li",
      null,
      h("button", { type: "button", class: "quiet", "aria-label": "as it is", title: "as it is", onclick: () => onScale(pair, 1) }, "×"),
      h("span", null, h("b", null, `${pair.layer}.${pair.head} `), h("a", { href: link(pair) }, h("bdi", null, query), " → ", h("bdi", null, key)), " ", scale),
    );
  };
  return [h("ul", { class: "edited" }, pairs.map(listed)), h("button", { type: "button", class: "reset", onclick: onReset }, "Reset")];
}

/** The most probable next tokens: a table of `rows` {token, probability, edited?}. */
export function nextTokens(rows) {
  const edited = rows.some((row) => row.edited !== undefined);
  const most = Math.max(...rows.flatMap((row) => [row.probability, row.edited ?? 0]), 1e-9);
  const grown = (kind, share) =>
    h("i", { class: `grown ${kind}`, style: { "--share": `${100 * share}%` }, "aria-hidden": "true" });
  const cell = (p, kind) => h("td", null, grown(kind, p / most), h("span", { class: "number" }, percent(p)));
  const key = h("th", null, grown("before", 0), "model ", grown("after", 0), "edited");
  return h(
    "table",
    { class: edited ? "next edited" : "next" },
    edited ? h("thead", null, h("tr", null, h("th", null, "token"), key)) : null,
    h(
      "tbody",
      null,
      rows.map((row) =>
        h(
          "tr",
          null,
          h("th", { scope: "row" }, token(row.token)),
          cell(row.probability, "before"),
          edited ? cell(row.edited, "after") : null,
        ),
      ),
    ),
  );
}

/** A probability for a person: 91 %, 4.2 %, 0.31 %, <0.01 %. */
function percent(p) {
  const value = 100 * p;
  if (value < 0.01) return value > 0 ? "<0.01 %" : "0 %";
  return `${value.toFixed(value < 1 ? 2 : value < 10 ? 1 : 0)} %`;
}
