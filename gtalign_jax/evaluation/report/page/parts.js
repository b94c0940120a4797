"use strict";
// Completions are untrusted text: they enter the page through textContent alone.
const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

function el(tag, css, ...children) {
  const node = document.createElement(tag);
  if (css) node.className = css;
  for (const child of children) if (child !== null && child !== undefined) node.append(child);
  return node;
}

const fixed = (x, digits = 3) => (typeof x === "number" ? x.toFixed(digits).replace("-", "−") : "–");

/* The metric shown in the results. */
const pills = document.querySelector(".pills");
if (pills) {
  const show = (metric) => {
    for (const b of pills.children) b.setAttribute("aria-pressed", String(b.dataset.show === metric));
    for (const f of document.querySelectorAll(".results[data-metric]")) f.hidden = f.dataset.metric !== metric;
  };
  pills.classList.add("ready");
  pills.addEventListener("click", (e) => e.target.dataset.show && show(e.target.dataset.show));
  show(pills.firstElementChild.dataset.show);
}

/* Values under the pointer: of the three lines nearest to it. */
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const lines = JSON.parse(svg.dataset.chart);
  const { width, height } = svg.viewBox.baseVal;
  const cursor = document.createElementNS(svg.namespaceURI, "path");
  const readout = svg.parentElement.querySelector("output");
  cursor.setAttribute("class", "cursor");
  svg.append(cursor);
  svg.addEventListener("pointermove", (e) => {
    const box = svg.getBoundingClientRect();
    const x = ((e.clientX - box.left) / box.width) * width;
    const y = ((e.clientY - box.top) / box.height) * height;
    const nearest = (xs) => xs.reduce((best, at, i) => (Math.abs(at - x) < Math.abs(xs[best] - x) ? i : best), 0);
    const found = lines.map((line) => [line, nearest(line.x)]);
    const away = ([line, i]) => Math.abs(line.y[i] - y);
    const near = found.toSorted((a, b) => away(a) - away(b)).slice(0, 3);
    const [first, i] = near[0];
    cursor.setAttribute("d", `M${first.x[i]},8V${height - 34}`);
    const values = found.filter((each) => near.includes(each))
      .map(([line, at]) => `${lines.length > 1 ? line.name + " " : ""}${line.value[at]}`);
    readout.textContent = `step ${first.step[i]} · ${values.join(" · ")}`;
  });
  svg.addEventListener("pointerleave", () => {
    cursor.removeAttribute("d");
    readout.textContent = "";
  });
}

/* A payoff matrix: shade is the cell's welfare, dashes the frontier, a full line the chosen cell. */
function matrixTable(m) {
  const head = el("tr", "", el("th"));
  DATA.actions.forEach((action, a) => head.append(el("th", m.chosen && m.chosen[1] === a ? "picked" : "", action)));
  const body = el("tbody");
  const all = m.welfare.flat();
  const lo = Math.min(...all), span = Math.max(...all) - lo || 1;
  DATA.user_moves.forEach((move, u) => {
    const row = el("tr", "", el("th", "", move));
    DATA.actions.forEach((action, a) => {
      const chosen = m.chosen && m.chosen[0] === u && m.chosen[1] === a;
      const css = (m.frontier[u][a] ? "frontier " : "") + (chosen ? "chosen" : "");
      const [llm, user] = m.payoff[u][a];
      const cell = el("td", css, el("span", "u", fixed(user, 1)), " / ", el("span", "l", fixed(llm, 1)));
      cell.style.backgroundColor = `rgba(var(--heat), ${(0.04 + 0.3 * ((m.welfare[u][a] - lo) / span)).toFixed(3)})`;
      cell.title = `${move}, ${action}: user ${user}, assistant ${llm}`
        + (m.frontier[u][a] ? " · on the Pareto frontier" : "") + (chosen ? " · chosen" : "");
      row.append(cell);
    });
    body.append(row);
  });
  return el("div", "scroll", el("table", "matrix", el("thead", "", head), body));
}

const matrixKey = () => el("p", "key", el("span", "u", "user"), " / ", el("span", "l", "assistant"),
  " · shade: gain of both · dashed: Pareto frontier · outlined: chosen");

function block(name, text, ...more) {
  return el("section", `block ${name}`, el("h3", "", name), text ? el("p", "text", text) : null, ...more);
}

function disclosure(title, text) {
  return el("details", "", el("summary", "", title), el("p", "text", text));
}

function payoffBlock(s) {
  if (!s.matrix) return block("payoff", s.blocks.payoff);
  return block("payoff", "", matrixTable(s.matrix), matrixKey(), disclosure("as written", s.blocks.payoff));
}

function scoreList(s) {
  const rows = [["W", fixed(s.scores.utility), "welfare"], ["U", fixed(s.scores.user_reward), "user"],
    ["L", fixed(s.scores.llm_reward), "llm"], ["answer", fixed(s.scores.answer_reward, 2)],
    ["format", fixed(s.scores.format_reward, 2)], ["matrix", fixed(s.scores.payoff_reward, 2)],
    ["action", s.action || "–"], ["tokens", s.tokens ?? "–"]];
  const list = el("dl", "scores");
  for (const [name, value, css] of rows) list.append(el("div", css, el("dt", "", name), el("dd", "", String(value))));
  return list;
}

/* A completion: its errors and its blocks. */
function completion(s) {
  const parts = [];
  if (s.errors.length) {
    const errors = el("ul", "errors");
    for (const e of s.errors) errors.append(el("li", "", e));
    parts.push(errors);
  }
  for (const name of ["thinking", "payoff", "analyze", "response"])
    if (name in s.blocks) parts.push(name === "payoff" ? payoffBlock(s) : block(name, s.blocks[name]));
  if (s.raw !== null) {
    const shown = Object.keys(s.blocks).length;
    parts.push(shown ? block("broken", "", disclosure("whole completion as written", s.raw)) : block("broken", s.raw));
  }
  return parts;
}

function showSample(s) {
  const verdict = s.judge && s.judge.verdict === null ? ` · no verdict: ${s.judge.reason}` : "";
  byId("sample").replaceChildren(scoreList(s), el("p", "prompt text", s.prompt), ...completion(s),
    el("p", "foot text", `ground truth: ${s.truth}${verdict}`));
}

/* A list of buttons of which one is chosen; the arrow keys walk along it. */
function fillList(list, buttons) {
  for (const button of buttons) {
    button.type = "button";
    button.addEventListener("click", () => {
      for (const b of list.querySelectorAll("[aria-pressed=true]")) b.setAttribute("aria-pressed", "false");
      button.setAttribute("aria-pressed", "true");
    });
  }
  list.replaceChildren(...buttons.map((button) => el("li", "", button)));
  list.scrollTop = 0;
  if (buttons.length) buttons[0].click();
}

for (const list of document.querySelectorAll(".list"))
  list.addEventListener("keydown", (e) => {
    const step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[e.key];
    const next = step && document.activeElement.parentElement[step];
    if (!next) return;
    e.preventDefault();
    next.firstChild.focus();
    next.firstChild.click();
  });

const unique = (list) => [...new Set(list)];

/* The choices of a select; what was chosen stays so where it can. all: the name of no choice. */
function options(select, values, all) {
  const kept = select.value;
  select.replaceChildren(...[...(all ? [[all, ""]] : []), ...values.map((v) => [String(v), String(v)])]
    .map(([text, value]) => Object.assign(el("option", "", text), { value })));
  select.value = values.map(String).includes(kept) ? kept : all ? "" : String(values[0] ?? "");
}

/* The browser: filters, the list, the sample. */
function startBrowser() {
  const samples = DATA.samples;
  const field = (name) => byId(`f-${name}`);
  const lower = samples.map((s) => [s.prompt, s.raw || "", ...Object.values(s.blocks)].join("\n").toLowerCase());
  const actionOf = (s) => s.action || "none";

  function refresh() {
    const want = (name) => field(name)?.value ?? "";
    const here = samples.map((s, i) => [s, i]).filter(([s]) => s.split === want("split"));
    options(field("step"), unique(here.map(([s]) => s.step)).sort((a, b) => b - a), "all");
    const same = (name, value) => !want(name) || want(name) === String(value);
    const low = parseFloat(want("low")), high = parseFloat(want("high")), text = want("text").toLowerCase();
    const welfare = (s) => s.scores.utility ?? 0;
    let found = here.filter(([s, i]) => same("run", s.run) && same("step", s.step) && same("task", s.task)
      && same("action", actionOf(s)) && !(welfare(s) < low) && !(welfare(s) > high) && lower[i].includes(text));
    const sign = { up: 1, down: -1 }[want("sort")];
    if (sign) found = found.sort(([a], [b]) => sign * (welfare(a) - welfare(b)));
    byId("count").textContent = found.length === 1 ? "1 sample" : `${found.length} samples`;
    fillList(byId("list"), found.map(([s]) => listItem(s)));
    if (!found.length) byId("sample").replaceChildren(el("p", "foot", "Nothing matches these filters."));
  }

  function listItem(s) {
    const about = [s.run, s.task, s.action || "no action"].filter(Boolean).join(" · ");
    const button = el("button", "", el("small", "", about), el("b", "", fixed(s.scores.utility, 2)),
      el("span", "", s.blocks.response ?? s.raw ?? ""));
    button.addEventListener("click", () => showSample(s));
    return button;
  }

  options(field("split"), unique(samples.map((s) => s.split)), "");
  field("split").value = samples[samples.length - 1].split;
  if (field("run")) options(field("run"), unique(samples.map((s) => s.run)), "all");
  options(field("task"), unique(samples.map((s) => s.task)), "all");
  options(field("action"), unique(samples.map(actionOf)), "all");
  for (const input of document.querySelectorAll("#samples select")) input.addEventListener("change", refresh);
  for (const input of document.querySelectorAll("#samples input")) input.addEventListener("input", refresh);
  refresh();
}
