// The parts of the live view, empty, and where they stand.

import { fill, h } from "../dom.js";
import { HeatMap, legend } from "./heatmap.js";

/**
 * Fill `root` and give its parts by name. Listeners: `onPrompt(text)`, `onHover(i, j, event)` and `onPick(i, j)` of the
 * maps' cells, `onKey(event)` on the maps, `onPicks("key" | "query")` for what a click on a token chooses.
 */
export function layout(root, { onPrompt, onHover, onPick, onKey, onPicks }) {
  const field = h("textarea", {
    rows: 2,
    "aria-label": "Prompt",
    placeholder: "Type a text; Enter traces it",
    spellcheck: "false",
    dir: "auto",
    maxlength: 20000,
    onkeydown: (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      onPrompt(field.value);
    },
  });
  const submitted = (event) => {
    event.preventDefault();
    onPrompt(field.value);
  };
  const on = { onHover, onPick };
  const maps = {
    true: new HeatMap("Model", "the head's pattern", on),
    pruned: new HeatMap("Pruned map", "from the kept pairs", on),
    difference: new HeatMap("Difference", "pruned map − model", on),
    edited: new HeatMap("Pairs off", "the model without them", on),
  };
  const picks = (name, checked) =>
    h("label", null, h("input", { type: "radio", name: "picks", checked, onchange: () => onPicks(name) }), ` ${name} `);
  const parts = {
    field,
    maps,
    ready: h("span", { class: "ready" }),
    said: h("p", { class: "said", role: "status" }),
    layers: h("div", { class: "choices", role: "group", "aria-label": "Layer" }),
    heads: h("div", { class: "heads", role: "group", "aria-label": "Head" }),
    tip: h("div", { class: "tip", hidden: true }),
    edge: h("p", { class: "edge", "aria-live": "polite" }),
    strip: h("div", { class: "strip", dir: "auto" }),
    score: h("article"),
    why: h("article"),
    list: h("article"),
    next: h("article"),
  };
  const plots = h(
    "div",
    {
      class: "maps",
      tabindex: "0",
      role: "application",
      "aria-label": "Attention. Arrows move the edge, Enter traces it.",
      onkeydown: onKey,
    },
    Object.values(maps).map((map) => map.node),
  );
  const accounts = h("div", { class: "accounts" }, parts.score, parts.why);
  const words = "Shaded by the chosen query’s attention. A click on a token chooses the ";
  const hint = h("p", { class: "hint" }, words, picks("key", true), picks("query"));
  const traced = h(
    "div",
    { class: "traced", hidden: true },
    h("div", { class: "where" }, parts.layers, parts.heads),
    legend(),
    plots,
    parts.tip,
    parts.edge,
    h("div", { class: "tokens" }, parts.strip, hint),
    h("div", { class: "edges" }, accounts, h("div", { class: "effects" }, parts.list, parts.next)),
  );
  const trace = h("button", { type: "submit", class: "primary" }, "Trace");
  fill(
    root,
    h("h1", null, "Prompt"),
    h(
      "form",
      { class: "ask", onsubmit: submitted },
      field,
      h("div", { class: "below" }, trace, h("span", { class: "hint" }, "ready:"), parts.ready),
    ),
    parts.said,
    traced,
  );
  return { ...parts, accounts, traced };
}
