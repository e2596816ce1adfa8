"use strict";
// Makes elements of a page. All words come in as text, never as HTML.

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function formatFigure(value) {
  return value === null || value === undefined ? "–" : String(Number(value.toPrecision(3)));
}

function formatChange(value) {
  return (value > 0 ? "+" : value < 0 ? "−" : "±") + formatFigure(Math.abs(value));
}

// The data that stand in an element, for which something is drawn there.
function readData(element) {
  return JSON.parse(element.querySelector("script").textContent);
}
