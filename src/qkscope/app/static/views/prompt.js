// The live view: a prompt's attention head by head, the pairs behind an edge, and what the model does without them.
//
//   #/layer/3/prompt?prompt=…&head=5&query=23&key=11&off=3.21.71.5
//
// The address holds all that is chosen (`off`: layer.query.key.head of each pair that is switched off), so a link shows
// the same and "back" goes back. A choice changes the address and the parts that depend on it, never the whole view.

import { fill, h } from "../dom.js";
import { millinats, number, short } from "../format.js";
import { Problem } from "../net.js";
import { account, signed } from "../prompt/account.js";
import { pairsOf, same, textOf, whole } from "../prompt/address.js";
import { difference, share } from "../prompt/colour.js";
import { nextTokens, switchedOff } from "../prompt/effects.js";
import { thumbnail } from "../prompt/heatmap.js";
import { layout } from "../prompt/layout.js";
import { bytes, Pattern } from "../prompt/pattern.js";
import { token } from "../tokens.js";

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
    this.layer = params.layer;
    this.prompt = params.prompt ?? null;
    [this.head, this.query, this.key] = [params.head, params.query, params.key].map(whole);
    this.off = pairsOf(params.off);
    this.names = new Map(); // of features, as accounts bring them
    this.turns = {}; // of each kind of request, so that a late answer is not shown
    this.picks = "key"; // what a click on a token chooses
    Object.assign(
      this,
      layout(root, {
        onPrompt: (text) => this.#begin(text),
        onHover: (i, j, event) => this.#point(i, j, event),
        onPick: (i, j) => this.#pick(i, j),
        onKey: (event) => this.#keyed(event),
        onPicks: (name) => (this.picks = name),
      }),
    );
    this.field.value = this.prompt ?? "";
  }

  async start() {
    const drawn = () => Object.values(this.maps).forEach((map) => map.draw()); // their axes are in the page's colours
    addEventListener("themechange", drawn, { signal: this.api.signal });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawn, { signal: this.api.signal });
    if (this.prompt !== null && last.asked === this.#asked()) this.#show(last.answer);
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
    this.prompt ??= known.prompts[0]?.prompt ?? "";
    this.field.value ||= this.prompt;
    this.head ??= foremost(this.layer);
    if (this.trace) {
      this.#pressed();
      await this.#account();
    } else if (this.prompt) await this.#run({}, false);
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
    return JSON.stringify([this.prompt, this.layer, this.head]);
  }

  /** Write what is chosen into the address; a `step` is one that "back" goes back over. */
  #address(step = true) {
    const { prompt, layer, head, query, key } = this;
    this.api.moved({ layer, prompt, head, query, key, off: textOf(this.off) }, step);
  }

  /** Another prompt. */
  #begin(prompt) {
    this.field.value = prompt;
    if (!prompt.trim()) {
      this.#say("Type a text first, at least two tokens.", true);
      return;
    }
    this.#run({ prompt, query: undefined, key: undefined, off: [] });
  }

  /** Another layer, or another head of it. */
  #go(layer, head = foremost(layer)) {
    this.#run({ layer, head, key: undefined });
  }

  /** Trace with these changes of what is chosen; until the answer is there, and where there is none, nothing changes. */
  async #run(changes, step = true) {
    const { prompt, layer, head } = { prompt: this.prompt, layer: this.layer, head: this.head, ...changes };
    const answer = await this.#answer("trace", this.api.post("api/prompt/trace", { prompt, layer, head }));
    if (!answer) return;
    Object.assign(this, changes);
    this.#show(answer);
    last = { asked: this.#asked(), answer };
    this.#address(step);
    await this.#account();
  }

  // Showing a trace

  #show(answer) {
    this.#say("");
    this.trace = answer;
    this.head = answer.head;
    for (const kind of ["edge", "edit"]) this.#turn(kind); // what is still asked is of another trace
    const { tokens, causal, pattern } = answer;
    const n = tokens.length;
    const unpacked = Object.entries(pattern).map(([kind, packed]) => [kind, new Pattern(packed, n, causal)]);
    this.patterns = { ...Object.fromEntries(unpacked), edited: null };
    if (!(this.query < n)) this.query = n - 1;
    if (!(this.key < n) || (causal && this.key > this.query)) this.key = this.patterns.true.most(this.query);
    this.traced.hidden = false;
    this.#pressed();
    this.#thumbnails();
    this.#draw();
    this.#chosen();
  }

  #pressed() {
    for (const button of this.layers.children)
      button.setAttribute("aria-pressed", String(Number(button.dataset.layer) === this.layer));
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
      "aria-pressed": String(head === this.head),
      title: `head ${head}: the pruned map’s pattern KL on this prompt is ${kl.toFixed(3)} nats a query`,
      onclick: () => this.#go(this.layer, head),
    };
    return h("button", attributes, canvas, h("b", null, head), h("small", null, `KL ${kl.toFixed(2)}`));
  }

  #draw() {
    const { tokens, causal } = this.trace;
    const { true: model, pruned } = this.patterns;
    for (const kind of ["true", "pruned", "edited"]) this.#drawShares(kind);
    const apart = (i, j) => pruned.at(i, j) - model.at(i, j);
    this.maps.difference.set({ tokens, causal, colour: difference, value: apart });
  }

  #drawShares(kind) {
    const { tokens, causal } = this.trace;
    const pattern = this.patterns[kind];
    this.maps[kind].node.hidden = !pattern;
    if (pattern) this.maps[kind].set({ tokens, causal, colour: share, value: (i, j) => pattern.at(i, j) });
  }

  // The edge

  #at(n) {
    return n === this.trace.tokens.length ? "the sink" : [`${n} `, token(this.trace.tokens[n])];
  }

  /** Show which edge is chosen, and the query's attention. */
  #chosen() {
    const { tokens, special } = this.trace;
    const { query: i, key: j } = this;
    const model = this.patterns.true;
    this.#mark();
    const name = h("b", null, `${this.layer}.${this.head}`);
    const values = h("span", { class: "values" }, this.#values(i, j));
    fill(this.edge, name, " query ", this.#at(i), " → key ", this.#at(j), values);
    const shaded = (text, n) => {
      const marks = { query: n === i, key: n === j, special: special.includes(n) };
      return token(text, {
        class: Object.keys(marks).filter((mark) => marks[mark]).join(" "),
        style: { "--shade": Math.sqrt(model.at(i, n)).toFixed(3) },
        title: `${n}: ${model.at(i, n).toFixed(3)}`,
        onclick: () => this.#pickToken(n),
      });
    };
    const sink = model.sink && h("span", { class: "hint" }, ` sink ${model.at(i, tokens.length).toFixed(3)}`);
    const end = (text) => h(text.includes("\n") ? "br" : "wbr");
    fill(this.strip, tokens.map((text, n) => [shaded(text, n), end(text)]), sink);
  }

  #values(i, j) {
    const { true: model, pruned, reconstructed, edited } = this.patterns;
    const shown = {
      model: model.at(i, j).toFixed(3),
      transcoders: reconstructed.at(i, j).toFixed(3),
      "pruned map": pruned.at(i, j).toFixed(3),
      difference: signed(pruned.at(i, j) - model.at(i, j), 3),
      ...(edited && { "pairs off": edited.at(i, j).toFixed(3) }),
    };
    return Object.entries(shown).map(([name, value]) => [" ", h("span", null, `${name} `, h("b", null, value))]);
  }

  #mark(pointed = null) {
    for (const map of Object.values(this.maps)) map.mark({ i: this.query, j: this.key }, pointed);
  }

  #point(i, j, event) {
    this.tip.hidden = j === null;
    this.#mark(j === null ? null : { i, j });
    if (j === null) return;
    fill(this.tip, h("div", null, this.#at(i), " → ", this.#at(j)), h("div", null, this.#values(i, j)));
    const room = document.documentElement.clientWidth - this.tip.offsetWidth - 8;
    this.tip.style.setProperty("left", `${Math.max(8, Math.min(event.clientX + 14, room))}px`);
    this.tip.style.setProperty("top", `${event.clientY + 18}px`);
  }

  #pick(i, j) {
    Object.assign(this, { query: i, key: j });
    this.#chosen();
    this.#address();
    this.#account();
  }

  /** Choose a token of the strip as the key or the query; where that hides the other, the other follows. */
  #pickToken(n) {
    const { causal } = this.trace;
    if (this.picks === "query") this.#pick(n, causal ? Math.min(n, this.key) : this.key);
    else this.#pick(causal ? Math.max(n, this.query) : this.query, n);
  }

  #keyed(event) {
    const step = STEPS[event.key];
    if (event.target !== event.currentTarget || !(step || event.key === "Enter")) return;
    event.preventDefault();
    if (!step) {
      this.#pick(this.query, this.key);
      return;
    }
    const end = this.trace.tokens.length - 1;
    this.query = Math.min(Math.max(this.query + step[0], 0), end);
    this.key = Math.min(Math.max(this.key + step[1], 0), this.trace.causal ? this.query : end);
    this.#chosen();
    this.accounts.classList.add("stale");
  }

  async #account() {
    const { prompt, layer, head, query, key } = this;
    const answer = await this.#answer("edge", this.api.post("api/prompt/edge", { prompt, layer, head, query, key }));
    if (!answer) return;
    this.#say("");
    this.found = answer;
    this.unfolded = {};
    for (const term of [...answer.score.terms, ...(answer.why?.terms ?? [])])
      for (const side of ["query", "key"]) this.names.set(`${layer}.${side}.${term[side]}`, term[`${side}_name`]);
    this.#accounts();
    await this.#edit();
  }

  #accounts() {
    const { score, why, query, key } = this.found;
    const focused = document.activeElement?.dataset.term;
    const hint = (...words) => h("p", { class: "hint" }, words);
    const ranked = (term) => `rank ${term.rank + 1}, ${millinats(term.importance)} mnat`;
    const product = (term) =>
      `${number(term.query_activation)} × ${number(term.strength)} × ${number(term.key_activation)}`;
    const parts = (term) => `here ${signed(term.here)}, there ${signed(term.here - term.value)}`;
    const options = (name, detail) => ({
      name,
      detail: (term) => `${ranked(term)} · ${detail(term)}`,
      isOn: (term) => !this.off.some((pair) => same(pair, this.#pair(term))),
      onSwitch: (term, on) => this.#switch(this.#pair(term), on),
      link: (term) => this.api.link("pair", this.#pair(term)),
      whole: this.unfolded[name],
      onWhole: () => {
        this.unfolded[name] = true;
        this.#accounts();
      },
    });
    fill(
      this.score,
      h("h2", null, "Score of ", this.#at(query), " → ", this.#at(key)),
      hint("In grey: rank and importance of the pair · query activation × strength × key activation."),
      account(score, options("score", product)),
    );
    const part = (weight) => ` (${Math.round(100 * weight)} %)`;
    const others = why?.against.map(({ key: c, weight }, n) => [n ? ", " : "", this.#at(c), part(weight)]);
    const enough = why?.fewest ? `The ${why.fewest} largest add up to it` : "The kept pairs do not add up to it";
    fill(
      this.why,
      h("h2", null, "Why ", this.#at(key), " and not elsewhere"),
      why
        ? [hint("Log-odds against ", others, `. ${enough} within 10 %.`), account(why, options("why", parts))]
        : hint("This query attends to nothing else."),
    );
    this.accounts.classList.remove("stale");
    if (focused) this.accounts.querySelector(`[data-term="${CSS.escape(focused)}"]`)?.focus();
  }

  // Pairs off

  #pair(term) {
    return { layer: this.layer, query: term.query, key: term.key, head: this.head };
  }

  #switch(pair, on) {
    const others = this.off.filter((other) => !same(other, pair));
    this.#switched(on ? others : [...others, pair]);
  }

  #switched(pairs) {
    this.off = pairs;
    this.#address();
    if (this.found) this.#accounts();
    this.#edit();
  }

  async #edit() {
    this.#listed();
    const { prompt, layer, head, query } = this;
    const asked = { prompt, layer, head, position: query, ablate: this.off };
    const answer = await this.#answer("edit", this.api.post("api/prompt/edit", asked));
    if (!answer) return;
    const { tokens, causal } = this.trace;
    this.patterns.edited = answer.pattern && new Pattern(answer.pattern, tokens.length, causal);
    this.#drawShares("edited");
    this.#chosen();
    fill(
      this.next,
      h("h2", null, "Next token after ", this.#at(query)),
      answer.next ? nextTokens(answer.next.tokens) : h("p", { class: "hint" }, "This model predicts none."),
    );
  }

  #listed() {
    const shown = switchedOff(this.off, {
      name: (pair, side) => this.names.get(`${pair.layer}.${side}.${pair[side]}`) ?? short(side, pair[side]),
      link: (pair) => this.api.link("pair", pair),
      onOn: (pair) => this.#switch(pair, true),
      onReset: () => this.#switched([]),
    });
    fill(this.list, h("h2", null, "Pairs switched off"), shown);
  }
}

/** The head of a layer whose pairs matter most. */
function foremost(layer) {
  const { importance } = known.layers.find((one) => one.layer === layer);
  return importance.indexOf(Math.max(...importance));
}
