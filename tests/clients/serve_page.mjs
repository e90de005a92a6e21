// Drives Chromium through the chat page of `fox-edge serve` and prints what was seen as JSON.
//
//   node serve_page.mjs CHROMIUM URL WIDTH HEIGHT light|dark [KEY] [SCREENSHOT.png]
//
// All of it by keyboard: a question, a second one in the same chat, a stop in mid-answer, a new chat.

import { launch } from "./chromium.mjs";

const [executablePath, url, width, height, colorScheme, key, screenshot] = process.argv.slice(2);
const QUESTION = "Tom has 12 apples and buys 7 more apples. How many apples does Tom have?";
const { context, discard } = await launch(executablePath, {
  viewport: { width: Number(width), height: Number(height) },
  colorScheme,
  deviceScaleFactor: screenshot ? 2 : 1,
  permissions: ["clipboard-read", "clipboard-write"],
});
const requests = [];
const complaints = [];

const state = (page) => page.evaluate(() => document.body.dataset.state);
const settled = (page) =>
  page.waitForFunction(() => !["loading", "answering"].includes(document.body.dataset.state), null, {
    timeout: 60_000,
  });
const focused = (page) => page.evaluate(() => document.activeElement.id || document.activeElement.className);

/** The last answer, when it is there in full. */
async function answered(page) {
  await settled(page);
  return page.evaluate(() => {
    const last = [...document.querySelectorAll(".answer")].at(-1);
    return {
      text: last.querySelector(".text").textContent,
      note: last.querySelector(".figures, .failed")?.textContent ?? "",
      failed: last.querySelector(".failed") !== null,
      announced: document.querySelector("#announce").textContent,
    };
  });
}

/** Press Tab until this element has the focus. */
async function tabTo(page, id) {
  for (let presses = 0; presses < 40; presses++) {
    if ((await focused(page)) === id) return;
    await page.keyboard.press("Tab");
  }
  throw new Error(`no number of Tabs leads to ${id}`);
}

async function typeAndEnter(page, text) {
  await page.keyboard.type(text);
  await page.keyboard.press("Enter");
}

try {
  const page = context.pages()[0] ?? (await context.newPage());
  context.on("request", (request) => requests.push(request.url()));
  page.on("console", (message) => message.type() === "error" && complaints.push(message.text()));
  page.on("pageerror", (error) => complaints.push(String(error)));
  await page.goto(url);
  await settled(page);
  const seen = { opened: await state(page), focusedFirst: await focused(page) };
  if (seen.opened === "locked") {
    seen.hint = await page.textContent("#hint");
    await page.keyboard.type("wrong");
    await page.keyboard.press("Tab");
    await page.waitForFunction(() => document.querySelector("#hint").textContent.startsWith("That is not"));
    await page.focus("#key");
    await page.keyboard.press("ControlOrMeta+a");
    await page.keyboard.type(key);
    await page.keyboard.press("Tab");
    await page.waitForFunction(() => document.body.dataset.state === "ready");
    complaints.length = 0; // Chromium itself writes every 401 to the console
    await page.focus("#question");
  }
  seen.facts = await page.evaluate(() =>
    Object.fromEntries([...document.querySelectorAll("dd")].map((dd) => [dd.id, dd.textContent])),
  );
  seen.title = await page.title();
  seen.examples = await page.locator("#examples button").count();
  seen.sideways = await page.evaluate(() => $("main").scrollWidth - $("main").clientWidth);
  await typeAndEnter(page, QUESTION);
  seen.question = QUESTION;
  seen.first = await answered(page);
  seen.focusedAfter = await focused(page);
  // Copy, by keyboard.
  await page.locator(".copy").last().focus();
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => [...document.querySelectorAll(".copy")].at(-1).textContent === "Copied");
  seen.copied = await page.evaluate(() => navigator.clipboard.readText());
  await tabTo(page, "question");
  await typeAndEnter(page, "Ben has 5 boxes with 6 pencils in each box. How many pencils does Ben have?");
  seen.second = await answered(page);
  if (screenshot && screenshot !== "-") {
    await page.evaluate(() => document.activeElement.blur());
    await page.screenshot({ path: screenshot });
  }
  seen.overflow = await page.evaluate(
    () => document.documentElement.scrollWidth - document.documentElement.clientWidth,
  );
  seen.formVisible = await page.evaluate(() => {
    const box = document.querySelector("#form").getBoundingClientRect();
    return box.top >= 0 && box.bottom <= innerHeight && box.right <= innerWidth;
  });
  seen.ground = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  // A long answer, stopped by Escape while it grows.
  await page.focus("#question");
  await page.evaluate(() => {
    const real = window.fetch;
    window.fetch = (path, init) => {
      if (init?.body) {
        const body = { ...JSON.parse(init.body), grammar: 'start: /(fox ){300,}/' };
        init = { ...init, body: JSON.stringify(body) };
      }
      return real(path, init);
    };
    window.restore = () => (window.fetch = real);
  });
  await typeAndEnter(page, "Go on for ever.");
  await page.waitForFunction(
    () => [...document.querySelectorAll(".answer .text")].at(-1).textContent.length > 8,
  );
  seen.growing = { state: await state(page), stop: await page.isVisible("#stop"), ask: await page.isVisible("#send") };
  await page.keyboard.press("Escape");
  seen.stopped = await answered(page);
  seen.focusedStopped = await focused(page);
  await page.evaluate(() => window.restore());
  seen.turns = await page.locator("#turns li").count();
  await tabTo(page, "new");
  await page.keyboard.press("Enter");
  seen.turnsAnew = await page.locator("#turns li").count();
  seen.focusedAnew = await focused(page);
  // What a model writes is text, whatever it looks like; code between fences has a box.
  seen.drawn = await page.evaluate(() => {
    const place = document.createElement("div");
    draw(place, "<b>so</b>\n```js\nlet a = 1 < 2;\n```\nend\n```\nopen");
    return {
      html: place.innerHTML,
      boxes: [...place.querySelectorAll("pre")].map((box) => box.textContent),
    };
  });
  // A system prompt goes along.
  const [asked] = await Promise.all([
    page.waitForRequest((request) => request.url().endsWith("/chat/completions")),
    (async () => {
      await page.evaluate(() => (document.querySelector("details").open = true));
      await page.fill("#system", "Be brief.");
      await page.fill("#max_tokens", "4");
      await page.focus("#question");
      await typeAndEnter(page, "Hello?");
    })(),
  ]);
  seen.body = asked.postDataJSON();
  seen.brief = await answered(page);
  // By mouse: whatever button goes away, the focus ends where the next question is typed.
  await page.click("#new");
  await page.click("#examples button");
  await answered(page);
  seen.focusedClicked = await focused(page);
  console.log(JSON.stringify({ ...seen, requests, complaints }));
} finally {
  await context.close();
  discard();
}
