// Drives Chromium through the page and prints what was seen as JSON: opens it, asks the example, asks it again in
// a new chat, and goes on in that chat.
//
//   node browser.mjs CHROMIUM URL [SCREENSHOT.png]

import { launch } from "./chromium.mjs";

const [executablePath, url, screenshot] = process.argv.slice(2);
const { context, discard } = await launch(executablePath, {
  viewport: { width: 900, height: 620 },
});
const requests = [];
const complaints = [];

async function settled(page) {
  await page.waitForFunction(() => !["loading", "answering"].includes(document.body.dataset.state), null, {
    timeout: 60_000,
  });
  return page.evaluate(() => document.body.dataset.state);
}

/** The last answer, when it is there in full. */
async function answered(page) {
  await settled(page);
  return page.evaluate(() => {
    const last = [...document.querySelectorAll(".answer")].at(-1);
    return {
      text: last.querySelector(".text").textContent,
      ids: (last.dataset.ids ?? "").split(" ").filter(Boolean).map(Number),
      figures: last.querySelector(".figures, .failed")?.textContent ?? "",
    };
  });
}

try {
  const page = context.pages()[0] ?? (await context.newPage());
  context.on("request", (request) => requests.push(request.url()));
  page.on("console", (message) => message.type() === "error" && complaints.push(message.text()));
  page.on("pageerror", (error) => complaints.push(String(error)));
  await page.goto(url);
  const seen = { state: await settled(page), answers: [] };
  if (seen.state === "ready") {
    seen.facts = await page.evaluate(() =>
      Object.fromEntries([...document.querySelectorAll("dd")].map((dd) => [dd.id, dd.textContent])),
    );
    seen.isolated = await page.evaluate(() => self.crossOriginIsolated);
    const question = await page.textContent("#example");
    await page.fill("#question", question);
    await page.press("#question", "Enter");
    seen.question = question;
    seen.answers.push(await answered(page));
    if (screenshot) await page.screenshot({ path: screenshot });
    await page.click("#new");
    await page.click("#example");
    seen.answers.push(await answered(page));
    await page.fill("#question", "And how many did she give away?");
    await page.click("#send");
    seen.answers.push(await answered(page));
    seen.turns = await page.locator("#turns li").count();
  } else {
    seen.failed = await page.textContent("#hint.failed");
  }
  console.log(JSON.stringify({ ...seen, requests, complaints }));
} finally {
  await context.close();
  discard();
}
