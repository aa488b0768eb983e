// Numbers and names as they are written on the page.

import { quoted, clean } from "./tokens.js";

const DASH = "–";

export const finite = (value) => typeof value === "number" && Number.isFinite(value);

/** Three significant digits; a dash for what was not measured. */
export function number(value, digits = 3) {
  if (!finite(value)) return DASH;
  const size = Math.abs(value);
  if (Number.isInteger(value) || size >= 10 ** digits) return Math.round(value).toLocaleString("en").replace("-", "−");
  if (size >= 1e-4) return String(Number(value.toPrecision(digits))).replace("-", "−");
  const [mantissa, exponent] = value.toExponential(1).split("e");
  return `${mantissa.replace("-", "−")}×10${[...exponent.replace("+", "")].map((c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]).join("")}`;
}

export const percent = (value) => (finite(value) ? `${number(100 * value)} %` : DASH);

/** Nats as millinats. */
export const millinats = (value) => (finite(value) ? number(1000 * value) : DASH);

/** A figure {mean, ci95} with its interval, as text. */
export function figure(value, scale = 1) {
  if (!value || !finite(value.mean)) return DASH;
  const ends = bounds(value);
  return number(value.mean * scale) + (ends ? ` [${ends.map((end) => number(end * scale)).join(", ")}]` : "");
}

/** The interval of a figure, where it has one. */
export function bounds(value) {
  const ends = value?.ci95;
  return Array.isArray(ends) && ends.every(finite) ? ends : null;
}

/** What a feature goes by, as text: its label, or the tokens it fires on most. */
export function nameOf(name) {
  if (!name) return "";
  if (name.bias) return "bias";
  if (name.label) return clean(name.label.replace("“ ", "“␣"));
  return (name.tokens ?? []).map(quoted).join(" ");
}

export const short = (side, feature) => (feature < 0 ? `${side} bias` : `${side[0]}${feature}`);

/** Columns as rows: {columns: {a: [1, 2]}} to [{a: 1}, {a: 2}]. */
export function rows({ columns }) {
  const names = Object.keys(columns);
  return columns[names[0]].map((_, i) => Object.fromEntries(names.map((name) => [name, columns[name][i]])));
}

export const OTHER = { query: "key", key: "query" };
export const SIDES = ["query", "key"];
