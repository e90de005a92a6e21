// The model's own thread, so that the page stays alive while it computes. Takes messages, gives messages:
//
//   { open: url, threads }          -> { progress: { done, total } } ..., { opened: { ... } }
//   { ask: messages, maxTokens }    -> { text } ... (the whole answer so far), { answered: { ... } }
//   { stop: true }                  ends the answer after the next token
//   and { failed: sentence } whenever something did not work

import { Engine } from "./engine.js";
import { ModelFolder } from "./folder.js";
import { Conversation } from "./generate.js";
import { ChatTokenizer } from "./tokenizer.js";

let engine, tokenizer, conversation;
let stopping = false;

/** Let waiting messages in (a stop); awaiting the session alone never does. */
function breathe() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}

const seconds = (since) => (performance.now() - since) / 1000;

async function open(url, threads) {
  const start = performance.now();
  const folder = new ModelFolder(url);
  const onBytes = (done, total) => postMessage({ progress: { done, total } });
  [tokenizer, engine] = await Promise.all([
    ChatTokenizer.open(folder),
    Engine.open(folder, { threads, onBytes }),
  ]);
  conversation = new Conversation(engine, tokenizer.stopIds);
  const { bytes, context, threads: used } = engine;
  postMessage({ opened: { bytes, context, threads: used, loadSeconds: seconds(start) } });
}

async function ask(messages, maxTokens) {
  stopping = false;
  const start = performance.now();
  const prompt = tokenizer.encodeChat(messages);
  const answer = conversation.answer(prompt, { maxTokens, stopped: () => stopping });
  const ids = [];
  let first = 0;
  let last = 0;
  let step = await answer.next();
  for (; !step.done; step = await answer.next()) {
    last = seconds(start);
    first ||= last;
    ids.push(step.value);
    postMessage({ text: tokenizer.decodeSoFar(ids) });
    await breathe();
  }
  postMessage({
    answered: {
      text: tokenizer.decode(ids),
      ids,
      ...step.value,
      promptTokens: prompt.length,
      firstTokenSeconds: first || seconds(start),
      decodeTokensPerSecond: ids.length > 1 ? (ids.length - 1) / (last - first) : null,
    },
  });
}

// One thing after the other; only a stop overtakes.
let busy = Promise.resolve();
onmessage = ({ data }) => {
  if (data.stop) {
    stopping = true;
    return;
  }
  const task = data.open ? () => open(data.open, data.threads) : () => ask(data.ask, data.maxTokens);
  busy = busy.then(task).catch((error) => postMessage({ failed: String(error?.message ?? error) }));
};
