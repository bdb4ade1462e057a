"use strict";
// Everything shown arrives as text and is set as text: no markup is ever built from it.

const one = (selector) => document.querySelector(selector);
const all = (selector) => [...document.querySelectorAll(selector)];
const make = (name, className = "", text = "") => {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
};
const setText = (element, text) => { if (element.textContent !== text) element.textContent = text; };

// ---- Live state ----

const LOST_MS = 6000;
let shown = null;
let heardAt = Date.now();
let source = null;

function show(snapshot) {
  shown = snapshot;
  heardAt = Date.now();
  setLost("");
  document.documentElement.dataset.state = snapshot.state;
  document.title = `${snapshot.texts.name} · ${snapshot.state}`;
  for (const place of all("body [data-text]")) setText(place, snapshot.texts[place.dataset.text] ?? "");
  for (const place of all("[data-rows]")) showRows(place, snapshot.tables[place.dataset.rows] ?? []);
  const runbook = one("#runbook");
  runbook.hidden = !snapshot.runbook;
  if (snapshot.runbook) runbook.href = snapshot.runbook;
  showBars(snapshot.parts);
  for (const figure of all("[data-chart]")) showChart(figure, snapshot.points, snapshot.now);
  showForm(snapshot);
}

function showRows(body, rows) {
  const text = JSON.stringify(rows);
  if (body.dataset.shown === text) return;
  body.dataset.shown = text;
  const titles = [...body.closest("table").querySelectorAll("th")].map((head) => head.textContent);
  body.replaceChildren(...rows.map((cells, number) => {
    const row = make("tr");
    if (body.dataset.marks) row.dataset.mark = cells[Number(body.dataset.marks)];
    if ("keys" in body.dataset) row.dataset.part = number < rows.length - 1 ? partNumber(number) : 0;
    row.append(...cells.map((cell, column) => {
      const place = make("td", "", cell);
      if ("titled" in body.dataset) place.dataset.title = titles[column];
      return place;
    }));
    return row;
  }));
}

// Weights and KV cache have colours of their own; all else shares one.
const partNumber = (number) => Math.min(number, 2) + 1;

function showBars(parts) {
  const place = one("#bars");
  const text = JSON.stringify(parts);
  if (place.dataset.shown === text) return;
  place.dataset.shown = text;
  place.replaceChildren();
  if (!parts) return;
  const numbers = new Map(parts.planned.map(([key], number) => [key, partNumber(number)]));
  const whole = Math.max(parts.card, parts.planned.reduce((sum, part) => sum + part[2], 0));
  addBar(place, "planned", parts.planned.map(([key, , bytes]) => [key, bytes]), numbers, whole);
  if (parts.allocated.length) addBar(place, "allocated", parts.allocated, numbers, whole);
}

function addBar(place, label, parts, numbers, whole) {
  const track = make("div", "track");
  for (const [key, bytes] of parts) {
    const piece = make("i");
    piece.dataset.part = numbers.get(key);
    piece.style.width = `${(100 * bytes) / whole}%`;
    track.append(piece);
  }
  place.append(make("span", "", label), track);
}

const MINUTES = 10;
const svg = (name, attributes) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
};

function showChart(figure, points, now) {
  const column = Number(figure.dataset.chart);
  const known = points.filter((point) => point[column] !== null && now - point[0] <= MINUTES * 60);
  if (known.length < 2) return figure.replaceChildren();
  const top = Math.max(...known.map((point) => point[column])) || 1;
  const place = ([at, ...values]) => [600 - (now - at), 46 - (44 * values[column - 1]) / top];
  const drawing = svg("svg", { viewBox: "0 0 600 48", preserveAspectRatio: "none", role: "img" });
  drawing.setAttribute("aria-label", `${figure.dataset.label}: ${unit(column, top)} at most`);
  drawing.append(svg("line", { x1: 0, x2: 600, y1: 47, y2: 47 }));
  for (const run of runs(known)) {
    const line = run.map((point) => place(point).map((value) => value.toFixed(1)).join(" ")).join(" L");
    const [first, last] = [place(run[0])[0], place(run[run.length - 1])[0]];
    drawing.append(svg("path", { class: "area", d: `M${first.toFixed(1)} 47 L${line} L${last.toFixed(1)} 47 Z` }));
    drawing.append(svg("path", { d: `M${line}` }));
  }
  const caption = make("figcaption");
  caption.append(make("span", "", "10 min"), make("span", "", `most ${unit(column, top)}`), make("span", "", "now"));
  figure.replaceChildren(drawing, caption);
}

// Points that follow each other without a gap, such as that of an engine that did not run.
function runs(points) {
  const found = [[]];
  points.forEach((point, number) => {
    if (number && point[0] - points[number - 1][0] > 30) found.push([]);
    found[found.length - 1].push(point);
  });
  return found;
}

function unit(column, value) {
  if (column === 1) return `${value.toFixed(1)} tok/s`;
  return value < 0.9995 ? `${Math.round(1000 * value)} ms` : `${value.toFixed(1)} s`;
}

function setLost(text) {
  const place = one("#lost");
  if (place.hidden === !text && place.textContent === text) return;
  place.hidden = !text;
  place.textContent = text;
  document.documentElement.toggleAttribute("data-lost", Boolean(text));
}

function connect() {
  if (source) source.close();
  source = new EventSource("events");
  source.onmessage = (event) => show(JSON.parse(event.data));
}

setInterval(() => {
  if (document.hidden) return;
  if (Date.now() - heardAt > LOST_MS) {
    const since = new Date(heardAt).toLocaleTimeString();
    setLost(`The agent does not answer since ${since}. What is shown below is what it said last.`);
    if (source.readyState === EventSource.CLOSED) connect();
  }
}, 2000);

document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    source.close();
  } else {
    heardAt = Date.now();
    connect();
  }
});

// ---- Questions ----

let conversation = [];
let running = null;

function showForm(snapshot) {
  const { kind } = snapshot.api;
  const answers = ["chat", "completion"].includes(kind);
  one("#form").hidden = !answers;
  one("#code").hidden = !answers && !(kind in ROLES);
  one("#role").hidden = !(kind in ROLES);
  if (kind in ROLES) setText(one("#role"), ROLES[kind].words);
  one("#key-row").hidden = !snapshot.api.key;
  one("#send").disabled = Boolean(running) || !["ready", "busy"].includes(snapshot.state);
  if (snapshot.api.most_tokens) one("#tokens").max = Math.min(4096, snapshot.api.most_tokens);
  showCode();
}

// What models do that write no answers: what the page says, and what programs ask.
const ROLES = {
  embed: {
    words: "This model turns texts into vectors; it writes no answers. Programs ask it as below.",
    path: "embeddings",
    body: { input: ["A Tesla P4 has no fan of its own.", "The chassis moves the air."] },
    python: ["answer = client.embeddings.create(", "    model=MODEL,", "    input=INPUT,", ")", "print([len(each.embedding) for each in answer.data])"],
  },
  rerank: {
    words: "This model puts documents into the order in which they fit a question; it writes no answers. Programs ask it as below.",
    path: "rerank",
    body: { query: "What cools the card?", documents: ["The chassis moves the air.", "The card has 8 GB."] },
  },
};

const wanted = (text) => {
  const system = one("#system").value.trim();
  const messages = shown.api.kind === "chat" && system ? [{ role: "system", content: system }] : [];
  return {
    messages: [...messages, ...conversation, { role: "user", content: text }],
    temperature: Number(one("#temperature").value),
    max_tokens: Number(one("#tokens").value),
  };
};

async function ask(text) {
  const question = wanted(text);
  const [, place] = [say("user", "You", text), say("assistant", shown.texts.name, "")];
  const stop = new AbortController();
  setRunning(stop);
  asked = text;
  showCode();
  const answer = { text: "", thoughts: "", tokens: 0, counted: 0, began: performance.now(), first: 0, last: 0, ended: false };
  try {
    const headers = { "Content-Type": "application/json" };
    if (one("#key").value) headers.Authorization = `Bearer ${one("#key").value}`;
    const response = await fetch("chat", { method: "POST", headers, body: JSON.stringify(question), signal: stop.signal });
    if (!response.ok) throw new Error(await reasonOf(response));
    for await (const data of events(response.body)) take(answer, data, place);
    if (!answer.ended) throw new Error("The answer ended before its end: the engine or the agent stopped.");
  } catch (error) {
    if (!stop.signal.aborted) place.append(make("p", "error", visible(error.message)));
  } finally {
    finish(answer, place, stop.signal.aborted);
    if (answer.text) conversation = [...question.messages.filter((each) => each.role !== "system"), { role: "assistant", content: answer.text }];
    setRunning(null);
  }
}

async function reasonOf(response) {
  const text = await response.text();
  try {
    const found = JSON.parse(text);
    const reason = found.error?.message ?? found.detail ?? found.message ?? text;
    return `${response.status}: ${typeof reason === "string" ? reason : JSON.stringify(reason)}`;
  } catch {
    return `${response.status}: ${text.slice(0, 500)}`;
  }
}

// The data of server-sent events.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r\n|\r|\n/);
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}

function take(answer, data, place) {
  if (data === "[DONE]") {
    answer.ended = true;
    return;
  }
  const found = JSON.parse(data);
  if (found.error) throw new Error(found.error.message ?? String(found.error));
  if (found.usage?.completion_tokens) answer.counted = found.usage.completion_tokens;
  const choice = found.choices?.[0];
  const text = choice?.delta?.content ?? choice?.text ?? "";
  const thoughts = choice?.delta?.reasoning_content ?? "";
  if (!text && !thoughts) return;
  answer.last = performance.now();
  answer.first ||= answer.last;
  answer.tokens += 1;
  answer.text += text;
  answer.thoughts += thoughts;
  const log = one("#talk");
  const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  setText(place.querySelector(".text"), visible(answer.text));
  if (answer.thoughts) {
    const aside = place.querySelector(".thoughts") ?? place.insertBefore(make("div", "text thoughts"), place.querySelector(".text"));
    aside.dir = "auto";
    setText(aside, visible(answer.thoughts));
  }
  if (follows) log.scrollTop = log.scrollHeight;
}

function finish(answer, place, stopped) {
  if (!answer.first) {
    if (stopped) place.append(make("p", "measured", "stopped before the first token"));
    return;
  }
  const tokens = answer.counted || answer.tokens;
  const parts = [`${tokens} tokens`];
  if (answer.last > answer.first && tokens > 1) parts.push(`${((1000 * (tokens - 1)) / (answer.last - answer.first)).toFixed(1)} tok/s`);
  parts.push(`first token after ${unit(2, (answer.first - answer.began) / 1000)}`);
  if (stopped) parts.push("stopped");
  place.append(make("p", "measured", parts.join(" · ")));
}

function say(role, who, text) {
  const place = make("div", `said ${role}`);
  const words = make("div", "text", visible(text));
  words.dir = "auto";
  place.append(make("p", "", who), words);
  one("#talk").append(place);
  one("#talk").scrollTop = one("#talk").scrollHeight;
  one("#fresh").hidden = false;
  return place;
}

// Control characters and those that reorder text become visible, so that a text shows what it holds.
function visible(text) {
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g, (character) => {
    const code = character.codePointAt(0);
    if (code < 0x20) return String.fromCodePoint(0x2400 + code);
    return code === 0x7f ? "\u2421" : `<U+${code.toString(16).toUpperCase().padStart(4, "0")}>`;
  });
}

function setRunning(stop) {
  running = stop;
  one("#stop").hidden = !stop;
  one("#send").hidden = Boolean(stop);
  one("#send").disabled = Boolean(stop) || !["ready", "busy"].includes(shown.state);
}

// ---- The same from a program ----

let asked = "";

function address() {
  const { host, port } = shown.api;
  const name = ["0.0.0.0", "::"].includes(host) ? location.hostname : host.includes(":") ? `[${host}]` : host;
  return `http://${name}:${port}/v1`;
}

// JSON whose every character is visible; Python reads its texts as its own.
const json = (value, indent) => JSON.stringify(value, null, indent).replace(
  /[\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g,
  (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`);

function showCode() {
  const { kind, key, model } = shown.api;
  if (kind in ROLES) return showRoleCode(ROLES[kind]);
  const question = wanted(asked || one("#question").value || one("#question").placeholder);
  if (asked && conversation.length) question.messages = conversation.filter((each, number) => number < conversation.length - 1);
  const last = question.messages[question.messages.length - 1].content;
  const content = kind === "chat" ? { messages: question.messages } : { prompt: last };
  const rest = { temperature: question.temperature, max_tokens: question.max_tokens };
  const path = kind === "chat" ? "chat/completions" : "completions";
  setText(one("#curl"), curl(path, { model, ...content, ...rest, stream: true }, key));
  const call = kind === "chat" ? "client.chat.completions.create" : "client.completions.create";
  const piece = kind === "chat" ? "chunk.choices[0].delta.content" : "chunk.choices[0].text";
  const lines = Object.entries({ model, ...content, ...rest }).map(([name, value]) => `    ${name}=${json(value)},`);
  setText(one("#python"), [
    ...client(key),
    `stream = ${call}(`,
    ...lines,
    "    stream=True,",
    ")",
    "for chunk in stream:",
    "    if chunk.choices:",
    `        print(${piece} or "", end="", flush=True)`,
  ].join("\n"));
}

function showRoleCode({ path, body, python }) {
  const { key, model } = shown.api;
  setText(one("#curl"), curl(path, { model, ...body }, key));
  const lines = python
    ? [...client(key), ...python.map((line) => line.replace("MODEL", () => json(model)).replace("INPUT", () => json(body.input)))]
    : ["import httpx", ...(key ? ["import os"] : []), "",
      `answer = httpx.post(${json(`${address()}/${path}`)}, json=${json({ model, ...body })}${key ? ', headers={"Authorization": "Bearer " + os.environ["API_KEY"]}' : ""})`,
      "print(answer.json())"];
  setText(one("#python"), lines.join("\n"));
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

const curl = (path, body, key) => [
  `curl -N ${address()}/${path} \\`,
  "  -H 'Content-Type: application/json' \\",
  ...(key ? ['  -H "Authorization: Bearer $API_KEY" \\'] : []),
  `  -d ${quoted(json(body))}`,
].join("\n");

const client = (key) => [
  ...(key ? ["import os", ""] : []),
  "from openai import OpenAI",
  "",
  `client = OpenAI(base_url=${json(address())}, api_key=${key ? 'os.environ["API_KEY"]' : '"none"'})`,
];

// ---- What the person does ----

one("#form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = one("#question").value.trim();
  if (!text || running || one("#send").disabled) return;
  one("#question").value = "";
  ask(text);
});
one("#question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    one("#form").requestSubmit();
  }
});
one("#form").addEventListener("input", () => { if (shown) showCode(); });
one("#stop").addEventListener("click", () => running?.abort());
one("#fresh").addEventListener("click", () => {
  running?.abort();
  conversation = [];
  asked = "";
  one("#talk").replaceChildren();
  one("#fresh").hidden = true;
  one("#question").focus();
});
for (const button of all("[data-copy]")) {
  button.addEventListener("click", async () => {
    const text = one(`#${button.dataset.copy}`);
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch {
      // Only secure origins have a clipboard: select it, for the person to copy.
      getSelection().selectAllChildren(text);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

connect();
