"use strict";

/* Charts as SVG: axes, lines, bands, bars and marks. The style sheet has the colours and dashes. */

const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes = {}, text = "") {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== "") node.textContent = text;
  return node;
}

function ticks(low, high, count = 5) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const values = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) values.push(k * step);
  return values;
}

/* options: title, xLabel, yLabel, x and y as [low, high], logX, xTicks, and layers, each with a kind
   (line, steps, band, bars, dots, point, vertical, horizontal), a style and, for the legend, a label. */
function drawChart(container, options) {
  const [width, height, left, right, top, bottom] = [420, 290, 52, 12, 10, 44];
  const [x0, x1] = options.x, [y0, y1] = options.y;
  const scale = options.logX ? Math.log : (value) => value;
  const X = (value) => left + (width - left - right) * (scale(value) - scale(x0)) / (scale(x1) - scale(x0) || 1);
  const Y = (value) => height - bottom - (height - top - bottom) * (value - y0) / (y1 - y0 || 1);
  const path = (points) => "M" + points.map(([x, y]) => `${X(x).toFixed(1)} ${Y(y).toFixed(1)}`).join("L");
  const short = (value) => String(Number(value.toPrecision(4)));

  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": options.title });
  for (const value of options.xTicks ?? ticks(x0, x1)) {
    svg.append(element("path", { class: "grid", d: `M${X(value)} ${top}V${height - bottom}` }));
    svg.append(element("text", { x: X(value), y: height - bottom + 16, "text-anchor": "middle" }, short(value)));
  }
  for (const value of ticks(y0, y1)) {
    svg.append(element("path", { class: "grid", d: `M${left} ${Y(value)}H${width - right}` }));
    svg.append(element("text", { x: left - 6, y: Y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  svg.append(element("text", { x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle" }, options.xLabel));
  const middle = (top + height - bottom) / 2;
  svg.append(element("text", { x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})` }, options.yLabel));

  for (const { kind, style, points, at } of options.layers) {
    if (kind === "line") svg.append(element("path", { class: `line ${style}`, d: path(points) }));
    if (kind === "steps") {
      const stairs = points.flatMap(([x, y], i) => (i ? [[x, points[i - 1][1]], [x, y]] : [[x, y]]));
      svg.append(element("path", { class: `line ${style}`, d: path(stairs) }));
    }
    if (kind === "band") {
      const edge = [...points.map(([x, , high]) => [x, high]), ...points.map(([x, low]) => [x, low]).reverse()];
      svg.append(element("path", { class: style, d: path(edge) + "Z" }));
    }
    if (kind === "bars") for (const [from, to, y] of points) {
      const bar = { x: X(from), width: Math.max(X(to) - X(from) - 0.6, 0.5), y: Y(y), height: Y(0) - Y(y) };
      svg.append(element("rect", { class: style, ...bar }));
    }
    if (kind === "dots" || kind === "point") for (const [x, y, text] of points) {
      const dot = element("circle", { class: `${style} ${kind}`, cx: X(x), cy: Y(y), r: kind === "point" ? 6 : 3.5 });
      dot.append(element("title", {}, text ?? `${short(x)}, ${short(y)}`));
      svg.append(dot);
    }
    if (kind === "vertical" && at != null) svg.append(element("path", { class: `line ${style}`, d: `M${X(at)} ${top}V${height - bottom}` }));
    if (kind === "horizontal" && at != null) svg.append(element("path", { class: `line ${style}`, d: `M${left} ${Y(at)}H${width - right}` }));
  }

  const title = document.createElement("h4");
  title.textContent = options.title;
  const legend = document.createElement("ul");
  legend.className = "legend";
  for (const { style, label } of options.layers) if (label) {
    const item = document.createElement("li");
    item.className = style;
    item.textContent = label;
    legend.append(item);
  }
  container.replaceChildren(title, svg, legend);
}
