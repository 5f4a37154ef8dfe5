"use strict";
// Threads of one prompt: fork, generate together, join. A session of the server; every answer carries its account.

const SHOWN = [
  "Tool: set_light(room: string, color: string, level: integer)\nSet kitchen, cellar, attic to blue at level 40.",
  ["kitchen", "cellar", "attic"].map((room) => `{"name": "set_light", "arguments": {"room": "${room}`).join("\n"),
];
const thread = { running: null };

function view(name) {
  for (const one of ["methods", "threads"]) byId(`tab-${one}`).setAttribute("aria-pressed", String(one === name));
  byId("weave").hidden = name !== "threads";
  byId("ask").hidden = byId("lanes").hidden = name === "threads";
}

async function request(path, body, signal, method = "POST") {
  const answer = await fetch(path, { method, headers: headers(), signal, ...(body ? { body: JSON.stringify(body) } : {}) });
  const said = await answer.json();
  if (!answer.ok) throw new Error(said.error.message);
  return said;
}

function tell(usage) {
  table(byId("account"), {
    "evaluated tokens": usage.evaluated, generated: usage.generated, "critical path": usage.critical_path,
    forwards: usage.forwards,
  });
}

function strand(start, number) {
  const box = Object.assign(document.createElement("section"), { className: "strand" });
  const head = Object.assign(document.createElement("h3"), { textContent: `Thread ${number} ` });
  const done = Object.assign(document.createElement("span"), { className: "done" });
  head.append(done);
  const out = Object.assign(document.createElement("pre"), { className: "out", tabIndex: 0 });
  out.setAttribute("aria-label", `Text of thread ${number}`);
  out.append(Object.assign(document.createElement("span"), { className: "forced", textContent: start }));
  box.append(head, out);
  byId("strands").append(box);
  return { out, done, tokens: 0 };
}

async function generate(path, body, lanes, signal) {
  let usage = null;
  for await (const event of events(`${path}/gen`, { model, stream: true, include_steps: true, ...body }, signal)) {
    if (event.object === "session.end") { usage = event.usage; continue; }
    const lane = lanes[event.thread];
    lane.out.querySelectorAll(".new").forEach((s) => s.classList.remove("new"));
    for (const { forward, texts } of group(event.stretto.tokens)) put(lane.out, forward, texts);
    lane.tokens += event.token_ids.length;
    lane.out.scrollTop = lane.out.scrollHeight;
    lane.done.textContent = `${lane.tokens} tokens${event.finish_reason ? `, ended by ${event.finish_reason}` : ""}`;
  }
  document.querySelectorAll("#weave .new").forEach((s) => s.classList.remove("new"));
  if (usage) tell(usage);
}

async function together(signal) {
  const starts = byId("starts").value.split("\n").filter((line) => line);
  const messages = [{ role: "user", content: byId("threadprompt").value }];
  const session = await request("v1/sessions", { model, messages }, signal);
  const path = `v1/sessions/${session.id}`;
  try {
    const forked = await request(`${path}/fork`, { prefixes: starts }, signal);
    tell(forked.usage);
    const lanes = {};
    forked.children.forEach((id, i) => { lanes[id] = strand(starts[i], i + 1); });
    const until = byId("until").value;
    await generate(path, {
      threads: forked.children, max_tokens: Number(byId("each").value), method: byId("decoder").value,
      ...(until ? { stop: until, include_stop_str_in_output: true } : {}),
    }, lanes, signal);
    const before = session.threads[0].text;
    const body = { children: forked.children, mode: byId("mode").value, separator: "\n" };
    const joined = await request(`${path}/join`, body, signal);
    byId("knot").hidden = false;
    byId("knotname").textContent = `Joined by ${body.mode}`;
    const out = byId("joined");
    out.append(body.mode === "gather" ? joined.texts.join("\n") : joined.threads[0].text.slice(before.length));
    tell(joined.usage);
    const after = Number(byId("after").value);
    if (after) await generate(path, { threads: [0], max_tokens: after }, { 0: { out, done: byId("knotname"), tokens: 0 } }, signal);
  } finally {
    await request(path, null, undefined, "DELETE").catch(() => {});
  }
}

async function start(event) {
  event.preventDefault();
  if (thread.running || (!model && !(await load()))) return;
  const say = (text) => { byId("weavestatus").textContent = text; };
  thread.running = new AbortController();
  byId("weavego").disabled = true;
  byId("weavestop").disabled = false;
  byId("strands").replaceChildren();
  byId("joined").replaceChildren();
  byId("knot").hidden = true;
  say("running");
  try {
    await together(thread.running.signal);
    say("done");
  } catch (error) {
    say(error.name === "AbortError" ? "stopped" : error.message);
  }
  thread.running = null;
  byId("weavego").disabled = false;
  byId("weavestop").disabled = true;
}

[byId("threadprompt").value, byId("starts").value] = SHOWN;
byId("tab-methods").onclick = () => view("methods");
byId("tab-threads").onclick = () => view("threads");
byId("weave").onsubmit = start;
byId("weavestop").onclick = () => thread.running?.abort();
