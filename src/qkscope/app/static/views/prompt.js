// The live view: a prompt's attention head by head, the pairs behind an edge, and what the model does without them.
//
//   #/layer/3/prompt?prompt=…&head=5&query=23&key=11&off=3.21.71.5
//
// The address holds all that is chosen (`off`: layer.query.key.head of each pair that is switched off), so a link shows
// the same and "back" goes back. A choice changes the address and the parts that depend on it, never the whole view.

import { fill, h } from "../dom.js";
import { Problem } from "../net.js";
import { account, signed } from "../prompt/account.js";
import { onTheme, ramps } from "../prompt/colour.js";
import { HeatMap, thumbnail } from "../prompt/heatmap.js";
import { nextTokens } from "../prompt/next.js";
import { bytes, Pattern } from "../prompt/pattern.js";
import { quoted, token } from "../tokens.js";

let known = null; // layers and ready prompts of this run
let last = { asked: null, answer: null }; // the last trace, so that going back shows at once

export async function render(root, params, api) {
  if (!api.live) {
    fill(root, h("h1", null, "Prompt"),
      h("p", { class: "state" }, "Live tracing needs the model, so not these files but a server: ", h("code", null, "qkscope serve DIR")));
    return;
  }
  new View(root, params, api).start();
}

class View {
  constructor(root, params, api) {
    this.api = api;
    this.layer = params.layer;
    this.prompt = params.prompt ?? null;
    [this.head, this.query, this.key] = [params.head, params.query, params.key].map(number);
    this.off = parsed(params.off);
    this.names = new Map(); // of features, as accounts bring them
    this.turns = {}; // of each kind of request, so that a late answer is not shown
    this.picks = "key"; // what a click on a token chooses
    this.#build(root);
  }

  async start() {
    onTheme(() => this.#colours(), this.api.signal);
    if (this.prompt !== null && last.asked === this.#asked()) this.#show(last.answer, false);
    else this.#say("Opening the model …");
    known ??= await this.#answer("examples", this.api.get("api/prompt/examples"));
    if (!known) return;
    fill(this.ready, known.prompts.map(({ name, prompt }) =>
      h("button", { type: "button", class: "chip", title: prompt, onclick: () => this.#begin(prompt) }, name)));
    fill(this.layers, known.layers.map(({ layer }) =>
      h("button", { type: "button", "aria-pressed": String(layer === this.layer), onclick: () => this.#toLayer(layer) }, `layer ${layer}`)));
    this.prompt ??= known.prompts[0]?.prompt ?? "";
    this.field.value = this.prompt;
    this.head ??= this.#foremost();
    if (this.trace) this.#edge(false);
    else if (this.prompt) await this.#run("replace");
    else this.#say("Type a text, or choose one that is ready.");
  }

  #build(root) {
    this.field = h("textarea", {
      rows: 2, "aria-label": "Prompt", placeholder: "Type a text; Enter traces it", spellcheck: "false", dir: "auto", maxlength: 20000,
      onkeydown: (event) => {
        if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
        event.preventDefault();
        this.#begin(this.field.value);
      },
    });
    this.field.value = this.prompt ?? "";
    this.ready = h("span", { class: "ready" });
    this.said = h("p", { class: "said", role: "status" });
    this.layers = h("div", { class: "choices", role: "group", "aria-label": "Layer" });
    this.heads = h("div", { class: "heads", role: "group", "aria-label": "Head" });
    const on = { onHover: (i, j, event) => this.#point(i, j, event), onPick: (i, j) => this.#pick(i, j) };
    this.maps = {
      true: new HeatMap("Model", "the head's pattern", on),
      pruned: new HeatMap("Pruned map", "from the kept pairs", on),
      difference: new HeatMap("Difference", "model − pruned map", on),
      edited: new HeatMap("Pairs off", "the model without them", on),
    };
    this.maps.edited.node.hidden = true;
    this.tip = h("div", { class: "tip", hidden: true });
    this.legend = h("div", { class: "legend", "aria-hidden": "true" }, legend());
    this.plots = h("div", {
      class: "maps", tabindex: "0", role: "application", onkeydown: (event) => this.#keys(event),
      "aria-label": "Attention. Arrows move the edge, Enter traces it.",
    }, Object.values(this.maps).map((map) => map.node));
    this.edge = h("p", { class: "edge", "aria-live": "polite" });
    this.strip = h("div", { class: "strip", dir: "auto" });
    const chosen = (picks, words) => h("label", null,
      h("input", { type: "radio", name: "picks", checked: picks === this.picks, onchange: () => (this.picks = picks) }), ` ${words}`);
    this.score = h("article");
    this.why = h("article");
    this.accounts = h("div", { class: "accounts" }, this.score, this.why);
    this.switched = h("article");
    this.next = h("article");
    this.traced = h("div", { class: "traced", hidden: true },
      h("div", { class: "where" }, this.layers, this.heads),
      this.legend, this.plots, this.tip, this.edge,
      h("div", { class: "tokens" }, this.strip,
        h("p", { class: "hint" }, "Shaded by the chosen query’s attention. A click on a token chooses the ",
          chosen("key", "key"), chosen("query", "query"))),
      h("div", { class: "edges" }, this.accounts, h("div", { class: "effects" }, this.switched, this.next)));
    fill(root,
      h("h1", null, "Prompt"),
      h("form", { class: "ask", onsubmit: (event) => { event.preventDefault(); this.#begin(this.field.value); } },
        this.field, h("div", { class: "below" }, h("button", { type: "submit", class: "primary" }, "Trace"),
          h("span", { class: "hint" }, "ready:"), this.ready)),
      this.said, this.traced);
  }

  // Asking

  #asked() {
    return JSON.stringify([this.prompt, this.layer, this.head]);
  }

  /** An answer, or null where it failed (which is said) or something newer of its kind was asked. */
  async #answer(kind, promise) {
    const turn = (this.turns[kind] = (this.turns[kind] ?? 0) + 1);
    const late = setTimeout(() => this.traced.classList.add("waiting"), 200);
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

  #say(words, wrong = false) {
    this.said.classList.toggle("wrong", wrong);
    fill(this.said, words);
    this.said.hidden = !words;
  }

  /** Write what is chosen into the address; "push" makes a step that "back" goes back over. */
  #address(how) {
    const { prompt, layer, head, query, key } = this;
    const params = { layer, prompt, head, query, key, off: this.off.map((p) => [p.layer, p.query, p.key, p.head].join(".")).join("_") };
    this.api.moved(params, how === "push");
  }

  #begin(prompt) {
    this.field.value = prompt;
    this.prompt = prompt;
    this.query = this.key = undefined;
    this.off = [];
    this.#run("push");
  }

  #toLayer(layer) {
    this.layer = layer;
    this.head = this.#foremost();
    this.key = undefined;
    this.#run("push");
  }

  #toHead(head) {
    this.head = head;
    this.key = undefined;
    this.#run("push");
  }

  /** The head whose pairs matter most. */
  #foremost() {
    const { importance } = known.layers.find(({ layer }) => layer === this.layer) ?? known.layers[0];
    return importance.indexOf(Math.max(...importance));
  }

  async #run(how) {
    if (!this.prompt.trim()) {
      this.#say("Type a text first, at least two tokens.", true);
      return;
    }
    const { prompt, layer, head } = this;
    const answer = await this.#answer("trace", this.api.post("api/prompt/trace", { prompt, layer, head }));
    if (!answer) return;
    last = { asked: this.#asked(), answer };
    this.#show(answer, true);
    this.#address(how);
    await this.#edge(false);
  }

  // Showing

  #show(answer) {
    this.#say("");
    this.trace = answer;
    const length = answer.tokens.length;
    this.patterns = Object.fromEntries(Object.entries(answer.pattern).map(([kind, packed]) => [kind, new Pattern(packed, length, answer.causal)]));
    this.patterns.edited = null;
    if (!(this.query >= 0 && this.query < length)) this.query = length - 1;
    if (!(this.key >= 0 && this.key < length) || (answer.causal && this.key > this.query)) this.key = this.patterns.true.most(this.query);
    this.traced.hidden = false;
    for (const button of this.layers.children) button.setAttribute("aria-pressed", String(button.textContent === `layer ${this.layer}`));
    this.#thumbnails();
    this.#draw();
    this.#chosen();
  }

  #colours() {
    this.ramps = ramps();
    if (!this.trace) return;
    this.#thumbnails();
    this.#draw();
  }

  #thumbnails() {
    fill(this.heads, this.trace.heads.map(({ head, kl, size, thumbnail: packed }) => {
      const canvas = h("canvas", { "aria-hidden": "true" });
      thumbnail(canvas, bytes(packed), size, this.ramps.share);
      return h("button", {
        type: "button", class: "head", "aria-pressed": String(head === this.head), onclick: () => this.#toHead(head),
        title: `head ${head}: pattern KL of the pruned map on this prompt ${kl.toFixed(3)} nats a query`,
      }, canvas, h("b", null, `${head}`), h("small", null, ` KL ${kl.toFixed(2)}`));
    }));
  }

  #draw() {
    const { tokens, causal } = this.trace;
    const { share, difference } = this.ramps;
    const { true: model, pruned, edited } = this.patterns;
    const shares = (pattern) => ({ tokens, causal, colour: share, value: (i, j) => pattern.at(i, j) });
    this.maps.true.set(shares(model));
    this.maps.pruned.set(shares(pruned));
    this.maps.difference.set({ tokens, causal, colour: difference, value: (i, j) => model.at(i, j) - pruned.at(i, j) });
    this.maps.edited.node.hidden = !edited;
    if (edited) this.maps.edited.set(shares(edited));
  }

  /** Show which edge is chosen. */
  #chosen() {
    const { tokens } = this.trace;
    const { query: i, key: j, patterns } = this;
    this.#mark();
    fill(this.edge, h("b", null, `${this.layer}.${this.head}`), " query ", i, token(tokens[i]), " → key ", j, token(tokens[j]),
      h("span", { class: "values" }, this.#values(i, j)));
    const sink = patterns.true.sink ? patterns.true.at(i, tokens.length) : null;
    fill(this.strip, tokens.map((text, n) => {
      const p = patterns.true.at(i, n);
      const kind = [n === i ? "query" : "", n === j ? "key" : "", this.trace.special.includes(n) ? "special" : ""].filter(Boolean).join(" ");
      return [token(text, {
        class: kind, style: { "--shade": Math.sqrt(p).toFixed(3) }, title: `${n}: ${p.toFixed(3)}`,
        onclick: () => (this.picks === "query" ? this.#pick(n, this.#seen(n, j)) : this.#pick(this.#seen(n, i, true), n)),
      }), text.includes("\n") ? h("br") : h("wbr")];
    }), sink === null ? null : h("span", { class: "hint" }, ` sink ${sink.toFixed(3)}`));
  }

  /** The key (or, `asQuery`, the query) nearest to `other` that goes with position n. */
  #seen(n, other, asQuery = false) {
    if (!this.trace.causal) return other;
    return asQuery ? Math.max(n, other) : Math.min(n, other);
  }

  #values(i, j) {
    const { true: model, pruned, reconstructed, edited } = this.patterns;
    const difference = model.at(i, j) - pruned.at(i, j);
    return [
      ["model", model.at(i, j).toFixed(3)], ["transcoders", reconstructed.at(i, j).toFixed(3)],
      ["pruned map", pruned.at(i, j).toFixed(3)], ["difference", signed(difference, 3)],
      ...(edited ? [["pairs off", edited.at(i, j).toFixed(3)]] : []),
    ].map(([name, value]) => [" ", h("span", null, `${name} `, h("b", null, value))]);
  }

  #mark(pointed = null) {
    for (const map of Object.values(this.maps)) map.mark({ i: this.query, j: this.key }, pointed);
  }

  #point(i, j, event) {
    this.tip.hidden = j === null;
    this.#mark(j === null ? null : { i, j });
    if (j === null) return;
    const { tokens } = this.trace;
    fill(this.tip, h("div", null, i, " ", token(tokens[i]), " → ", j, " ", token(tokens[j])), h("div", null, this.#values(i, j)));
    const room = document.documentElement.clientWidth - this.tip.offsetWidth - 8;
    this.tip.style.setProperty("left", `${Math.max(8, Math.min(event.clientX + 14, room))}px`);
    this.tip.style.setProperty("top", `${event.clientY + 18}px`);
  }

  #pick(i, j) {
    Object.assign(this, { query: i, key: j });
    this.#chosen();
    this.#edge(true);
  }

  #keys(event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const step = steps[event.key];
    if (event.key === "Enter") this.#edge(true);
    else if (step) {
      const most = this.trace.tokens.length - 1;
      this.query = Math.min(Math.max(this.query + step[0], 0), most);
      this.key = Math.min(Math.max(this.key + step[1], 0), this.trace.causal ? this.query : most);
      this.#chosen();
      this.accounts.classList.add("stale");
    } else return;
    event.preventDefault();
  }

  // One edge

  async #edge(step) {
    const { prompt, layer, head, query, key } = this;
    if (step) this.#address("push");
    const answer = await this.#answer("edge", this.api.post("api/prompt/edge", { prompt, layer, head, query, key }));
    if (!answer) return;
    this.#say("");
    this.whole = { score: false, why: false };
    this.found = answer;
    for (const account of [answer.score, answer.why])
      for (const term of account?.terms ?? [])
        for (const side of ["query", "key"]) this.names.set(`${layer}.${side}.${term[side]}`, term[`${side}_name`]);
    this.#accounts();
    await this.#edit();
  }

  #accounts() {
    const { tokens } = this.trace;
    const { score, why, query, key } = this.found;
    const at = (n) => (n === tokens.length ? "the sink" : [`${n} `, token(tokens[n])]);
    this.accounts.classList.remove("stale");
    const options = (name, detail) => ({
      isOn: (term) => !this.off.some((pair) => same(pair, this.#pair(term))),
      onSwitch: (term, on) => this.#switch(this.#pair(term), on),
      link: (term) => this.api.link("pair", this.#pair(term)),
      detail, whole: this.whole[name],
      onWhole: () => { this.whole[name] = true; this.#accounts(); },
    });
    const ranked = (term) => `rank ${term.rank + 1}, ${short(term.importance, 2)} nats`;
    const fired = (term) => `${ranked(term)} · ${short(term.query_activation)} × ${short(term.strength)} × ${short(term.key_activation)}`;
    const parts = (term) => `${ranked(term)} · here ${signed(term.here)}, there ${signed(term.here - term.value)}`;
    fill(this.score, h("h2", null, "Score of ", at(query), " → ", at(key)),
      h("p", { class: "hint" }, "In grey: rank and importance of the pair · query activation × strength × key activation."),
      account(score, options("score", fired)));
    if (!why) {
      fill(this.why, h("h2", null, "Why here"), h("p", { class: "hint" }, "This query sees no other key."));
      return;
    }
    const others = why.against.map(({ key: c, weight }, n) => [n ? ", " : "", at(c), ` (${Math.round(100 * weight)} %)`]);
    fill(this.why, h("h2", null, "Why ", at(key), " and not elsewhere"),
      h("p", { class: "hint" }, "Log-odds against ", others,
        why.fewest ? `. The ${why.fewest} largest add up to it within 10 %.` : ". The kept pairs do not add up to it within 10 %."),
      account(why, options("why", parts)));
  }

  // Pairs off

  #pair(term) {
    return { layer: this.layer, query: term.query, key: term.key, head: this.head };
  }

  #switch(pair, on) {
    this.off = this.off.filter((other) => !same(other, pair));
    if (!on) this.off.push(pair);
    this.#address("push");
    this.#accounts();
    this.#edit();
  }

  async #edit() {
    const { prompt, layer, head, query } = this;
    const asked = { prompt, layer, head, position: query, ablate: this.off };
    const answer = await this.#answer("edit", this.api.post("api/prompt/edit", asked));
    if (!answer) return;
    this.patterns.edited = answer.pattern && new Pattern(answer.pattern, this.trace.tokens.length, this.trace.causal);
    this.#draw();
    this.#chosen();
    this.#effects(answer);
  }

  #effects(answer) {
    const name = (pair, side) => this.names.get(`${pair.layer}.${side}.${pair[side]}`) ?? (pair[side] < 0 ? "bias" : `${side[0]}${pair[side]}`);
    fill(this.switched, h("h2", null, "Pairs switched off"),
      this.off.length
        ? [h("ul", { class: "off" }, this.off.map((pair) =>
            h("li", null, h("button", { type: "button", class: "quiet", "aria-label": "on again", title: "on again", onclick: () => this.#switch(pair, true) }, "×"),
              h("span", null, h("b", null, `${pair.layer}.${pair.head} `), h("a", { href: this.api.link("pair", pair) },
                h("bdi", null, name(pair, "query")), " → ", h("bdi", null, name(pair, "key"))))))),
          h("button", { type: "button", class: "reset", onclick: () => { this.off = []; this.#address("push"); this.#accounts(); this.#edit(); } }, "Reset")]
        : h("p", { class: "hint" }, "None. The switch before a pair takes what it adds off the model’s own scores, in its head."));
    const { next } = answer;
    if (!next) {
      fill(this.next, h("h2", null, "Next token"), h("p", { class: "hint" }, "This model predicts none."));
      return;
    }
    fill(this.next, h("h2", null, "Next token after ", next.position, " ", token(this.trace.tokens[next.position])), nextTokens(next.tokens));
  }
}

function legend() {
  return [h("span", null, "0"), h("i", { class: "ramp share" }), h("span", null, "1  attention (√)"),
    h("span", null, "−1"), h("i", { class: "ramp difference" }), h("span", null, "+1  difference (√)")];
}

/** A number with so many digits that count, never in powers of ten. */
function short(value, digits = 3) {
  return Number(value.toPrecision(digits)).toString().replace("-", "−");
}

function number(text) {
  return /^\d{1,9}$/.test(text ?? "") ? Number(text) : undefined;
}

/** Pairs of an address; what is none is left out. */
function parsed(text) {
  return (text ?? "").split("_").filter((part) => /^\d{1,9}(\.-?\d{1,9}){2}\.\d{1,9}$/.test(part)).map((part) => {
    const [layer, query, key, head] = part.split(".").map(Number);
    return { layer, query, key, head };
  });
}

function same(one, other) {
  return ["layer", "query", "key", "head"].every((name) => one[name] === other[name]);
}
