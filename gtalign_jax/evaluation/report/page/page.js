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
