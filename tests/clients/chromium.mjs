// A headless Chromium with an empty profile that is thrown away, and nothing that would ask the network.

import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { chromium } from "playwright-core";

const FLAGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

export async function launch(executablePath, options) {
  const profile = mkdtempSync(join(tmpdir(), "fox-edge-chromium-"));
  const context = await chromium.launchPersistentContext(profile, { executablePath, args: FLAGS, ...options });
  return { context, discard: () => rmSync(profile, { recursive: true, force: true }) };
}
