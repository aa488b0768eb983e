// Parts that several views share: links to features and pairs, columns of pairs, the way to the next one.

import { h } from "./dom.js";
import { millinats, nameOf, number, short } from "./format.js";

/** A feature by its number and what it goes by, as a link; the bias is no link. */
export function featureLink(api, layer, side, feature, name, attributes = {}) {
  const words = [h("b", { class: side }, short(side, feature)), " ", h("bdi", { class: "name" }, feature < 0 ? "" : nameOf(name))];
  if (feature < 0) return h("span", { class: "feature" }, words);
  const classes = ["feature", attributes.class].filter(Boolean).join(" ");
  return h("a", { ...attributes, class: classes, href: api.link("feature", { layer, side, feature }) }, words);
}

export function headLink(api, layer, head) {
  return h("a", { href: api.link("head", { layer, head }) }, `H${head}`);
}

/** Columns of rows of the pair table; `sides` are the features that are said. */
export function pairColumns(api, layer, sides = ["query", "key"]) {
  return [
    {
      name: "rank",
      words: "#",
      title: "rank by importance among the layer's pairs",
      down: false,
      cell: (row) =>
        h("a", { class: "open", href: api.link("pair", { layer, query: row.query, key: row.key, head: row.head }), title: "open the pair" }, number(row.rank + 1)),
    },
    ...sides.map((side) => ({
      name: side,
      words: `${side} feature`,
      text: true,
      down: false,
      cell: (row) => featureLink(api, layer, side, row[side], row[`${side}_name`]),
    })),
    { name: "head", words: "head", down: false, cell: (row) => headLink(api, layer, row.head) },
    {
      name: "strength",
      words: "strength",
      title: "multiplies the two activations in a score; with a rotary embedding, a factor on a product that varies with distance",
      cell: (row) => signed(row.strength),
    },
    {
      name: "importance",
      words: "mnat",
      title: "importance: what leaving the pair out costs, to second order, in millinats of KL a query row",
      cell: (row) => millinats(row.importance),
    },
  ];
}

/** A number whose sign can be seen: orange excites, blue inhibits. */
export function signed(value) {
  return h("span", { class: value < 0 ? "minus" : "plus" }, (value > 0 ? "+" : "") + number(value));
}

/** Links to the ones before and after, which j and k follow too. */
export function beside(before, after) {
  const one = (href, rel, words) =>
    href ? h("a", { href, rel, title: rel === "next" ? "next (j)" : "previous (k)" }, words) : h("span", { class: "off" }, words);
  return h("span", { class: "beside" }, one(before, "prev", "‹"), " ", one(after, "next", "›"));
}

/** The numbers that say the most, in a row. */
export function facts(...entries) {
  return h(
    "dl",
    { class: "facts" },
    entries.filter(Boolean).map(([words, value, title]) => h("div", { title }, h("dt", null, words), h("dd", null, value))),
  );
}

export function framed(title, drawing, note, legend) {
  return drawing && h("figure", null, h("figcaption", null, title), legend, drawing, note ? h("p", { class: "note" }, note) : null);
}

export function legend(entries) {
  return h("p", { class: "legend" }, entries.map(([kind, words]) => h("span", null, h("i", { class: `mark ${kind}` }), words)));
}
