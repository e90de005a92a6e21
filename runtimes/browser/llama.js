// A GGUF file in llama.cpp's WebAssembly build (wllama): chats, and conversations by the clock. Knows wllama's
// interface, which is llama-server's; neither the page nor where the file came from.

import { tooLong } from "./features.js";
import { readHeader } from "./gguf.js";
import { watchWorker } from "./memory.js";
import { Wllama, WllamaAbortError } from "./vendor/wllama.mjs";

// A page's WebAssembly has 4 GiB of memory, and wllama asks for no more.
const MOST_BYTES = 2 ** 32;
const CONTEXT = 4096;
// Tokens of a prompt that run at once: bounds the memory of the activations.
const BATCH = 256;
const TOO_LONG = /request \((\d+) tokens\) exceeds the available context size \((\d+) tokens\)/;
const GREEDY = { temperature: 0, stream: true, timings_per_token: true };

const vendored = (name) => new URL(`./vendor/${name}`, import.meta.url).href;
const seconds = (from, to) => (to - from) / 1000;

export class LlamaModel {
  /** Open a Blob with a GGUF file; throws an Error, one sentence, for what cannot be opened. */
  static async open(blob, name, { threads = 1, context } = {}) {
    const header = await readHeader(blob, name);
    if (blob.size > MOST_BYTES) {
      throw new Error(`${name} has ${(blob.size / 1e9).toFixed(1)} GB, but WebAssembly in a page has 4.3 GB of memory`);
    }
    const complaints = [];
    const complain = (...said) => complaints.push(said.join(" "));
    const quiet = () => {};
    const wllama = new Wllama(
      { default: vendored("wllama.wasm") },
      { logger: { debug: quiet, log: quiet, warn: quiet, error: complain } },
    );
    // For browsers that cannot suspend WebAssembly or give it 64-bit addresses: Safari, older ones.
    wllama.setCompat({ worker: vendored("wllama-compat.js"), wasm: vendored("wllama-compat.wasm") });
    const asked = Math.min(context ?? CONTEXT, header.context || CONTEXT);
    const options = {
      n_ctx: asked,
      n_threads: threads,
      n_batch: BATCH,
      n_ubatch: BATCH,
      n_parallel: 1,
      n_gpu_layers: 0,
      warmup: false,
      cache_type_k: "f16",
      cache_type_v: "f16",
      jinja: true,
      reasoning_format: "none",
      skip_chat_parsing: true,
    };
    const [, memory] = await watchWorker(() => wllama.loadModel([blob], options));
    const loaded = wllama.getLoadedContextInfo();
    if (!loaded.success) throw new Error(`llama.cpp cannot open ${name}: ${reason(complaints)}`);
    return new LlamaModel(wllama, complaints, {
      name: header.name ?? name,
      bytes: blob.size,
      context: loaded.n_ctx,
      vocabSize: loaded.n_vocab,
      threads: wllama.getNumThreads(),
      memory,
    });
  }

  constructor(wllama, complaints, { memory, ...about }) {
    this.wllama = wllama;
    this.complaints = complaints;
    this.about = { ...about, library: "llama.cpp" };
    this.memory = memory;
  }

  /**
   * Answer a conversation, greedily; `onText` is told the whole answer so far. Returns { text, ids, written,
   * reason, promptTokens, newTokens, firstTokenSeconds, decodeTokensPerSecond }; llama.cpp does not tell ids.
   */
  async answer(messages, { maxTokens, signal, onText }) {
    const start = performance.now();
    let [text, first, last, reason, timings] = ["", 0, 0, "stopped", {}];
    const onData = (chunk) => {
      timings = chunk.timings ?? timings;
      const [{ delta, finish_reason }] = chunk.choices;
      reason = finish_reason ?? reason;
      if (!delta.content) return;
      last = performance.now();
      first ||= last;
      text += delta.content;
      onText(text);
    };
    const request = { ...GREEDY, messages, max_tokens: maxTokens, abortSignal: signal, onData };
    await this.#ask("createChatCompletion", request).catch((error) => {
      if (!(error instanceof WllamaAbortError)) throw error;
      reason = "stopped";
    });
    // The token that ends an answer is counted there, and is no part of it.
    const written = (timings.predicted_n ?? 0) - (reason === "stop" ? 1 : 0);
    if (reason === "length" && written < maxTokens) reason = "context";
    return {
      text,
      ids: null,
      written,
      reason,
      newTokens: timings.prompt_n ?? 0,
      promptTokens: (timings.prompt_n ?? 0) + (timings.cache_n ?? 0),
      firstTokenSeconds: seconds(start, first || performance.now()),
      decodeTokensPerSecond: written > 1 && last > first ? (written - 1) / seconds(first, last) : null,
    };
  }

  /**
   * One conversation by the clock, from an empty cache: turns are [{ text }, ...], each answered with
   * `decodeTokens` tokens after the first, whatever they say. Gives [{ promptTokens, asked, stamps }, ...], in
   * seconds: when it was asked, when each token was there. Text is cut into tokens by llama.cpp.
   */
  async converse(turns, decodeTokens) {
    const timed = [];
    let prompt = "";
    for (const { text } of turns) {
      prompt += text;
      const stamps = [];
      let timings = {};
      const asked = performance.now();
      const onData = (chunk) => {
        timings = chunk.timings ?? timings;
        prompt += chunk.choices[0].text;
        // A piece of text may take several tokens: they are there together.
        while (stamps.length < (timings.predicted_n ?? 0)) stamps.push(performance.now() / 1000);
      };
      const request = { ...GREEDY, prompt, max_tokens: decodeTokens + 1, ignore_eos: true };
      await this.#ask("createCompletion", { ...request, cache_prompt: timed.length > 0, onData });
      timed.push({ promptTokens: timings.prompt_n, asked: asked / 1000, stamps });
    }
    return timed;
  }

  async #ask(what, request) {
    this.complaints.length = 0;
    try {
      return await this.wllama[what](request);
    } catch (error) {
      const [, tokens, most] = TOO_LONG.exec(error.message) ?? [];
      if (tokens) throw new Error(tooLong(tokens, most));
      // An exception in llama.cpp arrives as an answer that cannot be read; what it said is in the log.
      if (error.name === "RuntimeError" && this.complaints.length) throw new Error(`llama.cpp: ${reason(this.complaints)}`);
      throw error;
    }
  }
}

/** The first complaint of llama.cpp that says why. */
function reason(complaints) {
  const telling = complaints.find((said) => said.includes("error")) ?? complaints[0] ?? "it does not say why";
  return telling.replace(/^.*error loading model: /, "").trim();
}
