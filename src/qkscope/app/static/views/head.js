// One head: its strongest pairs, its pattern on the stored text, and the heads that rest on the same pairs.

import { layerData } from "../data.js";
import { append, fill, h } from "../dom.js";
import { figure, millinats, number, percent, rows } from "../format.js";
import { Maps } from "../heat/maps.js";
import { beside, facts, featureLink, headLink, pairColumns, signed } from "../parts.js";
import { sortable } from "../table.js";
import { clean, token } from "../tokens.js";

export async function render(root, params, api) {
  const { layer, head } = params;
  const data = layerData(api, layer);
  const [found, pattern] = await Promise.all([data.head(head), data.about.has.patterns ? data.pattern(head).catch(() => null) : null]);
  const to = (at) => (at >= 0 && at < found.heads ? api.link("head", { layer, head: at }) : null);
  append(root, [
    h("h1", null, beside(to(head - 1), to(head + 1)), ` Head ${head} `, h("small", null, `layer ${layer}`)),
    h("nav", { class: "heads", "aria-label": "Heads" }, d3.range(found.heads).map((n) => h("a", { href: to(n), "aria-current": n === head ? "page" : null }, `H${n}`))),
    facts(
      ["pairs", number(found.pairs)],
      ["importance", `${millinats(found.importance)} mnat`, "of all its pairs, KL a query row"],
      ["effective pairs", number(found.effective), "exp of the entropy of the pairs' shares of importance: n equal pairs count as n"],
      ["top 5 hold", percent(found.top?.["5"]), "share of the head's importance"],
      found.pattern_kl.map_pruned && ["KL, pruned map", figure(found.pattern_kl.map_pruned), "nats a query row"],
      found.pattern_kl.transcoders && ["KL, transcoders", number(found.pattern_kl.transcoders.mean)],
      found.top1.map_pruned && ["top-1", percent(found.top1.map_pruned.mean), "query rows with the same top key"],
    ),
    maps(pattern, api.signal),
    roles(found.roles),
    h(
      "section",
      null,
      h("h2", null, "Strongest pairs ", h("small", null, h("a", { href: api.link("pairs", { layer, head }) }, `all ${number(found.strongest.total)}`))),
      sortable(pairColumns(api, layer).filter((column) => column.name !== "head"), rows(found.strongest), { sort: "importance" }),
    ),
    alike(found, layer, data, api),
  ]);
}

function maps(pattern, signal) {
  if (!pattern) return h("p", { class: "state" }, "No pattern is stored for this head.");
  const { tokens, pruned, transcoders } = pattern;
  const causal = pattern.true.every((row, i) => row.slice(i + 1).every((value) => value === 0));
  const kinds = {
    true: ["Model", "the head’s pattern"],
    transcoders: ["Transcoders", "from q̂ and k̂"],
    pruned: ["Pruned map", "from the kept pairs"],
    difference: ["Difference", "pruned map − model"],
  };
  const minus = (i, j) => pruned[i][j] - pattern.true[i][j];
  const shown = new Maps(kinds, {
    values: (i, j) => ({ model: number(pattern.true[i][j]), transcoders: number(transcoders[i][j]), "pruned map": number(pruned[i][j]), difference: number(minus(i, j)) }),
    onPick: (i, j) => shown.choose(i, j),
    signal,
  });
  const of = (weights) => (i, j) => weights[i][j];
  shown.show({ tokens, causal, true: of(pattern.true), transcoders: of(transcoders), pruned: of(pruned), difference: minus });
  return h(
    "section",
    null,
    h("h2", null, "Pattern on a held-out text"),
    h("p", { class: "note" }, "Queries run down, keys across."),
    h("p", { class: "tokens", dir: "auto" }, tokens.map((text, i) => [h("wbr"), token(text, { "data-tip": `position ${i}` })])),
    shown.nodes,
  );
}

function roles(list) {
  if (!list.length) return null;
  const columns = [
    { name: "query", words: "from", text: true, fixed: true, cell: (row) => clean(row.query) },
    { name: "key", words: "to", text: true, fixed: true, cell: (row) => clean(row.key) },
    { name: "attention", words: "attention", title: "share of all its attention", cell: (row) => percent(row.attention) },
    { name: "uniform", words: "uniform", title: "the same share if it attended evenly", cell: (row) => percent(row.uniform) },
    { name: "loss", words: "CE without, mnat", title: "what the model's loss gains when the head may not", cell: (row) => figure(row.ce_increase, 1000) },
  ];
  const shown = list.map((row) => ({ ...row, loss: row.ce_increase?.mean }));
  return h("section", null, h("h2", null, "Between which roles it attends"), sortable(columns, shown, { sort: "loss" }));
}

function alike(found, layer, data, api) {
  const chance = h("p", { class: "note", role: "status" }, "What chance gives is being drawn …");
  data.heads().then(
    ({ heads, clusters, draws }) => {
      if (!draws) return fill(chance, "What chance gives is not drawn for so many pairs; qkscope heads does.");
      const own = heads.find((one) => one.head === found.head);
      const others = clusters.find((cluster) => cluster.includes(found.head))?.filter((n) => n !== found.head) ?? [];
      fill(
        chance,
        own?.chance
          ? `Its likest head has ${number(own.similarity)}; by chance, each head keeping its features, ${number(own.chance.kept.mean)} [${own.chance.kept.ci95.map((v) => number(v)).join(", ")}] (${draws} draws). ${own.above ? "That is above chance." : "That is not above chance."}`
          : "A layer of one head has no other.",
        others.length ? [" Together with ", others.map((n) => [headLink(api, layer, n), " "]), "it forms a cluster beyond chance."] : " It is in no cluster beyond chance.",
      );
    },
    () => fill(chance, "What chance gives could not be read."),
  );
  const shared = (row) => {
    const list = rows(row);
    return h(
      "details",
      { open: row === found.like[0] },
      h("summary", null, headLink(api, layer, row.head), ` similarity ${number(row.similarity)}, ${number(row.shared)} pairs of features shared`),
      sortable(
        [
          ...["query", "key"].map((side) => ({ name: side, words: `${side} feature`, text: true, down: false, cell: (r) => featureLink(api, layer, side, r[side], r[`${side}_name`]) })),
          { name: "strength", words: `strength, H${found.head}`, cell: (r) => signed(r.strength) },
          { name: "importance", words: `mnat, H${found.head}`, cell: (r) => millinats(r.importance) },
          { name: "importance_there", words: `mnat, H${row.head}`, cell: (r) => millinats(r.importance_there) },
        ],
        list,
      ),
    );
  };
  return h(
    "section",
    null,
    h("h2", null, "Heads most like it"),
    h("p", { class: "note" }, "Similarity: cosine of the two heads' importances over pairs of two features, biases left out."),
    chance,
    found.like.length ? found.like.map(shared) : h("p", { class: "state" }, "It shares no pair with another head."),
  );
}
