/* The table of the last verdicts, and what an inspector says of them. */

const entries = new Map(); // a tbody for each verdict, by its id
const WRONG = { normal: "false reject", anomalous: "missed" }; // by the label that contradicts

function showVerdicts({ verdicts, keeps_labels: keepsLabels }) {
  const ids = new Set(verdicts.map(({ id }) => id));
  for (const [id, entry] of entries) if (!ids.has(id)) {
    entry.remove();
    entries.delete(id);
  }
  let previous = byId("verdicts").tHead;
  for (const row of verdicts) {
    if (!entries.has(row.id)) entries.set(row.id, newEntry(row));
    const entry = entries.get(row.id);
    showLabel(entry, row);
    if (previous.nextElementSibling !== entry) previous.after(entry); // others keep their focus
    previous = entry;
  }
  byId("verdicts").classList.toggle("no-labels", !keepsLabels);
  byId("no-store").hidden = keepsLabels;
  const types = new Set(verdicts.map((row) => row.defect_type).filter(Boolean));
  byId("types").replaceChildren(...[...types].map((type) => node("option", { value: type })));
  filter();
}

const kindOf = (row) => row.verdict ?? "error";

function filter() {
  const wanted = document.querySelector('[data-show][aria-pressed="true"]').dataset.show;
  const rows = [...entries.values()].map(({ row }) => row);
  const shown = rows.filter((row) => wanted === "all" || kindOf(row) === wanted);
  for (const entry of entries.values()) entry.hidden = !shown.includes(entry.row);
  document.querySelector('[data-show="error"]').hidden = !rows.some((row) => row.error);
  const numAnomalous = rows.filter((row) => row.verdict === "anomalous").length;
  byId("count").textContent = rows.length ? `${numAnomalous} of the last ${rows.length} anomalous` : "";
  byId("verdicts").hidden = !shown.length;
  byId("none").hidden = shown.length > 0;
  byId("none").textContent = rows.length ? "None of these among the last verdicts." : "No verdicts yet.";
}

function newEntry(row) {
  const name = fileName(row.path), kind = kindOf(row);
  const show = node("button", { ariaExpanded: "false", ariaLabel: `Show ${name}` }, "Show");
  const entry = node("tbody", {},
    node("tr", {},
      node("td", {}, node("time", { dateTime: row.time, title: row.time }, timeOf(row.time))),
      node("td", { className: "name", title: row.path }, node("span", {}, name)),
      node("td", {}, node("span", { className: `badge ${kind}` }, MARKS[kind] + kind)),
      node("td", { className: "number" }, row.score == null ? "" : short(row.score)),
      node("td", {}, show),
      node("td", { className: "inspector" }),
    ),
  );
  if (row.error) entry.append(wide("problem", row.error));
  for (const alarm of row.alarms) entry.append(wide("alarm", `▲ Drift: ${alarm}`));
  show.addEventListener("click", () => togglePictures(entry, show));
  entry.row = row;
  addLabels(entry);
  return entry;
}

const wide = (className, ...content) => node("tr", { className }, node("td", { colSpan: 6 }, ...content));

async function togglePictures(entry, button) {
  const isOpen = button.ariaExpanded === "true";
  button.ariaExpanded = String(!isOpen);
  button.textContent = isOpen ? "Show" : "Hide";
  if (isOpen) return entry.querySelector(".pictures").remove();
  const row = wide("pictures", "Loading …");
  entry.append(row);
  const path = `verdicts/${entry.row.id}/picture`;
  const figures = await Promise.all([figure(path, PICTURE), figure(`${path}?overlay=true`, MAP)]);
  row.firstChild.replaceChildren(...figures);
}

function addLabels(entry) {
  const name = fileName(entry.row.path);
  const button = (label, text) => {
    const made = node("button", { ariaLabel: `${text}: ${name}` }, text);
    made.addEventListener("click", () => give(entry, label, ""));
    return made;
  };
  const type = node("input", { placeholder: "type of defect", ariaLabel: `Type of defect: ${name}`, pattern: "\\w[\\w .\\-]*", title: "letters, digits, space, dot, dash", maxLength: 100 });
  type.setAttribute("list", "types");
  type.addEventListener("change", () => type.reportValidity() && give(entry, "anomalous", type.value));
  entry.labels = { normal: button("normal", "Good"), anomalous: button("anomalous", "Defect") };
  Object.assign(entry, { type, undo: button(null, "Undo"), said: node("span", { role: "status" }) });
  entry.querySelector(".inspector").append(...Object.values(entry.labels), type, entry.undo, entry.said);
}

function showLabel(entry, row) {
  entry.row = row;
  for (const [label, button] of Object.entries(entry.labels)) button.ariaPressed = String(row.label === label);
  entry.type.hidden = row.label !== "anomalous";
  entry.undo.hidden = !row.label;
  if (document.activeElement !== entry.type) entry.type.value = row.defect_type ?? "";
  const said = row.label && row.verdict !== row.label ? WRONG[row.label] : "";
  if (entry.said.className !== "problem" && entry.said.textContent !== said) entry.said.textContent = said;
}

async function give(entry, label, type) {
  const body = JSON.stringify({ label, defect_type: type || null });
  const headers = { "Content-Type": "application/json" };
  entry.said.className = "";
  try {
    const row = await json(`verdicts/${entry.row.id}/label`, { method: "POST", headers, body });
    state.changes++; // answers under way are from before
    showLabel(entry, row);
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    entry.said.className = "problem";
    entry.said.textContent = error.message;
  }
}

for (const button of document.querySelectorAll("[data-show]")) button.addEventListener("click", () => {
  for (const other of document.querySelectorAll("[data-show]")) other.ariaPressed = String(other === button);
  filter();
});
