// Figures as SVG, 320 units wide, with d3's scales. Colours are classes (page.css): `ours` and `ours2`, `base` for
// ablations, `control` outlined, `query` and `key`; nothing is told by colour alone. Every mark says its numbers (data-tip).

import { s } from "./dom.js";
import { bounds, finite, number } from "./format.js";

const WIDTH = 320;

function svg(height, label, ...children) {
  return s("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": label, class: "chart" }, children);
}

const text = (x, y, words, anchor = "start", kind = "tick") => s("text", { x, y, "text-anchor": anchor, class: kind }, words);
const line = (x1, y1, x2, y2, kind) => s("line", { x1, y1, x2, y2, class: kind });

/** Round values of a log scale, at most about `most`. */
function logTicks([low, high], most) {
  const decades = d3.range(Math.floor(Math.log10(low)), Math.ceil(Math.log10(high)) + 1);
  for (const factors of [[1, 2, 5], [1, 3], [1]]) {
    const ticks = decades.flatMap((d) => factors.map((m) => m * 10 ** d)).filter((t) => t >= low * 0.999 && t <= high * 1.001);
    if (ticks.length <= most + 1 && ticks.length > 1) return ticks;
  }
  const ticks = decades.map((d) => 10 ** d).filter((t) => t >= low * 0.999 && t <= high * 1.001);
  const step = Math.ceil(ticks.length / most);
  return ticks.length > 1 ? ticks.filter((_, i) => i % step === 0) : d3.ticks(low, high, most);
}

function axis(scale, log, most) {
  return log ? logTicks(scale.domain(), most) : scale.ticks(most);
}

const tick = (value) => (Math.abs(value) >= 1000 ? d3.format(".2~s")(value) : number(value));

/** Horizontal bars {label, figure, kind, note} with 95 % whiskers, on a scale that panels share (`domain`). */
export function bars(rows, { label, unit, log = false, domain }) {
  const [left, right, step] = [92, 262, 19];
  const height = rows.length * step + 30;
  const scale = (log ? d3.scaleLog() : d3.scaleLinear()).domain(domain).range([left, right]).clamp(true);
  const bottom = rows.length * step + 2;
  return svg(
    height,
    label,
    axis(scale, log, 3).map((t) => [line(scale(t), 0, scale(t), bottom, "grid"), text(scale(t), bottom + 11, tick(t), "middle")]),
    text((left + right) / 2, bottom + 24, unit, "middle"),
    rows.map(({ label: words, figure, kind = "base", note }, i) => {
      const y = i * step + step / 2;
      const shown = finite(figure?.mean) && (figure.mean > 0 || !log);
      const ends = bounds(figure)?.map(scale);
      const said = `${words}: ${number(figure?.mean, 5)} ${unit}${bounds(figure) ? `, 95 % interval ${bounds(figure).map((v) => number(v, 4)).join(" to ")}` : ""}${note ? `. ${note}` : ""}`;
      return s(
        "g",
        { "data-tip": said, tabindex: "-1" },
        s("rect", { x: 0, y: y - step / 2, width: WIDTH, height: step, class: "hit" }),
        text(left - 5, y + 4, words, "end", "words"),
        shown && s("rect", { x: left, y: y - 5.5, width: Math.max(scale(figure.mean) - left, 1), height: 11, class: kind }),
        shown && ends && line(ends[0], y, ends[1], y, "whisker"),
        text(right + 5, y + 4, finite(figure?.mean) ? number(figure.mean) : "–", "start", "words"),
      );
    }),
    line(left, 0, left, bottom, "rule"),
  );
}

/** Features by log10 of their density, the query side upwards, the key side downwards. */
export function densities({ edges, query, key }, { most, low }) {
  const [left, right, middle, tall] = [26, 314, 66, 60];
  const x = d3.scaleLinear().domain([low, 0]).range([left, right]).clamp(true);
  const y = d3.scaleLinear().domain([0, most]).range([0, tall]);
  const bar = (side, counts, sign) =>
    counts.map((count, i) => {
      if (!count) return null;
      const [a, b] = [x(edges[i]), x(edges[i + 1])];
      const said = `${count} ${side} features fire on ${number(100 * 10 ** edges[i])} to ${number(100 * 10 ** edges[i + 1])} % of tokens`;
      return s("rect", { x: a + 0.5, y: sign < 0 ? middle - y(count) : middle, width: Math.max(b - a - 1, 0.5), height: y(count), class: side, "data-tip": said });
    });
  return svg(
    154,
    "features by firing frequency",
    d3.range(Math.ceil(low), 1).map((t) => [line(x(t), 4, x(t), 128, "grid"), text(x(t), 139, `${number(100 * 10 ** t)} %`, t === 0 ? "end" : "middle")]),
    [most].map((t) => [text(left - 4, middle - y(t) + 8, number(t), "end"), text(left - 4, middle + y(t), number(t), "end")]),
    bar("query", query, -1),
    bar("key", key, 1),
    line(left, middle, right, middle, "rule"),
    text((left + right) / 2, 152, "share of tokens on which a feature fires (log)", "middle"),
  );
}

/** Lines of points [x, y, ci]; series {name, kind, points}; guides {name: y}. */
export function curves(series, { label, xLabel, yLabel, guides = {}, xDomain, yDomain, yLog = true }) {
  const [left, right, top, bottom] = [38, 310, 14, 138];
  const x = d3.scaleLog().domain(xDomain).range([left, right]).clamp(true);
  const y = (yLog ? d3.scaleLog() : d3.scaleLinear()).domain(yDomain).range([bottom, top]).clamp(true);
  return svg(
    168,
    label,
    text(0, 8, yLabel),
    axis(x, true, 4).map((t) => [line(x(t), top, x(t), bottom, "grid"), text(x(t), bottom + 12, tick(t), "middle")]),
    axis(y, yLog, 4).map((t) => [line(left, y(t), right, y(t), "grid"), text(left - 4, y(t) + 3.5, tick(t), "end")]),
    Object.entries(guides)
      .filter(([, value]) => finite(value) && value >= yDomain[0] && value <= yDomain[1])
      .map(([name, value]) => [line(left, y(value), right, y(value), "dash"), text(right, y(value) - 3, name, "end")]),
    series.map(({ name, kind, points }) => [
      s("path", { class: `line ${kind}`, d: d3.line((p) => x(p[0]), (p) => y(p[1]))(points) }),
      points.map(([a, b, ci]) => [
        ci && line(x(a), y(Math.max(ci[0], yDomain[0])), x(a), y(ci[1]), "whisker"),
        s("circle", { cx: x(a), cy: y(b), r: 3.5, class: kind, "data-tip": `${name}: ${number(b, 4)} with ${number(a)} pairs${ci ? `, 95 % interval ${ci.map((v) => number(v)).join(" to ")}` : ""}` }),
      ]),
    ]),
    text((left + right) / 2, bottom + 27, xLabel, "middle"),
  );
}

/** A row a head: pattern KL of {uniform, transcoders, map_pruned} as dots, top-1 as a number; a click opens the head. */
export function headDots(rows, { domain, href }) {
  const [left, right, step] = [34, 236, 17];
  const bottom = rows.length * step + 2;
  const x = d3.scaleLog().domain(domain).range([left, right]).clamp(true);
  const words = { uniform: "uniform", transcoders: "transcoders", map_pruned: "pruned map" };
  const kinds = { uniform: "control", transcoders: "ours2", map_pruned: "ours" };
  return svg(
    bottom + 30,
    "pattern KL by head",
    logTicks(domain, 4).map((t) => [line(x(t), 0, x(t), bottom, "grid"), text(x(t), bottom + 11, tick(t), "middle")]),
    text((left + right) / 2, bottom + 24, "KL, nats (log)", "middle"),
    text(278, bottom + 11, "top-1", "end"),
    text(WIDTH - 2, bottom + 11, "pairs", "end"),
    rows.map(({ head, kl, top1, pairs }, i) => {
      const y = i * step + step / 2;
      const said = [`head ${head}`, ...Object.entries(words).map(([name, w]) => finite(kl[name]) && `KL ${w} ${number(kl[name], 4)}`), finite(top1) && `top-1 of the pruned map ${number(100 * top1)} %`, finite(pairs) && `${number(pairs)} pairs`].filter(Boolean).join(", ");
      return s(
        "a",
        { href: href(head), "data-tip": said },
        s("rect", { x: 0, y: y - step / 2, width: WIDTH, height: step, class: "hit" }),
        text(left - 8, y + 4, `H${head}`, "end", "words"),
        line(left, y, right, y, "grid"),
        Object.keys(words).map((name) => finite(kl[name]) && kl[name] > 0 && s("circle", { cx: x(kl[name]), cy: y, r: 4, class: kinds[name] })),
        text(278, y + 4, finite(top1) ? `${number(100 * top1)} %` : "–", "end", "words"),
        text(WIDTH - 2, y + 4, number(pairs), "end", "words"),
      );
    }),
  );
}

/** Upright bars {value, tip, label}; labels stand under some of them. */
export function columns(rows, { label, kind, unit, height = 92 }) {
  const [left, right, top] = [30, 316, 12];
  const bottom = height - 28;
  const x = d3.scaleBand().domain(d3.range(rows.length)).range([left, right]).padding(0.08);
  const most = d3.max(rows, (row) => row.value) || 1;
  const y = d3.scaleLinear().domain([0, most]).range([bottom, top]);
  const every = Math.ceil(rows.filter((row) => row.label).length / 7);
  let labelled = 0;
  return svg(
    height,
    label,
    y.ticks(2).map((t) => [line(left, y(t), right, y(t), "grid"), text(left - 4, y(t) + 3.5, tick(t), "end")]),
    rows.map((row, i) => [
      row.value ? s("rect", { x: x(i), y: y(row.value), width: x.bandwidth(), height: Math.max(bottom - y(row.value), 0.5), class: kind }) : null,
      s("rect", { x: x(i), y: 0, width: x.step(), height: bottom, class: "hit", "data-tip": row.tip }),
      row.label && labelled++ % every === 0 ? text(x(i) + x.bandwidth() / 2, bottom + 11, row.label, "middle") : null,
    ]),
    line(left, bottom, right, bottom, "rule"),
    text((left + right) / 2, height - 2, unit, "middle"),
  );
}

/** A pair's M(i − j) in bins of distances, its extremes there as a band and its use as a ground of bars, by log distance. */
export function profile({ edges, mean, low, high, use, average }) {
  const [left, right, top, bottom] = [38, 314, 19, 132];
  const last = edges.at(-1);
  const x = d3.scaleLog().domain([1, last + 1]).range([left, right]);
  const [from, to] = [(i) => x(edges[i] + 1), (i) => x(edges[i + 1] + 1)];
  const y = d3.scaleLinear().domain(d3.extent([0, ...low, ...high])).nice(4).range([bottom, top]);
  const share = d3.scaleLinear().domain([0, d3.max(use) || 1]).range([bottom, top + 10]);
  const middle = (i) => (from(i) + to(i)) / 2;
  const at = d3.range(mean.length);
  const plus = (value) => (value > 0 ? "+" : "") + number(value);
  const ticks = [0, 1, 3, 7, 15, 31, 63, 127, 255, 511, 1023, 2047, 4095, 8191].filter((d) => d < last);
  const every = Math.ceil(ticks.length / 8);
  const said = (i) => {
    const [first, end] = [edges[i], edges[i + 1] - 1];
    const range = end > first ? `, ${plus(low[i])} to ${plus(high[i])}` : "";
    return `distance ${first === end ? first : `${first}–${end}`}: ${plus(mean[i])}${range}; ${number(100 * use[i])} % of where it occurs`;
  };
  return svg(
    168,
    "strength by distance",
    text(0, 8, "M(i − j), a factor on both activations, before the scale"),
    at.map((i) => s("rect", { x: from(i), y: share(use[i]), width: Math.max(to(i) - from(i) - 0.6, 0.4), height: bottom - share(use[i]), class: "use" })),
    y.ticks(4).map((t) => [line(left, y(t), right, y(t), "grid"), text(left - 4, y(t) + 3.5, tick(t), "end")]),
    ticks.filter((_, n) => n % every === 0).map((d) => [line(x(d + 1), bottom, x(d + 1), bottom + 3, "rule"), text(x(d + 1), bottom + 13, tick(d), "start")]),
    s("path", { class: "band", d: d3.area(middle, (i) => y(low[i]), (i) => y(high[i]))(at) }),
    line(left, y(0), right, y(0), "rule"),
    d3.max(use) > 0 && line(left, y(average), right, y(average), "dash"),
    s("path", { class: "line ours", d: d3.line(middle, (i) => y(mean[i]))(at) }),
    at.map((i) => s("circle", { cx: middle(i), cy: y(mean[i]), r: 1.7, class: "ours" })),
    at.map((i) => s("rect", { x: from(i), y: 0, width: to(i) - from(i), height: bottom, class: "hit", "data-tip": said(i) })),
    text((left + right) / 2, bottom + 27, "distance i − j in tokens (log)", "middle"),
  );
}
