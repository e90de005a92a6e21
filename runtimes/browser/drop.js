// What a user dropped or chose, as files with their paths. Knows the browser's ways to hand out files; not models.

const MOST_FILES = 500; // an exported folder has about fifteen

/** The files of an <input type="file">: [[path, File], ...]. */
export function listedFiles(list) {
  return check([...list].map((file) => [file.webkitRelativePath || file.name, file]));
}

/** Everything in a DataTransfer, folders and what is in them too: [[path, File], ...]. */
export async function droppedFiles(transfer) {
  // To be asked for before anything is awaited: then the list is emptied.
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return listedFiles(transfer.files);
  const found = [];
  for (const entry of entries) await walk(entry, found);
  return check(found);
}

async function walk(entry, found) {
  if (found.length > MOST_FILES) return;
  if (entry.isFile) {
    found.push([entry.fullPath.replace(/^\//, ""), await new Promise((...both) => entry.file(...both))]);
    return;
  }
  const reader = entry.createReader();
  // A reader gives its entries in portions, and none when it has given all.
  for (;;) {
    const portion = await new Promise((...both) => reader.readEntries(...both));
    if (!portion.length) return;
    for (const inside of portion) await walk(inside, found);
  }
}

function check(files) {
  if (files.length > MOST_FILES) throw new Error(`A model's folder has some fifteen files, and this has more than ${MOST_FILES}.`);
  return files;
}
