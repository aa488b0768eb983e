// Colours of attention: viridis for a share, orange for more and blue for less attention.
//
// Both go with the square root of the value, since most of attention is small.

const SHARES = Array.from({ length: 256 }, (_, n) => {
  const { r, g, b } = d3.rgb(d3.interpolateViridis(n / 255));
  return [r, g, b, 255];
});
const LESS = [0, 114, 178];
const MORE = [230, 110, 0];

/** [red, green, blue, opacity] of a share of attention, 0 … 1. */
export function share(p) {
  return SHARES[level(p)];
}

/** The same of a difference of two shares, -1 … 1: the fainter the nearer to 0, on light ground as on dark. */
export function difference(d) {
  return [...(d < 0 ? LESS : MORE), level(Math.abs(d))];
}

function level(p) {
  return Math.min(Math.round(255 * Math.sqrt(p)), 255);
}
