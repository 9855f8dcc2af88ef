/* Pictures that are dropped, pasted, chosen or taken, judged one after the other. */

const MOST_TRIES = 30;
const PICTURE = "picture", MAP = "anomalous pixels in red";
const queue = [];
let tally = {}; // of the pictures that came together

async function judge(files) {
  const isIdle = !queue.length;
  queue.push(...files.map((file) => ({ file, category: state.category })));
  if (!isIdle || !queue.length) return;
  byId("problems").replaceChildren();
  tally = { normal: 0, anomalous: 0, error: 0 };
  for (; queue.length; queue.shift()) {
    const [{ file, category }] = queue, started = performance.now();
    byId("progress").textContent = `Judging ${file.name}${queue.length > 1 ? `, ${queue.length - 1} more to come` : ""} …`;
    try {
      const row = await sent(file, category);
      await showResult(row, performance.now() - started);
    } catch (error) {
      showProblem(file, error);
    }
  }
  const { normal, anomalous, error } = tally;
  const summary = `${numShown()} pictures: ${normal} normal, ${anomalous} anomalous, ${error} not judged. The last one:`;
  byId("progress").textContent = numShown() > 1 ? summary : "";
  refresh();
}

const numShown = () => tally.normal + tally.anomalous + tally.error;

/* The verdict's row; a server that is busy is asked again. */
async function sent(file, category) {
  const query = new URLSearchParams({ name: file.name, overlay: true });
  if (category) query.set("category", category);
  const headers = { "Content-Type": "application/octet-stream" };
  for (let tries = 1; ; tries++) {
    try {
      return await json(`predict?${query}`, { method: "POST", body: file, headers });
    } catch (error) {
      if (error.status !== 503 || tries === MOST_TRIES) throw error;
      byId("progress").textContent = `The server is busy; ${file.name} is sent again in ${error.retryAfter} s.`;
      await new Promise((resolve) => setTimeout(resolve, 1000 * error.retryAfter));
    }
  }
}

async function showResult(row, milliseconds) {
  showVerdict(row.verdict, `${fileName(row.path)}, ${Math.round(milliseconds)} ms`);
  byId("chance").textContent = chance(row.p_value);
  drawScale(row);
  const seen = node("figure", {}, node("img", { src: row.overlay, alt: MAP }), node("figcaption", {}, MAP));
  byId("pictures").replaceChildren(seen);
  if (row.id) seen.before(await figure(`verdicts/${row.id}/picture`, PICTURE));
}

function showVerdict(verdict, about) {
  tally[verdict]++;
  byId("result").hidden = false;
  byId("verdict").className = verdict;
  byId("verdict").textContent = MARKS[verdict] + (verdict === "error" ? "not judged" : verdict);
  byId("judged").textContent = about;
}

function showProblem(file, error) {
  showVerdict("error", file.name);
  byId("chance").textContent = error.message;
  byId("pictures").replaceChildren();
  byId("scale").replaceChildren();
  if (numShown() > 1 || queue.length > 1) byId("problems").append(node("li", {}, `${file.name}: ${error.message}`));
}

/* A p-value for people: 0.03 is about 3 of 100 good parts. */
function chance(p) {
  const parts = p >= 0.0095 ? 100 : 10 ** Math.ceil(-Math.log10(p));
  const count = Math.round(p * parts);
  return `Of ${counted(parts, "good part")}, about ${count} score${count === 1 ? "s" : ""} at least as high.`;
}

/* The score and the threshold, among the scores of the last verdicts. */
function drawScale({ score, threshold }) {
  const others = [...entries.values()].map(({ row }) => row.score).filter((x) => x != null);
  const low = Math.min(score, threshold, ...others), high = Math.max(score, threshold, ...others);
  const X = (value) => `${6 + (88 * (value - low)) / (high - low || 1)}%`;
  const label = (value, y, name) => {
    const share = (value - low) / (high - low || 1);
    const anchor = share < 0.2 ? "start" : share > 0.8 ? "end" : "middle";
    return svgNode("text", { x: X(value), y, "text-anchor": anchor, class: name }, `${name} ${short(value)}`);
  };
  byId("scale").setAttribute("aria-label", `score ${short(score)}, threshold ${short(threshold)}`);
  byId("scale").replaceChildren(
    svgNode("line", { x1: "0", x2: "100%", y1: 32, y2: 32, class: "axis" }),
    ...others.map((x) => svgNode("line", { x1: X(x), x2: X(x), y1: 27, y2: 37, class: "other" })),
    svgNode("line", { x1: X(threshold), x2: X(threshold), y1: 20, y2: 44, class: "threshold" }),
    svgNode("circle", { cx: X(score), cy: 32, r: 7, class: score > threshold ? "anomalous" : "normal" }),
    label(score, 14, "score"),
    label(threshold, 60, "threshold"),
  );
}

for (const id of ["files", "camera"]) byId(id).addEventListener("change", ({ target }) => {
  judge([...target.files]);
  target.value = ""; // so that the same file can be chosen again
});
document.addEventListener("paste", (event) => judge([...event.clipboardData.files]));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  byId("drop").classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) byId("drop").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  byId("drop").classList.remove("over");
  judge([...event.dataTransfer.files]);
});
