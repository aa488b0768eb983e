// Filters of a table as a form: what is filled in becomes part of the address.

import { h } from "./dom.js";

/** Fields {name, words, unit, scale (of what is shown), type, on (value of a ticked box)}. */
export function fields(list, params, link) {
  const inputs = list.map((field) => [field, input(field, params[field.name])]);
  const go = (event) => {
    event.preventDefault();
    const changes = Object.fromEntries(inputs.map(([field, node]) => [field.name, valueOf(field, node)]));
    location.hash = link({ ...changes, page: "" });
  };
  return h(
    "form",
    { class: "fields", onsubmit: go, onchange: go },
    inputs.map(([field, node]) => h("label", null, h("span", null, field.words), " ", node, field.unit ? h("small", null, ` ${field.unit}`) : null)),
    h("button", { type: "submit" }, "Show"),
    list.some((field) => params[field.name]) &&
      h("a", { href: link({ ...Object.fromEntries(list.map((field) => [field.name, ""])), page: "" }) }, "clear"),
  );
}

function input(field, value = "") {
  if (field.type === "checkbox") return h("input", { type: "checkbox", name: field.name, checked: value === (field.on ?? "1") });
  const shown = field.scale && value !== "" ? Number((Number(value) * field.scale).toPrecision(7)) : value;
  return h("input", { type: field.type ?? "text", inputmode: field.type ? null : "decimal", name: field.name, value: shown, maxlength: 80 });
}

function valueOf(field, node) {
  if (field.type === "checkbox") return node.checked ? (field.on ?? "1") : "";
  if (field.type) return node.value;
  const text = node.value.trim().replace(",", ".").replace("−", "-");
  return field.scale && text !== "" ? String(Number((Number(text) / field.scale).toPrecision(7))) : text;
}
