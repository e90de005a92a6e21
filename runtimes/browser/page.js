// What is seen: draws the model's facts and the conversation, passes files and questions to the worker. Computes
// nothing.
//
// The model is what served.json beside this page names, what ?model=PATH says, or what the user drops. `data-state`
// on the body is 'empty', 'loading', 'ready', 'answering' or 'failed'. ?threads=N and ?context=N choose otherwise
// than the page would. `foxEdge` is for programs that measure the page.

import { droppedFiles, listedFiles } from "./drop.js";
import { inWords, lacking, usableThreads } from "./features.js";

const EXAMPLE = "Ivy buys 4 crates of 12 apples. She gives 9 apples to Julia. How many does she have left?";
const DROP_HINT = "No model yet. What you open runs in this page, and nothing of it leaves this machine.";
const MAX_TOKENS = 512;
const MAX_THREADS = 8;

const $ = (id) => document.getElementById(id);
const query = new URLSearchParams(location.search);

let worker = null;
let messages = [];
let answer = null; // the list item that is being written
let since = 0; // when the model was asked for
let conversed = null; // who waits for a conversation by the clock: [resolve, reject]
const opened = Promise.withResolvers?.() ?? withResolvers();

const megabytes = (bytes) =>
  bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB` : `${(bytes / 1e6).toLocaleString("en", { maximumFractionDigits: 1 })} MB`;
const time = (s) => (s < 1 ? `${Math.round(s * 1000)} ms` : `${s.toFixed(1)} s`);
const rate = (n) => `${n >= 100 ? Math.round(n) : n.toPrecision(2)} tokens/s`;

function withResolvers() {
  const made = {};
  made.promise = new Promise((resolve, reject) => Object.assign(made, { resolve, reject }));
  return made;
}

function setState(state) {
  document.body.dataset.state = state;
  $("send").textContent = state === "answering" ? "Stop" : "Ask";
  $("send").disabled = state !== "answering" && state !== "ready";
  $("new").disabled = state !== "ready" || !messages.length;
  // A button that had the focus may be gone now. Where there is no keyboard, the focus would bring one up.
  const lost = document.activeElement === document.body;
  if (lost && state === "ready" && matchMedia("(hover: hover)").matches) $("question").focus();
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

/** What stands in the middle while there is no conversation. */
function hint(text, { failed = false, example = false, progress = false } = {}) {
  $("empty").hidden = false;
  $("hint").textContent = text;
  $("hint").className = failed ? "failed" : "";
  $("example").hidden = !example;
  $("progress").hidden = !progress;
  $("announce").textContent = text;
}

function ask(text) {
  messages.push({ role: "user", content: text });
  addTurn("question", text);
  answer = addTurn("answer growing", "");
  worker.postMessage({ ask: messages, maxTokens: MAX_TOKENS });
  $("announce").textContent = "Answering";
  setState("answering");
}

function startOver() {
  messages = [];
  $("turns").replaceChildren();
  $("empty").hidden = false;
}

/** Open a model in a worker of its own; the one before goes, and its memory with it. */
function open(what, name, from) {
  since = from;
  worker?.terminate();
  startOver();
  forget();
  fact("model", name);
  $("progress").value = 0;
  hint("Opening the model. Nothing of it leaves this machine.", { progress: true });
  setState("loading");
  worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  worker.onmessage = ({ data }) => {
    const [kind] = Object.keys(data);
    on[kind](data[kind]);
  };
  worker.onerror = (event) => on.failed(event.message || "The model's worker did not start.");
  const threads = Number(query.get("threads")) || usableThreads(self, MAX_THREADS);
  worker.postMessage({ open: { ...what, threads, context: Number(query.get("context")) || undefined } });
}

/** No figures: there is no model, or not yet. */
function forget() {
  for (const id of ["model", "size", "load", "memory", "speed", "context", "device"]) fact(id, "–");
}

function fact(id, text, title = "") {
  $(id).textContent = text;
  $(id).title = title || text;
}

const on = {
  progress({ done, total }) {
    if (total) $("progress").value = done / total;
    fact("size", megabytes(done));
  },

  opened({ title, bytes, context, threads, vocabSize, library, memoryBytes }) {
    const loadSeconds = (performance.now() - since) / 1000;
    fact("model", title);
    fact("size", megabytes(bytes));
    fact("load", time(loadSeconds), "from asking for the model until it can be asked");
    fact("context", `${context.toLocaleString("en")} tokens`);
    fact("device", `${library}, ${threads} thread${threads === 1 ? "" : "s"}`, "compiled to WebAssembly");
    on.memory(memoryBytes);
    const why = self.crossOriginIsolated ? "" : ", on one thread, since its server does not isolate it";
    hint(`The model runs in this page${why}. Nothing leaves this machine. Try:`, { example: true });
    $("example").textContent = EXAMPLE;
    $("opener").open = false;
    setState("ready");
    opened.resolve({ bytes, context, threads, vocabSize, library, loadSeconds });
  },

  memory(bytes) {
    if (bytes) fact("memory", megabytes(bytes), "WebAssembly's memory in this page: weights, cache and buffers");
    else fact("memory", "not told");
  },

  text(text) {
    const atEnd = $("main").scrollHeight - $("main").scrollTop - $("main").clientHeight < 80;
    answer.querySelector(".text").textContent = text;
    if (atEnd) $("main").scrollTop = $("main").scrollHeight;
  },

  answered({ text, ids, written, reason, newTokens, promptTokens, memoryBytes, ...speed }) {
    const { firstTokenSeconds, decodeTokensPerSecond } = speed;
    on.text(text);
    messages.push({ role: "assistant", content: text });
    const reused = promptTokens - newTokens;
    const figures = [
      `${promptTokens} tokens read${reused ? ` (${reused} of them kept from before)` : ""}`,
      `first token after ${time(firstTokenSeconds)}`,
      `${written} tokens written${decodeTokensPerSecond ? ` at ${rate(decodeTokensPerSecond)}` : ""}`,
    ];
    if (reason === "length") figures.push(`cut after ${MAX_TOKENS}`);
    if (reason === "context") figures.push("the context is full");
    if (reason === "stopped") figures.push("stopped");
    if (decodeTokensPerSecond) fact("speed", rate(decodeTokensPerSecond));
    on.memory(memoryBytes);
    if (ids) answer.dataset.ids = ids.join(" ");
    finish(part("div", "figures", figures.join(" · ")), reason === "stopped" ? "Stopped" : text);
  },

  conversed(timed) {
    conversed[0](timed);
  },

  failed(sentence) {
    conversed?.[1](new Error(sentence));
    if (document.body.dataset.state === "answering") {
      // An answer that failed is no part of the conversation, nor is its question.
      messages.pop();
      finish(part("div", "failed", sentence), sentence);
      return;
    }
    refuse(sentence);
  },
};

/** Under the answer: what it cost, or what went wrong. */
function finish(note, announced) {
  answer.classList.remove("growing");
  answer.append(note);
  answer.scrollIntoView({ block: "end" });
  $("announce").textContent = announced;
  setState("ready");
}

/** There is no model, and a sentence that says why. */
function refuse(sentence) {
  forget();
  hint(sentence, { failed: true });
  $("opener").open = true;
  setState("failed");
  opened.reject(new Error(sentence));
}

function openFiles(files) {
  if (!files.length) return refuse("What was dropped has no files in it.");
  const paths = files.map(([path]) => path);
  return open({ files }, paths[0].split("/")[0], performance.now());
}

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
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && document.body.dataset.state === "answering") worker.postMessage({ stop: true });
});
$("new").addEventListener("click", () => {
  startOver();
  setState("ready");
  $("question").focus();
});
$("example").addEventListener("click", () => ask(EXAMPLE));
for (const [button, input] of [
  ["choose-file", "file"],
  ["choose-folder", "folder"],
]) {
  $(button).addEventListener("click", () => $(input).click());
  $(input).addEventListener("change", () => {
    openFiles(listedFiles($(input).files));
    $(input).value = "";
  });
}
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("dropping"));
addEventListener("drop", async (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  try {
    openFiles(await droppedFiles(event.dataTransfer));
  } catch (error) {
    refuse(inWords(error));
  }
});

/** The folder that is served beside the page, as a path; null where there is none. */
async function servedModel() {
  if (query.has("model")) return query.get("model");
  const response = await fetch("served.json").catch(() => null);
  return response?.ok ? (await response.json()).model : null;
}

async function start() {
  const sentence = lacking(self);
  if (sentence) return refuse(sentence);
  const model = await servedModel();
  if (model !== null) return open({ url: new URL(model, location.href).href }, "…", 0);
  hint(DROP_HINT);
  $("opener").open = true;
  return setState("empty");
}

opened.promise.catch(() => {}); // said on the page; who measures hears it too
globalThis.foxEdge = {
  opened: opened.promise,
  /** One conversation by the clock, as the model's `converse`. */
  converse(turns, decodeTokens) {
    worker.postMessage({ converse: turns, decodeTokens });
    return new Promise((...both) => (conversed = both));
  },
};
start().catch((error) => refuse(inWords(error)));
