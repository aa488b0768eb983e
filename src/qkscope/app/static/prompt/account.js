// An account as signed bars: a score, or a log-odds, as the sum of pair terms and of what no pair says.

import { h } from "../dom.js";

const FIRST = 12; // terms that are shown at once
const REST = {
  dropped: "pairs that were not kept",
  error: "what the transcoders miss of the model",
  "soft cap": "the model's soft cap",
  sink: "the model's learned sink",
};

/**
 * An account's sum and rows. `isOn(term)` and `onSwitch(term, on)` are of a term's pair, `link(term)` is its address,
 * `detail(term)` says of which numbers it is made; `name` tells one account from another.
 */
export function account(found, { name, isOn, onSwitch, link, detail, whole, onWhole }) {
  const rest = Object.entries(found.rest).map(([what, value]) => ({ what, value }));
  const shown = whole ? found.terms : found.terms.slice(0, FIRST);
  const hidden = found.terms.slice(shown.length);
  const smaller = {
    count: hidden.length + found.smaller.count,
    value: hidden.reduce((sum, term) => sum + term.value, found.smaller.value),
  };
  const most = Math.max(...[...found.terms, ...rest, smaller].map((row) => Math.abs(row.value)), 1e-9);
  const row = (kind, first, value, words, numbers) =>
    h(
      "li",
      { class: `term ${kind}` },
      [first, number(value), bar(value, most), h("span", { class: "name" }, words), numbers],
    );

  function ofPair(term) {
    const words = `${term.query_name} → ${term.key_name}`;
    const onOff = h("input", {
      type: "checkbox",
      role: "switch",
      checked: isOn(term),
      "aria-label": `pair ${words} on`,
      title: "off: ablate this pair in the model",
      "data-term": `${name}.${term.query}.${term.key}`,
      onchange: (event) => onSwitch(term, event.target.checked),
    });
    const named = h("a", { href: link(term) }, h("bdi", null, term.query_name), " → ", h("bdi", null, term.key_name));
    return row(isOn(term) ? "pair" : "pair off", onOff, term.value, named, h("small", null, detail(term)));
  }

  const more = h("button", { type: "button", class: "quiet", onclick: onWhole }, `show ${hidden.length}`);
  const sum = [
    ` = ${signed(found.pairs)} from ${found.count} pair${found.count === 1 ? "" : "s"}`,
    rest.map(({ what, value }) => ` ${signed(value)} ${what}`),
  ];
  return [
    h("p", { class: "sum" }, h("b", null, signed(found.total)), sum),
    h(
      "ol",
      { class: "terms" },
      shown.map(ofPair),
      smaller.count
        ? row("smaller", h("i"), smaller.value, [`${smaller.count} smaller ones `, hidden.length ? more : null])
        : null,
      rest.map(({ what, value }) =>
        row("rest", h("i"), value, [h("b", null, what), h("span", { class: "hint" }, ` ${REST[what] ?? ""}`)]),
      ),
    ),
  ];
}

/** A number with its sign. */
export function signed(value, digits = 2) {
  return `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}`;
}

function number(value) {
  return h("span", { class: "number" }, signed(value));
}

/** A bar to the right of the middle, or to the left where it is negative. */
function bar(value, most) {
  const share = `${(50 * Math.abs(value)) / most}%`;
  return h("span", { class: value < 0 ? "bar less" : "bar", style: { "--share": share }, "aria-hidden": "true" });
}
