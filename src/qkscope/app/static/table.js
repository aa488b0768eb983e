// Tables: of a whole layer, paged and sorted through the address, and small ones that are sorted in place.
//
// A column is {name, words, title, cell: (row) => child, text: true where it is no number, fixed: true where rows cannot
// be sorted by it, down: false where the first order is rising}.

import { fill, h } from "./dom.js";
import { number } from "./format.js";

/** A page of a large table; `params` of the address hold sort, order and page, and `link(changes)` makes addresses. */
export function browse(columns, { total, rows }, params, size, link) {
  const { sort, order } = { sort: "importance", order: "desc", ...defined(params) };
  const heads = columns.map((column) => {
    if (column.fixed) return h("th", { class: kind(column), title: column.title }, column.words);
    const active = sort === column.name;
    const next = active ? (order === "desc" ? "asc" : "desc") : column.down === false ? "asc" : "desc";
    return h(
      "th",
      { class: kind(column), title: column.title, "aria-sort": active ? ordered(order) : null },
      h("a", { href: link({ sort: column.name, order: next, page: "" }) }, column.words, arrow(active && order)),
    );
  });
  return [
    pager(total, Number(params.page ?? 0), size, link),
    h(
      "div",
      { class: "scroll" },
      h("table", { class: "browse" }, h("thead", null, h("tr", null, heads)), h("tbody", null, rows.map((row) => line(columns, row)))),
    ),
    rows.length ? null : h("p", { class: "state" }, "Nothing is like that."),
    rows.length > 20 ? pager(total, Number(params.page ?? 0), size, link) : null,
  ];
}

function pager(total, page, size, link) {
  const last = Math.max(Math.ceil(total / size) - 1, 0);
  const to = (at, words, rel) =>
    at < 0 || at > last
      ? h("span", { class: "off" }, words)
      : h("a", { href: link({ page: at || "" }), "data-page": rel }, words);
  return h(
    "p",
    { class: "pager" },
    total ? `${number(page * size + 1)}–${number(Math.min((page + 1) * size, total))} of ${number(total)}` : "0 rows",
    last > 0 ? [" ", to(page - 1, "‹ before", "before"), " ", to(page + 1, "after ›", "after")] : null,
  );
}

/** A table of rows that are all here, sorted where it stands; the `first` are shown until more are asked for. */
export function sortable(columns, rows, { sort, order = "desc", first = 20, here = () => false } = {}) {
  const body = h("tbody");
  const heads = h("tr");
  const more = h("button", { type: "button", class: "more", onclick: () => ((first = rows.length), show(...now)) }, `all ${number(rows.length)}`);
  let now = [sort, order];
  const show = (by, way) => {
    now = [by, way];
    more.hidden = first >= rows.length;
    const sign = way === "desc" ? -1 : 1;
    const worth = (row) => row[by] ?? -Infinity;
    const sorted = by ? [...rows].sort((a, b) => (worth(a) === worth(b) ? 0 : sign * (worth(a) < worth(b) ? -1 : 1))) : rows;
    fill(body, sorted.slice(0, first).map((row) => line(columns, row, here(row))));
    fill(
      heads,
      columns.map((column) => {
        if (column.fixed) return h("th", { class: kind(column), title: column.title }, column.words);
        const active = by === column.name;
        const next = active ? (way === "desc" ? "asc" : "desc") : column.down === false ? "asc" : "desc";
        return h(
          "th",
          { class: kind(column), title: column.title, "aria-sort": active ? ordered(way) : null },
          h("button", { type: "button", onclick: () => show(column.name, next) }, column.words, arrow(active && way)),
        );
      }),
    );
  };
  show(sort, order);
  return h("div", { class: "scroll" }, h("table", { class: "sortable" }, h("thead", null, heads), body), more);
}

const line = (columns, row, here = false) =>
  h("tr", { class: here ? "here" : null }, columns.map((column) => h("td", { class: kind(column) }, (column.cell ?? ((r) => number(r[column.name])))(row))));
const kind = (column) => (column.text ? "text" : "number");
const ordered = (order) => (order === "desc" ? "descending" : "ascending");
const arrow = (order) => h("span", { class: "arrow", "aria-hidden": "true" }, order ? (order === "desc" ? "▾" : "▴") : "");
const defined = (params) => Object.fromEntries(Object.entries(params).filter(([, value]) => value !== "" && value !== undefined));
