// What a payoff matrix says should be done: the rules of game/payoff.py, equilibrium.py, pricing.py and
// break_even.py, so that an edit or a price is answered at once. A matrix is six cells [LLM, user], the three
// of the first user move before those of the second.

const MOVES = 2, ACTIONS = 3;
const LLM = 0, USER = 1;
const LOW = -5, HIGH = 5; // the scale that models write on
const APART = 1e-6; // prices closer than this are one

export const actionOf = (cell) => cell % ACTIONS;
export const moveOf = (cell) => Math.floor(cell / ACTIONS);

/* The matrix with a policy's price on it. */
export function priced(cells, policy, price) {
  if (price === 0) return cells;
  return cells.map((cell, i) => cell.map((value, player) =>
    value + (price * policy.slope[actionOf(i)][player] + policy.offset[actionOf(i)][player])));
}

/* On the scale and in the steps that the model reads, 10 of 1 in a decimal; halves go to the even neighbour. */
export const asWritten = (cells, perUnit) => cells.map((cell) => cell.map((value) =>
  halfToEven(Math.min(Math.max(value, LOW), HIGH) * perUnit) / perUnit + 0));

function halfToEven(x) {
  const near = Math.round(x);
  return Math.abs(x % 1) === 0.5 && near % 2 !== 0 ? near - 1 : near;
}

/* Of each cell: whether no other is as good for both and better for one. */
export const frontier = (cells) => cells.map(([llm, user]) =>
  !cells.some(([l, u]) => l >= llm && u >= user && (l > llm || u > user)));

/* Of each cell: the geometric mean of both gains above the floor. */
export const welfare = (cells) => cells.map(([llm, user]) =>
  Math.sqrt(Math.max(llm - LOW, 0) * Math.max(user - LOW, 0)));

/* The recommended cell: on the frontier the largest welfare, then user payoff, then LLM payoff, then the first. */
export function recommended(cells) {
  let best = frontier(cells);
  const of = (player) => cells.map((cell) => cell[player]);
  for (const [values, slack] of [[welfare(cells), 1e-5], [of(USER), 0], [of(LLM), 0]]) {
    const top = Math.max(...values.filter((_, i) => best[i]));
    best = best.map((kept, i) => kept && values[i] >= top - slack * (1 + Math.abs(top)));
  }
  return best.indexOf(true);
}

/* Of each cell: whether nobody gains by moving alone. */
export const pureNash = (cells) => cells.map(([llm, user], i) =>
  cells.every(([l, u], j) => (actionOf(i) !== actionOf(j) || user >= u) && (moveOf(i) !== moveOf(j) || llm >= l)));

/* The extreme equilibria that are no cell: [{user: [2 chances], llm: [3 chances]}]. */
export function mixedNash(cells) {
  const whole = (player) => [0, 1].map((u) => [0, 1, 2].map((a) => Math.round(cells[u * ACTIONS + a][player] * 100)));
  const llm = whole(LLM), user = whole(USER);
  const users = vertices(llm), llms = vertices([0, 1, 2].map((a) => [user[0][a], user[1][a]]));
  const only = (weights, replies) => weights.every((weight, i) => weight === 0 || replies[i]);
  const chances = (weights) => weights.map((weight) => weight / weights.reduce((a, b) => a + b));
  const found = [];
  for (const x of users)
    for (const y of llms)
      if (!(x.pure && y.pure) && only(y.weights, x.replies) && only(x.weights, y.replies))
        found.push({ user: chances(x.weights), llm: chances(y.weights) });
  return found;
}

/* Strategies at which the opponent's best replies change, each once: pure, and of two moves where two replies tie.
   opponent[move][reply]: its payoffs in whole numbers. */
function vertices(opponent) {
  const moves = opponent.length, replies = opponent[0].length;
  const answer = (weights) => {
    const value = opponent[0].map((_, r) => weights.reduce((sum, weight, m) => sum + weight * opponent[m][r], 0));
    return value.map((v) => v >= Math.max(...value));
  };
  const strategy = (pairs, pure) => {
    const weights = Array(moves).fill(0);
    for (const [move, weight] of pairs) weights[move] = weight;
    return { weights, replies: answer(weights), pure };
  };
  const found = opponent.map((_, m) => strategy([[m, 1]], true));
  for (const [i, j] of pairsOf(moves)) {
    const here = [];
    for (const [r, s] of pairsOf(replies)) {
      const first = opponent[j][s] - opponent[j][r], second = opponent[i][r] - opponent[i][s];
      if (first * second <= 0) continue; // no mixture of both makes these two tie
      const one = strategy([[i, Math.abs(first)], [j, Math.abs(second)]], false);
      const tie = ({ replies: best }) => best[r] && best[s];
      if (tie(one) && !here.some(tie)) here.push(one);
    }
    found.push(...here);
  }
  return found;
}

function pairsOf(count) {
  const found = [];
  for (let i = 0; i < count; i++) for (let j = i + 1; j < count; j++) found.push([i, j]);
  return found;
}

/* Every price above 0 at which the recommended action flips, of the matrix as models read it, ascending:
   [{price, before, after}], actions by their number. */
export function breakEven(cells, policy, perUnit) {
  const base = cells.map((cell, i) => cell.map((value, player) => value + policy.offset[actionOf(i)][player]));
  const found = [];
  base.forEach((cell, i) => cell.forEach((value, player) => {
    const slope = policy.slope[actionOf(i)][player];
    for (let k = 0; slope !== 0 && k < (HIGH - LOW) * perUnit; k++)
      found.push((LOW + (k + 0.5) / perUnit - value) / slope);
  }));
  const ascending = found.filter((price) => price > APART).sort((a, b) => a - b);
  const prices = ascending.filter((price, i) => price - (i ? ascending[i - 1] : 0) > APART * (1 + price));
  const between = prices.map((price, i) => (price + (i ? prices[i - 1] : 0)) / 2);
  between.push(prices.length ? prices[prices.length - 1] + 1 : 1);
  const actions = [0, ...between].map((price) => actionOf(recommended(asWritten(priced(cells, policy, price), perUnit))));
  return [0, ...prices].map((price, i) => ({ price, before: actions[i], after: actions[i + 1] }))
    .filter(({ before, after }) => before !== after);
}
