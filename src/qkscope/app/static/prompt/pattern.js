// A pattern as the server sends it: base64 of fixed-point numbers, rows of a triangle or of a square.

const STEPS = 65535;

/** Bytes of base64. */
export function bytes(text) {
  return Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
}

/** One head's attention: what share of it each query (row) gives to each key. */
export class Pattern {
  constructor({ cells, sink }, length, causal) {
    this.length = length;
    this.causal = causal;
    this.cells = numbers(cells);
    this.sink = sink === null ? null : numbers(sink);
  }

  /** The share of key j in query i's attention; 0 where it is not seen, the learned sink's at j = length. */
  at(i, j) {
    if (j === this.length) return this.sink ? this.sink[i] / STEPS : 0;
    if (this.causal) return j > i ? 0 : this.cells[(i * (i + 1)) / 2 + j] / STEPS;
    return this.cells[i * this.length + j] / STEPS;
  }

  /** The key that gets most of a query's attention. */
  most(i) {
    let best = 0;
    for (let j = 1; j < this.length; j++) if (this.at(i, j) > this.at(i, best)) best = j;
    return best;
  }
}

function numbers(text) {
  return new Uint16Array(bytes(text).buffer);
}
