/* The facts of the run, which run.js beside the page brings as RUN, if it is there; it may belong to
   other results, since DVC restores the page but not this file. Texts are only ever set as text. */

function showFacts({ revision, made, commands, trends, times, speeds, next }) {
  byId("run").textContent = `${revision} · ${made}`;
  byId("commands").textContent = commands.join("\n");
  for (const node of document.querySelectorAll("[data-trend]")) showTrend(node, trends[node.dataset.category]);
  for (const { name } of categories) if (next[name]) showNext(name, next[name]);
  for (const node of document.querySelectorAll("[data-note]")) {
    const note = trends[node.dataset.note];
    node.textContent = note;
    node.hidden = typeof note !== "string";
  }
  const seconds = Object.fromEntries(times.map((row) => [row.stage, row.seconds.toFixed(1)]));
  for (const node of document.querySelectorAll("[data-fit]")) node.textContent = seconds[`train@${node.dataset.fit}`] ?? "–";
  table(byId("speeds"), ["Category", "Judged by", "Median, ms", "99 %, ms", "Images/s"], Object.entries(speeds).flatMap(([category, formats]) =>
    Object.entries(formats).map(([name, of]) => [category, name, of.p50.toFixed(1), of.p99.toFixed(1), of.images_per_second.toFixed(0)])));
  table(byId("times"), ["Stage", "Ended", "Seconds", "Peak memory, MB"], times.map((row) =>
    [row.stage, row.ended, row.seconds.toFixed(1), row.peak_memory ? (row.peak_memory / 1e6).toFixed(0) : "–"]));
  for (const node of document.querySelectorAll(".of-run")) node.hidden = false;
}

function showTrend(node, trends) {
  const trend = trends[node.dataset.trend];
  if (!trend) return;
  const [value, word] = trend;
  const before = document.createElement("span");
  before.className = "quiet";
  before.textContent = `, was ${node.dataset.trend === "image_auroc" ? value.toFixed(3) : percent(value)}`;
  node.classList.add(word.replace(" ", "-"));
  node.append(word, before);
  node.hidden = false;
}

if (typeof RUN !== "undefined" && RUN.results === byId("data").dataset.results) showFacts(RUN);
