// The artefact's records, from a server (one record, one page of a table) or from an export's compressed files (several
// records each, chunks of columns, which are filtered and sorted here as queries.py does there).

import { Problem } from "./net.js";
import { rows } from "./format.js";

/** Reader of one layer. */
export function layerData(api, number) {
  const about = api.run.layers.find((layer) => layer.layer === number);
  const plain = (path, query = "") => api.get(`data/${number}/${path}.json${query}`);
  const at = api.run.static ? (path) => plain(path, ".gz") : plain;
  return {
    about,
    report: () => plain("report"),
    head: (head) => at(`head/${head}`),
    heads: () => at("heads"),
    pattern: (head) => at(`pattern/${head}`),
    ...(api.run.static ? files(about, at, api.run) : served(at, number)),
  };
}

function served(at, number) {
  const page = async (path, asked) => {
    const entries = Object.entries(asked).filter(([, value]) => value !== undefined && value !== "");
    const found = await at(path, `?${new URLSearchParams(entries)}`);
    return { total: found.total, rows: rows(found) };
  };
  return {
    feature: (side, feature) => at(`feature/${side}/${feature}`),
    features: (side, asked) => page(`features/${side}`, asked),
    pair: (query, key, head) => at(`pair/${query}/${key}/${head}`),
    pairFile: async (query, key, head) => `data/${number}/pair/${query}/${key}/${head}.json`,
    pairs: (asked) => page("pairs", asked),
  };
}

function files(about, at, { rows: size, shards }) {
  const { layer } = about;
  const missing = (what) => {
    throw new Problem(`Layer ${layer} ${what}.`);
  };
  const chunks = async (path, total) =>
    (await Promise.all(d3.range(0, Math.max(total, 1), shards.rows).map((start) => at(`${path}/${start / shards.rows}`)))).flatMap(rows);
  const features = (side) => chunks(`features/${side}`, about.width[side]);

  async function named(found) {
    const names = {};
    for (const side of ["query", "key"])
      names[side] = new Map((await features(side)).map((row) => [row.feature, row.name]));
    const name = (side, feature) => (feature < 0 ? { bias: true } : (names[side].get(feature) ?? {}));
    return found.map((row) => ({ ...row, query_name: name("query", row.query), key_name: name("key", row.key) }));
  }

  /** The file that holds a pair (-1: none does), and the pair's cell in it; store.py has the same sum. */
  async function place(query, key, head) {
    const { width, starts } = await at("pair/starts");
    const cell = (head * width + query + 1) * width + key + 1;
    return { cell, shard: Math.max(query, key) + 2 <= width ? d3.bisectRight(starts, cell) - 1 : -1 };
  }

  return {
    async feature(side, feature) {
      const inside = feature >= 0 && feature < about.numbers[side];
      const shard = inside ? await at(`feature/${side}/${Math.floor(feature / shards.features)}`) : {};
      return shard[feature] ?? missing(`has no ${side} feature ${feature}`);
    },
    async features(side, asked) {
      return paged(await features(side), asked, size, (row) => {
        if (asked.live === "1" && !(row.density > 0)) return false;
        return !asked.text || hasText(row.feature, row.name, asked.text);
      });
    },
    async pair(query, key, head) {
      const { cell, shard } = await place(query, key, head);
      const found = shard >= 0 ? await at(`pair/${shard}`) : {};
      return found[cell] ?? missing(`keeps no pair of query feature ${query} and key feature ${key} in head ${head}`);
    },
    pairFile: async (query, key, head) => `data/${layer}/pair/${(await place(query, key, head)).shard}.json.gz`,
    async pairs(asked) {
      const first = !asked.sort && !Object.entries(asked).some(([name, value]) => name !== "page" && value !== "" && value !== undefined);
      const start = Number(asked.page ?? 0) * size;
      if (first && Math.floor(start / shards.rows) === Math.floor((start + size - 1) / shards.rows)) {
        const chunk = rows(await at(`pairs/${Math.floor(start / shards.rows)}`)); // they lie by importance
        const from = start % shards.rows;
        return { total: about.pairs, rows: await named(chunk.slice(from, from + size)) };
      }
      const hits = {};
      if (asked.text)
        for (const side of ["query", "key"])
          hits[side] = new Set(
            (await features(side)).filter((row) => hasText(row.feature, row.name, asked.text)).map((row) => row.feature),
          );
      const found = paged(await chunks("pairs", about.pairs), asked, size, (row) => {
        for (const name of ["query", "key", "head"])
          if (asked[name] !== undefined && asked[name] !== "" && row[name] !== Number(asked[name])) return false;
        if (asked.bias === "0" && (row.query < 0 || row.key < 0)) return false;
        return !asked.text || hits.query.has(row.query) || hits.key.has(row.key);
      });
      return { total: found.total, rows: await named(found.rows) };
    },
  };
}

function hasText(feature, name, text) {
  const words = text.toLowerCase().replaceAll("␣", " ").replaceAll("·", " ");
  const searched = (name.label ? [name.label] : (name.tokens ?? [])).join("\n").toLowerCase();
  return searched.includes(words) || (/^\d+$/.test(words.trim()) && Number(words.trim()) === feature);
}

/** One page of the rows that are within the bounds and wanted, in the order that is asked for. */
export function paged(all, asked, size, wanted) {
  const limits = Object.entries(asked)
    .filter(([name, value]) => /^(min|max)_/.test(name) && value !== "" && value !== undefined)
    .map(([name, value]) => [name.slice(0, 3), name.slice(4), Number(value)]);
  const inside = all.filter(
    (row) =>
      limits.every(([bound, name, value]) => (bound === "min" ? row[name] >= value : row[name] <= value)) && wanted(row),
  );
  const sort = asked.sort || "importance";
  const sign = asked.order === "asc" ? 1 : -1;
  const missing = (value) => value === null || value === undefined;
  inside.sort((a, b) => missing(a[sort]) - missing(b[sort]) || (missing(a[sort]) ? 0 : sign * (a[sort] - b[sort])));
  const start = Number(asked.page ?? 0) * size;
  return { total: inside.length, rows: inside.slice(start, start + size) };
}
