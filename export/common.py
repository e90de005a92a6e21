"""What every exporter does around its model file: side files, the card, the manifest, the finish.

Knows the artifact folder and the checkpoint's descriptive files; not how any format stores weights, and
not what verification looks at: that is a function it is handed.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import fox_edge
from fox_edge.artifact import MANIFEST, Artifact, ArtifactWriter, Manifest, TensorRecord
from fox_edge.checkpoint import Checkpoint
from fox_edge.quant import EMBEDDING, GGUF, Assignment, Recipe

# done bytes, total bytes: of the checkpoint's weights as they are read.
Progress = Callable[[int, int], None]
# Looks at the finished folder, raises VerificationError or returns what the manifest is to say.
Verify = Callable[[Artifact], dict[str, Any]]

CARD = "README.md"
CHAT_TEMPLATE = "chat_template.jinja"
_MAX_CARD_BYTES = 1 << 20
_HEADROOM_BYTES = 1 << 20


def versions(*packages: str) -> dict[str, str]:
    """The version of fox-edge and of each named distribution ('?' for one that is not installed)."""
    found = {"fox-edge": fox_edge.__version__}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "?"
    return found


def tensor_bytes(name: str, shape: tuple[int, ...], assignment: Assignment) -> int:
    """Bytes that a tensor takes under its type; raises RecipeError when its rows are no whole blocks."""
    rows = 1
    for n in shape[:-1]:
        rows *= n
    return rows * assignment.type.row_bytes(name, shape[-1])


def needed_bytes(checkpoint: Checkpoint, assignments: Mapping[str, Assignment]) -> int:
    """Disk space for an artifact, for `ArtifactWriter.need`: weights, tokenizer (twice: its files, and
    again inside the model file) and some headroom."""
    shapes = checkpoint.shapes()
    weights = sum(tensor_bytes(name, shapes[name], given) for name, given in assignments.items())
    side = sum(path.stat().st_size for path in checkpoint.tokenizer_files())
    return weights + 2 * side + _HEADROOM_BYTES


def make_manifest(
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    model_file: str,
    tensors: Iterable[TensorRecord],
    checkpoint_sha256: str,
    versions: Mapping[str, str],
    notes: Iterable[str] = (),
    rounding: Mapping[str, Any] | None = None,
    pte: dict[str, Any] | None = None,
) -> Manifest:
    """The manifest of an export, before its files are hashed; the checkpoint's notes come before `notes`.

    `rounding` says how the weights were really rounded, and by which text.
    """
    config = checkpoint.config
    return Manifest(
        format=recipe.format,
        quant=recipe.name,
        model_file=model_file,
        tied=config.tied,
        parameters=config.num_parameters(),
        context=config.max_positions,
        checkpoint=checkpoint.name,
        checkpoint_sha256=checkpoint_sha256,
        tensors=tuple(tensors),
        # As JSON has it, so that a manifest equals what is read back.
        recipe=json.loads(json.dumps({**asdict(recipe), **(rounding or {})})),
        versions=dict(versions),
        notes=(*checkpoint.notes, *notes),
        pte=pte,
    )


def copy_side_files(writer: ArtifactWriter, checkpoint: Checkpoint) -> None:
    """Write config.json and generation_config.json (token ids as the tokenizer has them, whatever the
    checkpoint's own say), the tokenizer files and the chat template into the writer's folder."""
    tokenizer, folder = checkpoint.tokenizer(), writer.folder
    for path in checkpoint.tokenizer_files():
        shutil.copyfile(path, folder / path.name)
    # Always as a file of its own: a fallback template would be lost to those who open the folder without us.
    (folder / CHAT_TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    config = checkpoint.config.to_hf() | {f"{k}_token_id": v for k, v in ids.items() if v is not None}
    config["torch_dtype"] = str(checkpoint.dtype(EMBEDDING)).removeprefix("torch.")
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", checkpoint.generation_config())


def finish(
    writer: ArtifactWriter, checkpoint: Checkpoint, manifest: Manifest, verify: Verify | None
) -> Artifact:
    """Verify the finished folder, write the card, commit.

    `verify` is handed the artifact as it will be, but for file hashes; its manifest is only written by the
    commit, so that a process killed in mid-verification leaves no manifest behind. When it raises, leaving
    the writer's context deletes everything.
    """
    if verify is not None:
        manifest = replace(manifest, verification=verify(Artifact(writer.folder, manifest)))
    (writer.folder / CARD).write_text(model_card(checkpoint, manifest), encoding="utf-8")
    return writer.commit(manifest)


def license_of(checkpoint: Checkpoint) -> str | None:
    """The licence id that the checkpoint's own card states in its front matter."""
    path = checkpoint.path / CARD
    if not path.is_file() or path.stat().st_size > _MAX_CARD_BYTES:
        return None
    front = re.match(r"---\r?\n(.*?)\r?\n---", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = re.search(r"^license:\s*['\"]?([A-Za-z0-9.+-]+)", front[1], re.MULTILINE) if front else None
    return found[1] if found else None


def hub_id(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """(owner, name) of a checkpoint that was named by its hub id."""
    parts = checkpoint.name.split("/")
    return (parts[0], parts[1]) if len(parts) == 2 and all(parts) else None


def model_card(checkpoint: Checkpoint, manifest: Manifest) -> str:
    """The artifact's README.md: what it is, how big, what was checked, how to run it."""
    front = [
        f"library_name: {manifest.format}",
        "tags: [fox-edge, quantized]",
        "pipeline_tag: text-generation",
    ]
    licence, hub = license_of(checkpoint), hub_id(checkpoint)
    if licence:
        front.append(f"license: {licence}")
    if hub:
        front.append(f"base_model: {'/'.join(hub)}")
    title = f"# {manifest.checkpoint}, {manifest.format.upper()} {manifest.quant}"
    blocks = [
        "\n".join(["---", *front, "---"]),
        title,
        f"Exported by fox-edge {manifest.versions.get('fox-edge', '?')}. `{MANIFEST}` lists every tensor "
        "with its type, the digest of the checkpoint, and the sha256 of each file.",
        _facts_table(manifest),
    ]
    if manifest.verification is not None:
        blocks.append(_verification_line(manifest.verification))
    if manifest.notes:
        blocks.append("\n".join(["## Notes", "", *(f"- {note}" for note in manifest.notes)]))
    commands = ["fox-edge chat FOLDER", "fox-edge bench FOLDER"]
    if manifest.format == GGUF:
        commands.append(
            f"llama-server -m FOLDER/{manifest.model_file} --jinja  # or any program that reads GGUF"
        )
    blocks.append("\n".join(["## Use", "", "```sh", *commands, "```"]))
    return "\n\n".join(blocks) + "\n"


def _facts_table(manifest: Manifest) -> str:
    """Size and storage of the weights, type by type."""
    by_type: dict[str, list[TensorRecord]] = {}
    for record in manifest.tensors:
        by_type.setdefault(record.type, []).append(record)
    rows = [
        ("parameters", f"{manifest.parameters:,}"),
        ("weights", f"{manifest.weight_bytes:,} bytes, {manifest.bits_per_weight:.2f} bits per parameter"),
        ("embedding and head", "one tied matrix, stored once" if manifest.tied else "two matrices"),
        ("context", f"{manifest.context:,} tokens"),
        *(
            (f"stored as {name}", f"{len(records)} tensors, {sum(r.bytes for r in records):,} bytes")
            for name, records in by_type.items()
        ),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows)])


def _verification_line(report: dict[str, Any]) -> str:
    """One paragraph on what verification found."""
    words = ["Checked against the checkpoint before it was written"]
    kl, top1 = report.get("mean_kl_nats"), report.get("top1_agreement_percent")
    if isinstance(kl, int | float):
        words.append(f"mean KL divergence {kl:.5f} nats per token")
    if isinstance(top1, int | float):
        words.append(f"same most likely token {top1:.1f} % of the time")
    return ", ".join(words) + "."


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """One thread per torch operator: the exporters' own threads are what runs side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_at(handle: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at a place of an open file; a write that stops short is continued."""
    while data:
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
