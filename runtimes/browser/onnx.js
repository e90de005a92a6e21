// An exported ONNX folder in onnxruntime-web: chats, and conversations by the clock. Puts together the tokenizer,
// the engine and the loop, which know nothing of each other.

import { Engine } from "./engine.js";
import { tooLong } from "./features.js";
import { Conversation } from "./generate.js";
import { ChatTokenizer } from "./tokenizer.js";

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

const now = () => performance.now() / 1000;

export class OnnxModel {
  /** Open a folder; throws an Error, one sentence, for what cannot be opened. `memory()` gives bytes. */
  static async open(folder, { threads, context, onBytes, memory }) {
    const [tokenizer, engine] = await Promise.all([
      ChatTokenizer.open(folder),
      Engine.open(folder, { threads, context, onBytes }),
    ]);
    return new OnnxModel(tokenizer, engine, folder.name, memory);
  }

  constructor(tokenizer, engine, name, memory) {
    this.tokenizer = tokenizer;
    this.engine = engine;
    this.conversation = new Conversation(engine, tokenizer.stopIds);
    const { bytes, context, threads, vocabSize } = engine;
    this.about = { name, bytes, context, threads, vocabSize, library: "onnxruntime" };
    this.memory = memory;
  }

  /** As LlamaModel.answer. */
  async answer(messages, { maxTokens, signal, onText }) {
    const start = now();
    const prompt = this.tokenizer.encodeChat(messages);
    if (prompt.length > this.engine.context) throw new Error(tooLong(prompt.length, this.engine.context));
    const answer = this.conversation.answer(prompt, { maxTokens, stopped: () => signal.aborted });
    const ids = [];
    let [first, last] = [0, 0];
    let step = await answer.next();
    for (; !step.done; step = await answer.next()) {
      last = now();
      first ||= last;
      ids.push(step.value);
      onText(this.tokenizer.decodeSoFar(ids));
      await breathe();
    }
    return {
      text: this.tokenizer.decode(ids),
      ids,
      written: ids.length,
      ...step.value,
      promptTokens: prompt.length,
      firstTokenSeconds: (first || now()) - start,
      decodeTokensPerSecond: ids.length > 1 ? (ids.length - 1) / (last - first) : null,
    };
  }

  /** As LlamaModel.converse, of turns [{ ids }, ...]: they are run as they are. */
  async converse(turns, decodeTokens) {
    const timed = [];
    const endless = new Conversation(this.engine, new Set());
    this.engine.reset();
    let prompt = [];
    for (const { ids } of turns) {
      prompt = [...prompt, ...ids];
      const stamps = [];
      const asked = now();
      const answer = endless.answer(prompt, { maxTokens: decodeTokens + 1 });
      let step = await answer.next();
      for (; !step.done; step = await answer.next()) {
        stamps.push(now());
        prompt.push(step.value);
        await breathe();
      }
      timed.push({ promptTokens: step.value.newTokens, asked, stamps });
    }
    // What the chat believes to be in the cache is not there any more.
    this.engine.reset();
    this.conversation = new Conversation(this.engine, this.tokenizer.stopIds);
    return timed;
  }
}
