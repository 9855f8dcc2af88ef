/* What holds the parts together: the category, and looking every two seconds for what is new. */

const EVERY = 2000; // milliseconds
const state = { category: null, changes: 0, drift: null };
let timer, lastAnswer;

async function refresh() {
  if (document.hidden) return;
  const asOf = state.changes;
  try {
    showDetectors(await json("detectors"));
    const category = encodeURIComponent(state.category);
    const [verdicts, drift] = await Promise.all([json(`verdicts?category=${category}`), json("drift")]);
    if (asOf === state.changes) {
      showVerdicts(verdicts);
      state.drift = drift[state.category];
      showDrift(state.drift);
    }
    lastAnswer = new Date();
    notice("gone", "");
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    const since = lastAnswer ? ` This is as of ${timeOf(lastAnswer)}.` : "";
    notice("gone", error.message + since);
  } finally {
    clearTimeout(timer);
    timer = setTimeout(refresh, EVERY);
  }
}

const hashOf = (category) => `#${encodeURIComponent(category)}`;

function showDetectors(detectors) {
  const names = detectors.map(({ category }) => category);
  const select = byId("category");
  if ([...select.options].map(({ value }) => value).join("\n") !== names.join("\n")) {
    select.replaceChildren(...names.map((name) => new Option(name, name)));
  }
  byId("choice").hidden = names.length < 2;
  state.category = names.find((name) => hashOf(name) === location.hash) ?? names[0];
  select.value = state.category;
  document.title = `Inspection: ${state.category}`;
  showFacts(detectors.find(({ category }) => category === state.category));
}

function showFacts(one) {
  const facts = {
    category: one.category,
    model: one.model || "–",
    threshold: short(one.threshold),
    "image size": `${one.image_size} pixels`,
    fingerprint: one.fingerprint,
    loaded: timeOf(one.loaded_at),
    from: one.path,
  };
  const pairs = Object.entries(facts).map(([name, value]) => node("div", {}, node("dt", {}, name), node("dd", {}, value)));
  const text = pairs.map((pair) => pair.textContent).join("");
  if (byId("facts").textContent !== text) byId("facts").replaceChildren(...pairs); // else it can be copied
  notice("reload-error", one.reload_error ? `A new detector was refused, and the earlier one goes on: ${one.reload_error}` : "");
}

byId("category").addEventListener("change", () => (location.hash = hashOf(byId("category").value)));
addEventListener("hashchange", () => {
  state.changes++;
  byId("result").hidden = true;
  refresh();
});
addEventListener("resize", () => state.drift && showDrift(state.drift));
document.addEventListener("visibilitychange", refresh);
refresh();
