// The parts of the live view, empty, and where they stand.

import { fill, h } from "../dom.js";
import { Maps } from "../heat/maps.js";

const KINDS = {
  true: ["Model", "the head’s pattern"],
  pruned: ["Pruned map", "from the kept pairs"],
  difference: ["Difference", "pruned map − model"],
  edited: ["Edited", "the model with the pairs edited"],
};

/**
 * Fill `root` and give its parts by name. Listeners: `onPrompt(text)`, `onPick(i, j)` of the maps' cells, `onKey(event)`
 * on the maps, `onPicks("key" | "query" | "competitor")` for what a click on a token chooses; `values(i, j)` is what is
 * said of a cell.
 */
export function layout(root, { onPrompt, values, onPick, onKey, onPicks, signal }) {
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
  const maps = new Maps(KINDS, {
    values,
    onPick,
    signal,
    tabindex: "0",
    role: "application",
    "aria-label": "Attention. Arrows move the edge, Enter traces it.",
    onkeydown: onKey,
  });
  const picks = (name, checked) =>
    h("label", null, h("input", { type: "radio", name: "picks", checked, onchange: () => onPicks(name) }), ` ${name} `);
  const parts = {
    field,
    maps,
    ready: h("span", { class: "ready" }),
    said: h("p", { class: "said", role: "status" }),
    layers: h("div", { class: "choices", role: "group", "aria-label": "Layer" }),
    heads: h("div", { class: "heads", role: "group", "aria-label": "Head" }),
    edge: h("p", { class: "edge", "aria-live": "polite" }),
    strip: h("div", { class: "strip", dir: "auto" }),
    score: h("article"),
    why: h("article"),
    list: h("article"),
    next: h("article"),
  };
  const accounts = h("div", { class: "accounts" }, parts.score, parts.why);
  const words = "Shaded by the chosen query’s attention. A click on a token chooses the ";
  const hint = h("p", { class: "hint" }, words, picks("key", true), picks("query"), picks("competitor"));
  const traced = h(
    "div",
    { class: "traced", hidden: true },
    h("div", { class: "where" }, parts.layers, parts.heads),
    maps.nodes,
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
