"use strict";
// Two streams of one prompt, side by side. A chunk of the stream carries its tokens with the forward that decided each.

const COLOURS = 6;
const EXAMPLES = [
  ["a function call", "Tool: set_alarm(hour: integer, minute: integer, label: string)\nCall it with hour 7, minute 30, label garden."],
  ["several calls", "Tool: set_light(room: string, color: string, level: integer)\nSet kitchen, cellar to blue at level 40."],
  ["a word problem", "Mia has 12 apples. She buys 7 more and gives away 4. How many apples does she have?"],
  ["a list", "Reverse: 4 8 15 16 23 42"],
];
const byId = (id) => document.getElementById(id);
const lanes = [...document.querySelectorAll("#lanes .lane")];
let methods = [], model = "", running = null;

function headers() {
  const key = byId("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function load() {
  const answers = await Promise.all(["v1/methods", "v1/models"].map((url) => fetch(url, { headers: headers() })));
  if (answers[0].status === 401) {
    byId("keyfield").hidden = false;
    say("This server asks for an API key.");
    return false;
  }
  methods = (await answers[0].json()).methods;
  model = (await answers[1].json()).data[0].id;
  byId("model").textContent = model;
  byId("decoder").replaceChildren(...methods.map((m) => new Option(m.name, m.name)));
  lanes.forEach((lane, i) => {
    const select = lane.querySelector("select");
    select.replaceChildren(...methods.map((m) => new Option(m.name, m.name)));
    const second = methods.find((m) => m.name === "suffix") || methods[methods.length - 1];
    select.value = i ? second.name : methods[0].name;
    select.onchange = () => describe(lane);
    describe(lane);
  });
  return true;
}

function describe(lane) {
  const found = methods.find((m) => m.name === lane.querySelector("select").value);
  lane.querySelector(".purpose").textContent = found ? found.purpose + (found.lossless ? " Same text as ar." : "") : "";
}

function counters(lane, values) { table(lane.querySelector(".counters"), values); }

function table(list, values) {
  list.replaceChildren(...Object.entries(values).map(([name, value]) => {
    const box = document.createElement("div");
    box.append(Object.assign(document.createElement("dt"), { textContent: name }),
      Object.assign(document.createElement("dd"), { textContent: value }));
    return box;
  }));
}

function say(text) { byId("status").textContent = text; }

async function* events(url, body, signal) {
  const answer = await fetch(url, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ") || part === "data: [DONE]") continue;
      const data = JSON.parse(part.slice(6));
      if (data.error) throw new Error(data.error.message);
      yield data;
    }
  }
}

function group(tokens) {
  // [[text, forward], ...] -> runs of one forward
  const runs = [];
  for (const [text, forward] of tokens) {
    const last = runs[runs.length - 1];
    if (last && last.forward === forward) { last.texts.push(text); } else { runs.push({ forward, texts: [text] }); }
  }
  return runs;
}

function put(out, forward, texts) {
  for (const text of texts) {
    out.append(Object.assign(document.createElement("span"), {
      textContent: text, className: `f${forward % COLOURS} new`, title: `forward ${forward + 1}`,
    }));
  }
}

async function run(lane, body, pace, signal) {
  const out = lane.querySelector(".out"), notes = lane.querySelector(".notes");
  out.replaceChildren();
  notes.replaceChildren();
  const seen = new Set();
  let tokens = 0, done = null;
  const start = performance.now();
  const show = (seconds) => counters(lane, {
    tokens, forwards: seen.size, "tokens/forward": seen.size ? (tokens / seen.size).toFixed(2) : "0",
    seconds: (seconds ?? (performance.now() - start) / 1000).toFixed(2),
  });
  show(0);
  try {
    for await (const event of events("v1/chat/completions", body, signal)) {
      for (const { forward, texts } of group(event.stretto?.tokens ?? [])) {
        if (pace && !seen.has(forward)) await new Promise((go) => setTimeout(go, pace));
        if (signal.aborted) break;
        out.querySelectorAll(".new").forEach((s) => s.classList.remove("new"));
        put(out, forward, texts);
        seen.add(forward);
        tokens += texts.length;
        out.scrollTop = out.scrollHeight;
        show();
      }
      if (event.stretto?.forwards !== undefined) done = event.stretto;
    }
    out.querySelectorAll(".new").forEach((s) => s.classList.remove("new"));
    if (done) {
      const cost = done;
      counters(lane, { tokens, forwards: cost.forwards, "tokens/forward": cost.tokens_per_forward.toFixed(2),
        accepted: cost.acceptance === null ? "–" : `${Math.round(100 * cost.acceptance)} %` });
      notes.replaceChildren(...cost.notes.map((n) => Object.assign(document.createElement("li"), { textContent: n })));
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      notes.append(Object.assign(document.createElement("li"), { className: "error", textContent: error.message }));
    }
  }
}

async function both(event) {
  event.preventDefault();
  if (running) return;
  if (!model && !(await load())) return;
  running = new AbortController();
  byId("go").disabled = true;
  byId("stop").disabled = false;
  say("running");
  const common = {
    model, messages: [{ role: "user", content: byId("prompt").value }], stream: true, include_steps: true,
    max_tokens: Number(byId("length").value), temperature: Number(byId("temperature").value), seed: 0,
  };
  const pace = Number(byId("pace").value);
  await Promise.all(lanes.map((lane) =>
    run(lane, { ...common, method: lane.querySelector("select").value }, pace, running.signal)));
  const texts = lanes.map((lane) => lane.querySelector(".out").textContent);
  say(running.signal.aborted ? "stopped" : texts[0] === texts[1] ? "done: both texts are the same" : "done: the texts differ");
  running = null;
  byId("go").disabled = false;
  byId("stop").disabled = true;
}

byId("example").replaceChildren(...EXAMPLES.map(([name], i) => new Option(name, i)));
byId("example").onchange = () => { byId("prompt").value = EXAMPLES[byId("example").value][1]; };
byId("example").value = "1";
byId("example").onchange();
byId("prompt").onkeydown = (e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) byId("ask").requestSubmit(); };
byId("key").onchange = load;
byId("ask").onsubmit = both;
byId("stop").onclick = () => running?.abort();
load().catch((error) => say(error.message));
