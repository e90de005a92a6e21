// Token ids in, logits out: onnxruntime-web on an exported graph, with the keys and values of what was read.
// Knows the graph's inputs and outputs. Knows neither text, nor how a token is chosen, nor the page.

import * as ort from "./vendor/ort.wasm.min.mjs";

export const MODEL_FILE = "model.onnx";
export const DATA_FILE = "model.onnx_data";

// Tokens of a prompt that run at once: bounds the memory of the activations.
const PREFILL_CHUNK = 256;
const PAST = "past_key_values.";

export class Engine {
  /**
   * Fetch the model and start a session of at most `context` tokens. `onBytes(done, total)` follows the weights.
   * Threads need a page that is cross-origin isolated; without that there is one.
   */
  static async open(folder, { threads = 1, context, onBytes } = {}) {
    ort.env.wasm.numThreads = self.crossOriginIsolated ? threads : 1;
    ort.env.wasm.wasmPaths = new URL("./vendor/", import.meta.url).href;
    const [config, graph, data] = await Promise.all([
      folder.json("config.json"),
      folder.bytes(MODEL_FILE),
      folder.bytes(DATA_FILE, onBytes),
    ]);
    const session = await ort.InferenceSession.create(graph, {
      executionProviders: ["wasm"],
      externalData: [{ path: DATA_FILE, data }],
      logSeverityLevel: 3,
    });
    const most = Math.min(context ?? Infinity, config.max_position_embeddings);
    return new Engine(session, config, most, graph.length + data.length, ort.env.wasm.numThreads);
  }

  constructor(session, config, context, bytes, threads) {
    this.bytes = bytes;
    this.threads = threads;
    this.context = context;
    this.vocabSize = config.vocab_size;
    this.session = session;
    this.heads = config.num_key_value_heads ?? config.num_attention_heads;
    this.width = config.head_dim ?? config.hidden_size / config.num_attention_heads;
    this.reset();
  }

  /** Forget everything. */
  reset() {
    this.length = 0;
    this.cache = {};
    for (const name of this.session.inputNames) {
      if (name.startsWith(PAST)) this.cache[name] = this.#tensor(new Float32Array(0), 0);
    }
  }

  /** Keep only the first `length` cached tokens. */
  truncate(length) {
    if (length >= this.length) return;
    for (const [name, { data }] of Object.entries(this.cache)) {
      const kept = new Float32Array(this.heads * length * this.width);
      for (let head = 0; head < this.heads; head++) {
        const from = head * this.length * this.width;
        kept.set(data.subarray(from, from + length * this.width), head * length * this.width);
      }
      this.cache[name] = this.#tensor(kept, length);
    }
    this.length = length;
  }

  /** Append tokens to the cache; the logits (vocab) after the last, as a Float32Array. */
  async prefill(tokens) {
    if (!tokens.length) throw new Error("a model needs at least one token to go on from");
    if (this.length + tokens.length > this.context) {
      throw new Error(`${this.length + tokens.length} tokens do not fit a context of ${this.context}`);
    }
    let logits;
    for (let at = 0; at < tokens.length; at += PREFILL_CHUNK) {
      logits = await this.#run(tokens.slice(at, at + PREFILL_CHUNK));
    }
    return logits;
  }

  async #run(tokens) {
    const total = this.length + tokens.length;
    const outputs = await this.session.run({
      ...this.cache,
      input_ids: new ort.Tensor("int64", BigInt64Array.from(tokens, BigInt), [1, tokens.length]),
      attention_mask: new ort.Tensor("int64", new BigInt64Array(total).fill(1n), [1, total]),
    });
    for (const name of Object.keys(this.cache)) this.cache[name] = outputs[name.replace(PAST, "present.")];
    this.length = total;
    return outputs.logits.data;
  }

  #tensor(data, length) {
    return new ort.Tensor("float32", data, [1, this.heads, length, this.width]);
  }
}
