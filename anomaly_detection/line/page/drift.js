/* Evidence of drift over the last pictures, on a logarithmic axis, and the alarms that it made. */

const LOWEST = 0.5;

function showDrift({ limit, num_images: total, evidence, alarms }) {
  const count = Math.max(0, ...Object.values(evidence).map((values) => values.length));
  const texts = [...new Set(alarms.map(({ text }) => text))];
  const last = alarms[alarms.length - 1];
  byId("drift").classList.toggle("alarmed", alarms.length > 0);
  byId("standing").textContent = last
    ? `▲ Changed: the last alarm was ${counted(count - 1 - last.index, "picture")} ago, at ${timeOf(last.time)}.`
    : !count ? "No pictures yet." : total > count
      ? `No alarm in the last ${counted(count, "picture")} (${total.toLocaleString("en")} in all).`
      : `No alarm in ${counted(count, "picture")}.`;
  showAlarms(texts.map((text) => ({ text, same: alarms.filter((alarm) => alarm.text === text) })));
  if (count) drawDrift(byId("chart"), limit, evidence, count, alarms.map(({ text, index }) => ({ index, text, number: texts.indexOf(text) + 1 })));
  else byId("chart").replaceChildren();
}

/* The texts, numbered as in the chart; untouched while they stay, so that they are not read again. */
function showAlarms(groups) {
  const items = groups.map(({ text, same }) => {
    const more = same.length > 1 ? `, and again until ${timeOf(same[same.length - 1].time)}` : "";
    return `${timeOf(same[0].time)}${more}: ${text}`;
  });
  const shown = [...byId("alarms").children].map((item) => item.textContent);
  if (items.join("\n") !== shown.join("\n")) byId("alarms").replaceChildren(...items.map((text) => node("li", {}, text)));
}

function drawDrift(container, limit, evidence, count, alarms) {
  const rows = Math.max(0, ...alarms.map(({ number }) => number)); // of numbers above the chart
  const width = Math.max(container.clientWidth, 240), height = 240 + 13 * rows;
  const [left, right, top, bottom] = [76, 100, 8 + 13 * rows, 26];
  const highest = 3 * Math.max(limit, ...Object.values(evidence).flat());
  const X = (index) => left + ((width - left - right) * index) / Math.max(1, count - 1);
  const Y = (value) => {
    const share = Math.log(Math.max(value, LOWEST) / LOWEST) / Math.log(highest / LOWEST);
    return height - bottom - (height - top - bottom) * share;
  };
  const svg = svgNode("svg", { width, height, role: "img", "aria-label": "Evidence of drift over the last pictures" });
  const line = (style, d) => svg.append(svgNode("path", { class: style, d }));
  const text = (x, y, anchor, content) => svg.append(svgNode("text", { x, y, "text-anchor": anchor }, content));

  for (let value = 1; value < highest; value *= 100) {
    line("grid", `M${left} ${Y(value)}H${width - right}`);
    if (Math.abs(Y(value) - Y(limit)) > 14) text(left - 6, Y(value) + 4, "end", value.toLocaleString("en"));
  }
  line("limit", `M${left} ${Y(limit)}H${width - right}`);
  text(left - 6, Y(limit) + 4, "end", limit.toLocaleString("en"));
  text(width - right + 6, Y(limit) + 4, "start", "alarm");
  text(left, height - 8, "start", counted(count, "picture") + " ago");
  text(width - right, height - 8, "end", "now");

  for (const [name, values] of Object.entries(evidence)) {
    let pen = "M";
    const steps = values.map((value, index) => {
      if (value == null) { pen = "M"; return ""; }
      const step = `${pen}${X(index).toFixed(1)} ${Y(value).toFixed(1)}`;
      pen = "L";
      return step;
    });
    line(`evidence ${name}`, steps.join("") || "M0 0");
  }
  for (const { index, number, text: cause } of alarms) {
    const mark = svgNode("g", { class: "alarm" });
    mark.append(svgNode("title", {}, cause), svgNode("path", { d: `M${X(index)} ${top}V${height - bottom}` }));
    mark.append(svgNode("text", { x: X(index), y: 13 * number, "text-anchor": "middle" }, number));
    svg.append(mark);
  }
  const ends = Object.entries(evidence).map(([name, values]) => ({ name, y: Y(values[count - 1] ?? LOWEST) }));
  for (const { name, y } of spread(ends, 16, top + 30, height - bottom)) {
    line(`evidence ${name}`, `M${width - right + 5} ${y}h18`);
    text(width - right + 27, y + 4, "start", name);
  }
  container.replaceChildren(svg);
}

/* Labels at their heights, moved as far apart as they must be to be read. */
function spread(labels, distance, top, bottom) {
  const sorted = labels.sort((a, b) => b.y - a.y);
  let below = bottom + distance;
  for (const label of sorted) below = label.y = Math.min(label.y, below - distance);
  let above = top - distance;
  for (const label of sorted.reverse()) above = label.y = Math.max(label.y, above + distance);
  return sorted;
}
