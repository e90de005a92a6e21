// The build step: copies what the page needs of its npm packages into vendor/, with their licences.
// The page loads nothing from anywhere else, and node_modules is never served.

import { copyFileSync, existsSync, mkdirSync, rmSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const HERE = dirname(fileURLToPath(import.meta.url));
// What is imported from vendor/, by package: [file in the package, name in vendor/].
const FILES = {
  "onnxruntime-web": [
    ["dist/ort.wasm.min.mjs", "ort.wasm.min.mjs"],
    ["dist/ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.mjs"],
    ["dist/ort-wasm-simd-threaded.wasm", "ort-wasm-simd-threaded.wasm"],
  ],
  "@wllama/wllama": [
    ["esm/index.min.js", "wllama.mjs"],
    ["esm/wasm/wllama.wasm", "wllama.wasm"],
  ],
  // For browsers that cannot suspend WebAssembly or give it 64-bit addresses.
  "@wllama/wllama-compat": [
    ["wasm/wllama.js", "wllama-compat.js"],
    ["wasm/wllama.wasm", "wllama-compat.wasm"],
  ],
  "@huggingface/tokenizers": [["dist/tokenizers.min.mjs", "tokenizers.min.mjs"]],
  "@huggingface/jinja": [["dist/index.js", "jinja.mjs"]],
};
const LICENCES = ["LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE"];

const target = join(HERE, "vendor");
rmSync(target, { recursive: true, force: true });
mkdirSync(target);
for (const [name, files] of Object.entries(FILES)) {
  const folder = join(HERE, "node_modules", name);
  for (const [from, to] of files) copyFileSync(join(folder, from), join(target, to));
  const licence = LICENCES.find((file) => existsSync(join(folder, file)));
  if (licence) copyFileSync(join(folder, licence), join(target, `LICENSE.${name.split("/").pop()}`));
}
