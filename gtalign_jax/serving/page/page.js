// The page: what is asked, the matrix and its price, both answers. What a model wrote enters the page through
// textContent and input values alone.
import {
  actionOf, asWritten, breakEven, frontier, mixedNash, moveOf, priced, pureNash, recommended, welfare,
} from "./solve.js";
import { blocks, chat, getJson, namedAction, readMatrix, writeMatrix } from "./stream.js";

const byId = (id) => document.getElementById(id);
const PLAYERS = [["user", 1], ["LLM", 0]]; // as a cell shows them, and their place in it
const MEANS = {
  DA: "answer", CQ: "ask back", AQ: "answer and ask", VQ: "user asks vaguely", DQ: "user asks in detail",
};
const NEAR = 1e-3; // of a break-even price: just above it

const told = await getJson("page/settings.json");
const names = told.user_moves.flatMap((move) => told.actions.map((action) => `${move}_${action}`));
// The request behind the answers; its matrix as written and as edited; what is being streamed, by side.
const state = { asked: null, written: null, cells: null, steered: "", running: {} };

function el(tag, css, ...children) {
  const node = document.createElement(tag);
  if (css) node.className = css;
  node.append(...children);
  return node;
}

const number = (x) => x.toFixed(1).replace("-", "−");
const short = (price) => String(Number(price.toFixed(3)));
const say = (text) => { byId("status").textContent = text; };

/* Asking. */

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (state.running.original) return state.running.original.abort();
  state.running.steered?.abort();
  delete state.running.steered;
  state.asked = {
    messages: [["system", byId("system").value], ["user", byId("prompt").value]]
      .filter(([, content]) => content).map(([role, content]) => ({ role, content })),
    temperature: byId("temperature").valueAsNumber || 0,
    seed: Math.floor(Math.random() * 2 ** 31), // of both answers, so that they differ by the edit alone
    ...(byId("model").value && { model: byId("model").value }),
  };
  Object.assign(state, { written: null, cells: null, steered: "" });
  for (const id of ["shared", "original", "steered"]) byId(id).replaceChildren();
  byId("steered-note").textContent = "Edit a number or move the price, then steer.";
  byId("game").hidden = true;
  byId("answers").hidden = false;
  run("original", state.asked, byId("ask-button"));
});

byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
});

byId("steer").addEventListener("click", () => {
  if (state.running.steered) return state.running.steered.abort();
  const pricing = pricingNow(), analyze = document.querySelector("[name=analyze]:checked").value;
  state.steered = JSON.stringify(pricing);
  byId("steered").replaceChildren();
  solve();
  run("steered", { ...state.asked, pricing, analyze }, byId("steer"));
});

/* Stream an answer to its side; the button that began it stops it. */
async function run(side, body, button) {
  const control = new AbortController(), label = button.textContent, note = byId(`${side}-note`);
  state.running[side] = control;
  button.textContent = "Stop";
  byId("problem").hidden = true;
  note.textContent = "…";
  note.classList.remove("warn");
  say(side === "original" ? "The model is writing." : "The model goes on from the edited matrix.");
  let last = ["", null];
  try {
    const finish = await chat(body, byId("key").value, control.signal, (text, steering) => {
      last = [text, steering];
      show(side, text);
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
  const known = error.status !== undefined; // the server said it
  const again = error.retry ? ` (in ${error.retry} s)` : "";
  say("");
  byId("problem").textContent = known ? `The server says: ${error.message}${again}` : "The server cannot be reached.";
  byId("problem").hidden = false;
  if (error.status === 401) {
    byId("key-field").hidden = false;
    byId("key").focus();
  }
}

/* What has come of an answer: what stands before the choice once, for both sides have it; the rest on its side. */
function show(side, text) {
  const found = blocks(text), matrix = found.find(({ name, open }) => name === "payoff" && !open);
  if (side === "original" && matrix && !state.written) take(readMatrix(matrix.text, names));
  const before = ({ name }) => name === "thinking" || name === "payoff";
  if (side === "original") fill(byId("shared"), found.filter((b) => before(b) && !(b.name === "payoff" && state.written)));
  fill(byId(side), found.filter((b) => !before(b)));
}

/* Show these blocks in a list; those that are there already keep their nodes. */
function fill(list, wanted) {
  wanted.forEach(({ name, text, open }, i) => {
    let node = list.children[i];
    if (node?.dataset.name !== name) {
      const fresh = el("div", `block ${name}`, el("h3", "", name === "outside" ? "outside of the blocks" : name), el("p", "text"));
      fresh.dataset.name = name;
      if (node) node.replaceWith(fresh); else list.append(fresh);
      node = fresh;
    }
    node.ariaBusy = String(open);
    if (node.lastChild.textContent !== text) node.lastChild.textContent = text;
  });
  while (list.children.length > wanted.length) list.lastChild.remove();
}

function finished(side, text, steering, finish) {
  if (!state.written && steering?.payoff) take(readMatrix(steering.payoff, names)); // of a key with a price of its own
  const analysis = blocks(text).find(({ name }) => name === "analyze")?.text ?? "";
  const action = namedAction(analysis, told.user_moves, told.actions);
  const said = [action ? `chose ${action}` : "names no action"];
  if (steering?.steered && steering.recommended !== action) said.push(`the matrix recommends ${steering.recommended}`);
  if (steering) said.push(steering.steered ? `${steering.policy} at ${short(steering.price)}` : `not steered: ${steering.reason}`);
  if (steering?.steered && JSON.parse(state.steered || "{}").matrix) said.push("edited by hand");
  if (finish === "length") said.push("cut at its length limit");
  const note = byId(`${side}-note`);
  note.textContent = said.join(" · ");
  note.classList.toggle("warn", side === "steered" && !steering?.steered);
  if (state.written) say(`The ${side === "steered" ? "steered answer" : "answer"} is complete: it ${said[0]}.`);
  else say("The answer is complete. It has no payoff matrix that can be read, so there is nothing to steer.");
}

/* The matrix. */

function take(cells) {
  if (!cells) return;
  Object.assign(state, { written: cells, cells: cells.map((cell) => [...cell]) });
  byId("game").hidden = false;
  writeInputs();
  refresh();
  say(`The payoff matrix is here: it recommends ${told.actions[actionOf(recommended(asWritten(cells)))]}.`);
}

const inputs = names.map((name) => PLAYERS.map(([player, place]) => makeInput(name, player, place)));
const marks = names.map((_, i) => Object.assign(el("p", "marks"), { id: `marks-${i}` }));

function makeInput(name, player, place) {
  const input = Object.assign(el("input"), { type: "number", step: "0.1" });
  const after = Object.assign(el("span", "after"), { id: `after-${name}-${player}` });
  input.setAttribute("aria-label", `${player}: payoff of ${name}`);
  input.setAttribute("aria-describedby", `${after.id} marks-${names.indexOf(name)}`);
  input.addEventListener("input", () => {
    input.setAttribute("aria-invalid", String(!Number.isFinite(input.valueAsNumber)));
    if (!Number.isFinite(input.valueAsNumber)) return;
    state.cells[names.indexOf(name)][place] = input.valueAsNumber;
    refresh();
  });
  input.addEventListener("change", writeInputs); // what is no number goes back to the last that was one
  return { input, after, place, label: el("label", player.toLowerCase(), el("span", "", player), input, after) };
}

byId("columns").append(el("tr", "", el("td"), ...told.actions.map((action) => heading("col", action))));
byId("cells").append(...told.user_moves.map((move, u) => el("tr", "", heading("row", move), ...told.actions.map((_, a) => {
  const i = u * told.actions.length + a;
  return el("td", "", marks[i], el("div", "pair", ...inputs[i].map(({ label }) => label)));
}))));

function heading(scope, name) {
  return Object.assign(el("th", "", name, el("small", "", MEANS[name] ?? "")), { scope });
}

function writeInputs() {
  for (const [i, players] of inputs.entries())
    for (const { input, place } of players) {
      if (input.valueAsNumber !== state.cells[i][place]) input.value = state.cells[i][place];
      input.setAttribute("aria-invalid", "false");
    }
}

byId("reset").addEventListener("click", () => {
  state.cells = state.written.map((cell) => [...cell]);
  writeInputs();
  refresh();
});

/* The price. */

const policy = () => told.policies[byId("policy").value];
const priceNow = () => Math.max(byId("price").valueAsNumber, 0) || 0;

function pricingNow() {
  const edited = JSON.stringify(state.cells) !== JSON.stringify(state.written);
  const matrix = edited ? { matrix: writeMatrix(state.cells, names) } : {};
  return { policy: byId("policy").value, price: priceNow(), ...matrix };
}

function setPrice(value) {
  byId("price").value = short(value);
  byId("slider").value = value;
  solve();
}

byId("slider").addEventListener("input", (event) => setPrice(event.target.valueAsNumber));
byId("price").addEventListener("input", () => { byId("slider").value = priceNow(); solve(); });
byId("policy").addEventListener("change", refresh);

/* After a change of the matrix or the policy: where the recommendation flips, then what it is. */
function refresh() {
  const { about, slope } = policy(), steepest = Math.max(...slope.flat().map(Math.abs));
  const most = steepest ? nice(10 / steepest) : 1; // by then every payoff has left the scale
  const flips = breakEven(state.cells, policy());
  byId("policy-note").textContent = about;
  byId("slider").max = most;
  byId("slider").step = most / 500;
  byId("slider").value = priceNow();
  byId("flips").replaceChildren(flips.length ? "Break-even at " : "No price changes the recommendation.", ...flips.map(flipButton));
  const ends = [...flips.filter(({ price }) => price < most), { price: most }];
  const start = actionOf(recommended(asWritten(state.cells)));
  byId("bands").replaceChildren(...ends.map(({ price }, i) => {
    const share = (price - (i ? ends[i - 1].price : 0)) / most;
    const band = el("span", "", share > 0.12 ? told.actions[i ? ends[i - 1].after : start] : "");
    band.style.flexGrow = share;
    return band;
  }));
  solve();
}

function flipButton({ price, before, after }) {
  const change = `${told.actions[before]} to ${told.actions[after]}`;
  const button = el("button", "", `${short(price)} `, el("span", "", change.replace("to", "→")));
  button.type = "button";
  button.setAttribute("aria-label", `${short(price)}, from ${change}: go there`);
  button.addEventListener("click", () => setPrice(price + NEAR));
  return button;
}

/* A round number from x up. */
function nice(x) {
  const unit = 10 ** Math.floor(Math.log10(x));
  return [1, 2, 5, 10].find((m) => m * unit >= x) * unit;
}

/* What the matrix says at this price. */
function solve() {
  const cells = asWritten(priced(state.cells, policy(), priceNow()));
  const chosen = recommended(cells), front = frontier(cells), nash = pureNash(cells), gains = welfare(cells);
  const most = Math.max(...gains, 1e-9);
  cells.forEach((cell, i) => {
    const said = [i === chosen && "chosen", nash[i] && "Nash"].filter(Boolean).map((text) => el("b", `mark ${text}`, text));
    marks[i].replaceChildren(...said, ...(front[i] ? [el("span", "unseen", "on the Pareto frontier")] : []));
    const box = marks[i].parentElement;
    box.className = `${front[i] ? "frontier" : ""} ${i === chosen ? "chosen" : ""}`;
    box.style.setProperty("--gain", (gains[i] / most).toFixed(3));
    for (const { after, place } of inputs[i])
      after.textContent = cell[place] === state.cells[i][place] ? "" : number(cell[place]);
  });
  const action = told.actions[actionOf(chosen)], move = told.user_moves[moveOf(chosen)];
  byId("verdict").replaceChildren("The matrix recommends ", el("b", "", action), `: ${MEANS[action] ?? ""} (${move}_${action})`);
  byId("slider").setAttribute("aria-valuetext", `${short(priceNow())}, recommends ${action}`);
  const mixed = nash.includes(true) ? [] : mixedNash(cells);
  byId("mixed").textContent = mixed.length ? `No cell is an equilibrium; mixed: ${mixed.map(mixture).join("; ")}` : "";
  byId("mixed").hidden = !mixed.length;
  const stale = state.steered && state.steered !== JSON.stringify(pricingNow());
  byId("steered").parentElement.classList.toggle("stale", Boolean(stale));
}

function mixture({ user, llm }) {
  const side = (moves, chances) => moves.map((move, i) => [move, chances[i]]).filter(([, chance]) => chance > 0)
    .map(([move, chance]) => `${move} ${Math.round(100 * chance)} %`).join(" + ");
  return `${side(told.user_moves, user)} against ${side(told.actions, llm)}`;
}

/* The settings, and whose model it is. */

for (const name of Object.keys(told.policies)) byId("policy").append(el("option", "", name));
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
