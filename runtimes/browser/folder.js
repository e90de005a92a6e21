// Where a model's files are: behind a URL, or dropped on the page. Knows names and bytes, not what they mean.
//
// Both kinds of folder have: name, single, names(), json(file), text(file), bytes(file, onBytes), blob(file,
// onBytes). `onBytes(done, total)` is called as bytes arrive (total 0: the server did not say).

class Folder {
  /** A small JSON file, parsed. */
  async json(file) {
    const text = await this.text(file);
    try {
      return JSON.parse(text);
    } catch {
      throw new Error(`${file} is not JSON`);
    }
  }

  /** A small text file. */
  async text(file) {
    return (await this.blob(file)).text();
  }
}

/** Files that the user dropped or chose: [[path, File], ...]. */
export class DroppedFolder extends Folder {
  constructor(files) {
    super();
    const top = files[0]?.[0].split("/")[0] ?? "";
    const nested = files.length > 0 && files.every(([path]) => path.startsWith(`${top}/`));
    this.single = files.length === 1 && !nested; // a file by itself
    this.name = nested || this.single ? top : "what was dropped";
    this.files = new Map(files.map(([path, file]) => [nested ? path.slice(top.length + 1) : path, file]));
  }

  names() {
    return [...this.files.keys()];
  }

  async blob(file, onBytes = () => {}) {
    const found = this.files.get(file);
    if (!found) throw new Error(`${this.name} has no ${file}`);
    onBytes(found.size, found.size);
    return found;
  }

  async bytes(file, onBytes) {
    return new Uint8Array(await (await this.blob(file, onBytes)).arrayBuffer());
  }
}

/** A folder that a server hands out; its manifest.json names the files. */
export class ServedFolder extends Folder {
  static async open(url) {
    const folder = new ServedFolder(url);
    folder.manifest = await folder.json("manifest.json");
    folder.name = folder.manifest.checkpoint ?? "the served folder";
    return folder;
  }

  constructor(url) {
    super();
    this.url = url.endsWith("/") ? url : `${url}/`;
    this.single = false;
  }

  names() {
    return Object.keys(this.manifest.files ?? {});
  }

  /** A file in the browser's keeping: it streams there, and this thread never holds all of it. */
  async blob(file, onBytes = () => {}) {
    const response = await this.#fetch(file);
    const total = Number(response.headers.get("content-length") ?? 0);
    let done = 0;
    const counted = new TransformStream({
      transform(part, out) {
        done += part.length;
        onBytes(done, total);
        out.enqueue(part);
      },
    });
    return new Response(response.body.pipeThrough(counted)).blob();
  }

  /** A file as bytes; one buffer of the announced size is filled in place, so that it is held once. */
  async bytes(file, onBytes = () => {}) {
    const response = await this.#fetch(file);
    const total = Number(response.headers.get("content-length") ?? 0);
    const parts = [];
    let done = 0;
    let whole = total ? new Uint8Array(total) : null;
    const reader = response.body.getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      if (whole && done + part.value.length <= total) whole.set(part.value, done);
      else parts.push(part.value);
      done += part.value.length;
      onBytes(done, total);
    }
    if (whole && done === total) return whole;
    if (whole) throw new Error(`${file}: ${done} bytes came, but ${total} were announced`);
    whole = new Uint8Array(done);
    let at = 0;
    for (const part of parts) {
      whole.set(part, at);
      at += part.length;
    }
    return whole;
  }

  async #fetch(file) {
    const response = await fetch(new URL(file, this.url));
    if (!response.ok) throw new Error(`${file}: the server answered ${response.status}`);
    return response;
  }
}
