// The matrix and its price: a grid whose numbers can be changed, a slider, and what follows from both at once.
import { byId, el } from "./dom.js";
import {
  actionOf, asWritten, breakEven, frontier, mixedNash, moveOf, priced, pureNash, recommended, welfare,
} from "./solve.js";
import { writeMatrix } from "./stream.js";

const PLAYERS = [["user", 1], ["LLM", 0]]; // as a cell shows them, and their place in it
const MEANS = {
  DA: "answer", CQ: "ask back", AQ: "answer and ask", VQ: "user asks vaguely", DQ: "user asks in detail",
};
const NEAR = 1e-3; // just above a break-even price

const number = (x) => x.toFixed(1).replace("-", "−");
export const short = (price) => String(Number(price.toFixed(3)));

export class Game {
  /* told: the server's settings. changed: called after every change of matrix, policy or price. */
  constructor(told, changed) {
    Object.assign(this, { told, changed, written: null, cells: null });
    this.names = told.user_moves.flatMap((move) => told.actions.map((action) => `${move}_${action}`));
    this.marks = this.names.map((_, i) => Object.assign(el("p", "marks"), { id: `marks-${i}` }));
    this.inputs = this.names.map((_, i) => PLAYERS.map(([player, place]) => this.#input(i, player, place)));
    this.#table();
    for (const name of Object.keys(told.policies)) byId("policy").append(el("option", "", name));
    byId("policy").addEventListener("change", () => this.#refresh());
    byId("slider").addEventListener("input", (event) => this.#setPrice(event.target.valueAsNumber));
    byId("price").addEventListener("input", () => { byId("slider").value = this.price; this.#solve(); });
    byId("reset").addEventListener("click", () => this.take(this.written));
  }

  get policy() { return this.told.policies[byId("policy").value]; }

  get price() { return Math.max(byId("price").valueAsNumber, 0) || 0; }

  /* As requests have it: the policy's price on the matrix that is shown. */
  get pricing() {
    return { policy: byId("policy").value, price: this.price, matrix: writeMatrix(this.cells, this.names) };
  }

  get edited() { return JSON.stringify(this.cells) !== JSON.stringify(this.written); }

  /* Show a matrix as the model's; null for none. */
  take(cells) {
    this.written = cells;
    this.cells = cells?.map((cell) => [...cell]) ?? null;
    byId("game").hidden = !cells;
    if (!cells) return;
    this.#writeInputs();
    this.#refresh();
  }

  #input(i, player, place) {
    const input = Object.assign(el("input"), { type: "number", step: String(1 / this.told.per_unit) });
    const after = Object.assign(el("span", "after"), { id: `after-${i}-${place}` });
    input.setAttribute("aria-label", `${player}: payoff of ${this.names[i]}`);
    input.setAttribute("aria-describedby", `${after.id} marks-${i}`);
    input.addEventListener("input", () => {
      const known = Number.isFinite(input.valueAsNumber);
      input.setAttribute("aria-invalid", String(!known));
      if (!known) return;
      this.cells[i][place] = input.valueAsNumber;
      this.#refresh();
    });
    input.addEventListener("change", () => this.#writeInputs()); // what is no number goes back to the last that was
    return { input, after, place, label: el("label", player.toLowerCase(), el("span", "", player), input, after) };
  }

  #table() {
    const heading = (scope, name) => Object.assign(el("th", "", name, el("small", "", MEANS[name] ?? "")), { scope });
    const cell = (i) => el("td", "", this.marks[i], el("div", "pair", ...this.inputs[i].map(({ label }) => label)));
    const { user_moves: moves, actions } = this.told;
    byId("columns").append(el("tr", "", el("td"), ...actions.map((action) => heading("col", action))));
    byId("cells").append(...moves.map((move, u) =>
      el("tr", "", heading("row", move), ...actions.map((_, a) => cell(u * actions.length + a)))));
  }

  #writeInputs() {
    for (const [i, players] of this.inputs.entries())
      for (const { input, place } of players) {
        if (input.valueAsNumber !== this.cells[i][place]) input.value = this.cells[i][place];
        input.setAttribute("aria-invalid", "false");
      }
  }

  #setPrice(value) {
    byId("price").value = short(value);
    byId("slider").value = value;
    this.#solve();
  }

  /* After a change of the matrix or the policy: where the recommendation flips, then what it is. */
  #refresh() {
    const { about, slope } = this.policy, steepest = Math.max(...slope.flat().map(Math.abs));
    const most = steepest ? nice(10 / steepest) : 1; // by then some payoff has crossed the whole scale
    const flips = breakEven(this.cells, this.policy, this.told.per_unit);
    byId("policy-note").textContent = about;
    byId("slider").max = most;
    byId("slider").step = most / 500;
    byId("slider").value = this.price;
    const said = flips.length ? "Break-even at " : "No price changes the recommendation.";
    byId("flips").replaceChildren(said, ...flips.map((flip) => this.#flipButton(flip)));
    this.#drawBands(flips, most);
    this.#solve();
  }

  /* Under the slider: which action is recommended from where to where. */
  #drawBands(flips, most) {
    const start = { price: 0, after: actionOf(recommended(asWritten(this.cells, this.told.per_unit))) };
    const starts = [start, ...flips.filter(({ price }) => price < most)];
    byId("bands").replaceChildren(...starts.map(({ price, after }, i) => {
      const share = ((starts[i + 1]?.price ?? most) - price) / most;
      const band = el("span", "", share > 0.12 ? this.told.actions[after] : "");
      band.style.flexGrow = share;
      return band;
    }));
  }

  #flipButton({ price, before, after }) {
    const from = this.told.actions[before], to = this.told.actions[after];
    const button = el("button", "", `${short(price)} `, el("span", "", `${from} → ${to}`));
    button.type = "button";
    button.setAttribute("aria-label", `${short(price)}, from ${from} to ${to}: go there`);
    button.addEventListener("click", () => this.#setPrice(price + NEAR));
    return button;
  }

  /* What the matrix says at this price. */
  #solve() {
    const cells = asWritten(priced(this.cells, this.policy, this.price), this.told.per_unit);
    const chosen = recommended(cells), nash = pureNash(cells);
    this.#mark(cells, chosen, nash);
    const action = this.told.actions[actionOf(chosen)], move = this.told.user_moves[moveOf(chosen)];
    const means = `: ${MEANS[action] ?? ""} (${move}_${action})`;
    byId("verdict").replaceChildren("The matrix recommends ", el("b", "", action), means);
    byId("slider").setAttribute("aria-valuetext", `${short(this.price)}, recommends ${action}`);
    const mixed = nash.includes(true) ? [] : mixedNash(cells).map((one) => this.#mixture(one));
    byId("mixed").textContent = mixed.length ? `No cell is an equilibrium; mixed: ${mixed.join("; ")}` : "";
    byId("mixed").hidden = !mixed.length;
    this.changed();
  }

  #mark(cells, chosen, nash) {
    const front = frontier(cells), gains = welfare(cells), most = Math.max(...gains, 1e-9);
    cells.forEach((cell, i) => {
      const said = [];
      if (i === chosen) said.push(el("b", "mark chosen", "chosen"));
      if (nash[i]) said.push(el("b", "mark nash", "Nash"));
      if (front[i]) said.push(el("span", "unseen", "on the Pareto frontier"));
      this.marks[i].replaceChildren(...said);
      const box = this.marks[i].parentElement;
      box.classList.toggle("frontier", front[i]);
      box.classList.toggle("chosen", i === chosen);
      box.style.setProperty("--gain", (gains[i] / most).toFixed(3));
      for (const { after, place } of this.inputs[i])
        after.textContent = cell[place] === this.cells[i][place] ? "" : number(cell[place]);
    });
  }

  #mixture({ user, llm }) {
    const side = (moves, chances) => moves.map((move, i) => `${move} ${Math.round(100 * chances[i])} %`)
      .filter((_, i) => chances[i] > 0).join(" + ");
    return `${side(this.told.user_moves, user)} against ${side(this.told.actions, llm)}`;
  }
}

/* A round number from x up. */
function nice(x) {
  const unit = 10 ** Math.floor(Math.log10(x));
  return [1, 2, 5, 10].find((m) => m * unit >= x) * unit;
}
