// A side's features: found by number, token or role, bounded by density and importance, sorted by any number.

import { layerData } from "../data.js";
import { h } from "../dom.js";
import { millinats, nameOf, number, OTHER, percent } from "../format.js";
import { fields } from "../fields.js";
import { append } from "../dom.js";
import { browse } from "../table.js";

export async function render(root, params, api) {
  const { layer } = params;
  const side = params.side === "key" ? "key" : "query";
  const data = layerData(api, layer);
  const { layer: _, side: __, ...asked } = params;
  const found = await data.features(side, asked);
  const link = (changes) => api.link("features", { ...params, side, ...changes });
  const labelled = data.about.has.truth;
  const columns = [
    {
      name: "feature",
      words: "feature",
      text: true,
      down: false,
      cell: (row) =>
        h("a", { class: "open feature", href: api.link("feature", { layer, side, feature: row.feature }) }, h("b", { class: side }, `${side[0]}${row.feature}`), " ", h("bdi", { class: "name" }, nameOf(row.name))),
    },
    { name: "importance", words: "mnat", title: "importance of its pairs, millinats of KL a query row", cell: (row) => millinats(row.importance) },
    { name: "density", words: "fires on", title: "share of held-out tokens", cell: (row) => percent(row.density) },
    { name: "pairs", words: "pairs", title: "kept pairs it is in", cell: (row) => number(row.pairs) },
    { name: "max_activation", words: "max", title: "largest activation", cell: (row) => number(row.max_activation) },
    { name: "mean_activation", words: "mean", title: "mean activation where it fires", cell: (row) => number(row.mean_activation) },
    {
      name: "by_position",
      words: "by position",
      title: "share of its activation's variance that the place in the sequence alone explains",
      cell: (row) => percent(row.by_position),
    },
    labelled && { name: "f1", words: "F1", title: "of the role it predicts best", cell: (row) => number(row.f1) },
  ].filter(Boolean);
  append(root, [
    h("h1", null, `Layer ${layer}, ${side} features`, " ", h("small", null, h("a", { href: api.link("features", { layer, side: OTHER[side] }) }, `${OTHER[side]} features`))),
    fields(
      [
        { name: "text", words: "token, role or number", type: "search" },
        { name: "min_density", words: "fires on at least", unit: "%", scale: 100 },
        { name: "max_density", words: "at most", unit: "%", scale: 100 },
        { name: "min_importance", words: "importance at least", unit: "mnat", scale: 1000 },
        { name: "live", words: "live only", type: "checkbox" },
      ],
      params,
      link,
    ),
    browse(columns, found, params, api.run.rows, link),
  ]);
}
