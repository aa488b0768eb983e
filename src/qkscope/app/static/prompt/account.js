// An account as signed bars: a score, or a log-odds, as the sum of pair terms and of what no pair says.

import { h } from "../dom.js";
import { factorOf } from "./address.js";

const FIRST = 12; // terms that are shown at once
const REST = {
  dropped: "pairs that were not kept",
  error: "what the transcoders miss of the model",
  "soft cap": "the model's soft cap",
  sink: "the model's learned sink",
};

/**
 * An account's sum and rows. `factor(term)` and `onScale(term, factor)` are of a term's pair, `link(term)` is its
 * address, `detail(term)` says of which numbers it is made; `name` tells one account from another.
 */
export function account(found, { name, factor, onScale, link, detail, whole, onWhole }) {
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
    const [times, place] = [factor(term), `${name}.${term.query}.${term.key}`];
    const onOff = h("input", {
      type: "checkbox",
      role: "switch",
      checked: times !== 0,
      "aria-label": `pair ${words} on`,
      title: "off: ablate this pair in the model",
      "data-place": place,
      onchange: (event) => onScale(term, event.target.checked ? 1 : 0),
    });
    const named = h("a", { href: link(term) }, h("bdi", null, term.query_name), " → ", h("bdi", null, term.key_name));
    const scale = factorField(times, { words, place: `${place}.times`, onScale: (value) => onScale(term, value) });
    const kind = times === 0 ? "pair off" : times === 1 ? "pair" : "pair scaled";
    return row(kind, onOff, term.value, named, h("small", null, detail(term), " · ", scale));
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

/** The number that a pair is multiplied by in the model, to be typed; `onScale(factor)` is told another one. */
export function factorField(factor, { words, place, onScale }) {
  const input = h("input", {
    type: "text",
    inputmode: "decimal",
    class: "times",
    value: String(factor).replace("-", "−"),
    maxlength: 9,
    "aria-label": `times pair ${words}`,
    title: "what the pair is multiplied by in the model: 1 as it is, 0 off, 2 doubled, −1 turned round",
    "data-place": place,
    onchange: () => {
      const typed = factorOf(input.value);
      if (typed === null) input.value = String(factor).replace("-", "−");
      else onScale(typed);
    },
  });
  return h("label", { class: factor === 1 ? null : "changed" }, "edit × ", input);
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
