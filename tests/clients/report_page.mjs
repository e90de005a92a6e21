// Opens a report in Chromium and prints what was seen as JSON.
//
//   node report_page.mjs CHROMIUM FILE.html WIDTH HEIGHT light|dark screen|print [SCREENSHOT.png]

import { resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { launch } from "./chromium.mjs";

const [executablePath, file, width, height, colorScheme, media, screenshot] = process.argv.slice(2);
const { context, discard } = await launch(executablePath, {
  viewport: { width: Number(width), height: Number(height) },
  colorScheme,
  deviceScaleFactor: screenshot ? 2 : 1,
});
const requests = [];
const complaints = [];

try {
  const page = context.pages()[0] ?? (await context.newPage());
  await page.emulateMedia({ media, colorScheme });
  context.on("request", (request) => requests.push(request.url()));
  page.on("console", (message) => complaints.push(message.text()));
  page.on("pageerror", (error) => complaints.push(String(error)));
  page.on("dialog", (dialog) => (complaints.push(`dialog: ${dialog.message()}`), dialog.dismiss()));
  const url = pathToFileURL(resolve(file)).href;
  await page.goto(url);
  const seen = await page.evaluate(() => {
    const root = document.documentElement;
    const cut = (text) => {
      const svg = text.ownerSVGElement.getBoundingClientRect();
      const box = text.getBoundingClientRect();
      return box.left < svg.left - 1 || box.right > svg.right + 1;
    };
    return {
      title: document.title,
      sideways: root.scrollWidth - root.clientWidth,
      ground: getComputedStyle(document.body).backgroundColor,
      cards: [...document.querySelectorAll(".card h3")].map((h) => h.textContent),
      drawings: document.querySelectorAll("svg").length,
      cutTexts: [...document.querySelectorAll("svg text")].filter(cut).map((t) => t.textContent),
      hatched: [...document.querySelectorAll("rect.projected, rect.published")].map(
        (bar) => getComputedStyle(bar).fill,
      ),
      smallest: Math.min(
        ...[...document.querySelectorAll("svg text")].map((t) => t.getBoundingClientRect().height),
      ),
    };
  });
  // The tables scroll in themselves, and a keyboard gets there.
  seen.regions = await page.evaluate(() =>
    [...document.querySelectorAll(".scroll")].map((box) => ({
      focusable: box.tabIndex === 0,
      scrolls: box.scrollWidth > box.clientWidth,
    })),
  );
  if (screenshot) await page.screenshot({ path: screenshot, fullPage: true });
  console.log(JSON.stringify({ ...seen, url, requests, complaints }));
} finally {
  await context.close();
  discard();
}
