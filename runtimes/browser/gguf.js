// The header of a GGUF file: what the model is, and whether the file is all there. Reads the beginning of a Blob
// and trusts none of it: counts and lengths come from whoever wrote the file. Runs no model.
//
// Format: docs/gguf.md of ggml-org/ggml, versions 2 and 3, little-endian.

const FIRST_READ = 1 << 20;
const MOST_HEADER = 1 << 28; // the largest vocabularies take 10 MB
const MOST_DEPTH = 4; // arrays of arrays: none are known
const ALIGNMENT = 32;

// ggml type -> [weights in a block, bytes of a block].
export const BLOCKS = {
  0: [1, 4], // F32
  1: [1, 2], // F16
  2: [32, 18], // Q4_0
  3: [32, 20], // Q4_1
  6: [32, 22], // Q5_0
  7: [32, 24], // Q5_1
  8: [32, 34], // Q8_0
  10: [256, 84], // Q2_K
  11: [256, 110], // Q3_K
  12: [256, 144], // Q4_K
  13: [256, 176], // Q5_K
  14: [256, 210], // Q6_K
  16: [256, 66], // IQ2_XXS
  17: [256, 74], // IQ2_XS
  18: [256, 98], // IQ3_XXS
  19: [256, 50], // IQ1_S
  20: [32, 18], // IQ4_NL
  21: [256, 110], // IQ3_S
  22: [256, 82], // IQ2_S
  23: [256, 136], // IQ4_XS
  29: [256, 56], // IQ1_M
  30: [1, 2], // BF16
  34: [256, 54], // TQ1_0
  35: [256, 66], // TQ2_0
  39: [32, 17], // MXFP4
};
const [STRING, ARRAY] = [8, 9];
// Value type -> [bytes, how a DataView reads it].
const SCALARS = {
  0: [1, "getUint8"],
  1: [1, "getInt8"],
  2: [2, "getUint16"],
  3: [2, "getInt16"],
  4: [4, "getUint32"],
  5: [4, "getInt32"],
  6: [4, "getFloat32"],
  7: [1, "getUint8"],
  10: [8, "getBigUint64"],
  11: [8, "getBigInt64"],
  12: [8, "getFloat64"],
};

/** What was read ends before the header does. */
class MoreNeeded extends Error {}

const bytes = (n) => `${n.toLocaleString("en")} bytes`;

/**
 * The header: { architecture, name, context, end }, `end` being where the last tensor ends. Throws an Error, one
 * sentence with the numbers in it, for what is no GGUF file or is not all there.
 */
export async function readHeader(blob, name) {
  const magic = new Uint8Array(await blob.slice(0, 4).arrayBuffer());
  if (String.fromCharCode(...magic) !== "GGUF") {
    throw new Error(`${name} is not a model: a GGUF file begins with the letters GGUF, and this one does not`);
  }
  for (let size = FIRST_READ; ; size *= 4) {
    const read = await blob.slice(0, size).arrayBuffer();
    try {
      const header = parse(new Cursor(read), name);
      if (header.end > blob.size) {
        throw new Error(`${name} is cut short: it has ${bytes(blob.size)}, but its tensors end at ${bytes(header.end)}`);
      }
      return header;
    } catch (error) {
      if (!(error instanceof MoreNeeded)) throw error;
      if (read.byteLength >= blob.size) {
        throw new Error(`${name} is cut short: its header is longer than the ${bytes(blob.size)} that it has`);
      }
      if (size >= MOST_HEADER) throw new Error(`${name}: its header takes more than ${bytes(MOST_HEADER)}`);
    }
  }
}

function parse(cursor, name) {
  cursor.skip(4);
  const version = cursor.scalar(4);
  if (version !== 2 && version !== 3) throw new Error(`${name}: GGUF version ${version}, and only 2 and 3 are known`);
  const tensors = cursor.count();
  const pairs = cursor.count();
  const meta = {};
  for (let n = 0; n < pairs; n++) {
    const key = cursor.string();
    meta[key] = cursor.value(cursor.scalar(4), 0, name);
  }
  let end = 0;
  for (let n = 0; n < tensors; n++) end = Math.max(end, tensorEnd(cursor));
  const alignment = Number(meta["general.alignment"] ?? ALIGNMENT);
  if (!(alignment > 0)) throw new Error(`${name}: an alignment of ${alignment}`);
  const architecture = meta["general.architecture"];
  if (typeof architecture !== "string") throw new Error(`${name} does not say which architecture it is`);
  return {
    architecture,
    name: meta["general.name"] ?? null,
    context: Number(meta[`${architecture}.context_length`] ?? 0),
    end: Math.ceil(cursor.at / alignment) * alignment + end,
  };
}

/** Where a tensor ends, from the beginning of the data on. */
function tensorEnd(cursor) {
  cursor.string();
  let weights = 1;
  for (let dimensions = cursor.scalar(4); dimensions > 0; dimensions--) weights *= cursor.count();
  // A type that is not known here has at least one byte.
  const [block, size] = BLOCKS[cursor.scalar(4)] ?? [Infinity, 1];
  return cursor.count() + Math.max(1, Math.ceil((weights / block) * size));
}

/** Reads a buffer from its beginning to its end; throws MoreNeeded there. */
class Cursor {
  constructor(buffer) {
    this.view = new DataView(buffer);
    this.at = 0;
  }

  skip(length) {
    const from = this.at;
    if (from + length > this.view.byteLength) throw new MoreNeeded();
    this.at += length;
    return from;
  }

  scalar(type) {
    const [size, read] = SCALARS[type];
    return this.view[read](this.skip(size), true);
  }

  /** An unsigned 64-bit number; beyond 2^53 it is as good as infinite. */
  count() {
    return Number(this.scalar(10));
  }

  string() {
    const length = this.count();
    return new TextDecoder().decode(new Uint8Array(this.view.buffer, this.skip(length), length));
  }

  /** A value; arrays are passed over. */
  value(type, depth, name) {
    if (type === STRING) return this.string();
    if (type in SCALARS) return this.scalar(type);
    if (type !== ARRAY || depth === MOST_DEPTH) throw new Error(`${name}: a value of type ${type} in its header`);
    const of = this.scalar(4);
    const length = this.count();
    if (of in SCALARS) this.skip(SCALARS[of][0] * length);
    else if (of === STRING) for (let n = 0; n < length; n++) this.skip(this.count());
    else for (let n = 0; n < length; n++) this.value(of, depth + 1, name);
    return null;
  }
}
