// What a browser must have, told in a sentence where it has not. Looks at nothing but the scope that it is given.

// (module (func (result v128) (i8x16.splat (i32.const 0)))): valid only where there are SIMD instructions.
const SIMD = [
  ...[0, 97, 115, 109, 1, 0, 0, 0], // "\0asm", version 1
  ...[1, 5, 1, 96, 0, 1, 123], // a type: () -> v128
  ...[3, 2, 1, 0], // a function of that type
  ...[10, 8, 1, 6, 0, 65, 0, 253, 15, 11], // its body
];
const REMEDY = "A current Chrome, Edge, Firefox or Safari has it";

/** What is missing in this scope for a model to run, as a sentence; null where nothing is. */
export function lacking(scope) {
  if (typeof scope.WebAssembly !== "object") {
    return `This browser has no WebAssembly, which is what models run in here. ${REMEDY}, unless it was switched off.`;
  }
  if (!scope.WebAssembly.validate(Uint8Array.from(SIMD))) {
    return `This browser's WebAssembly has no SIMD instructions, without which no model runs here. ${REMEDY}.`;
  }
  if (typeof scope.Worker !== "function") return `This browser has no workers to run a model in. ${REMEDY}.`;
  return null;
}

/** The threads that a model may use in this scope: one, unless the server isolates the page from other origins. */
export function usableThreads(scope, most) {
  return scope.crossOriginIsolated ? Math.min(scope.navigator.hardwareConcurrency || 1, most) : 1;
}

const NO_MEMORY = /could not allocate|cannot allocate|out of memory|allocation failed|bad_alloc|(failed|unable) to allocate/i;

/** What is said of a conversation that does not fit. */
export function tooLong(tokens, context) {
  return `The conversation has ${tokens} tokens, and the context holds ${context}: begin a new chat.`;
}

/** What went wrong while a model was opened or asked, as a sentence. */
export function inWords(error) {
  const said = String(error?.message ?? error) || "something went wrong, and the browser does not say what";
  if (!NO_MEMORY.test(said)) return said;
  return `The browser does not give this page the memory that the model needs (${said}). Close other pages, or take a smaller model.`;
}
