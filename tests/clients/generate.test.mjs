// The page's generation loop on an engine of three lines: why an answer ends, and what is read again.

import assert from "node:assert/strict";
import { test } from "node:test";
import { Conversation, commonPrefix, likeliest } from "../../runtimes/browser/generate.js";

const STOP = 9;

/** Says 1, 2, 3, ... by how much it has read, and remembers what it was given. */
class Counter {
  constructor(context = 100) {
    this.context = context;
    this.length = 0;
    this.read = [];
  }

  truncate(length) {
    this.length = Math.min(this.length, length);
  }

  async prefill(tokens) {
    this.read.push([...tokens]);
    this.length += tokens.length;
    return Float32Array.from({ length: 10 }, (_, id) => (id === this.length % 10 ? 1 : 0));
  }
}

async function drain(answer) {
  const ids = [];
  let step = await answer.next();
  for (; !step.done; step = await answer.next()) ids.push(step.value);
  return { ids, ...step.value };
}

test("a stop token ends the answer and is no part of it", async () => {
  const chat = new Conversation(new Counter(), new Set([STOP]));
  assert.deepEqual(await drain(chat.answer([5, 5])), {
    ids: [2, 3, 4, 5, 6, 7, 8],
    reason: "stop",
    newTokens: 2,
  });
});

test("the limit, the context and the user end it too", async () => {
  const chat = new Conversation(new Counter(), new Set());
  assert.deepEqual(await drain(chat.answer([5], { maxTokens: 3 })), {
    ids: [1, 2, 3],
    reason: "length",
    newTokens: 1,
  });
  const small = new Conversation(new Counter(4), new Set());
  assert.equal((await drain(small.answer([5, 5]))).reason, "context");
  assert.deepEqual((await drain(small.answer([5, 5, 5, 5, 5]))).ids, []);
  let asked = 0;
  const stopped = await drain(new Conversation(new Counter(), new Set()).answer([5], { stopped: () => ++asked > 2 }));
  assert.deepEqual([stopped.ids, stopped.reason], [[1, 2], "stopped"]);
});

test("what the cache holds is not read again, but for the last token", async () => {
  const engine = new Counter();
  const chat = new Conversation(engine, new Set([STOP]));
  const first = await drain(chat.answer([4, 4, 4, 4, 4]));
  engine.read = [];
  const more = await drain(chat.answer([4, 4, 4, 4, 4, ...first.ids, 7, 7]));
  assert.equal(more.newTokens, 2);
  assert.deepEqual(engine.read[0], [7, 7]);
  engine.read = [];
  const again = await drain(chat.answer([4, 4, 4, 4, 4]));
  assert.deepEqual([again.newTokens, engine.read[0], again.ids], [1, [4], first.ids]);
});

test("ties go to the first, and prefixes end where texts part", () => {
  assert.equal(likeliest(Float32Array.of(-3, 2, 2, 1)), 1);
  assert.equal(commonPrefix([1, 2, 3], [1, 2, 4, 5]), 2);
  assert.equal(commonPrefix([], [1]), 0);
});
