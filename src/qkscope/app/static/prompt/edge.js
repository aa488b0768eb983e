// The edge that is chosen: what its head gives it in each pattern, and the query's attention over the text.

import { h } from "../dom.js";
import { told } from "../heat/maps.js";
import { token } from "../tokens.js";
import { signed } from "./account.js";

/** A position of a traced text, as nodes. */
export function at(n, tokens) {
  return n === tokens.length ? "the sink" : [`${n} `, token(tokens[n])];
}

/** What each pattern gives a cell, {name: text}. */
export function values({ true: model, pruned, reconstructed, edited }, i, j) {
  return {
    model: model.at(i, j).toFixed(3),
    transcoders: reconstructed.at(i, j).toFixed(3),
    "pruned map": pruned.at(i, j).toFixed(3),
    difference: signed(pruned.at(i, j) - model.at(i, j), 3),
    ...(edited && { edited: edited.at(i, j).toFixed(3) }),
  };
}

/** The edge in one line. */
export function edgeLine({ layer, head, query, key }, tokens, patterns) {
  const shown = h("span", { class: "values" }, told(values(patterns, query, key)));
  return [h("b", null, `${layer}.${head}`), " query ", at(query, tokens), " → key ", at(key, tokens), shown];
}

/** The text, shaded by the query's attention; `onPick(n)` is told a token that is clicked. */
export function strip({ query, key, against }, { tokens, special }, model, onPick) {
  const shaded = (text, n) => {
    const marks = { query: n === query, key: n === key, against: against.includes(n), special: special.includes(n) };
    return token(text, {
      class: Object.keys(marks).filter((mark) => marks[mark]).join(" "),
      style: { "--shade": Math.sqrt(model.at(query, n)).toFixed(3) },
      title: `${n}: ${model.at(query, n).toFixed(3)}`,
      onclick: () => onPick(n),
    });
  };
  const sink = model.sink && h("span", { class: "hint" }, ` sink ${model.at(query, tokens.length).toFixed(3)}`);
  const end = (text) => h(text.includes("\n") ? "br" : "wbr");
  return [tokens.map((text, n) => [shaded(text, n), end(text)]), sink];
}
