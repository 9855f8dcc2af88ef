/* Requests to the server, with the token that it may ask for. */

const WORDS = {
  0: "The server does not answer: is it running, and is the network up?",
  404: "It is not there.",
  413: "The picture is too large.",
  415: "This is no picture that can be judged.",
  422: "The picture cannot be judged.",
  503: "The server is busy.",
};

class Refusal extends Error {
  constructor(status, reason = "", retryAfter = 1) {
    const words = reason.replace(/^image: /, "It ").replace(/^./, (first) => first.toUpperCase());
    super([WORDS[status], words].filter(Boolean).join(" "));
    Object.assign(this, { status, retryAfter });
  }
}

async function ask(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = { ...options.headers, ...(token && { Authorization: `Bearer ${token}` }) };
  const answer = await fetch(path, { ...options, headers, cache: "no-store" }).catch(() => {
    throw new Refusal(0);
  });
  if (answer.status === 401) {
    await anotherToken(token);
    return ask(path, options);
  }
  if (!answer.ok) {
    const { error } = await answer.json().catch(() => ({}));
    throw new Refusal(answer.status, error, Number(answer.headers.get("Retry-After")) || 1);
  }
  return answer;
}

const json = async (path, options) => (await ask(path, options)).json();

let typed = null; // a promise while the token's field is shown

/* Resolves when there is another token than the one that was refused. */
function anotherToken(refused) {
  if (sessionStorage.getItem("token") !== refused) return Promise.resolve();
  typed ??= new Promise((resolve) => {
    const form = byId("token"), field = form.querySelector("[type=password]");
    form.querySelector("span").textContent = refused ? "That token was refused." : "";
    form.hidden = false;
    field.focus();
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      sessionStorage.setItem("token", field.value);
      field.value = "";
      form.hidden = true;
      typed = null;
      resolve();
    }, { once: true });
  });
  return typed;
}

/* A figure with a picture from the server, or with the reason why there is none. */
async function figure(path, caption) {
  const made = node("figure");
  try {
    const url = URL.createObjectURL(await (await ask(path)).blob());
    made.append(node("img", { src: url, alt: caption, onload: () => URL.revokeObjectURL(url) }));
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    made.append(node("p", { className: "problem" }, error.message));
  }
  made.append(node("figcaption", {}, caption));
  return made;
}
