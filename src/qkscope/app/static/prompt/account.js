// An account as signed bars: a score, or a log-odds, as the sum of pair terms and of what no pair says.

import { h } from "../dom.js";

const FIRST = 12; // terms that are shown at once

export const signed = (value, digits = 2) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}`;
const REST = {
  dropped: "pairs that were not kept",
  error: "what the transcoders miss of the model",
  "soft cap": "the model's soft cap",
  sink: "the model's learned sink",
};

/**
 * Rows of an account. `isOn(term)` and `onSwitch(term, on)` are of a term's pair, `link(term)` is its address, `detail(term)`
 * says of which numbers it is made.
 */
export function account(found, { isOn, onSwitch, link, detail, whole, onWhole }) {
  const rest = Object.entries(found.rest).map(([name, value]) => ({ name, value }));
  const shown = whole ? found.terms : found.terms.slice(0, FIRST);
  const hidden = found.terms.slice(shown.length);
  const smaller = {
    count: hidden.length + found.smaller.count,
    value: hidden.reduce((sum, term) => sum + term.value, found.smaller.value),
  };
  const most = Math.max(...[...found.terms, ...rest, smaller].map((row) => Math.abs(row.value)), 1e-9);
  return [
    h("p", { class: "sum" }, h("b", null, signed(found.total)), ` = ${signed(found.pairs)} from ${pairs(found.count)}`,
      rest.map(({ name, value }) => ` ${signed(value)} ${name}`)),
    h("ol", { class: "terms" },
      shown.map((term) => {
        const words = `${term.query_name} → ${term.key_name}`;
        return h("li", { class: isOn(term) ? "term" : "term off" },
          h("input", {
            type: "checkbox", role: "switch", checked: isOn(term), "aria-label": `pair ${words} on`,
            title: "off: ablate this pair in the model", onchange: (event) => onSwitch(term, event.target.checked),
          }),
          number(term.value), bar(term.value, most),
          h("span", { class: "name" },
            h("a", { href: link(term) }, h("bdi", null, term.query_name), " → ", h("bdi", null, term.key_name))),
          h("small", null, detail(term)));
      }),
      smaller.count
        ? h("li", { class: "term sum" }, h("i"), number(smaller.value), bar(smaller.value, most),
            h("span", { class: "name" }, `${smaller.count} smaller ones `,
              hidden.length ? h("button", { type: "button", class: "quiet", onclick: onWhole }, `show ${hidden.length}`) : null))
        : null,
      rest.map(({ name, value }) =>
        h("li", { class: "term rest" }, h("i"), number(value), bar(value, most),
          h("span", { class: "name" }, h("b", null, name), h("span", { class: "hint" }, `  ${REST[name] ?? ""}`)))),
    ),
  ];
}

const pairs = (count) => `${count} pair${count === 1 ? "" : "s"}`;
const number = (value) => h("span", { class: "number" }, signed(value));

/** A bar to the right of the middle, or to the left where it is negative. */
export function bar(value, most) {
  const share = `${(50 * Math.abs(value)) / most}%`;
  return h("span", { class: value < 0 ? "bar less" : "bar", style: { "--share": share }, "aria-hidden": "true" });
}
