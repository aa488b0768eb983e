// The two accounts of an edge: what its score is made of, and why there and not elsewhere, with its competitors.

import { fill, h } from "../dom.js";
import { millinats, number } from "../format.js";
import { account, signed } from "./account.js";
import { positionsOf } from "./address.js";
import { at } from "./edge.js";

const hint = (...words) => h("p", { class: "hint" }, words);
const ranked = (term) => `rank ${term.rank + 1}, ${millinats(term.importance)} mnat`;
const product = (term) => `${number(term.query_activation)} × ${number(term.strength)} × ${number(term.key_activation)}`;
const parts = (term) => `here ${signed(term.here)}, there ${signed(term.here - term.value)}`;

/**
 * Fill the articles `score` and `why` with an answer of api/prompt/edge. `of` holds `tokens`, `against` (positions; empty:
 * all others), `factor(term)`, `link(term)`, and what is told: `onScale(term, factor)`, `onAgainst(positions)`.
 */
export function accounts({ score, why }, found, of) {
  const unfolded = {};
  const draw = () => {
    const options = (name, detail) => ({
      ...of,
      name,
      detail: (term) => `${ranked(term)} · ${detail(term)}`,
      whole: unfolded[name],
      onWhole: () => {
        unfolded[name] = true;
        draw();
      },
    });
    fill(
      score,
      h("h2", null, "Score of ", at(found.query, of.tokens), " → ", at(found.key, of.tokens)),
      hint("In grey: rank and importance of the pair · query activation × strength × key activation."),
      account(found.score, options("score", product)),
    );
    fill(
      why,
      h("h2", null, "Why ", at(found.key, of.tokens), " and not ", of.against.length ? "there" : "elsewhere"),
      found.why
        ? [competitors(found.why, of), account(found.why, options("why", parts))]
        : hint("This query attends to nothing else."),
    );
  };
  return draw;
}

/** Which keys the key is held against, and with what weight. */
function competitors({ against, fewest }, { tokens, against: chosen, onAgainst }) {
  const part = (weight) => ` (${Math.round(100 * weight)} %)`;
  const others = against.map(({ key, weight }, n) => [n ? ", " : "", at(key, tokens), part(weight)]);
  const enough = fewest ? `The ${fewest} largest add up to it` : "The kept pairs do not add up to it";
  const field = h("input", {
    type: "text",
    inputmode: "numeric",
    class: "against",
    value: chosen.join(" "),
    placeholder: "all others",
    maxlength: 200,
    "aria-label": "Competitors: positions",
    title: "positions of the keys to hold it against, such as 4 9; empty: every other key, by its attention",
    "data-place": "against",
    onchange: () => {
      const typed = positionsOf(field.value);
      if (typed === null) field.value = chosen.join(" ");
      else onAgainst(typed);
    },
  });
  return [
    h("p", { class: "hint" }, h("label", null, "Against ", field), chosen.length ? [" ", h("button", { type: "button", class: "quiet", onclick: () => onAgainst([]) }, "all others")] : null),
    hint("Log-odds against ", others, `. ${enough} within 10 %.`),
  ];
}
