// The live view: a prompt's attention head by head, the pairs behind an edge, and what the model does without them.
//
//   #/layer/3/prompt?prompt=…&head=5&query=23&key=11&against=9&edit=3.21.71.5
//
// The address holds all that is chosen (see prompt/address.js), so a link shows the same and "back" goes back. A choice
// changes the address and the parts that depend on it, never the whole view.

import { fill, h } from "../dom.js";
import { short } from "../format.js";
import { share } from "../heat/colour.js";
import { thumbnail } from "../heat/heatmap.js";
import { Problem } from "../net.js";
import { accounts } from "../prompt/accounts.js";
import { addressOf, chosenBy, same } from "../prompt/address.js";
import { at, edgeLine, strip, values } from "../prompt/edge.js";
import { editedPairs, nextTokens } from "../prompt/effects.js";
import { layout } from "../prompt/layout.js";
import { bytes, Pattern } from "../prompt/pattern.js";

const SLOW = 200; // milliseconds after which what is shown fades until the answer is there
const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }; // query, key

let known = null; // layers and ready prompts of this run
let last = { asked: null, answer: null }; // the last trace, so that going back shows at once

export async function render(root, params, api) {
  if (api.live) {
    new View(root, params, api).start();
    return;
  }
  const how = ["Live tracing needs the model, and so a server: ", h("code", null, "qkscope serve DIR")];
  fill(root, h("h1", null, "Prompt"), h("p", { class: "state" }, how));
}

class View {
  constructor(root, params, api) {
    this.api = api;
    this.now = chosenBy(params); // layer, prompt, head, query, key, against, edits
    this.names = new Map(); // of features, as accounts bring them
    this.turns = {}; // of each kind of request, so that a late answer is not shown
    this.picks = "key"; // what a click on a token chooses
    const on = {
      onPrompt: (text) => this.#begin(text),
      values: (i, j) => values(this.patterns, i, j),
      onPick: (i, j) => this.#pick(i, j),
      onKey: (event) => this.#keyed(event),
      onPicks: (name) => (this.picks = name),
    };
    Object.assign(this, layout(root, { ...on, signal: api.signal }));
    this.field.value = this.now.prompt ?? "";
  }

  async start() {
    const { now } = this;
    if (now.prompt !== null && last.asked === this.#asked()) this.#show(last.answer);
    else this.#say("Opening the model …");
    known ??= await this.#answer("examples", this.api.get("api/prompt/examples"));
    if (!known) return;
    const begin = (prompt) => () => this.#begin(prompt);
    fill(
      this.ready,
      known.prompts.map(({ name, prompt }) =>
        h("button", { type: "button", class: "chip", title: prompt, onclick: begin(prompt) }, name),
      ),
    );
    fill(
      this.layers,
      known.layers.map(({ layer }) =>
        h("button", { type: "button", "data-layer": layer, onclick: () => this.#go(layer) }, `layer ${layer}`),
      ),
    );
    now.prompt ??= known.prompts[0]?.prompt ?? "";
    this.field.value ||= now.prompt;
    now.head ??= foremost(now.layer);
    if (this.trace) {
      this.#pressed();
      await this.#account();
    } else if (now.prompt) await this.#run({}, false);
    else this.#say("Type a text, or choose one that is ready.");
  }

  // Asking

  /** An answer, or null where it failed (which is said) or something newer of its kind was asked. */
  async #answer(kind, promise) {
    const turn = this.#turn(kind);
    const late = setTimeout(() => this.traced.classList.add("waiting"), SLOW);
    try {
      const answer = await promise;
      return turn === this.turns[kind] && !this.api.signal.aborted ? answer : null;
    } catch (error) {
      if (error.name === "AbortError" || turn !== this.turns[kind]) return null;
      if (!(error instanceof Problem)) console.error(error);
      this.#say(error instanceof Problem ? error.message : "Something on this page went wrong.", true);
      return null;
    } finally {
      clearTimeout(late);
      this.traced.classList.remove("waiting");
    }
  }

  #turn(kind) {
    return (this.turns[kind] = (this.turns[kind] ?? 0) + 1);
  }

  #say(words, wrong = false) {
    this.said.classList.toggle("wrong", wrong);
    this.said.hidden = !words;
    fill(this.said, words);
  }

  #asked() {
    const { prompt, layer, head } = this.now;
    return JSON.stringify([prompt, layer, head]);
  }

  /** Write what is chosen into the address; a `step` is one that "back" goes back over. */
  #address(step = true) {
    this.api.moved(addressOf(this.now), step);
  }

  /** Another prompt. */
  #begin(prompt) {
    this.field.value = prompt;
    if (!prompt.trim()) {
      this.#say("Type a text first, at least two tokens.", true);
      return;
    }
    this.#run({ prompt, query: undefined, key: undefined, against: [], edits: [] });
  }

  /** Another layer, or another head of it. */
  #go(layer, head = foremost(layer)) {
    this.#run({ layer, head, key: undefined, against: [] });
  }

  /** Trace with these changes of what is chosen; until the answer is there, and where there is none, nothing changes. */
  async #run(changes, step = true) {
    const { prompt, layer, head } = { ...this.now, ...changes };
    const answer = await this.#answer("trace", this.api.post("api/prompt/trace", { prompt, layer, head }));
    if (!answer) return;
    Object.assign(this.now, changes);
    this.#show(answer);
    last = { asked: this.#asked(), answer };
    this.#address(step);
    await this.#account();
  }

  // Showing a trace

  #show(answer) {
    this.#say("");
    this.trace = answer;
    const { now } = this;
    now.head = answer.head;
    for (const kind of ["edge", "edit"]) this.#turn(kind); // what is still asked is of another trace
    const { tokens, causal, pattern } = answer;
    const n = tokens.length;
    const unpacked = Object.entries(pattern).map(([kind, packed]) => [kind, new Pattern(packed, n, causal)]);
    this.patterns = { ...Object.fromEntries(unpacked), edited: null };
    if (!(now.query < n)) now.query = n - 1;
    if (!(now.key < n) || (causal && now.key > now.query)) now.key = this.patterns.true.most(now.query);
    now.against = now.against.filter((position) => this.#competes(position));
    this.traced.hidden = false;
    this.#pressed();
    this.#thumbnails();
    this.#draw();
    this.#chosen();
  }

  #pressed() {
    for (const button of this.layers.children)
      button.setAttribute("aria-pressed", String(Number(button.dataset.layer) === this.now.layer));
  }

  #thumbnails() {
    const focused = this.heads.contains(document.activeElement);
    fill(this.heads, this.trace.heads.map((one) => this.#thumbnail(one)));
    if (focused) this.heads.querySelector("[aria-pressed=true]")?.focus();
  }

  #thumbnail({ head, kl, size, thumbnail: packed }) {
    const canvas = h("canvas", { "aria-hidden": "true" });
    thumbnail(canvas, bytes(packed), size, this.trace.causal, share);
    const attributes = {
      type: "button",
      class: "head",
      "aria-pressed": String(head === this.now.head),
      title: `head ${head}: the pruned map’s pattern KL on this prompt is ${kl.toFixed(3)} nats a query`,
      onclick: () => this.#go(this.now.layer, head),
    };
    return h("button", attributes, canvas, h("b", null, head), h("small", null, `KL ${kl.toFixed(2)}`));
  }

  #draw() {
    const { tokens, causal } = this.trace;
    const { true: model, pruned } = this.patterns;
    const apart = (i, j) => pruned.at(i, j) - model.at(i, j);
    this.maps.show({ tokens, causal, true: shares(model), pruned: shares(pruned), difference: apart, edited: null });
  }

  // The edge

  /** Show which edge is chosen, and the query's attention. */
  #chosen() {
    const { now, trace, patterns } = this;
    this.maps.choose(now.query, now.key);
    fill(this.edge, edgeLine(now, trace.tokens, patterns));
    fill(this.strip, strip(now, trace, patterns.true, (n) => this.#pickToken(n)));
  }

  #pick(query, key) {
    const { now } = this;
    if (query !== now.query) now.against = [];
    Object.assign(now, { query, key });
    now.against = now.against.filter((position) => position !== key);
    this.#chosen();
    this.#address();
    this.#account();
  }

  /** Choose a token of the strip as the key, the query (where that hides the other, the other follows) or a competitor. */
  #pickToken(n) {
    const { causal } = this.trace;
    const { query, key, against } = this.now;
    if (this.picks === "query") this.#pick(n, causal ? Math.min(n, key) : key);
    else if (this.picks === "key") this.#pick(causal ? Math.max(n, query) : query, n);
    else this.#against(against.includes(n) ? against.filter((other) => other !== n) : [...against, n]);
  }

  #competes(position) {
    const { query, key } = this.now;
    return position !== key && position < this.trace.tokens.length && !(this.trace.causal && position > query);
  }

  /** Hold the key against these others; none: against all. */
  #against(positions) {
    const wrong = positions.find((position) => !this.#competes(position));
    if (wrong !== undefined) {
      this.#say(`Position ${wrong} is no other key that the query sees.`, true);
      this.redraw?.();
      return;
    }
    this.now.against = positions;
    this.#chosen();
    this.#address();
    this.#account();
  }

  #keyed(event) {
    const step = STEPS[event.key];
    if (event.target !== event.currentTarget || !(step || event.key === "Enter")) return;
    event.preventDefault();
    const { now, trace } = this;
    if (!step) {
      this.#pick(now.query, now.key);
      return;
    }
    const end = trace.tokens.length - 1;
    const query = Math.min(Math.max(now.query + step[0], 0), end);
    if (query !== now.query) now.against = [];
    now.query = query;
    now.key = Math.min(Math.max(now.key + step[1], 0), trace.causal ? query : end);
    this.#chosen();
    this.accounts.classList.add("stale");
  }

  async #account() {
    const { prompt, layer, head, query, key, against } = this.now;
    const asked = { prompt, layer, head, query, key, ...(against.length && { against }) };
    const answer = await this.#answer("edge", this.api.post("api/prompt/edge", asked));
    if (!answer) return;
    this.#say("");
    for (const term of [...answer.score.terms, ...(answer.why?.terms ?? [])])
      for (const side of ["query", "key"]) this.names.set(`${layer}.${side}.${term[side]}`, term[`${side}_name`]);
    const pair = (term) => ({ layer, query: term.query, key: term.key, head });
    const draw = accounts(this, answer, {
      tokens: this.trace.tokens,
      against,
      factor: (term) => this.now.edits.find((other) => same(other, pair(term)))?.scale ?? 1,
      link: (term) => this.api.link("pair", pair(term)),
      onScale: (term, factor) => this.#scale(pair(term), factor),
      onAgainst: (positions) => this.#against(positions),
    });
    this.redraw = () => kept(this.traced, draw);
    this.redraw();
    this.accounts.classList.remove("stale");
    await this.#edit();
  }

  // Edits

  /** Multiply a pair in the model; 1: leave it as it is. */
  #scale(pair, scale) {
    const at = this.now.edits.findIndex((other) => same(other, pair));
    const edits = this.now.edits.filter((other) => !same(other, pair));
    if (scale !== 1) edits.splice(at < 0 ? edits.length : at, 0, { ...pair, scale });
    this.#edited(edits);
  }

  #edited(edits) {
    this.now.edits = edits;
    this.#address();
    this.redraw?.();
    this.#edit();
  }

  async #edit() {
    this.#listed();
    const { prompt, layer, head, query, edits } = this.now;
    const answer = await this.#answer("edit", this.api.post("api/prompt/edit", { prompt, layer, head, position: query, edits }));
    if (!answer) return;
    const { tokens, causal } = this.trace;
    this.patterns.edited = answer.pattern && new Pattern(answer.pattern, tokens.length, causal);
    this.maps.show({ tokens, causal, edited: shares(this.patterns.edited) });
    this.#chosen();
    fill(
      this.next,
      h("h2", null, "Next token after ", at(query, tokens)),
      answer.next ? nextTokens(answer.next.tokens) : h("p", { class: "hint" }, "This model predicts none."),
    );
  }

  #listed() {
    const shown = editedPairs(this.now.edits, {
      name: (pair, side) => this.names.get(`${pair.layer}.${side}.${pair[side]}`) ?? short(side, pair[side]),
      link: (pair) => this.api.link("pair", { layer: pair.layer, query: pair.query, key: pair.key, head: pair.head }),
      onScale: (pair, factor) => this.#scale(pair, factor),
      onReset: () => this.#edited([]),
    });
    kept(this.list, () => fill(this.list, h("h2", null, "Pairs edited"), shown));
  }
}

const shares = (pattern) => pattern && ((i, j) => pattern.at(i, j));

/** Draw anew, and give the focus back to the field that had it. */
function kept(root, draw) {
  const focused = root.contains(document.activeElement) ? document.activeElement.dataset.place : null;
  draw();
  if (focused) root.querySelector(`[data-place="${CSS.escape(focused)}"]`)?.focus();
}

/** The head of a layer whose pairs matter most. */
function foremost(layer) {
  const { importance } = known.layers.find((one) => one.layer === layer);
  return importance.indexOf(Math.max(...importance));
}
