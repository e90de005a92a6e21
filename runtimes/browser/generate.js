// The generation loop: greedy, over any engine that has prefill, truncate and length. Knows token ids only.

/** The index of the largest logit; the first of equals. */
export function likeliest(logits) {
  let best = 0;
  for (let id = 1; id < logits.length; id++) if (logits[id] > logits[best]) best = id;
  return best;
}

/** How many tokens two sequences have in common at their beginning. */
export function commonPrefix(one, other) {
  let n = 0;
  while (n < one.length && n < other.length && one[n] === other[n]) n++;
  return n;
}

/** A conversation with an engine: remembers which tokens its cache holds, and reads only what is new. */
export class Conversation {
  constructor(engine, stopIds) {
    this.engine = engine;
    this.stopIds = stopIds;
    this.cached = [];
  }

  /**
   * Go on from `prompt`: yields token ids until a stop token, `maxTokens`, the end of the context, or until
   * `stopped()` says so. Returns { reason, newTokens }: why it ended, and how much of the prompt was read.
   */
  async *answer(prompt, { maxTokens = 512, stopped = () => false } = {}) {
    // The last token of the prompt always runs: its logits are the answer's beginning.
    const known = Math.min(commonPrefix(this.cached, prompt), prompt.length - 1);
    this.engine.truncate(known);
    this.cached = this.cached.slice(0, known);
    const newTokens = prompt.length - known;
    let next = prompt.slice(known);
    for (let made = 0; ; made++) {
      if (made === maxTokens) return { reason: "length", newTokens };
      if (this.engine.length + next.length > this.engine.context) return { reason: "context", newTokens };
      if (stopped()) return { reason: "stopped", newTokens };
      const token = likeliest(await this.engine.prefill(next));
      this.cached.push(...next);
      if (this.stopIds.has(token)) return { reason: "stop", newTokens };
      yield token;
      next = [token];
    }
  }
}
