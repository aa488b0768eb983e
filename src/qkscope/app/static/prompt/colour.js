// Colours of attention: shares from the page's ground to a deep blue, differences from orange over the ground to blue.
//
// Both are read off the style sheet (so that they follow light and dark) and get darker with the square root of the
// value, since most of attention is small. Blue and orange are told apart by all common kinds of colour blindness.

const LEVELS = 256;

/** {share(p), difference(d)}: each gives [r, g, b] for a value in 0 … 1 or -1 … 1. */
export function ramps() {
  const style = getComputedStyle(document.documentElement);
  const named = (name) => style.getPropertyValue(name).trim();
  const ground = named("--map-ground");
  const more = table([ground, named("--map-half"), named("--map-full")]);
  const less = table([ground, named("--map-less-half"), named("--map-less")]);
  return {
    share: (p) => more[level(p)],
    difference: (d) => (d < 0 ? less : more)[level(Math.abs(d))],
  };
}

function level(p) {
  return Math.min(LEVELS - 1, Math.round(Math.sqrt(Math.max(p, 0)) * (LEVELS - 1)));
}

function table(stops) {
  const mixed = d3.piecewise(d3.interpolateLab, stops);
  return Array.from({ length: LEVELS }, (_, n) => {
    const { r, g, b } = d3.rgb(mixed(n / (LEVELS - 1)));
    return [r, g, b];
  });
}

/** Call `draw` now and whenever the page turns light or dark, until `signal` ends. */
export function onTheme(draw, signal) {
  draw();
  addEventListener("themechange", draw, { signal });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw, { signal });
}
