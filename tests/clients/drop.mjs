// Drives Chromium through the page without a served model, and prints what was seen as JSON: what is no model is
// refused in a sentence, what is one is dropped or chosen and asked by keyboard; then browsers that lack something.
//
//   node drop.mjs CHROMIUM URL '{"text": FILE, "cut": FILE, "empty": FOLDER, "gguf": FILE, "other": FILE,
//                                "onnx": FOLDER, "question": TEXT, "long": TEXT}' [SCREENSHOTS]

import { join } from "node:path";
import { launch } from "./chromium.mjs";

const [executablePath, url, given, screenshots] = process.argv.slice(2);
const files = JSON.parse(given);
const { context, discard } = await launch(executablePath, {
  viewport: { width: 1280, height: 800 },
  colorScheme: "light",
});
const requests = [];
const complaints = [];

const state = (page) => page.evaluate(() => document.body.dataset.state);
const settled = (page) =>
  page.waitForFunction(() => !["loading", "answering"].includes(document.body.dataset.state), null, {
    timeout: 60_000,
  });
const focused = (page) => page.evaluate(() => document.activeElement.id || document.activeElement.tagName);

/** What a page looks like now, light and dark. */
async function picture(page, name) {
  if (!screenshots) return;
  for (const colorScheme of ["light", "dark"]) {
    await page.emulateMedia({ colorScheme });
    await page.screenshot({ path: join(screenshots, `${name}-${page.viewportSize().width}-${colorScheme}.png`) });
  }
}

async function opened(prepare, query = "") {
  const found = await context.newPage();
  await prepare?.(found);
  context.on("request", (request) => requests.push(request.url()));
  found.on("console", (message) => message.type() === "error" && complaints.push(message.text()));
  found.on("pageerror", (error) => complaints.push(String(error)));
  await found.goto(url + query);
  await settled(found);
  return found;
}

/** A file or folder of this machine, dropped as a person does it. */
async function drop(page, path) {
  const cdp = await context.newCDPSession(page);
  await expectChange(page);
  const data = { items: [], files: [path], dragOperationsMask: 1 };
  for (const type of ["dragEnter", "dragOver", "drop"]) {
    await cdp.send("Input.dispatchDragEvent", { type, x: 300, y: 500, data });
  }
  await settled(page);
}

async function choose(page, input, path) {
  await expectChange(page);
  await page.setInputFiles(input, path);
  await settled(page);
}

/** From now on the page is settled only when it has said so anew. */
const expectChange = (page) => page.evaluate(() => (document.body.dataset.state = "loading"));

const refusal = (page) =>
  page.evaluate(() => ({
    state: document.body.dataset.state,
    sentence: document.querySelector("#hint.failed")?.textContent ?? null,
    announced: document.querySelector("#announce").textContent,
    send: document.querySelector("#send").disabled,
    choices: document.querySelector("#opener").open,
  }));

async function facts(page) {
  return page.evaluate(() =>
    Object.fromEntries([...document.querySelectorAll("dd")].map((dd) => [dd.id, dd.textContent])),
  );
}

/** Ask by keyboard; the whole answer, the facts after it, and whether anything moved meanwhile. */
async function ask(page, question = files.question) {
  const places = () =>
    page.evaluate(() =>
      ["facts", "form"].map((id) => {
        const { top, height } = document.getElementById(id).getBoundingClientRect();
        return [top, height];
      }),
    );
  const ready = { state: await state(page), hint: await page.textContent("#hint") };
  const before = { focused: await focused(page), places: await places() };
  await page.keyboard.insertText(question);
  await page.keyboard.press("Enter");
  await settled(page);
  const answer = await page.evaluate(() => {
    const last = [...document.querySelectorAll(".answer")].at(-1);
    return {
      text: last.querySelector(".text").textContent,
      note: last.querySelector(".figures, .failed")?.textContent ?? "",
    };
  });
  const moved = JSON.stringify(before.places) !== JSON.stringify(await places());
  return {
    ready,
    ...answer,
    moved,
    focused: [before.focused, await focused(page)],
    facts: await facts(page),
    announced: await page.textContent("#announce"),
  };
}

const sideways = (page) =>
  page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);

/** A page whose worker, or whose server, is another one. */
const withWorker = (head) => (page) =>
  page.route("**/worker.js", async (route) => {
    const response = await route.fetch();
    await route.fulfill({ response, body: `${head};\n${await response.text()}` });
  });
const withoutIsolation = (page) =>
  page.route(url, async (route) => {
    const response = await route.fetch();
    const headers = response.headers();
    delete headers["cross-origin-opener-policy"];
    delete headers["cross-origin-embedder-policy"];
    await route.fulfill({ response, headers });
  });

const seen = {};
try {
  const page = await opened();
  await context.pages()[0].close();
  seen.empty = { state: await state(page), hint: await page.textContent("#hint"), facts: await facts(page) };
  seen.buttons = await page.locator("button:visible, summary:visible, textarea:visible").evaluateAll((all) =>
    all.map((one) => one.getAttribute("aria-label") || one.textContent.trim()),
  );
  await picture(page, "empty");
  await drop(page, files.text);
  seen.text = await refusal(page);
  await picture(page, "refused");
  await choose(page, "#file", files.cut);
  seen.cut = await refusal(page);
  await choose(page, "#folder", files.empty);
  seen.noModel = await refusal(page);

  await drop(page, files.gguf);
  seen.gguf = await ask(page);
  await picture(page, "gguf");
  await page.keyboard.type("And how many did she give away?");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => [...document.querySelectorAll(".answer .text")].at(-1).textContent.length > 4);
  await page.keyboard.press("Escape");
  await settled(page);
  seen.stopped = await page.evaluate(() => [...document.querySelectorAll(".figures")].at(-1)?.textContent);

  // Another model takes its place; on a phone, in the dark.
  await page.setViewportSize({ width: 390, height: 844 });
  await page.emulateMedia({ colorScheme: "dark" });
  await drop(page, files.onnx);
  seen.turns = await page.locator("#turns li").count();
  await picture(page, "ready");
  await page.focus("#question");
  seen.onnx = await ask(page);
  await picture(page, "onnx");
  seen.narrow = { sideways: await sideways(page), ground: await page.evaluate(() => getComputedStyle(document.body).backgroundColor) };
  await page.close();
  seen.complaints = [...complaints];

  const lacking = {
    webAssembly: (other) => other.addInitScript("delete globalThis.WebAssembly"),
    simd: (other) => other.addInitScript("WebAssembly.validate = () => false"),
    worker: (other) => other.addInitScript("delete globalThis.Worker"),
  };
  for (const [name, without] of Object.entries(lacking)) {
    const other = await opened(without);
    seen[name] = await refusal(other);
    await other.close();
  }
  // No thread but one; no way to suspend WebAssembly; no memory.
  const alone = await opened(withoutIsolation);
  await drop(alone, files.other);
  seen.alone = await ask(alone);
  await alone.close();
  // A context that is too short for the question.
  const short = await opened(null, "?context=256");
  await drop(short, files.gguf);
  seen.shortGguf = await ask(short, files.long);
  await drop(short, files.onnx);
  seen.shortOnnx = await ask(short, files.long);
  await short.close();
  const old = await opened(withWorker("delete WebAssembly.Suspending"));
  await drop(old, files.gguf);
  seen.old = await ask(old);
  await old.close();
  const none = "WebAssembly.Memory = class { constructor() { throw new RangeError('WebAssembly.Memory(): could not allocate memory'); } }";
  const poor = await opened(withWorker(none));
  await drop(poor, files.onnx);
  seen.poor = await refusal(poor);
  await poor.close();
  console.log(JSON.stringify({ ...seen, requests }));
} finally {
  await context.close();
  discard();
}
