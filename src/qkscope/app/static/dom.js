// DOM nodes from plain values: text is always text, never markup.

const SVG = "http://www.w3.org/2000/svg";

/**
 * An element: h("a", {href, class: "x", onclick: f, style: {"--shade": 0.5}}, "text", node, [more]).
 * Attributes that are null, undefined or false are left out, true is an empty attribute; `on…` functions are listeners;
 * `style` is an object of properties (a style attribute would be refused by the content security policy).
 * Children may be nodes, text, numbers, lists of these; null, undefined and false are nothing.
 */
export function h(tag, attributes, ...children) {
  return built(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function s(tag, attributes, ...children) {
  return built(document.createElementNS(SVG, tag), attributes, children);
}

function built(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, part] of Object.entries(value)) node.style.setProperty(key, part);
    else node.setAttribute(name, value === true ? "" : value);
  }
  append(node, children);
  return node;
}

/** Append children as `h` does. */
export function append(node, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
}

/** Put these children in the place of all that a node has. */
export function fill(node, ...children) {
  node.replaceChildren();
  append(node, children);
  return node;
}
