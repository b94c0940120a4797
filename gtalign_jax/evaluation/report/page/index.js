
/* A table is sorted by the column whose name is pressed, again the other way; what is missing stands last. */
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const down = head.classList.contains("num") ? head.ariaSort !== "descending" : head.ariaSort === "ascending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.ariaSort = down ? "descending" : "ascending";
    const keyed = [...table.tBodies[0].rows].map((row) => {
      const cell = row.cells[column];
      return [head.classList.contains("num") ? parseFloat(cell.dataset.value) : cell.textContent, row];
    });
    const order = ([a], [b]) => (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
    const present = keyed.filter(([key]) => !Number.isNaN(key)).sort((a, b) => (down ? order(b, a) : order(a, b)));
    const missing = keyed.filter(([key]) => Number.isNaN(key));
    table.tBodies[0].replaceChildren(...[...present, ...missing].map(([, row]) => row));
  }));
}

/* Two models item by item. */
function startItems() {
  const { contenders, pairs, items } = DATA.compared;
  const field = (name) => byId(`i-${name}`);
  const nameOf = ({ run, model }) => `${run} · ${model}`;
  const signed = (x) => (x < 0 ? "" : "+") + fixed(x);

  function pairOf(a, b) {
    const found = pairs.find((p) => (p.a === a && p.b === b) || (p.a === b && p.b === a));
    if (!found || found.a === a) return found;
    return { ...found, mean: -found.mean, lo: -found.hi, hi: -found.lo, wins: found.losses, losses: found.wins };
  }

  function side(place, contender) {
    const { means, completions, sample } = place;
    const counted = completions > 1 ? `first of ${completions} completions; W, U and L are their means` : "";
    const scores = { ...sample.scores, ...means };
    return el("div", "", el("h4", "", el("b", "", nameOf(contender))), scoreList({ ...sample, scores }),
      counted ? el("p", "foot", counted) : null, ...completion(sample));
  }

  function showItem(item, a, b) {
    byId("i-item").replaceChildren(el("p", "prompt text", item.prompt),
      el("div", "sides", side(item.sides[a], contenders[a]), side(item.sides[b], contenders[b])),
      el("p", "foot text", `ground truth: ${item.truth}`));
  }

  function listItem(item, gain, a, b) {
    const moves = [a, b].map((at) => item.sides[at].sample.action || "none").join(" → ");
    const button = el("button", "", el("small", "", `${item.task} · ${moves}`),
      el("b", ["loss", "", "gain"][Math.sign(gain) + 1], signed(gain)), el("span", "", item.prompt));
    button.addEventListener("click", () => showItem(item, a, b));
    return button;
  }

  function refresh() {
    const [a, b] = [Number(field("a").value), Number(field("b").value)];
    const pair = pairOf(a, b);
    byId("i-pair").textContent = pair
      ? `Welfare ${signed(pair.mean)} [${signed(pair.lo)}, ${signed(pair.hi)}] over ${pair.prompts} shared prompts: `
        + `better on ${pair.wins}, worse on ${pair.losses}, equal on ${pair.prompts - pair.wins - pair.losses}.`
      : a === b ? "These are the same model; choose another." : "These two share no prompt.";
    const task = field("task").value, sign = field("sort").value === "up" ? 1 : -1;
    const found = items.filter((item) => item.sides[a] && item.sides[b] && (!task || item.task === task))
      .map((item) => [item, item.sides[b].means.utility - item.sides[a].means.utility])
      .sort(([, x], [, y]) => sign * (x - y));
    byId("i-count").textContent = found.length === 1 ? "1 prompt" : `${found.length} prompts`;
    fillList(byId("i-list"), found.map(([item, gain]) => listItem(item, gain, a, b)));
    if (!found.length) byId("i-item").replaceChildren();
  }

  for (const name of ["a", "b"])
    field(name).append(...contenders.map((c, i) => Object.assign(el("option", "", nameOf(c)), { value: i })));
  // At first the last models of two runs, where two share a prompt.
  const first = pairs.findLast(({ a, b }) => contenders[a].run !== contenders[b].run) ?? pairs[0];
  field("a").value = first.a;
  field("b").value = first.b;
  options(field("task"), unique(items.map((item) => item.task)), "all");
  for (const select of document.querySelectorAll("#items select")) select.addEventListener("change", refresh);
  refresh();
}

if (byId("items")) startItems();
if (DATA.samples.length) startBrowser();
