// What the page's reader of GGUF headers says of files, as JSON: one object per file, { header } or { error }.
//
//   node gguf_header.mjs FILE...

import { openAsBlob } from "node:fs";
import { basename } from "node:path";
import { BLOCKS, readHeader } from "../../runtimes/browser/gguf.js";

const found = [];
for (const file of process.argv.slice(2)) {
  const blob = await openAsBlob(file);
  found.push(
    await readHeader(blob, basename(file)).then(
      (header) => ({ header }),
      (error) => ({ error: error.message, kind: error.constructor.name }),
    ),
  );
}
console.log(JSON.stringify({ found, blocks: BLOCKS }));
