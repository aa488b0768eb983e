// The page's frame: what run this is, which view the address asks for, keys, and what to say while it loads or fails.
//
// A view is views/NAME.js with `export async function render(root, params, api)`: it fills `root`, an empty <main>.
// `api` is {get(path), post(path, body), h, link(view, params), signal, live, run}.
// `api.signal` ends when the person goes elsewhere; a view that fails says so by throwing.

import { fill, h } from "./dom.js";
import { keys } from "./keys.js";
import { get, post, Problem } from "./net.js";
import { link, parse } from "./router.js";
import { header } from "./header.js";
import { tips } from "./tip.js";

const VIEWS = ["overview", "features", "feature", "pairs", "pair", "head", "prompt"];
let leaving = new AbortController();
let [here, back] = ["", false]; // the address that is shown, and whether history leads to the next
const scrolled = new Map(); // how far down each address was left

async function show() {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  scrolled.set(here, scrollY);
  here = location.hash;
  const down = back ? (scrolled.get(here) ?? 0) : 0;
  back = false;
  const found = parse(location.hash);
  const root = h("main", { id: "view", tabindex: "-1" });
  const late = setTimeout(() => place(root, h("p", { class: "state", role: "status" }, "Loading …")), 150);
  const api = {
    h,
    link,
    signal,
    get: (path) => get(path, signal),
    post: (path, body) => post(path, body, signal),
    /** Change the address of a view that shows what it says already; `step`: one that "back" goes back over. */
    moved: (params, step = true) => {
      history[step ? "pushState" : "replaceState"](null, "", link(found.view, params));
      header(document.getElementById("top"), api.run, { ...found, params }, api);
      document.body.dataset.shown = location.hash;
    },
    live: false,
    run: null,
  };
  try {
    api.run = await run();
    api.live = api.run.live;
    header(document.getElementById("top"), api.run, found, api);
    if (!found || !VIEWS.includes(found.view)) throw new Problem("There is no such page.");
    if (found.params.layer !== undefined && !api.run.layers.some((layer) => layer.layer === found.params.layer))
      throw new Problem(`This run has no layer ${found.params.layer}.`);
    const view = await import(`./views/${found.view}.js`);
    const filled = h("main", { id: "view", tabindex: "-1", class: found.view });
    await view.render(filled, found.params, api);
    if (signal.aborted) return;
    place(filled);
    scrollTo(0, down);
  } catch (error) {
    if (signal.aborted) return;
    if (!(error instanceof Problem)) console.error(error);
    place(root, problem(error instanceof Problem ? error.message : "Something on this page went wrong."));
  } finally {
    clearTimeout(late);
    if (!signal.aborted) document.body.dataset.shown = here;
  }

  function place(main, ...children) {
    if (signal.aborted) return;
    if (children.length) fill(main, ...children);
    document.getElementById("view").replaceWith(main);
    document.title = [main.querySelector("h1")?.textContent, "qkscope"].filter(Boolean).join(" · ");
  }
}

function problem(words) {
  return h(
    "section",
    { class: "state", role: "alert" },
    h("h1", null, words),
    h("p", null, h("a", { href: link("overview") }, "Overview of the run"), " · ", retry()),
  );
}

function retry() {
  return h("button", { type: "button", onclick: show }, "Try again");
}

let known = null;
function run() {
  known ??= get("data/run.json").catch((error) => {
    known = null;
    throw error;
  });
  return known;
}

history.scrollRestoration = "manual";
globalThis.navigation?.addEventListener("navigate", (event) => (back = event.navigationType === "traverse"));
addEventListener("hashchange", show);
keys();
tips();
// The other views are read while the first is looked at, so that a click need not wait for them.
show().then(() => VIEWS.forEach((view) => import(`./views/${view}.js`)));
