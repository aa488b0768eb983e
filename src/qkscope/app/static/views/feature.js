// One feature: what it fires on, how strongly and where, and which features of the other side its pairs look for.

import { columns } from "../charts.js";
import { layerData } from "../data.js";
import { append, h } from "../dom.js";
import { millinats, nameOf, number, OTHER, percent, rows } from "../format.js";
import { beside, facts, framed, pairColumns } from "../parts.js";
import { example } from "../snippets.js";
import { sortable } from "../table.js";
import { clean, quoted, token } from "../tokens.js";

const RANGES = {
  "-1": "Strongest",
  0: "Drawn: within an octave of the maximum",
  1: "Drawn: one octave below",
  2: "Drawn: two octaves below",
  3: "Drawn: three octaves below and weaker",
};

export async function render(root, params, api) {
  const { layer, side, feature } = params;
  const data = layerData(api, layer);
  const found = await data.feature(side, feature);
  const to = (at) => (at >= 0 && at < data.about.numbers[side] ? api.link("feature", { layer, side, feature: at }) : null);
  append(root, [
    h(
      "h1",
      null,
      beside(to(feature - 1), to(feature + 1)),
      " ",
      h("b", { class: side }, `${side} feature ${feature}`),
      " ",
      h("bdi", { class: "name" }, nameOf(found.name)),
      " ",
      h("small", null, `layer ${layer}`),
    ),
    facts(
      ["fires on", percent(found.density), "of held-out tokens"],
      ["max", number(found.max_activation), "largest activation"],
      ["mean", number(found.mean_activation), "where it fires"],
      ["importance", `${millinats(found.importance)} mnat`, "of all its pairs, KL a query row"],
      ["pairs", number(found.partners.total)],
      found.by_position !== undefined && ["by position", percent(found.by_position), "share of its activation's variance that the place in the sequence alone explains"],
    ),
    found.live === false ? h("p", { class: "state" }, "It never fired on the held-out text.") : null,
    h("div", { class: "two" }, h("div", null, examples(found, side)), h("aside", null, role(found), histogram(found, side), tokens(found), positions(found, side))),
    partners(found, layer, side, api),
  ]);
}

function examples(found, side) {
  if (!found.examples.length) return h("p", { class: "state" }, "No examples are stored.");
  const top = found.max_activation || Math.max(...found.examples.map((row) => row.activation));
  return d3
    .groups(found.examples, (row) => row.range)
    .sort((a, b) => a[0] - b[0])
    .map(([range, list]) =>
      h("section", null, h("h2", null, RANGES[range] ?? `Range ${range}`, " ", h("small", null, number(list.length))), h("ol", { class: "examples" }, list.map((row) => example(row, side, top)))),
    );
}

function role({ known }) {
  if (!known) return null;
  return h(
    "section",
    null,
    h("h2", null, "Role it predicts best"),
    h("p", { class: "role" }, h("b", null, clean(known.label.replace("“ ", "“␣")))),
    facts(["precision", percent(known.precision)], ["recall", percent(known.recall)], ["F1", number(known.f1)]),
  );
}

function histogram(found, side) {
  const counts = found.histogram;
  const [first, last] = [counts?.findIndex((n) => n > 0) ?? -1, counts?.findLastIndex((n) => n > 0) ?? -1];
  if (first < 0) return null;
  const edge = (i) => 2 ** ((i - 32) / 2);
  const list = d3.range(Math.max(first - 1, 0), Math.min(last + 2, counts.length)).map((i) => ({
    value: counts[i],
    label: i % 2 ? "" : number(edge(i)),
    tip: `${number(counts[i])} tokens with an activation of ${number(edge(i))} to ${number(edge(i + 1))}`,
  }));
  return framed("Activations", columns(list, { label: "histogram of activations", kind: side, unit: "activation (log), tokens" }));
}

function positions({ positions: found }, side) {
  if (!found?.length) return null;
  const list = found.map((value, i) => {
    const [from, to] = [2 ** i - 1, 2 ** (i + 1) - 2];
    return { value, label: String(from), tip: `mean activation ${number(value)} at places ${from === to ? from : `${from} to ${to}`} of a sequence` };
  });
  return framed("By position", columns(list, { label: "mean activation by position", kind: side, unit: "place in the sequence, mean activation" }));
}

function tokens(found) {
  const list = found.top_tokens;
  if (!list?.length) return null;
  const most = Math.max(...found.top_token_counts);
  return h(
    "section",
    null,
    h("h2", null, "Tokens it fires on", found.token_share < 1 ? h("small", { title: "counts are estimated from this share of its firings" }, ` from ${percent(found.token_share)}`) : null),
    h(
      "table",
      { class: "tokens-table" },
      h("tbody", null, list.map((text, i) =>
        h("tr", { "data-tip": `${quoted(text)}: fires ${number(found.top_token_counts[i])} times, mean activation ${number(found.top_token_activations[i])}` },
          h("td", null, token(text)),
          h("td", { class: "bar" }, h("i", { class: found.side, style: { width: `${(100 * found.top_token_counts[i]) / most}%` } })),
          h("td", { class: "number" }, number(found.top_token_counts[i])),
          h("td", { class: "number soft" }, number(found.top_token_activations[i])),
        ),
      )),
    ),
  );
}

function partners(found, layer, side, api) {
  const { total } = found.partners;
  const words = side === "query" ? "Key features it looks for" : "Query features that look for it";
  const list = rows(found.partners);
  return h(
    "section",
    null,
    h("h2", null, words, " ", h("small", null, h("a", { href: api.link("pairs", { layer, [side]: found.feature }) }, total > list.length ? `the ${list.length} most important of ${number(total)} pairs` : `${number(total)} pairs`))),
    list.length ? sortable(pairColumns(api, layer, [OTHER[side]]), list, { sort: "importance" }) : h("p", { class: "state" }, "No pair was kept."),
  );
}
