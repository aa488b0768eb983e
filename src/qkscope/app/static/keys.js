// The keyboard: / finds, j and k (or the arrows) go on and back, Enter opens, Escape leaves, ? explains.

import { fill, h } from "./dom.js";

const HELP = [
  ["/", "find: a feature, a token, a pair"],
  ["j  ↓", "next row of a list, or the next feature, pair or head"],
  ["k  ↑", "the one before"],
  ["Enter", "open the row"],
  ["o", "overview of the run"],
  ["Escape", "leave a field, close this"],
  ["?", "this help"],
];

/** Listen. */
export function keys() {
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    const field = event.target.closest?.("input, select, textarea");
    if (event.key === "Escape") {
      if (document.querySelector("dialog[open]")) return; // closes by itself
      document.activeElement?.blur();
    } else if (field) return;
    else if (event.key === "/") focusSearch(event);
    else if (event.key === "?") help();
    else if (event.key === "o") location.hash = "#/";
    else if (event.key === "j" || event.key === "ArrowDown") go(event, 1);
    else if (event.key === "k" || event.key === "ArrowUp") go(event, -1);
  });
}

function focusSearch(event) {
  const field = document.querySelector("main input[type=search], header input[type=search]");
  if (!field) return;
  event.preventDefault();
  field.focus();
  field.select();
}

/** The next row of the view's list, or the page that follows. */
function go(event, step) {
  const rows = [...document.querySelectorAll("main table.browse tbody tr a.open")];
  if (rows.length) {
    event.preventDefault();
    const at = rows.indexOf(document.activeElement);
    rows[Math.min(Math.max(at < 0 ? (step > 0 ? 0 : rows.length - 1) : at + step, 0), rows.length - 1)].focus();
    return;
  }
  if (event.key.startsWith("Arrow")) return; // scrolls
  document.querySelector(`main a[rel=${step > 0 ? "next" : "prev"}]`)?.click();
}

/** What the keys do. */
export function help() {
  const dialog = document.querySelector("dialog.help") ?? document.body.appendChild(h("dialog", { class: "help" }));
  fill(
    dialog,
    h("h2", null, "Keys"),
    h("dl", null, HELP.map(([key, words]) => [h("dt", null, h("kbd", null, key)), h("dd", null, words)])),
    h("button", { type: "button", onclick: () => dialog.close() }, "Close"),
  );
  if (!dialog.open) dialog.showModal();
}
