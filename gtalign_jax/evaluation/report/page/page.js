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
    for (const f of document.querySelectorAll(".results")) f.hidden = f.dataset.metric !== metric;
  };
  pills.classList.add("ready");
  pills.addEventListener("click", (e) => e.target.dataset.show && show(e.target.dataset.show));
  show(pills.firstElementChild.dataset.show);
}

/* Values under the pointer. */
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const lines = JSON.parse(svg.dataset.chart);
  const cursor = svg.querySelector(".cursor");
  const readout = svg.parentElement.querySelector("output");
  svg.addEventListener("pointermove", (e) => {
    const box = svg.getBoundingClientRect();
    const at = ((e.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const nearest = (xs) => xs.reduce((best, x, i) => (Math.abs(x - at) < Math.abs(xs[best] - at) ? i : best), 0);
    const i = nearest(lines[0].x);
    cursor.setAttribute("x1", lines[0].x[i]);
    cursor.setAttribute("x2", lines[0].x[i]);
    cursor.setAttribute("visibility", "visible");
    const values = lines.map((l) => `${lines.length > 1 ? l.name + " " : ""}${l.y[nearest(l.x)]}`);
    readout.textContent = `step ${lines[0].step[i]} · ${values.join(" · ")}`;
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
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

function showSample(s) {
  const parts = [scoreList(s), el("p", "prompt text", s.prompt)];
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
  const verdict = s.judge && s.judge.verdict === null ? ` · no verdict: ${s.judge.reason}` : "";
  parts.push(el("p", "foot text", `ground truth: ${s.truth}${verdict}`));
  byId("sample").replaceChildren(...parts);
}

/* The browser: filters, the list, the sample. */
function startBrowser() {
  const samples = DATA.samples;
  const field = (name) => byId(`f-${name}`);
  const options = (name, values, all) => {
    const kept = field(name).value;
    field(name).replaceChildren(...[...(all ? [[all, ""]] : []), ...values.map((v) => [String(v), String(v)])]
      .map(([text, value]) => Object.assign(el("option", "", text), { value })));
    field(name).value = values.map(String).includes(kept) ? kept : all ? "" : String(values[0] ?? "");
  };
  const unique = (list) => [...new Set(list)];
  const lower = samples.map((s) => [s.prompt, s.raw || "", ...Object.values(s.blocks)].join("\n").toLowerCase());

  function refresh() {
    const split = field("split").value;
    const here = samples.map((s, i) => [s, i]).filter(([s]) => !split || s.split === split);
    options("step", unique(here.map(([s]) => s.step)).sort((a, b) => b - a), "all");
    const want = { step: field("step").value, task: field("task").value, text: field("text").value.toLowerCase() };
    let found = here.filter(([s, i]) => (!want.step || String(s.step) === want.step)
      && (!want.task || s.task === want.task) && (!want.text || lower[i].includes(want.text)));
    const sign = { up: 1, down: -1 }[field("sort").value];
    if (sign) found = found.sort(([a], [b]) => sign * ((a.scores.utility ?? 0) - (b.scores.utility ?? 0)));
    byId("count").textContent = found.length === 1 ? "1 sample" : `${found.length} samples`;
    byId("list").replaceChildren(...found.map(([s]) => listItem(s)));
    byId("list").scrollTop = 0;
    const first = byId("list").querySelector("button");
    if (first) first.click();
    else byId("sample").replaceChildren(el("p", "foot", "Nothing matches these filters."));
  }

  function listItem(s) {
    const button = el("button", "", el("small", "", `${s.task} · ${s.action || "no action"}`),
      el("b", "", fixed(s.scores.utility, 2)), el("span", "", s.blocks.response ?? s.raw ?? ""));
    button.type = "button";
    button.addEventListener("click", () => {
      for (const b of byId("list").querySelectorAll("[aria-pressed=true]")) b.setAttribute("aria-pressed", "false");
      button.setAttribute("aria-pressed", "true");
      showSample(s);
    });
    return el("li", "", button);
  }

  byId("list").addEventListener("keydown", (e) => {
    const step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[e.key];
    const next = step && document.activeElement.parentElement[step];
    if (!next) return;
    e.preventDefault();
    next.firstChild.focus();
    next.firstChild.click();
  });
  options("split", unique(samples.map((s) => s.split)), "");
  field("split").value = samples[samples.length - 1].split;
  options("task", unique(samples.map((s) => s.task)), "all");
  for (const name of ["split", "step", "task", "sort"]) field(name).addEventListener("change", refresh);
  field("text").addEventListener("input", refresh);
  refresh();
}

function steeredCard(e) {
  const side = (name, title) => el("div", "", el("h4", "", `${title}: chooses `, el("b", "", e[name].action || "no action")),
    matrixTable(e[name].matrix), e[name].analyze ? block("analyze", e[name].analyze) : null,
    block("response", e[name].response));
  const price = typeof e.price === "number" ? ` at ${e.price}` : "";
  return el("section", "steered", el("h3", "", e.task, el("small", "", ` · ${e.policy}${price}`)),
    el("p", "prompt text", e.prompt), el("div", "sides", side("before", "As written"), side("after", "Edited")), matrixKey());
}

if (byId("steered")) byId("steered").append(...DATA.steering.map(steeredCard));
if (DATA.samples.length) startBrowser();
