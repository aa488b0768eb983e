// Addresses: every view has one, in the part after #, so that any web host can serve the page.
//
//   #/layer/3/feature/query/12?head=5   ⇄   {view: "feature", params: {layer: 3, side: "query", feature: 12, head: "5"}}
//
// Whole numbers in the path are numbers; what stands after ? are strings.

const ROUTES = {
  overview: "",
  features: "layer/:layer/features",
  feature: "layer/:layer/feature/:side/:feature",
  pairs: "layer/:layer/pairs",
  pair: "layer/:layer/pair/:query/:key/:head",
  head: "layer/:layer/head/:head",
  prompt: "layer/:layer/prompt",
};

/** The address of a view: parameters that its path does not name stand after ?; empty ones are left out. */
export function link(view, params = {}) {
  const left = { ...params };
  const path = ROUTES[view]
    .split("/")
    .map((part) => {
      if (!part.startsWith(":")) return part;
      const value = left[part.slice(1)];
      delete left[part.slice(1)];
      return encodeURIComponent(String(value));
    })
    .join("/");
  const entries = Object.entries(left).filter(([, value]) => value !== undefined && value !== null && value !== "");
  const query = new URLSearchParams(entries.map(([name, value]) => [name, String(value)])).toString();
  return `#/${path}${query ? `?${query}` : ""}`;
}

/** What an address asks for: {view, params}, or null where there is no such view. */
export function parse(hash) {
  const [path, query = ""] = split(hash.replace(/^#?\/?/, ""), "?");
  const parts = path.replace(/\/$/, "").split("/").map(decoded);
  for (const [view, route] of Object.entries(ROUTES)) {
    const names = route.split("/");
    if (names.length !== parts.length) continue;
    const own = {};
    const fits = names.every((name, i) => {
      if (!name.startsWith(":")) return name === parts[i];
      if (name === ":side") {
        own.side = parts[i];
        return parts[i] === "query" || parts[i] === "key";
      }
      own[name.slice(1)] = Number(parts[i]);
      return /^(-1|\d{1,9})$/.test(parts[i]);
    });
    if (fits) return { view, params: { ...Object.fromEntries(new URLSearchParams(query)), ...own } };
  }
  return null;
}

function split(text, at) {
  const place = text.indexOf(at);
  return place < 0 ? [text] : [text.slice(0, place), text.slice(place + 1)];
}

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part; // a stray % is no view's name
  }
}
