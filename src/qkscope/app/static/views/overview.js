// The run: what each layer's decomposition is worth, its layers side by side on the same scales.

import * as charts from "../charts.js";
import { layerData } from "../data.js";
import { append, h } from "../dom.js";
import { bounds, figure, finite, number, percent, SIDES } from "../format.js";
import { framed, legend } from "../parts.js";
import { clean } from "../tokens.js";

const NAMES = {
  map_pruned: "pruned map",
  transcoders: "transcoders",
  step1: "before tuning",
  mean: "mean pattern",
  uniform: "uniform",
  zero: "zero",
  shuffled: "shuffled pairs",
  random: "random",
  svd: "SVD of QK",
};
const KINDS = { map_pruned: "ours", transcoders: "ours2", step1: "ours2", shuffled: "control", random: "control", svd: "control" };
const NOTES = {
  shuffled: "Control: the kept pairs with their key features permuted.",
  random: "Control: frozen random dictionaries at the same L0.",
  svd: "Control: singular vectors of the model's own projections at the same L0.",
};

export async function render(root, params, api) {
  const layers = await Promise.all(
    api.run.layers.map(async ({ layer, has }) => ({ layer, report: has.report ? await layerData(api, layer).report() : null })),
  );
  const measured = layers.filter((one) => one.report);
  const config = Object.entries(api.run.config).map(([name, value]) => `${name} ${typeof value === "number" ? number(value, 6) : clean(value)}`);
  append(root, [
    h("h1", null, `QK decomposition of ${clean(api.run.model)}`),
    h("p", { class: "soft" }, config.join(" · ")),
    layers.length ? summary(layers, api) : h("p", { class: "state" }, "This run has no layer."),
    panels("Pattern KL", measured, klBars(measured), "KL(true ‖ reproduced) in nats a query row, mean over query rows and heads of held-out text. Outlined: controls.", api),
    panels("Cross-entropy increase", measured, lossBars(measured, "ce_increase"), "What the model's next-token loss gains when the layer's pattern is replaced, nats a token (log). Grey: ablations.", api),
    panels("KL of the model's output", measured, lossBars(measured, "logit_kl"), "KL(true ‖ patched logits), nats a token (log).", api),
    panels("Firing frequency", measured, densityCharts(measured), "Features by the share of tokens on which they fire: query side above the line, key side below.", api, legend([["query", "query features"], ["key", "key features"]])),
    panels("Pattern KL by pairs kept", measured, pairCurves(measured), "The final map cut to its most important pairs, without retraining, on held-out text. Dashed: all pairs, and a uniform pattern.", api),
    panels("Each head", measured, headCharts(measured, api), "Pattern KL by head on a log scale; full dot over the light one: pruning costs nothing. Top-1: query rows with the same top key under the pruned map.", api, legend([["ours", "pruned map"], ["ours2", "transcoders"], ["control", "uniform"]])),
    together(api.run.together),
  ]);
}

function summary(layers, api) {
  const head = ["layer", "L0 q / k", "live q / k", "dead q / k", "pairs", "of live pairs", "KL pruned, nats", "KL uniform", "CE increase, nats", "top-1", "data"];
  const two = (report, key, say) => SIDES.map((side) => say(report[key]?.[side]?.mean ?? report[key]?.[side])).join(" / ");
  const cells = ({ layer, report: r }) => [
    h("a", { href: api.link("features", { layer }) }, `layer ${layer}`),
    ...(r
      ? [
          two(r, "l0", number),
          SIDES.map((side) => `${number(r.live?.[side])} of ${number(r.width?.[side])}`).join(" / "),
          two(r, "dead", percent),
          number(r.pairs?.kept),
          percent(r.pairs?.share_of_live),
          figure(r.pattern_kl?.map_pruned),
          number(r.pattern_kl?.uniform?.mean),
          figure(r.ce_increase?.map_pruned),
          percent(r.top1?.map_pruned?.mean),
          h("a", { href: `data/${layer}/report.json` }, "report.json"),
        ]
      : [h("span", { class: "soft" }, "not measured yet: qkscope evaluate writes its report"), ...Array(9).fill("")]),
  ];
  return [
    h(
      "div",
      { class: "scroll" },
      h(
        "table",
        { class: "summary browse" },
        h("thead", null, h("tr", null, head.map((words) => h("th", null, words)))),
        h("tbody", null, layers.map((one) => h("tr", null, cells(one).map((cell) => h("td", null, cell))))),
      ),
    ),
    h("p", { class: "note" }, "Held-out text; in brackets 95 % intervals over sequences."),
  ];
}

function panels(title, layers, drawings, note, api, signs) {
  if (!drawings.some(Boolean)) return null;
  return h(
    "section",
    null,
    h("h2", null, title),
    h("p", { class: "note" }, note),
    signs,
    h("div", { class: "panels" }, layers.map(({ layer }, i) => drawings[i] && framed(`layer ${layer}`, drawings[i]))),
  );
}

const tops = (rows) => rows.flatMap(({ figure: f }) => [f?.mean, ...(bounds(f) ?? [])]).filter(finite);

function barRows(found) {
  return Object.keys(NAMES)
    .filter((name) => found?.[name])
    .map((name) => ({ label: NAMES[name], figure: found[name], kind: KINDS[name], note: NOTES[name] }));
}

function klBars(layers) {
  const all = layers.map(({ report }) => {
    const controls = Object.entries(report.controls ?? {}).map(([name, one]) => [name, one?.pattern_kl]);
    return barRows({ ...report.pattern_kl, ...Object.fromEntries(controls) });
  });
  const most = d3.max(all.flatMap(tops)) || 1;
  return all.map((rows) => rows.length && charts.bars(rows, { label: "Pattern KL", unit: "nats a query row", domain: [0, most] }));
}

function lossBars(layers, key) {
  const all = layers.map(({ report }) => barRows(report[key]));
  const means = all.flatMap((rows) => rows.map((row) => row.figure.mean)).filter((mean) => finite(mean) && mean > 0);
  if (!means.length) return [];
  const domain = [10 ** Math.floor(Math.log10(d3.min(means) / 1.5)), d3.max(all.flatMap(tops)) * 1.05];
  return all.map((rows) => rows.length && charts.bars(rows, { label: key, unit: "nats a token (log)", log: true, domain }));
}

function densityCharts(layers) {
  const found = layers.map(({ report }) => report.log10_density);
  const most = d3.max(found.filter(Boolean).flatMap((one) => [...one.query, ...one.key])) || 1;
  const low = d3.min(found.filter(Boolean).flatMap((one) => one.edges.filter((_, i) => one.query[i] || one.key[i]))) ?? -4;
  return found.map((one) => one && charts.densities(one, { most, low: Math.min(low, -3) }));
}

function pairCurves(layers) {
  const all = layers.map(({ report }) => (report.pairs?.curve ?? []).map((p) => [p.kept, p.pattern_kl.mean, bounds(p.pattern_kl)]).filter((p) => p[0] > 0 && p[1] > 0));
  const points = all.flat();
  if (points.length < 2) return [];
  const uniform = layers.map(({ report }) => report.pattern_kl?.uniform?.mean).filter(finite);
  const pruned = layers.map(({ report }) => report.pattern_kl?.transcoders?.mean).filter(finite);
  const xDomain = [d3.min(points, (p) => p[0]) / 1.2, d3.max(points, (p) => p[0]) * 1.2];
  const yDomain = [d3.min([...points.map((p) => p[1]), ...pruned]) / 1.2, d3.max([...points.map((p) => p[1]), ...uniform]) * 1.2];
  return all.map(
    (own, i) =>
      own.length &&
      charts.curves([{ name: "pattern KL", kind: "ours", points: own }], {
        label: "Pattern KL by pairs kept",
        xLabel: "pairs kept (log)",
        yLabel: "nats (log)",
        guides: { transcoders: layers[i].report.pattern_kl?.transcoders?.mean, uniform: layers[i].report.pattern_kl?.uniform?.mean },
        xDomain,
        yDomain,
      }),
  );
}

function headCharts(layers, api) {
  const all = layers.map(({ report: r }) => {
    const lists = Object.fromEntries(["uniform", "transcoders", "map_pruned"].map((name) => [name, r.pattern_kl?.[name]?.per_head ?? []]));
    return d3.range(d3.max(Object.values(lists), (list) => list.length) ?? 0).map((head) => ({
      head,
      kl: Object.fromEntries(Object.entries(lists).map(([name, list]) => [name, list[head]?.mean])),
      top1: r.top1?.map_pruned?.per_head?.[head]?.mean,
      pairs: r.pairs?.per_head?.[head],
    }));
  });
  const values = all.flat().flatMap((row) => Object.values(row.kl)).filter((value) => finite(value) && value > 0);
  if (!values.length) return [];
  const domain = [d3.min(values) / 1.3, d3.max(values) * 1.3];
  return all.map((rows, i) => rows.length && charts.headDots(rows, { domain, href: (head) => api.link("head", { layer: layers[i].layer, head }) }));
}

function together(found) {
  if (!found?.ce_increase) return null;
  return h(
    "section",
    null,
    h("h2", null, "All layers at once"),
    h("p", { class: "note" }, `The patterns of layers ${found.layers.join(", ")} replaced together, values kept, on ${number(found.tokens)} held-out tokens.`),
    h(
      "div",
      { class: "scroll" },
      h(
        "table",
        { class: "summary" },
        h("thead", null, h("tr", null, ["pattern", "CE increase, nats a token", "KL of the model's output"].map((words) => h("th", null, words)))),
        h("tbody", null, Object.keys(found.ce_increase).map((name) => h("tr", null, h("td", null, NAMES[name] ?? name), h("td", null, figure(found.ce_increase[name])), h("td", null, figure(found.logit_kl?.[name]))))),
      ),
    ),
  );
}
