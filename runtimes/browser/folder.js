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

}

/** An answer's bytes, as many as were announced; one buffer is filled in place, so that they are held once. */
async function readInto(response, total, file, onBytes = () => {}) {
  const whole = new Uint8Array(total);
  let done = 0;
  const reader = response.body.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    if (done + part.value.length <= total) whole.set(part.value, done);
    done += part.value.length;
    onBytes(done, total);
  }
  if (done !== total) throw new Error(`${file}: ${done} bytes came, but ${total} were announced`);
  return whole;
}

/** A file on a server, or a stretch of it, with what its readers ask of a Blob; each reading is a request. */
class ServedBlob {
  /** Null where the server does not give pieces of its files. */
  static async open(url, onBytes) {
    const response = await fetch(url, { headers: { Range: "bytes=0-0" }, cache: "no-store" });
    await response.body?.cancel();
    const size = Number(response.headers.get("content-range")?.split("/")[1]);
    if (response.status !== 206 || !(size > 0)) return null;
    let most = 0;
    const onEnd = (end) => {
      most = Math.max(most, end);
      onBytes(most, size);
    };
    return new ServedBlob(url, 0, size, onEnd);
  }

  constructor(url, start, end, onEnd) {
    this.url = url;
    this.start = start;
    this.size = Math.max(0, end - start);
    this.onEnd = onEnd;
  }

  slice(start = 0, end = this.size) {
    const [from, to] = [start, end].map((at) => this.start + Math.min(at, this.size));
    return new ServedBlob(this.url, from, to, this.onEnd);
  }

  async arrayBuffer() {
    if (!this.size) return new ArrayBuffer(0);
    const whole = await readInto(await this.#fetch(), this.size, this.url.pathname);
    this.onEnd(this.start + this.size);
    return whole.buffer;
  }

  async #fetch() {
    const headers = { Range: `bytes=${this.start}-${this.start + this.size - 1}` };
    const response = await fetch(this.url, { headers, cache: "no-store" });
    if (response.status !== 206) throw new Error(`${this.url.pathname}: the server answered ${response.status}`);
    return response;
  }

  /** For readers that want all of it in order. */
  stream() {
    const step = 1 << 22;
    let at = 0;
    return new ReadableStream({
      pull: async (out) => {
        if (at >= this.size) return out.close();
        out.enqueue(new Uint8Array(await this.slice(at, at + step).arrayBuffer()));
        at += step;
      },
    });
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

  async text(file) {
    return (await this.blob(file)).text();
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

  /**
   * A file that nobody holds as a whole: read piece by piece where the server gives pieces, else streamed into the
   * browser's keeping.
   */
  async blob(file, onBytes = () => {}) {
    const served = await ServedBlob.open(new URL(file, this.url), onBytes);
    if (served) return served;
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

  async text(file) {
    return (await this.#fetch(file)).text();
  }

  /** A file as bytes. */
  async bytes(file, onBytes) {
    const response = await this.#fetch(file);
    const total = Number(response.headers.get("content-length") ?? 0);
    if (total) return readInto(response, total, file, onBytes);
    return new Uint8Array(await response.arrayBuffer()); // the server did not say how many come
  }

  async #fetch(file) {
    const response = await fetch(new URL(file, this.url));
    if (!response.ok) throw new Error(`${file}: the server answered ${response.status}`);
    return response;
  }
}
