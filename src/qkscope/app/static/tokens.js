// Tokens as a person reads them: white space and control characters visible, each in its own direction.

import { h } from "./dom.js";

const MARKS = { " ": "·", "\n": "⏎", "\t": "⇥", "\r": "↵", "\u00a0": "⍽" };
const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/u;
const JOINERS = "\u200c\u200d"; // belong to scripts and emoji
const SPECIAL = /^<[^<>\s]{1,40}>$|^\[[A-Z]{2,8}\]$/; // <bos>, <|endoftext|>, [CLS]

/** Text in which no character hides or reorders others. */
export function clean(text) {
  return [...String(text)].map(cleanCharacter).join("");
}

function cleanCharacter(char) {
  if (!HIDDEN.test(char) || JOINERS.includes(char)) return char;
  const code = char.codePointAt(0);
  return code >= 0xd800 && code < 0xe000 ? "\ufffd" : `⟨${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
}

/** A token's text as nodes; white space as faint signs. */
export function tokenText(token) {
  const lone = /^\p{M}/u.test(token) ? "◌" : ""; // a mark without its letter
  return [lone, [...token].map((char) => (MARKS[char] ? h("i", null, MARKS[char]) : cleanCharacter(char)))];
}

/** A token as an element of its own; attributes as in `h`. */
export function token(text, attributes = {}) {
  const kind = SPECIAL.test(text) ? "token special" : "token";
  return h("bdi", { ...attributes, class: [kind, attributes.class].filter(Boolean).join(" ") }, tokenText(text));
}

/** A token in quotation marks, spaces visible, as text. */
export function quoted(text) {
  return `“${[...text].map((char) => (char === " " ? "␣" : (MARKS[char] ?? cleanCharacter(char)))).join("")}”`;
}
