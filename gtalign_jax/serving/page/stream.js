// A request to this server as a stream of events, and its text as blocks while it comes.

export class Refused extends Error {
  constructor(status, message, retry) {
    super(message);
    this.status = status;
    this.retry = retry;
  }
}

const headers = (key) => (key ? { authorization: `Bearer ${key}` } : {});

/* The JSON at an address. Refused for any status but 2xx. */
export async function getJson(address, key) {
  const answer = await fetch(address, { headers: headers(key) });
  if (!answer.ok) throw await refusal(answer);
  return answer.json();
}

/* Stream a chat completion: told(text so far, steering or null) at every event, and its finish reason at the end. */
export async function chat(body, key, signal, told) {
  const answer = await fetch("v1/chat/completions", {
    method: "POST", signal, headers: { "content-type": "application/json", ...headers(key) },
    body: JSON.stringify({ ...body, stream: true, reasoning: "shown" }),
  });
  if (!answer.ok) throw await refusal(answer);
  let text = "", steering = null, finish = null;
  for await (const event of events(answer.body)) {
    if (event.error) throw new Refused(0, event.error.message, null);
    for (const choice of event.choices) {
      text += choice.delta.content ?? "";
      steering = choice.steering ?? steering;
      finish = choice.finish_reason ?? finish;
    }
    told(text, steering);
  }
  if (finish === null) throw new Refused(0, "the answer broke off", null);
  return finish;
}

async function refusal(answer) {
  const body = await answer.json().catch(() => null);
  const message = body?.error?.message ?? `status ${answer.status}`;
  return new Refused(answer.status, message, answer.headers.get("retry-after"));
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (text + value).split("\n");
    text = lines.pop();
    for (const line of lines)
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}

const BLOCKS = ["thinking", "payoff", "analyze", "response"];

/* The blocks of a chain so far, in the order in which they come: [{name, text, open}]. What stands in none of them
   is a block "outside". */
export function blocks(text) {
  const found = [];
  const outside = (part) => part.trim() && found.push({ name: "outside", text: part.trim(), open: false });
  const opening = new RegExp(`<(${BLOCKS.join("|")})>`, "g");
  let at = 0;
  for (let tag; (tag = opening.exec(text)); opening.lastIndex = at) {
    outside(text.slice(at, tag.index));
    const close = `</${tag[1]}>`, start = tag.index + tag[0].length, end = text.indexOf(close, start);
    const inside = end < 0 ? settled(text.slice(start), [close]) : text.slice(start, end);
    found.push({ name: tag[1], text: inside.trim(), open: end < 0 });
    at = end < 0 ? text.length : end + close.length;
  }
  outside(settled(text.slice(at), BLOCKS.map((name) => `<${name}>`)));
  return found;
}

/* The text without an end that may be the beginning of a tag. */
function settled(text, tags) {
  const from = text.lastIndexOf("<");
  return from >= 0 && tags.some((tag) => tag.startsWith(text.slice(from))) ? text.slice(0, from) : text;
}

/* The six cells [LLM, user] of a matrix {DQ_AQ: {LLM, user}, …} in the order of `names`, or null if it is none. */
export function readMatrix(matrix, names) {
  if (typeof matrix === "string") {
    try { matrix = JSON.parse(matrix); } catch { return null; }
  }
  const cells = names.map((name) => [matrix?.[name]?.LLM, matrix?.[name]?.user]);
  const whole = cells.flat().every(Number.isFinite) && Object.keys(matrix).length === names.length;
  return whole ? cells : null;
}

export const writeMatrix = (cells, names) =>
  Object.fromEntries(names.map((name, i) => [name, { LLM: cells[i][0], user: cells[i][1] }]));

/* The action that an analysis settles on: the last it names. */
export function namedAction(analysis, moves, actions) {
  const choice = new RegExp(`\\b(?:(?:${moves.join("|")})_)?(${actions.join("|")})\\b`, "g");
  return [...analysis.matchAll(choice)].at(-1)?.[1] ?? null;
}
