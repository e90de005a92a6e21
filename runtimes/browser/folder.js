// A model folder behind a URL: fetches its files and says how far it is. Knows names and bytes, not what they mean.

export class ModelFolder {
  constructor(url) {
    this.url = url.endsWith("/") ? url : `${url}/`;
  }

  /** A small JSON file, parsed. */
  async json(name) {
    return JSON.parse(await this.text(name));
  }

  /** A small text file. */
  async text(name) {
    return (await this.#fetch(name)).text();
  }

  /** A file as bytes; `onBytes(done, total)` is called as they arrive (total 0: the server did not say). */
  async bytes(name, onBytes = () => {}) {
    const response = await this.#fetch(name);
    const total = Number(response.headers.get("content-length") ?? 0);
    const parts = [];
    let done = 0;
    // One buffer of the announced size is filled in place, so that a large file is held once and not twice.
    let whole = total ? new Uint8Array(total) : null;
    const reader = response.body.getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      if (whole && done + part.value.length <= total) whole.set(part.value, done);
      else parts.push(part.value);
      done += part.value.length;
      onBytes(done, total);
    }
    if (whole && done === total) return whole;
    if (whole) throw new Error(`${name}: ${done} bytes came, but ${total} were announced`);
    whole = new Uint8Array(done);
    let at = 0;
    for (const part of parts) {
      whole.set(part, at);
      at += part.length;
    }
    return whole;
  }

  async #fetch(name) {
    const response = await fetch(new URL(name, this.url));
    if (!response.ok) throw new Error(`${name}: the server answered ${response.status}`);
    return response;
  }
}
