// JSON from this page's own host, compressed or not; every failure is one line for a person.

/** What went wrong, in words that are shown. */
export class Problem extends Error {}

const kept = new Map(); // what was read lately, so that going back shows at once
const KEPT = 64;

/** GET `path`, relative to the page; `data/…` is read once, since an artefact that is served does not change. */
export async function get(path, signal) {
  if (kept.has(path)) return kept.get(path);
  const value = await answered(path, { signal });
  if (path.startsWith("data/")) {
    kept.set(path, value);
    if (kept.size > KEPT) kept.delete(kept.keys().next().value);
  }
  return value;
}

/** POST `body` as JSON. */
export function post(path, body, signal) {
  return answered(path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
}

async function answered(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The page's host does not answer; is it still running?");
  }
  if (answer.ok) {
    try {
      return path.endsWith(".gz") ? await unpacked(await answer.blob()) : await answer.json();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("The page's host sent something that cannot be read.");
    }
  }
  const said = await answer.json().catch(() => ({}));
  throw new Problem(typeof said.error === "string" ? said.error : answer.status === 404 ? "Not found." : `The page's host answers ${answer.status}.`);
}

/** JSON of a compressed file, or of one that the host has unpacked on its way here. */
async function unpacked(blob) {
  const [first, second] = new Uint8Array(await blob.slice(0, 2).arrayBuffer());
  const packed = first === 0x1f && second === 0x8b;
  return new Response(packed ? blob.stream().pipeThrough(new DecompressionStream("gzip")) : blob).json();
}
