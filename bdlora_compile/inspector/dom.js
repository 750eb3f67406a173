"use strict";
// Elements from plain values. Text goes in as text nodes only: names of a model are not markup.

function h(tag, attributes, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name);
  if (classes.length) element.className = classes.join(" ");
  fill(element, attributes, children);
  return element;
}

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  fill(element, attributes, children);
  return element;
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
}

function badge(kind) {
  const [letter, words] = KINDS[kind] || ["?", kind];
  return h(`span.badge.k-${kind}`, { title: words, "aria-label": words }, letter);
}

function originBadge(origin) {
  return h(`span.origin.o-${origin}`, {}, ORIGINS[origin] || origin);
}

function table(heads, rows, attributes) {
  const head = heads.map((one) => h(one.num ? "th.num" : "th", { scope: "col" }, one.text || one));
  return h("div.scroll", {}, h("table", attributes || {}, h("thead", {}, h("tr", {}, head)), h("tbody", {}, rows)));
}

function legend() {
  return h("ul.legend", { "aria-label": "kinds of nodes" },
    Object.entries(KINDS).map(([kind, [, words]]) => h("li", {}, badge(kind), " ", words)));
}

function segments(options, chosen, choose, label) {
  return h("div.segments", { role: "group", "aria-label": label }, options.map(([value, text]) =>
    h("button", { type: "button", "aria-pressed": String(value === chosen), onclick: () => choose(value) }, text)));
}
