// Colours of attention, as in the other views: viridis for a share, blue over grey to orange for a difference.
//
// Both go with the square root of the value, since most of attention is small.

const LEVELS = 256;
const DIVERGING = ["#08519c", "#6baed6", "#f5f5f5", "#fdae6b", "#a63603"];
const shares = table(d3.interpolateViridis);
const differences = table(d3.interpolateRgbBasis(DIVERGING));

/** [r, g, b] of a share of attention, 0 … 1. */
export function share(p) {
  return at(shares, Math.sqrt(p));
}

/** [r, g, b] of a difference of two shares, -1 … 1. */
export function difference(d) {
  return at(differences, 0.5 + (Math.sign(d) * Math.sqrt(Math.abs(d))) / 2);
}

function at(colours, place) {
  return colours[Math.min(Math.max(Math.round(place * (LEVELS - 1)), 0), LEVELS - 1)];
}

function table(scale) {
  return Array.from({ length: LEVELS }, (_, n) => {
    const { r, g, b } = d3.rgb(scale(n / (LEVELS - 1)));
    return [r, g, b];
  });
}
