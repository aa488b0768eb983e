// What an address holds beside the prompt: positions, and the pairs that are switched off as layer.query.key.head.

const PAIR = /^\d{1,9}(\.(-1|\d{1,9})){2}\.\d{1,9}$/;

/** A whole number, or undefined for anything else. */
export function whole(text) {
  return /^\d{1,9}$/.test(text ?? "") ? Number(text) : undefined;
}

/** Pairs of an address; what is none is left out. */
export function pairsOf(text) {
  return (text ?? "").split("_").filter((part) => PAIR.test(part)).map((part) => {
    const [layer, query, key, head] = part.split(".").map(Number);
    return { layer, query, key, head };
  });
}

/** The same pairs as an address holds them. */
export function textOf(pairs) {
  return pairs.map(({ layer, query, key, head }) => [layer, query, key, head].join(".")).join("_");
}

export function same(one, other) {
  return textOf([one]) === textOf([other]);
}
