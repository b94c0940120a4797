// The page: a question, its answer as it comes, and the one that goes on from the edited matrix.
import { byId, el } from "./dom.js";
import { Game, short } from "./game.js";
import { Refused, blocks, chat, getJson, namedAction, readMatrix } from "./stream.js";

const HINT = "Edit a number or move the price, then steer.";
const told = await getJson("page/settings.json");
const game = new Game(told, markStale);
// The request behind the answers; the pricing of the steered one; what is being streamed, by side.
const state = { asked: null, steered: null, running: {} };

const say = (text) => { byId("status").textContent = text; };

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (state.running.original) return state.running.original.abort();
  state.running.steered?.abort();
  delete state.running.steered;
  const said = [["system", byId("system").value], ["user", byId("prompt").value]];
  state.asked = {
    messages: said.filter(([, content]) => content).map(([role, content]) => ({ role, content })),
    temperature: byId("temperature").valueAsNumber || 0,
    seed: Math.floor(Math.random() * 2 ** 31), // of both answers, so that they differ by the edit alone
    ...(byId("model").value && { model: byId("model").value }),
  };
  state.steered = null;
  for (const id of ["shared", "original", "steered"]) byId(id).replaceChildren();
  byId("steered-note").textContent = HINT;
  byId("answers").hidden = true;
  game.take(null);
  markStale();
  say("The model is writing.");
  run("original", state.asked, byId("ask-button"));
});

byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
});

byId("steer").addEventListener("click", () => {
  if (state.running.steered) return state.running.steered.abort();
  state.steered = { pricing: game.pricing, edited: game.edited };
  byId("steered").replaceChildren();
  markStale();
  say("The model goes on from the edited matrix.");
  const analyze = document.querySelector("[name=analyze]:checked").value;
  run("steered", { ...state.asked, pricing: state.steered.pricing, analyze }, byId("steer"));
});

/* A steered answer is of the matrix and the price that it was asked with. */
function markStale() {
  const stale = state.steered && JSON.stringify(state.steered.pricing) !== JSON.stringify(game.pricing);
  byId("stale").hidden = !stale;
}

/* Stream an answer to its side; the button that began it stops it. */
async function run(side, body, button) {
  const control = new AbortController(), label = button.textContent, note = byId(`${side}-note`);
  state.running[side] = control;
  button.textContent = "Stop";
  byId("problem").hidden = true;
  note.textContent = "…";
  note.classList.remove("warn");
  let last = ["", null];
  try {
    const finish = await chat(body, byId("key").value, control.signal, (...soFar) => {
      last = soFar;
      show(side, last[0]);
    });
    finished(side, ...last, finish);
  } catch (error) {
    if (state.running[side] !== control) return; // another question has its place
    note.textContent = "";
    if (error.name === "AbortError") say("Stopped.");
    else fail(error);
  } finally {
    if (state.running[side] === control) delete state.running[side];
    if (!state.running[side]) button.textContent = label;
  }
}

function fail(error) {
  const said = `The server says: ${error.message}${error.retry ? ` (in ${error.retry} s)` : ""}`;
  say("");
  byId("problem").textContent = error instanceof Refused ? said : "The server cannot be reached.";
  byId("problem").hidden = false;
  if (error.status === 401) {
    byId("key-field").hidden = false;
    byId("key").focus();
  }
}

/* What has come of an answer: what stands before the choice once, for both sides have it; the rest on its side. */
function show(side, text) {
  const found = blocks(text), rest = found.filter(({ name }) => name !== "thinking" && name !== "payoff");
  const thought = byId("shared").querySelector(".thinking .text")?.textContent;
  const matrix = found.find(({ name, open }) => name === "payoff" && !open);
  byId("answers").hidden = false;
  if (side === "original") {
    if (matrix && !game.written) taken(readMatrix(matrix.text, game.names));
    fill(byId("shared"), found.filter(({ name }) => name === "thinking" || (name === "payoff" && !game.written)));
    fill(byId(side), rest);
  } else {
    // Drawn otherwise than before, as another server may: then it is not the other answer's thinking.
    fill(byId(side), [...found.filter((b) => b.name === "thinking" && !b.open && b.text !== thought), ...rest]);
  }
}

function taken(cells) {
  game.take(cells);
  if (cells) say(`The payoff matrix is here. ${byId("verdict").textContent}.`);
}

/* Show these blocks in a list; those that are there already keep their nodes. */
function fill(list, wanted) {
  wanted.forEach(({ name, text, open }, i) => {
    if (list.children[i]?.dataset.name !== name) {
      const title = name === "outside" ? "outside of the blocks" : name;
      const fresh = el("div", `block ${name}`, el("h3", "", title), el("p", "text"));
      fresh.dataset.name = name;
      if (list.children[i]) list.children[i].replaceWith(fresh);
      else list.append(fresh);
    }
    const node = list.children[i];
    node.ariaBusy = String(open);
    if (node.lastChild.textContent !== text) node.lastChild.textContent = text;
  });
  while (list.children.length > wanted.length) list.lastChild.remove();
}

function finished(side, text, steering, finish) {
  const original = side === "original", steered = steering?.steered;
  // An answer nobody priced here has the price of its key; the model's own matrix is the one to edit.
  if (original && steering?.payoff) taken(readMatrix(steering.payoff, game.names));
  const analysis = blocks(text).find(({ name }) => name === "analyze")?.text ?? "";
  const action = namedAction(analysis, told.user_moves, told.actions);
  const said = [action ? `chose ${action}` : "names no action"];
  if (steered && steering.recommended !== action) said.push(`the matrix recommends ${steering.recommended}`);
  if (steered) said.push(`${steering.policy} at ${short(steering.price)}`);
  if (steered && !original && state.steered.edited) said.push("edited by hand");
  if (steering && !steered) said.push(`not steered: ${steering.reason}`);
  if (finish === "length") said.push("cut at its length limit");
  byId(`${side}-note`).textContent = said.join(" · ");
  byId(`${side}-note`).classList.toggle("warn", !original && !steered);
  const none = ", without a payoff matrix that can be read: there is nothing to steer.";
  const end = game.written ? `: it ${said[0]}.` : none;
  say(`The ${original ? "" : "steered "}answer is complete${end}`);
}

for (const name of [...Object.keys(told.instructions), "own"]) byId("instruction").append(el("option", "", name));
byId("system").value = Object.values(told.instructions)[0];
byId("instruction").addEventListener("change", (event) => {
  byId("system").value = told.instructions[event.target.value] ?? "";
});
byId("system").addEventListener("input", () => { byId("instruction").value = "own"; });

async function listModels() {
  const { data } = await getJson("v1/models", byId("key").value);
  byId("model").replaceChildren(...data.map(({ id }) => el("option", "", id)));
  byId("model-field").hidden = data.length < 2;
  byId("served").textContent = data.length === 1 ? `· ${data[0].id}` : "";
}

byId("key-field").hidden = !told.with_key;
byId("key").addEventListener("change", () => listModels().catch(fail));
if (!told.with_key) listModels().catch(fail);
byId("ask-button").disabled = false;
