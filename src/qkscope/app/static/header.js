// The head of every view: the run, its layers and views, a search field, the colours.

import { fill, h } from "./dom.js";
import { help } from "./keys.js";
import { clean } from "./tokens.js";

/** Fill the page's head for a run and what is shown of it. */
export function header(top, run, found, api) {
  const { view = "overview", params = {} } = found ?? {};
  const layer = params.layer ?? run.layers[0]?.layer;
  const current = (name) => (view === name ? "page" : null);
  const views = [
    ["features", "Features", ["features", "feature"]],
    ["pairs", "Pairs", ["pairs", "pair"]],
    ["head", "Heads", ["head"]],
    ...(run.live ? [["prompt", "Prompt", ["prompt"]]] : []),
  ];
  const more = { features: { side: params.side }, head: { head: 0 } };
  fill(
    top,
    h("a", { class: "brand", href: api.link("overview"), "aria-current": current("overview") }, "qkscope"),
    h("span", { class: "model", title: "the model that was decomposed" }, clean(run.model)),
    h(
      "nav",
      { "aria-label": "Layers" },
      run.layers.map((one) =>
        h(
          "a",
          {
            href: api.link(...sameView(view, params, one.layer)),
            "aria-current": params.layer === one.layer ? "true" : null,
          },
          `L${one.layer}`,
        ),
      ),
    ),
    h(
      "nav",
      { "aria-label": "Views" },
      layer === undefined
        ? null
        : views.map(([name, words, members]) =>
            h(
              "a",
              {
                href: api.link(name, { layer, ...more[name] }),
                "aria-current": members.includes(view) ? "page" : null,
              },
              words,
            ),
          ),
    ),
    h("span", { class: "grow" }),
    layer === undefined ? null : search(layer, api),
    h("button", { type: "button", class: "quiet", title: "light or dark", onclick: switchTheme }, "◐"),
    h("button", { type: "button", class: "quiet", title: "keys", onclick: help }, "?"),
  );
}

/** The view of another layer that is nearest to this one. */
function sameView(view, params, layer) {
  if (view === "head") return ["head", { layer, head: params.head }];
  if (view === "pairs" || view === "pair") return ["pairs", { layer }];
  if (view === "prompt") return ["prompt", { ...params, layer }];
  return ["features", { layer, side: params.side }];
}

/** q12, k7 and q12 k7 go there; anything else is a token or role to find. */
function search(layer, api) {
  const field = h("input", {
    type: "search",
    placeholder: `q12, k7, q12 k7, token  /`,
    "aria-label": `Find in layer ${layer}: q12, k7, a token or a role`,
    maxlength: 80,
  });
  return h(
    "form",
    {
      role: "search",
      onsubmit: (event) => {
        event.preventDefault();
        location.hash = target(field.value, layer, api.link);
      },
    },
    field,
  );
}

export function target(words, layer, link) {
  const text = words.trim();
  const one = /^(q|k)(?:uery|ey)?\s*(\d+)$/i.exec(text);
  if (one) return link("feature", { layer, side: one[1].toLowerCase() === "q" ? "query" : "key", feature: one[2] });
  const two = /^q(?:uery)?\s*(\d+)\W*k(?:ey)?\s*(\d+)$/i.exec(text);
  if (two) return link("pairs", { layer, query: two[1], key: two[2] });
  return link("features", { layer, text: words });
}

function switchTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try {
    localStorage.setItem("qkscope-theme", root.dataset.theme);
  } catch {
    // chosen for this visit only
  }
  dispatchEvent(new Event("themechange")); // what is drawn on a canvas has the old colours
}
