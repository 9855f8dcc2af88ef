"use strict";

/* Nodes of the document, and how values are written. All text is inserted as text. */

const byId = (id) => document.getElementById(id);

function node(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function svgNode(tag, attributes = {}, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

/* A notice that is there as long as it has a text. */
function notice(id, text) {
  byId(id).hidden = !text;
  if (byId(id).textContent !== text) byId(id).textContent = text;
}

const short = (value) => String(Number(value.toPrecision(4)));
const counted = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
const fileName = (path) => path.split(/[\\/]/).pop() || "unnamed";

/* The local time, with the date unless it is today. */
function timeOf(iso) {
  const time = new Date(iso);
  const isToday = time.toDateString() === new Date().toDateString();
  const clock = time.toLocaleTimeString([], { hourCycle: "h23" });
  return isToday ? clock : `${time.toLocaleDateString()} ${clock}`;
}

const MARKS = { normal: "✓ ", anomalous: "✕ ", error: "! " };
