// The model's own thread, so that the page stays alive while it computes. Takes messages, gives messages:
//
//   { open: { url | files, threads, context } }  -> { progress: { done, total } } ..., { opened: { ... } }
//   { ask: messages, maxTokens }    -> { text } ... (the whole answer so far), { answered: { ... } }
//   { converse: turns, decodeTokens } -> { conversed: [...] }
//   { stop: true }                  ends the answer after the next token
//   and { failed: sentence } whenever something did not work
//
// Knows which kind of model lies in a folder; what runs it is llama.js or onnx.js.

import { inWords } from "./features.js";
import { DroppedFolder, ServedFolder } from "./folder.js";
import { watchMemory } from "./memory.js";

// Before any library is imported: it may make its memory at once.
const memory = watchMemory();
const ONNX_FILES = ["model.onnx", "model.onnx_data"];

let model = null;
let stop = new AbortController();

async function open({ url, files, threads, context }) {
  const folder = files ? new DroppedFolder(files) : await ServedFolder.open(url);
  const onBytes = (done, total) => postMessage({ progress: { done, total } });
  model = await openFolder(folder, { threads, context, onBytes });
  const title = folder.manifest && `${folder.name}, ${folder.manifest.format.toUpperCase()} ${folder.manifest.quant}`;
  postMessage({ opened: { title: title ?? model.about.name, ...model.about, memoryBytes: await model.memory() } });
}

/** Whichever kind of model it is; throws an Error that says what was looked for. */
async function openFolder(folder, options) {
  const names = folder.names();
  // What a file by itself is, its first bytes tell.
  const files = folder.single ? names : names.filter((name) => name.toLowerCase().endsWith(".gguf"));
  if (files.length > 1) throw new Error(`${folder.name} has ${files.length} GGUF files: drop the one that is meant`);
  if (files.length) {
    const { LlamaModel } = await import("./llama.js");
    return LlamaModel.open(await folder.blob(files[0], options.onBytes), files[0], options);
  }
  const missing = ONNX_FILES.find((name) => !names.includes(name));
  if (missing) throw new Error(`${folder.name} is not a model: it has neither a .gguf file nor ${missing}`);
  const { OnnxModel } = await import("./onnx.js");
  return OnnxModel.open(folder, { ...options, memory });
}

async function ask(messages, maxTokens) {
  stop = new AbortController();
  const onText = (text) => postMessage({ text });
  const answered = await model.answer(messages, { maxTokens, signal: stop.signal, onText });
  postMessage({ answered: { ...answered, memoryBytes: await model.memory() } });
}

async function converse(turns, decodeTokens) {
  postMessage({ conversed: await model.converse(turns, decodeTokens) });
}

// One thing after the other; only a stop overtakes.
let busy = Promise.resolve();
onmessage = ({ data }) => {
  if (data.stop) {
    stop.abort();
    return;
  }
  const task = () => {
    if (data.open) return open(data.open);
    return data.ask ? ask(data.ask, data.maxTokens) : converse(data.converse, data.decodeTokens);
  };
  busy = busy.then(task).catch((error) => postMessage({ failed: inWords(error) }));
};
