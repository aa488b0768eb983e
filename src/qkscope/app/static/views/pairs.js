// A layer's kept pairs: by feature, head, importance, or a word of either feature.

import { layerData } from "../data.js";
import { append, h } from "../dom.js";
import { fields } from "../fields.js";
import { pairColumns } from "../parts.js";
import { browse } from "../table.js";

export async function render(root, params, api) {
  const { layer, ...asked } = params;
  const found = await layerData(api, layer).pairs(asked);
  const link = (changes) => api.link("pairs", { ...params, ...changes });
  append(root, [
    h("h1", null, `Layer ${layer}, pairs`),
    fields(
      [
        { name: "text", words: "token or role", type: "search" },
        { name: "query", words: "query feature", unit: "−1: bias" },
        { name: "key", words: "key feature", unit: "−1: bias" },
        { name: "head", words: "head" },
        { name: "min_importance", words: "importance at least", unit: "mnat", scale: 1000 },
        { name: "bias", words: "without biases", type: "checkbox", on: "0" },
      ],
      params,
      link,
    ),
    browse(pairColumns(api, layer), found, params, api.run.rows, link),
  ]);
}
