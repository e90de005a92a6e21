// How much memory WebAssembly has taken, which no interface of the browser tells: whoever makes a memory in this
// thread is watched, and so is wllama's own worker, by a few lines put in front of its script.

/** Watch every memory made in this thread from now on; returns what sums their sizes, in bytes. */
export function watchMemory() {
  const memories = new Set();
  const { Memory } = WebAssembly;
  WebAssembly.Memory = class extends Memory {
    constructor(description) {
      super(description);
      memories.add(this);
    }
  };
  for (const name of ["instantiate", "instantiateStreaming"]) {
    const real = WebAssembly[name];
    WebAssembly[name] = async (...all) => {
      const made = await real.apply(WebAssembly, all);
      for (const one of Object.values((made.instance ?? made).exports)) if (one instanceof Memory) memories.add(one);
      return made;
    };
  }
  return () => [...memories].reduce((sum, memory) => sum + memory.buffer.byteLength, 0);
}

/**
 * Watch the memories of a worker that `start` makes from a script of its own in a Blob. Returns what `start`
 * gives, and a function that asks that worker for their sizes (null: it did not answer).
 */
export async function watchWorker(start) {
  const name = `fox-edge-memory-${crypto.randomUUID()}`;
  const head = `
    const told = (${watchMemory})();
    new BroadcastChannel("${name}").onmessage = function () { this.postMessage(told()); };\n`;
  const real = URL.createObjectURL;
  // Only the first Blob is the worker; what that worker makes in turn shares its memory.
  URL.createObjectURL = (blob) => {
    URL.createObjectURL = real;
    return real.call(URL, new Blob(["{", head, "}\n", blob], { type: blob.type }));
  };
  try {
    return [await start(), () => ask(name)];
  } finally {
    URL.createObjectURL = real;
  }
}

const PATIENCE_MS = 2000;

function ask(name) {
  const channel = new BroadcastChannel(name);
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, PATIENCE_MS, null);
    channel.onmessage = ({ data }) => {
      clearTimeout(timer);
      resolve(data);
    };
    channel.postMessage(null);
  }).finally(() => channel.close());
}
