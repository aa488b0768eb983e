// One pair of features in a head: what each fires on, how strong the pair is by distance and by head, and where it is at
// work in text.

import { profile } from "../charts.js";
import { layerData } from "../data.js";
import { append, h } from "../dom.js";
import { finite, millinats, number, percent, rows, SIDES } from "../format.js";
import { beside, facts, featureLink, headLink, legend, pairColumns, signed } from "../parts.js";
import { example, pairExample } from "../snippets.js";
import { sortable } from "../table.js";

const SHOWN = 5; // examples of each feature

export async function render(root, params, api) {
  const { layer, query, key, head } = params;
  const data = layerData(api, layer);
  const numbers = { query, key };
  const [found, file, ...sides] = await Promise.all([
    data.pair(query, key, head),
    data.pairFile(query, key, head),
    ...SIDES.map((side) => (numbers[side] < 0 ? null : data.feature(side, numbers[side]))),
  ]);
  const heads = rows({ columns: found.heads });
  const here = heads.find((row) => row.head === head);
  const to = (other) => other && api.link("pair", { layer, query: other[0], key: other[1], head: other[2] });
  append(root, [
    h(
      "h1",
      null,
      beside(to(found.neighbours.before), to(found.neighbours.after)),
      " ",
      featureLink(api, layer, "query", query, found.names.query),
      " → ",
      featureLink(api, layer, "key", key, found.names.key),
      " ",
      h("small", null, "layer ", layer, ", ", headLink(api, layer, head)),
    ),
    facts(
      ["strength", signed(here.strength), "multiplies the two activations in a score"],
      ["from the weights", signed(here.weight_strength), "⟨W_dec, W_dec⟩, before the strengths were trained"],
      ["importance", `${millinats(here.importance)} mnat`, "what leaving it out costs, KL a query row"],
      ["rank", `${number(here.rank + 1)} of ${number(found.kept)}`],
      finite(found.distance?.position) && ["where it occurs", signed(found.distance.average), "M(i − j) averaged over the distances at which both features are active"],
      found.linked > 0 && ["along links", `${millinats(found.linked)} mnat`, "importance where the key is what the query's token, or the next one, answers to"],
    ),
    h("section", null, h("h2", null, "At work"), ...work(found, data)),
    byDistance(found, data, file),
    h(
      "div",
      { class: "halves" },
      SIDES.map((side, i) => h("section", null, h("h2", null, featureLink(api, layer, side, numbers[side], found.names[side])), fires(sides[i], side))),
    ),
    h("section", null, h("h2", null, "By head"), sortable(pairColumns(api, layer, []), heads, { sort: "head", order: "asc", first: 64, here: (row) => row.head === head })),
  ]);
}

function work(found, data) {
  if (!data.about.has.pair_examples) return [h("p", { class: "state" }, "No examples of pairs are stored; qkscope evaluate writes them.")];
  if (!found.examples.length) return [h("p", { class: "state" }, "Both features never fired where this pair changes the pattern.")];
  return [
    h("p", { class: "note" }, "The places where the pair changes the pattern most: the arc goes from the query to the key; the number is its effect on the pattern's weight there, to first order, of what that weight is."),
    legend([["query", "query"], ["key", "key"]]),
    h("ol", { class: "examples" }, found.examples.map(pairExample)),
  ];
}

/** Of a model with a rotary embedding. */
function byDistance({ distance }, data, file) {
  if (!data.about.has.distances) return null;
  if (!distance) return h("section", null, h("h2", null, "By distance"), h("p", { class: "state" }, "Stored for the layer's most important pairs only; this is none of them."));
  const used = distance.position !== null;
  return h(
    "section",
    null,
    h("h2", null, "By distance ", h("small", null, h("a", { href: file }, "data"))),
    h(
      "p",
      { class: "note" },
      "The rotary embedding makes a pair stronger or weaker with the distance from query to key. ",
      used
        ? ["Grey: where both features are active, by the squares of their activations. Where they are, it is ", signed(distance.average), ` on average (dashed); the distance explains ${percent(distance.position)} of its score, the features alone the rest.`]
        : "Its features were never active together on the text that was measured.",
    ),
    h("figure", { class: "distance" }, profile(distance)),
  );
}

function fires(feature, side) {
  if (!feature) return h("p", { class: "soft" }, "The side's bias: a feature that is always active.");
  const list = feature.examples.filter((row) => row.range < 0).slice(0, SHOWN);
  return [
    h("p", { class: "soft" }, `fires on ${number(100 * feature.density)} % of tokens, at most ${number(feature.max_activation)}`),
    list.length ? h("ol", { class: "examples" }, list.map((row) => example(row, side, feature.max_activation))) : h("p", { class: "state" }, "No examples are stored."),
  ];
}
