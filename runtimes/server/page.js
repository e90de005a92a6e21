"use strict";
// The chat page's behaviour: asks the server that it came from, by OpenAI's interface, and draws the answer as it
// grows. Text is only ever set as text; nothing that a model writes becomes markup, but blocks of code their own box.

const $ = (id) => document.getElementById(id);
const EXAMPLES = [
  "Tom has 12 apples and buys 7 more. How many apples does Tom have?",
  "A fox has 3 dens with 4 cubs each. How many cubs?",
];
const FENCE = /```[^\n`]*\n([\s\S]*?)(?:\n?```|$)/;

let model = null; // what /v1/models said
let turns = []; // [{role, content}], complete turns only
let asking = null; // the AbortController of the answer that grows
let chats = 0; // how often a new chat was begun

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

function setState(state) {
  document.body.dataset.state = state;
  $("send").hidden = state === "answering";
  $("stop").hidden = state !== "answering";
  $("send").disabled = state !== "ready";
  // A button that had the focus may be gone now. Where there is no keyboard, the focus would bring one up.
  if (document.activeElement === document.body && matchMedia("(hover: hover)").matches) $("question").focus();
}

const megabytes = (bytes) => (bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB` : `${(bytes / 1e6).toFixed(1)} MB`);

/** Ask about the model; draws its card. With a locked server, asks for the key first. */
async function meet() {
  let response;
  try {
    response = await fetch("v1/models", { headers: headers() });
  } catch {
    return say("The server does not answer.");
  }
  if (response.status === 401) {
    $("locked").hidden = false;
    document.querySelector("details").open = true;
    $("key").focus();
    setState("locked");
    return say($("key").value ? "That is not the server's API key." : "This server wants an API key (Settings).");
  }
  if (!response.ok) return say(await complaint(response));
  model = (await response.json()).data[0];
  drawCard();
  if (turns.length === 0) greet();
  if (document.body.dataset.state !== "answering") setState("ready");
}

function drawCard() {
  const facts = model.fox_edge;
  $("title").textContent = model.id;
  document.title = `${model.id} · fox-edge`;
  $("quant").textContent = `${facts.quant} ${facts.format === "checkpoint" ? "" : facts.format.toUpperCase()}`;
  $("size").textContent = facts.bytes ? megabytes(facts.bytes) : "not known";
  $("fidelity").textContent =
    facts.mean_kl_nats == null ? "not verified" : `KL ${facts.mean_kl_nats.toPrecision(2)} nats`;
  if (facts.top1_agreement_percent != null) {
    $("fidelity").title = `The likeliest token is the original's in ${facts.top1_agreement_percent.toFixed(1)} % of places`;
  }
  $("context").textContent = `${facts.context.toLocaleString("en")} tokens`;
  $("memory").textContent = facts.rss_bytes ? megabytes(facts.rss_bytes) : "not known";
}

function greet() {
  $("hint").textContent = `Runs in ${model.fox_edge.runtime} on the machine that serves this page. Ask something, or try:`;
  $("examples").hidden = false;
  $("examples").replaceChildren(
    ...EXAMPLES.map((text) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = text;
      button.addEventListener("click", () => ask(text));
      return button;
    }),
  );
}

function say(text) {
  $("empty").hidden = false;
  $("examples").hidden = true;
  $("hint").textContent = text;
  $("announce").textContent = text;
}

async function complaint(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

/** Text with blocks between ``` fences in boxes of their own. */
function draw(place, text) {
  const parts = [];
  for (let found; (found = FENCE.exec(text)); text = text.slice(found.index + found[0].length).replace(/^\n/, "")) {
    const block = document.createElement("pre");
    block.textContent = found[1];
    block.tabIndex = 0; // it may scroll sideways
    parts.push(text.slice(0, found.index).replace(/\n$/, ""), block);
  }
  place.replaceChildren(...parts, text);
}

function addTurn(role, text) {
  const item = document.createElement("li");
  item.className = role === "user" ? "question" : "answer growing";
  const body = document.createElement("div");
  body.className = "text";
  if (role === "user") body.textContent = text;
  item.append(body);
  $("turns").append(item);
  $("empty").hidden = true;
  item.scrollIntoView({ block: "end" });
  return item;
}

/** Under an answer: what it cost, or what went wrong; and a button that copies it. */
function finish(item, text, note, failed) {
  item.classList.remove("growing");
  const under = document.createElement("div");
  under.className = "under";
  const line = document.createElement("span");
  line.className = failed ? "failed" : "figures";
  line.textContent = note;
  under.append(line);
  if (text) {
    const copy = document.createElement("button");
    copy.type = "button";
    copy.className = "copy";
    copy.textContent = "Copy";
    copy.setAttribute("aria-label", "Copy this answer");
    copy.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(text);
      } catch {
        // Without a secure origin there is no clipboard; what is selected can be copied by hand.
        getSelection().selectAllChildren(item.querySelector(".text"));
        return;
      }
      copy.textContent = "Copied";
      setTimeout(() => (copy.textContent = "Copy"), 1500);
    });
    under.append(copy);
  }
  item.append(under);
  item.scrollIntoView({ block: "end" });
}

function request(question) {
  const system = $("system").value.trim();
  const messages = [
    ...(system ? [{ role: "system", content: system }] : []),
    ...turns,
    { role: "user", content: question },
  ];
  const body = { model: model.id, messages, stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "max_tokens"]) {
    if ($(name).value !== "") body[name] = Number($(name).value);
  }
  return body;
}

/** The JSON objects of a stream of server-sent events. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (held + value).split("\n\n");
    held = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function ask(question) {
  if (document.body.dataset.state !== "ready") return;
  asking = new AbortController();
  setState("answering");
  $("announce").textContent = "Answering";
  addTurn("user", question);
  const item = addTurn("assistant");
  const place = item.querySelector(".text");
  const began = performance.now();
  const chat = chats;
  let text = "";
  let first = 0;
  let pieces = 0;
  let usage = null;
  let reason = null;
  let failure = null;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify(request(question)),
      signal: asking.signal,
    });
    if (!response.ok) throw new Error(await complaint(response));
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage ?? usage;
      const choice = chunk.choices[0];
      reason = choice?.finish_reason ?? reason;
      const piece = choice?.delta?.content;
      if (!piece) continue;
      first ||= performance.now();
      text += piece;
      pieces += 1;
      const atEnd = $("main").scrollHeight - $("main").scrollTop - $("main").clientHeight < 80;
      draw(place, text);
      if (atEnd) $("main").scrollTop = $("main").scrollHeight;
      if (pieces > 1) showSpeed((pieces - 1) / ((performance.now() - first) / 1000));
    }
  } catch (error) {
    if (error.name !== "AbortError") failure = error.message;
  }
  const stopped = asking.signal.aborted;
  asking = null;
  if (chat !== chats) return setState("ready"); // all of it is gone from the page
  if (text || !failure) {
    turns.push({ role: "user", content: question }, { role: "assistant", content: text });
  } else {
    $("question").value ||= question; // nothing was answered: it can be asked again
  }
  finish(item, text, failure ?? note(usage, first - began, first && performance.now() - first, stopped, reason), failure);
  $("announce").textContent = failure ?? (stopped ? "Stopped" : text);
  setState("ready");
  meet(); // memory may have changed, and a key may be wrong by now
}

const showSpeed = (rate) => ($("speed").textContent = `${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`);

/** What an answer cost, in words. */
function note(usage, firstMs, restMs, stopped, reason) {
  if (stopped) return "stopped";
  if (!usage) return "";
  const written = usage.completion_tokens;
  const rate = restMs > 0 && written > 1 ? (written - 1) / (restMs / 1000) : 0;
  if (rate) showSpeed(rate);
  const kept = usage.prompt_tokens_details.cached_tokens;
  return [
    `${usage.prompt_tokens} tokens read${kept ? ` (${kept} kept from before)` : ""}`,
    `first after ${Math.round(firstMs)} ms`,
    `${written} written${rate ? ` at ${rate.toFixed(0)} tokens/s` : ""}`,
    ...(reason === "length" ? ["cut: no more tokens allowed"] : []),
  ].join(" · ");
}

function startAnew() {
  asking?.abort();
  chats += 1;
  turns = [];
  $("turns").replaceChildren();
  $("empty").hidden = false;
  if (model) greet();
  $("question").focus();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || document.body.dataset.state !== "ready") return;
  $("question").value = "";
  ask(question);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("form").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && asking) stop();
});
function stop() {
  asking?.abort();
  $("question").focus();
}
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", startAnew);
$("key").addEventListener("change", meet);
meet();
