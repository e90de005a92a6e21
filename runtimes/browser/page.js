// What is seen: draws the model's facts and the conversation, passes questions to the worker. Computes nothing.
//
// The model folder is ./model/ beside this page, or what ?model=PATH says. `data-state` on the body is
// 'loading', 'ready', 'answering' or 'failed'.

const EXAMPLE = "Ivy buys 4 crates of 12 apples. She gives 9 apples to Julia. How many does she have left?";
const MAX_TOKENS = 512;
const MAX_THREADS = 8;

const $ = (id) => document.getElementById(id);
const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
const folder = new URL(new URLSearchParams(location.search).get("model") ?? "model/", location.href);

let messages = [];
let answer = null; // the list item that is being written

const megabytes = (bytes) => `${(bytes / 1e6).toLocaleString("en", { maximumFractionDigits: 1 })} MB`;
const time = (s) => (s < 1 ? `${Math.round(s * 1000)} ms` : `${s.toFixed(1)} s`);
const rate = (n) => `${n >= 100 ? Math.round(n) : n.toPrecision(2)} tokens/s`;

function setState(state) {
  document.body.dataset.state = state;
  $("send").textContent = state === "answering" ? "Stop" : "Ask";
  $("send").disabled = state === "loading" || state === "failed";
  $("new").disabled = state !== "ready" || !messages.length;
}

/** A new turn at the end of the conversation; returns its list item. */
function addTurn(kind, text) {
  $("empty").hidden = true;
  const item = document.createElement("li");
  item.className = kind;
  item.append(part("div", "text", text));
  $("turns").append(item);
  item.scrollIntoView({ block: "end" });
  return item;
}

function part(tag, kind, text) {
  const element = document.createElement(tag);
  element.className = kind;
  element.textContent = text;
  return element;
}

function ask(text) {
  messages.push({ role: "user", content: text });
  addTurn("question", text);
  answer = addTurn("answer", "");
  worker.postMessage({ ask: messages, maxTokens: MAX_TOKENS });
  setState("answering");
}

function startOver() {
  messages = [];
  $("turns").replaceChildren();
  $("empty").hidden = false;
  setState("ready");
  $("question").focus();
}

const on = {
  progress({ done, total }) {
    if (total) $("progress").value = done / total;
    $("size").textContent = megabytes(done);
  },

  opened({ bytes, context, threads, loadSeconds }) {
    $("size").textContent = megabytes(bytes);
    $("load").textContent = time(loadSeconds);
    $("context").textContent = `${context.toLocaleString("en")} tokens`;
    $("device").textContent = `WebAssembly, ${threads} thread${threads === 1 ? "" : "s"}`;
    $("hint").textContent = "The model runs in this page. Nothing leaves this machine. Try:";
    $("progress").hidden = true;
    $("example").textContent = EXAMPLE;
    $("example").hidden = false;
    setState("ready");
    $("question").focus();
  },

  text(text) {
    answer.querySelector(".text").textContent = text;
    answer.scrollIntoView({ block: "end" });
  },

  answered({ text, ids, reason, newTokens, promptTokens, firstTokenSeconds, decodeTokensPerSecond }) {
    on.text(text);
    messages.push({ role: "assistant", content: text });
    const reused = promptTokens - newTokens;
    const figures = [
      `${promptTokens} tokens read${reused ? ` (${reused} of them kept from before)` : ""}`,
      `first token after ${time(firstTokenSeconds)}`,
      `${ids.length} tokens written${decodeTokensPerSecond ? ` at ${rate(decodeTokensPerSecond)}` : ""}`,
    ];
    if (reason === "length") figures.push(`cut after ${MAX_TOKENS}`);
    if (reason === "context") figures.push("the context is full");
    if (reason === "stopped") figures.push("stopped");
    answer.dataset.ids = ids.join(" ");
    answer.append(part("div", "figures", figures.join(" · ")));
    answer.scrollIntoView({ block: "end" });
    setState("ready");
  },

  failed(sentence) {
    const opened = document.body.dataset.state !== "loading";
    // An answer that failed is no part of the conversation, nor is its question.
    if (opened) messages.pop();
    const item = opened ? answer : addTurn("answer", "");
    item.append(part("div", "failed", sentence));
    setState(opened ? "ready" : "failed");
  },
};

worker.onmessage = ({ data }) => {
  const [kind] = Object.keys(data);
  on[kind](data[kind]);
};
worker.onerror = (event) => on.failed(event.message || "the model's worker did not start");

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (document.body.dataset.state === "answering") {
    worker.postMessage({ stop: true });
    return;
  }
  const text = $("question").value.trim();
  if (!text || document.body.dataset.state !== "ready") return;
  $("question").value = "";
  ask(text);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (document.body.dataset.state === "ready") $("form").requestSubmit();
});
$("new").addEventListener("click", startOver);
$("example").addEventListener("click", () => ask(EXAMPLE));

/** The folder's own name for itself, where it is one of ours. */
async function showName() {
  const response = await fetch(new URL("manifest.json", folder));
  if (!response.ok) return;
  const { checkpoint, quant, format } = await response.json();
  $("model").textContent = `${checkpoint}, ${format.toUpperCase()} ${quant}`;
}

showName().catch(() => {});
const threads = Math.min(navigator.hardwareConcurrency || 1, MAX_THREADS);
worker.postMessage({ open: folder.href, threads });
