// What an address holds beside the prompt: positions, competitors, and the pairs that are edited.
//
//   head=5&query=23&key=11&against=9.4&edit=3.21.71.5_3.8.-1.5*0.5
//
// A pair is layer.query.key.head, then * and what it is multiplied by; without that it is switched off.

const PAIR = /^(\d{1,9})\.(-1|\d{1,9})\.(-1|\d{1,9})\.(\d{1,9})(?:\*(-?\d{1,3}(?:\.\d{1,4})?))?$/;
const MOST = 100; // times what it is, either way; the server takes no more

/** What an address chooses; what it does not is undefined or empty. */
export function chosenBy({ layer, prompt = null, head, query, key, against, edit }) {
  return {
    layer,
    prompt,
    head: whole(head),
    query: whole(query),
    key: whole(key),
    against: (against ?? "").split(".").map(whole).filter((position) => position !== undefined),
    edits: (edit ?? "").split("_").map(pairOf).filter(Boolean),
  };
}

/** The address's parameters of a choice. */
export function addressOf({ layer, prompt, head, query, key, against, edits }) {
  const edit = edits.map((pair) => nameOf(pair) + (pair.scale ? `*${pair.scale}` : "")).join("_");
  return { layer, prompt, head, query, key, against: against.join("."), edit };
}

/** A whole number, or undefined for anything else. */
function whole(text) {
  return /^\d{1,9}$/.test(text ?? "") ? Number(text) : undefined;
}

function pairOf(text) {
  const [, ...numbers] = PAIR.exec(text) ?? [];
  const [layer, query, key, head, scale = 0] = numbers.map((part) => (part === undefined ? undefined : Number(part)));
  return numbers.length && Math.abs(scale) <= MOST ? { layer, query, key, head, scale } : null;
}

/** A factor that a person has typed, with four decimals at most; null where it is none that the server takes. */
export function factorOf(text) {
  const value = Number(text.trim().replace(",", ".").replace("−", "-") || NaN);
  return Math.abs(value) <= MOST ? Math.round(1e4 * value) / 1e4 : null;
}

/** Positions that a person has typed; null where there is anything else. */
export function positionsOf(text) {
  const found = text.split(/[\s,;.]+/).filter(Boolean).map(whole);
  return found.includes(undefined) ? null : [...new Set(found)];
}

function nameOf({ layer, query, key, head }) {
  return [layer, query, key, head].join(".");
}

export function same(one, other) {
  return nameOf(one) === nameOf(other);
}
