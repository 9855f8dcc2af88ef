/* What moves on the page. Its data are in #data; file names are only ever set as text. */

const categories = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const percent = (share) => (Number.isFinite(share) ? `${(100 * share).toFixed(1)} %` : "–");
const state = { category: categories[0], shown: 120, selected: 0, open: null };
const images = categories.flatMap((category) => category.images.map((image) => ({ ...image, category })));
// Scores have single precision, so the threshold must too.
for (const category of categories) category.threshold = Math.fround(category.metrics.threshold);

/* ---- verdicts ---- */

function verdict(image, threshold = image.category.threshold) {
  const rejected = image.score > threshold;
  if (image.label) return rejected ? "detected" : "missed";
  return rejected ? "false reject" : "passed";
}

function confusion(category, threshold = category.threshold) {
  const counts = { passed: 0, "false reject": 0, missed: 0, detected: 0 };
  for (const image of category.images) counts[verdict(image, threshold)]++;
  return counts;
}

/* Shares of good and of defective images. */
function errorRates(counts) {
  const [normal, anomalous] = [counts.passed + counts["false reject"], counts.missed + counts.detected];
  return { falseReject: counts["false reject"] / normal, miss: counts.missed / anomalous };
}

/* ---- what next ---- */

function showNext(name, { faults, steps }) {
  const node = [...document.querySelectorAll("[data-next]")].find((one) => one.dataset.next === name);
  const add = (tag, text, parent = node) => {
    const child = document.createElement(tag);
    child.textContent = text;
    parent.append(child);
    return child;
  };
  node.replaceChildren();
  node.classList.toggle("quiet", !faults.length && !steps.length);
  if (!faults.length && !steps.length) return void add("p", "What next: nothing to suggest.");
  add("h4", "What next");
  for (const fault of faults) add("p", `Poor: ${fault}`).className = "wrong";
  const list = steps.length ? add("ul", "") : add("p", "No rule says why.");
  for (const { reason, command } of steps) {
    const item = add("li", "", list);
    add("span", reason, item);
    add("pre", command, item);
  }
  add("p", "No model and no threshold is chosen on test images. docs/if-the-result-is-poor.md explains each step, and what to do where no rule applies.").className = "quiet";
}

/* ---- threshold ---- */

function cuts(category) {
  return [...new Set(category.images.map((image) => image.score))].sort((a, b) => a - b);
}

/* The threshold that so many of the scores do not exceed: where there is room, between two of them. */
function thresholdAt(scores, rank) {
  if (!rank) return Math.fround(scores[0] - (Math.abs(scores[0]) || 1) * 1e-6);
  const below = scores[rank - 1], above = scores[rank] ?? below;
  const middle = Math.fround((below + above) / 2);
  return middle < above ? middle : below;
}

/* The fewest decimal digits that give this number of single precision. */
function shortest(value) {
  const digits = [1, 2, 3, 4, 5, 6, 7, 8].find((count) => Math.fround(value.toPrecision(count)) === value);
  return String(Number(value.toPrecision(digits ?? 9)));
}

function setThreshold(value) {
  state.category.threshold = value;
  showThreshold();
  showGallery();
}

function showThreshold() {
  const category = state.category, threshold = category.threshold;
  const scores = cuts(category);
  byId("slider").max = scores.length;
  byId("slider").value = scores.filter((score) => score <= threshold).length;
  byId("slider").setAttribute("aria-valuetext", threshold.toPrecision(4));
  byId("number").value = shortest(threshold);
  const isCalibrated = threshold === Math.fround(category.metrics.threshold);
  byId("keep").textContent = isCalibrated ? "# this is the detector's threshold: there is nothing to set"
    : `dvc exp run -S evaluation.threshold_method=manual -S evaluation.threshold=${shortest(threshold)}`;
  const counts = confusion(category), rates = errorRates(counts);
  byId("true-passes").textContent = counts.passed;
  byId("false-rejects").textContent = counts["false reject"];
  byId("misses").textContent = counts.missed;
  byId("detections").textContent = counts.detected;
  byId("false-reject-rate").textContent = percent(rates.falseReject);
  byId("miss-rate").textContent = percent(rates.miss);
  const f1 = 2 * counts.detected / (2 * counts.detected + counts["false reject"] + counts.missed);
  byId("f1").textContent = Number.isFinite(f1) && category.metrics.num_anomalous ? f1.toFixed(3) : "–";
  drawScores(category);
  for (const row of byId("rates").tBodies[0].rows) row.ariaCurrent = row.threshold === threshold ? "true" : null;
  if (category.curves.roc) {
    const here = [rates.falseReject, 1 - rates.miss, "this threshold"];
    drawRoc(byId("explorer-roc"), category, "Where this threshold is on the ROC curve", [here]);
  }
}

/* A row for each false-reject rate, whose button sets the threshold that the calibration images give. */
function showRates(category) {
  const { num_images: number, thresholds } = category.metrics.calibration;
  byId("num-calibration").textContent = number;
  byId("rates").tBodies[0].replaceChildren(...thresholds.map(({ rate, threshold, images_needed: needed }) => {
    const row = document.createElement("tr"), button = document.createElement("button");
    button.textContent = `${Number((100 * rate).toPrecision(3))} %`;
    row.insertCell().append(button);
    if (threshold == null) {
      button.disabled = true;
      const cell = row.insertCell();
      cell.colSpan = 3;
      cell.className = "quiet";
      cell.textContent = `needs ${needed} calibration images`;
      return row;
    }
    const at = Math.fround(threshold), found = errorRates(confusion(category, at));
    const cells = [at.toPrecision(4), percent(found.falseReject)];
    if (category.metrics.num_anomalous) cells.push(percent(found.miss));
    for (const text of cells) Object.assign(row.insertCell(), { textContent: text, className: "number" });
    row.threshold = at;
    button.setAttribute("aria-label", `Threshold for ${button.textContent} false rejects`);
    button.addEventListener("click", () => setThreshold(at));
    return row;
  }));
}

/* How often a false reject's cost a miss may cost. */
const COSTS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000];

/* The threshold at which mistakes cost least, and what they cost a part, in false rejects; of equal
   ones that which rejects least. */
function cheapest(category, ratio, share) {
  const { num_normal: normal, num_anomalous: anomalous } = category.metrics;
  const scores = cuts(category), of = new Map(scores.map((score) => [score, [0, 0]]));
  for (const { score, label } of category.images) of.get(score)[label]++;
  let [misses, rejects, best] = [0, normal, { cost: Infinity }];
  for (let rank = 0; rank <= scores.length; rank++) {
    const [good, defective] = rank ? of.get(scores[rank - 1]) : [0, 0];
    rejects -= good;
    misses += defective;
    const cost = share * ratio * misses / anomalous + (1 - share) * rejects / (normal || 1);
    if (cost <= best.cost) best = { cost, rank };
  }
  return { threshold: thresholdAt(scores, best.rank), cost: best.cost };
}

function setByCost() {
  const ratio = COSTS[byId("cost").value], share = byId("share").valueAsNumber / 100;
  showCost();
  if (!(share >= 0 && share <= 1)) return;
  const { threshold, cost } = cheapest(state.category, ratio, share);
  setThreshold(threshold);
  byId("cheapest").textContent = `Threshold ${threshold.toPrecision(4)}: in 1,000 parts, mistakes cost as much as ${(1000 * cost).toPrecision(3)} false rejects.`;
}

function showCost() {
  const ratio = COSTS[byId("cost").value];
  byId("ratio").textContent = ratio;
  byId("cost").setAttribute("aria-valuetext", `${ratio} times`);
}

function drawScores(category) {
  const scores = category.images.map((image) => image.score);
  const [low, high] = [Math.min(...scores, category.threshold), Math.max(...scores, category.threshold)];
  const size = (high - low || 1) / 40;
  const bars = [0, 1].map((label) => {
    const chosen = category.images.filter((image) => image.label === label);
    const counts = new Array(40).fill(0);
    for (const { score } of chosen) counts[Math.min(39, Math.floor((score - low) / size))]++;
    return counts.map((count, i) => [low + i * size, low + (i + 1) * size, count / (chosen.length || 1)]);
  });
  drawChart(byId("explorer-scores"), {
    title: "Scores", xLabel: "Score", yLabel: "Share of the class",
    x: [low, low + 40 * size], y: [0, Math.max(...bars.flat().map((bar) => bar[2]))],
    layers: [
      { kind: "bars", style: "normal", points: bars[0], label: "good" },
      ...(category.metrics.num_anomalous ? [{ kind: "bars", style: "anomalous", points: bars[1], label: "defective" }] : []),
      { kind: "vertical", style: "threshold", at: category.threshold, label: "threshold" },
    ],
  });
}

/* ---- curves ---- */

function drawRoc(container, category, title, points) {
  const roc = category.curves.roc;
  drawChart(container, {
    title, xLabel: "False-reject rate", yLabel: "Detection rate", x: [0, 1], y: [0, 1],
    layers: [
      { kind: "band", style: "band", points: roc.map(([x, , low, high]) => [x, low, high]), label: "95 % interval" },
      { kind: "line", style: "chance", points: [[0, 0], [1, 1]], label: "chance" },
      { kind: "line", style: "normal", points: roc, label: `AUROC ${category.metrics.image_auroc.toFixed(3)}` },
      { kind: "point", style: "threshold", points },
    ],
  });
}

function drawDetection(container, title, xLabel, curve, { name, per_side: perSide }, size, made = {}) {
  const at = size == null ? null : perSide * size, short = name.split(" ")[0];
  const rows = curve.map((row) => [Number((perSide * row.size).toPrecision(3)), row]);
  drawChart(container, {
    title, xLabel: `${xLabel}, ${name}`, yLabel: "Detection rate", logX: true, xTicks: rows.map(([size]) => size),
    x: [rows[0][0] * 0.9, rows[rows.length - 1][0] * 1.1], y: [0, 1],
    layers: [
      { kind: "band", style: "band", points: rows.map(([x, row]) => [x, row.low, row.high]), label: "95 % interval" },
      { kind: "line", style: "normal", points: rows.map(([x, row]) => [x, row.detection_rate]) },
      { kind: "dots", style: "normal", points: rows.map(([x, row]) => [x, row.detection_rate, `${x} ${short}: ${percent(row.detection_rate)} of ${row.num_images}`]) },
      { kind: "vertical", style: "threshold", at, label: at == null ? "" : `90 % from ${Number(at.toPrecision(3))} ${short}` },
      { kind: "horizontal", style: "chance", at: 0.9 },
      { kind: "horizontal", style: "anomalous", at: made.rejected_without_defect, label: withoutDefect(made) },
    ],
  });
}

function withoutDefect({ rejected_without_defect: share, rejected_without_defect_interval: interval, num_without_defect: number }) {
  return share == null ? "" : `without a defect: ${percent(share)} of ${number} images rejected (95 %: ${interval.map(percent).join(" to ")})`;
}

function showCurves() {
  const { metrics, curves } = state.category;
  for (const id of ["roc", "precision-recall", "detection", "real-detection"]) byId(id).replaceChildren();
  if (curves.roc) {
    drawRoc(byId("roc"), state.category, "ROC curve", []);
    const share = metrics.num_anomalous / (metrics.num_anomalous + metrics.num_normal);
    drawChart(byId("precision-recall"), {
      title: "Precision and recall", xLabel: "Recall (detection rate)", yLabel: "Precision", x: [0, 1], y: [0, 1],
      layers: [
        { kind: "horizontal", style: "chance", at: share, label: `chance (${share.toFixed(2)})` },
        { kind: "steps", style: "normal", points: curves.precision_recall, label: `average precision ${metrics.image_average_precision.toFixed(3)}` },
      ],
    });
  }
  const unit = metrics.size_unit, made = metrics.synthetic;
  if (made) drawDetection(byId("detection"), `Synthetic defects (${made.num_images})`, "Size", made.detection_by_size, unit, made.size_detected_in_90_percent, made);
  if (metrics.detection_by_size) drawDetection(byId("real-detection"), "Real defects with masks", "Size up to", metrics.detection_by_size, unit, null);
  drawHistory(state.category);
  showTables(metrics);
}

/* Whatever curves the fit recorded; a model that is not trained in epochs has none. */
function drawHistory({ history, best_epoch: best }) {
  const lines = Object.entries(history.curves);
  if (!lines.length) {
    const note = document.createElement("p");
    note.className = "quiet";
    note.textContent = "This model is not trained in epochs, so there is no loss curve.";
    byId("loss").replaceChildren(note);
    return;
  }
  const points = lines.flatMap(([, curve]) => curve);
  const last = Math.max(2, ...points.map(([epoch]) => epoch));
  const values = points.map(([, value]) => value);
  const styles = ["normal", "anomalous", "third", "fourth"];
  drawChart(byId("loss"), {
    title: history.title, xLabel: "Epoch", yLabel: history.title === "Loss" ? "Loss" : "Value",
    x: [1, last], xTicks: ticks(1, last).filter(Number.isInteger),
    y: [Math.min(0, ...values), Math.max(0, ...values)],
    layers: [
      ...lines.map(([label, curve], k) => ({ kind: "line", style: styles[k % styles.length], points: curve, label })),
      { kind: "vertical", style: "threshold", at: best, label: best == null ? "" : `kept: epoch ${best}` },
    ],
  });
}

function table(target, head, rows) {
  const line = (cells, tag) => {
    const row = document.createElement("tr");
    for (const text of cells) {
      const cell = document.createElement(tag);
      cell.textContent = text;
      if (/^(-?[\d.]+( %)?|–)$/.test(text)) cell.className = "number";
      row.append(cell);
    }
    return row;
  };
  target.replaceChildren(...(head.length ? [line(head, "th")] : []), ...rows.map((cells) => line(cells, "td")));
}

function showTables(metrics) {
  const number = (value) => (value == null ? "–" : value.toFixed(3));
  const range = (interval, text) => (interval ? `${text(interval[0])} to ${text(interval[1])}` : "");
  const rows = [
    ["F1 at the threshold", metrics.image_f1, range(metrics.intervals.image_f1, number)],
    ["Best F1 at any threshold", metrics.image_f1_max, "chosen on the test images: an upper bound"],
    ["Average precision", metrics.image_average_precision, ""],
    ["Pixel AUROC", metrics.pixel_auroc, ""],
    ["Pixel average precision", metrics.pixel_average_precision, ""],
    ["Best pixel F1", metrics.pixel_f1_max, "chosen on the test images: an upper bound"],
    ["AUPRO", metrics.aupro, ""],
    ["Pixel AUROC, synthetic defects", metrics.synthetic?.pixel_auroc, ""],
    ["AUPRO, synthetic defects", metrics.synthetic?.aupro, ""],
  ];
  const known = rows.filter((row) => row[1] != null);
  byId("metrics").hidden = !known.length;
  table(byId("metrics"), ["Metric", "Value", "95 % interval, or how to read it"], known.map(([name, value, note]) => [name, number(value), note]));
  const types = Object.entries(metrics.per_defect_type).map(([name, row]) => [
    name, row.num_images, percent(row.detection_rate), range(row.intervals.detection_rate, percent),
    number(row.image_auroc), range(row.intervals.image_auroc, number), number(row.aupro),
  ]);
  byId("by-type").hidden = !types.length;
  table(byId("types"), ["Defect type", "Images", "Detected", "95 % interval", "Image AUROC", "95 % interval", "AUPRO"], types);
}

/* ---- images ---- */

const decoded = new Map();

function decode(url) {
  if (!decoded.has(url)) {
    const picture = new Image();
    picture.src = url;
    decoded.set(url, picture.decode().then(() => picture));
  }
  return decoded.get(url);
}

/* Pictures, maps and masks are squares; a canvas has the aspect of what they show. */
function shape(canvas, { aspect }, longest) {
  canvas.width = Math.max(1, Math.round(longest * Math.min(1, aspect)));
  canvas.height = Math.max(1, Math.round(longest * Math.min(1, 1 / aspect)));
}

function pixels(picture, { width, height }) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0, width, height);
  return context.getImageData(0, 0, width, height).data;
}

/* The picture, the heat map over it, and the outlines of the mask and of the map at the threshold;
   map and mask only if there are any. */
async function paint(canvas) {
  const image = canvas.image;
  const [picture, map, mask] = await Promise.all([image.picture, image.map, image.mask].map((url) => url && decode(url)));
  if (canvas.image !== image) return; // another one has been opened meanwhile
  const { width, height } = canvas;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0, width, height);
  const out = context.getImageData(0, 0, width, height);
  const levels = map && pixels(map, canvas), truth = mask && pixels(mask, canvas);
  const { colors, map_low: low, map_limit: limit, threshold } = image.category;
  const blend = Number(byId("blend").value), outlines = byId("outlines").checked;
  const cut = 255 * Math.sqrt(Math.max(threshold - low, 0) / (limit - low));
  const style = getComputedStyle(document.documentElement);
  const paintOf = (name) => style.getPropertyValue(name).trim().match(/\w\w/g).map((part) => parseInt(part, 16));
  const pens = [[levels, cut, paintOf("--predicted")], [truth, 127, paintOf("--truth")]];
  for (let i = 0; i < width * height; i++) {
    if (levels) {
      const opacity = blend ** (1 / (0.3 + 1.7 * levels[4 * i] / 255)); // heat covers more than cold
      for (let c = 0; c < 3; c++) {
        out.data[4 * i + c] += opacity * (colors[3 * levels[4 * i] + c] - out.data[4 * i + c]);
      }
    }
    if (outlines) for (const [field, level, pen] of pens) if (field) {
      const inside = field[4 * i] > level;
      const [isLastColumn, isLastRow] = [i % width === width - 1, i >= width * (height - 1)];
      const right = !isLastColumn && field[4 * i + 4] > level;
      const below = !isLastRow && field[4 * (i + width)] > level;
      if (inside !== right && !isLastColumn || inside !== below && !isLastRow) {
        for (let c = 0; c < 3; c++) out.data[4 * i + c] = pen[c];
      }
    }
  }
  context.putImageData(out, 0, 0);
}

/* How far above the threshold, in a unit that all categories share. */
const margin = (image) => (image.score - image.category.threshold) / (Math.abs(image.category.metrics.threshold) || 1);

const ORDERS = {
  wrong: (image) => (image.label ? 1 : -1) * margin(image),
  near: (image) => Math.abs(margin(image)),
  high: (image) => -image.score,
  low: (image) => image.score,
};

function chosenImages() {
  const [wanted, type, only] = ["verdict", "type", "only"].map((id) => byId(id).value);
  const text = byId("search").value.toLowerCase();
  const order = ORDERS[byId("sort").value];
  const chosen = images.filter((image) =>
    (!wanted || verdict(image) === wanted) && (!type || image.defect_type === type) &&
    (!only || image.category.name === only) && image.path.toLowerCase().includes(text));
  return order ? chosen.sort((a, b) => order(a) - order(b)) : chosen.sort((a, b) => (a.path < b.path ? -1 : 1));
}

const onScreen = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    target.visible = isIntersecting;
    if (isIntersecting) paint(target);
  }
}, { rootMargin: "200px" });

function card(image) {
  const node = document.createElement("button");
  node.className = "card";
  const canvas = document.createElement("canvas");
  shape(canvas, image, 256);
  canvas.image = image;
  const name = document.createElement("span");
  name.className = "name";
  name.textContent = image.path.split("/").pop();
  node.title = `${image.category.name}/${image.path}`;
  const line = document.createElement("span");
  line.className = "line";
  const [result, score] = [document.createElement("span"), document.createElement("span")];
  result.textContent = verdict(image);
  if (["missed", "false reject"].includes(verdict(image))) result.className = "wrong";
  score.textContent = image.score.toPrecision(3);
  const type = document.createElement("span");
  type.className = "line";
  type.textContent = image.defect_type;
  line.append(result, score);
  node.append(canvas, name, line, type);
  node.addEventListener("click", () => enlarge([...byId("gallery").children].indexOf(node)));
  onScreen.observe(canvas);
  return node;
}

function showGallery() {
  onScreen.disconnect();
  state.chosen = chosenImages();
  const shown = state.chosen.slice(0, state.shown);
  byId("gallery").replaceChildren(...shown.map(card));
  byId("count").textContent = `${state.chosen.length} of ${images.length} images`;
  byId("more").hidden = shown.length === state.chosen.length;
}

function repaint() {
  for (const canvas of document.querySelectorAll("#gallery canvas")) if (canvas.visible) paint(canvas);
  if (state.open) paint(document.querySelector("#large canvas"));
}

function enlarge(index) {
  const image = state.chosen[index];
  if (!image) return;
  state.selected = index;
  state.open = image;
  const canvas = document.querySelector("#large canvas");
  canvas.image = image;
  shape(canvas, image, 768);
  paint(canvas);
  document.querySelector("#large .caption").textContent =
    `${image.category.name}/${image.path}: ${verdict(image)}, score ${image.score.toPrecision(4)}, threshold ${image.category.threshold.toPrecision(4)}`;
  if (!byId("large").open) byId("large").showModal();
}

/* Columns and words as `anomaly-detection predict` has them, then what is known of the image. */
function csv(rows) {
  const text = (value) => (/[",\r\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  const word = (is) => (is ? "anomalous" : "normal");
  const lines = rows.map((image) => [
    image.path, shortest(image.score), shortest(image.category.threshold), word(image.score > image.category.threshold),
    word(image.label), image.defect_type, image.category.name,
  ]);
  return [["path", "score", "threshold", "verdict", "label", "defect_type", "category"], ...lines]
    .map((cells) => `${cells.map(text).join(",")}\n`).join("");
}

function download() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csv(state.chosen)], { type: "text/csv" }));
  link.download = "verdicts.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/* Cards in a row, for the arrow keys. */
function columns() {
  const cards = [...byId("gallery").children];
  const second = cards.findIndex((node) => node.offsetTop > cards[0].offsetTop);
  return second < 0 ? cards.length : second;
}

document.addEventListener("keydown", (event) => {
  if (event.target.matches("select, input") && !byId("large").open) return;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns(), ArrowUp: -columns() }[event.key];
  if (event.key === "+" || event.key === "-") {
    byId("blend").value = Number(byId("blend").value) + (event.key === "+" ? 0.1 : -0.1);
    repaint();
  } else if (step && byId("large").open) {
    enlarge(Math.max(0, Math.min(state.chosen.length - 1, state.selected + step)));
    event.preventDefault();
  } else if (step) {
    const cards = [...byId("gallery").children];
    const at = cards.indexOf(document.activeElement);
    if (at < 0 && document.activeElement !== document.body) return;
    const next = cards[at < 0 ? 0 : at + step];
    if (next && (at >= 0 || isOnScreen(byId("gallery")))) {
      next.focus();
      event.preventDefault();
    }
  }
});

function isOnScreen(node) {
  const box = node.getBoundingClientRect();
  return box.top < innerHeight && box.bottom > 0;
}

/* ---- the page ---- */

function fillTypes() {
  const names = [...new Set(images.map((image) => image.defect_type))].sort();
  for (const name of names) byId("type").append(new Option(name, name));
  for (const category of categories) byId("only").append(new Option(category.name, category.name));
}

function showCategory() {
  state.category = categories.find((category) => category.name === byId("category").value);
  for (const node of document.querySelectorAll(".of")) node.textContent = categories.length > 1 ? `· ${state.category.name}` : "";
  for (const node of document.querySelectorAll(".of-defects")) node.hidden = !state.category.metrics.num_anomalous;
  const { num_normal: normal, num_anomalous: anomalous } = state.category.metrics;
  byId("share").value = Number((100 * anomalous / (normal + anomalous)).toPrecision(3));
  byId("cheapest").textContent = "";
  showRates(state.category);
  showThreshold();
  showCurves();
}

byId("category").addEventListener("change", showCategory);
byId("slider").addEventListener("input", () => {
  setThreshold(thresholdAt(cuts(state.category), Number(byId("slider").value)));
});
byId("number").addEventListener("change", () => {
  const value = byId("number").valueAsNumber;
  if (Number.isFinite(value)) setThreshold(Math.fround(value));
});
byId("reset").addEventListener("click", () => setThreshold(Math.fround(state.category.metrics.threshold)));
for (const id of ["cost", "share"]) byId(id).addEventListener("input", setByCost);
byId("download").addEventListener("click", download);
for (const id of ["sort", "verdict", "type", "only", "search"]) {
  byId(id).addEventListener(id === "search" ? "input" : "change", () => { state.shown = 120; showGallery(); });
}
for (const id of ["blend", "outlines"]) byId(id).addEventListener("input", repaint);
byId("more").addEventListener("click", () => { state.shown += 240; showGallery(); });
byId("close").addEventListener("click", () => byId("large").close());
byId("large").addEventListener("close", () => { state.open = null; byId("gallery").children[state.selected]?.focus(); });
for (const button of document.querySelectorAll("[data-show]")) button.addEventListener("click", () => {
  byId("verdict").value = button.dataset.show;
  byId("only").value = categories.length > 1 ? button.dataset.category : "";
  state.shown = 120;
  showGallery();
  byId("images").scrollIntoView();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);

byId("cost").max = COSTS.length - 1;
byId("cost").value = COSTS.indexOf(10);
showCost();
for (const category of categories) showNext(category.name, category.next);
fillTypes();
showCategory();
showGallery();
