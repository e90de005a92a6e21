"""Which GGUF to ship: bytes, what is left of the model and speed, ours beside llama.cpp's own quantizer.

    python -m benchmarks.gguf_rounding WORK --data TEST.jsonl --results FILE.json [--llama-cpp BUILD]
        [--part fidelity|speed]

WORK is a scratch folder; TEST.jsonl is GSM8K's test split, on whose text every model's logits are compared
with the float32 reference's. `fidelity` exports the embedded model by every recipe of CANDIDATES and, when
BUILD is llama.cpp's build folder, by llama-quantize with llama-imatrix on the very text that ours are
calibrated on; it holds each of ours against the best of theirs that is as large or larger. `speed` runs the
presets and their rivals at Fox-1's exact shape, with random weights rounded to nearest, which take as much
time as any others. Minutes each; not part of the tests.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.machine import machine
from benchmarks.common.results import medians, study_command, write_results
from benchmarks.fidelity.reference import ReferenceScorer
from benchmarks.processes.commands import fox_edge, random_checkpoint, run
from benchmarks.rounding import WINDOW, WINDOWS, measured, windows
from fox_edge.artifact import MANIFEST, Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.progress import say
from fox_edge.quant import GGUF, PRESETS, mixed_rules
from runtimes.llama_cpp.gguf_file import GgufFile

# The body's type, then those of the parts of quant.PARTS.
CANDIDATES = (
    "q8_0",
    "q6_k",
    "q5_k, tied q6_k",
    "q5_0, tied q6_k, kv q8_0, ends q8_0",
    "q5_0, tied q8_0, kv q8_0, ends q8_0",
    "q4_k",
    "q4_k, tied q6_k",
    "q4_k, tied q6_k, kv q6_k, ends q6_k",
    "q4_k, tied q6_k, kv q5_0, ends q8_0, down iq4_nl",
    "q4_k, tied q8_0, kv q8_0, ends q8_0, down q5_0",
    "q4_0, tied q6_k, kv q5_0, ends q8_0",
    "q4_0, tied q6_k, kv q5_0, ends q5_0",
    "q4_0, tied q8_0, kv q8_0, ends q8_0",
    "iq4_nl, tied q6_k, kv q5_0, ends q8_0",
    "iq4_xs, tied q6_k, kv q5_0, ends q8_0, down iq4_nl",
    "iq4_xs, tied q6_k, kv q5_0, ends q5_0, down iq4_nl",
    "iq4_xs, tied q5_k, kv q5_0, ends q8_0, down iq4_nl",
    "q3_k",
    "q3_k, tied q6_k, kv q5_0, ends q8_0",
    "q3_k, tied q6_k, kv q5_0, ends q8_0, edges q4_k, down iq4_nl",
    "q3_k, tied q5_k, kv q5_0, ends q8_0, edges q4_k, down iq4_nl",
    "q3_k, tied q5_k, kv q5_0, ends q5_0, edges q4_k",
    "q3_k, tied q4_k, kv q4_0, ends q5_0, edges q4_k",
    "q2_k, tied q5_k, kv q4_0, ends q5_0, edges q4_k",
    "q2_k, tied q4_k, kv q4_0, ends q5_0, edges q4_k",
)
# Those whose speed is of interest: the presets, and what could stand in their place.
FAST = (
    "q8_0",
    "q5_0, tied q6_k, kv q8_0, ends q8_0",
    "q4_k",
    "q4_k, tied q6_k, kv q5_0, ends q8_0, down iq4_nl",
    "q4_0, tied q6_k, kv q5_0, ends q5_0",
    "q4_0, tied q8_0, kv q8_0, ends q8_0",
    "iq4_nl, tied q6_k, kv q5_0, ends q8_0",
    "iq4_xs, tied q6_k, kv q5_0, ends q8_0, down iq4_nl",
    "q3_k, tied q5_k, kv q5_0, ends q8_0, edges q4_k, down iq4_nl",
    "q2_k, tied q5_k, kv q4_0, ends q5_0, edges q4_k",
)
# llama-quantize's names, each with its imatrix.
PEERS = (
    *("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_NL", "IQ4_XS"),
    *("Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "Q2_K", "Q2_K_S", "IQ2_M"),
)
# So that sums are made in one order.
_ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# What is promised about them: at most so much of the divergence of the peer's best of the same bytes or more.
GOAL = 0.5
PROMPT_TOKENS, DECODE_TOKENS, CONTEXT = 234, 64, 1024


def recipe_text(candidate: str) -> str:
    """The recipe file of one of CANDIDATES."""
    body, _, parts = candidate.partition(", ")
    rules = [f'"{pattern}" = "{type_name}"' for pattern, type_name in mixed_rules(parts)]
    limits = ["[limits]", "mean_kl_nats = 10", "greedy_tokens = 0"]
    return "\n".join([f'default = "{body}"', "[tensors]", *rules, *limits, ""])


def folder_name(candidate: str) -> str:
    """A folder's name for one of CANDIDATES."""
    return "gguf-" + candidate.replace(", ", "-").replace(" ", "-")


def export(work: Path, checkpoint: Path | str, candidate: str, rounding: str | None) -> Path:
    """Export a checkpoint by one of CANDIDATES into the work folder."""
    name = folder_name(candidate)
    recipe = work / f"{name}.toml"
    recipe.write_text(recipe_text(candidate), encoding="utf-8")
    how = ("--rounding", rounding) if rounding else ()
    fox_edge("export", checkpoint, work / name, "--format", "gguf", "--quant", recipe, "--replace", *how)
    return work / name


def preset_of(candidate: str) -> str | None:
    """The preset that this is, if it is one."""
    shapes = Checkpoint.open("nano").shapes()
    text = recipe_text(candidate)
    for (format, name), preset in PRESETS.items():
        if format == GGUF and _types(preset.resolve(shapes)) == _types(_recipe(text).resolve(shapes)):
            return name
    return None


# --- the peer ------------------------------------------------------------------------------------------


def peer_exports(work: Path, checkpoint: Checkpoint, build: Path) -> Iterator[Path]:
    """The embedded model by llama-quantize, with llama-imatrix's importance of our calibration text."""
    from fox_edge.calibration import read_calibration

    whole = work / "gguf-f32"
    if not whole.exists():
        fox_edge("export", "nano", whole, "--format", "gguf", "--quant", "f32")
    artifact = Artifact.open(whole)
    tokenizer = checkpoint.tokenizer()
    text = read_calibration(tokenizer, checkpoint.config.max_positions)
    (work / "calibration.txt").write_text(tokenizer.decode(text.windows[:, 1:].flatten().tolist()), "utf-8")
    imatrix = work / "peer-imatrix.gguf"
    run(
        [
            *(build / "bin" / "llama-imatrix", "-m", artifact.model_path, "-f", work / "calibration.txt"),
            *("-o", imatrix, "-c", text.windows.shape[1], "-t", 1, "--parse-special"),
        ],
        env=_ONE_THREAD,
    )
    for quant in PEERS:
        file = work / f"peer-{quant}.gguf"
        quantize = (build / "bin" / "llama-quantize", "--imatrix", imatrix, artifact.model_path)
        run([*quantize, file, quant, 1], env=_ONE_THREAD)
        yield as_artifact(work / f"peer-{quant}", artifact, file)


def as_artifact(folder: Path, whole: Artifact, file: Path) -> Path:
    """Another tool's GGUF of the same model in a folder that our runtime opens."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole.path, folder, ignore=shutil.ignore_patterns("*.gguf"))
    file.rename(folder / whole.manifest.model_file)
    fields = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    stored = GgufFile(Artifact.open(folder))
    for tensor in fields["tensors"]:
        tensor["type"], tensor["bytes"] = stored.stored(tensor["name"])
    stored.close()
    (folder / MANIFEST).write_text(json.dumps(fields), encoding="utf-8")
    return folder


# --- what is said of it ----------------------------------------------------------------------------------


def ratios(ours: Iterable[Mapping[str, Any]], peers: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each of ours against the peer's: bytes and mean KL over those of the best that is no smaller.

    Of those within 6 % of its bytes the one with the least divergence; else the next larger one.
    """
    found, peers = [], list(peers)
    for row in ours:
        size = row["weight_bytes"]
        larger = [peer for peer in peers if peer["weight_bytes"] >= size]
        near = [peer for peer in larger if peer["weight_bytes"] <= 1.06 * size]
        if not larger:
            continue
        peer = (
            min(near, key=lambda p: p["mean_kl_nats"])
            if near
            else min(larger, key=lambda p: p["weight_bytes"])
        )
        found.append(
            {
                "ours": row["recipe"],
                "peer": peer["artifact"].removeprefix("peer-"),
                "bytes": size / peer["weight_bytes"],
                "mean_kl": row["mean_kl_nats"] / peer["mean_kl_nats"],
            }
        )
    return found


def fidelity(work: Path, data: Path, build: Path | None) -> dict[str, Any]:
    """The embedded model by all recipes, and by the peer's."""
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint.open("nano")
    reference, texts = ReferenceScorer(checkpoint), windows(checkpoint.tokenizer(), data)

    def row(folder: Path) -> dict[str, Any]:
        found = measured(folder, reference, texts)
        say(f"{folder.name}: {found['weight_bytes']:,} bytes, {found['mean_kl_nats']:.5f} nats")
        return found

    ours = [row(export(work, "nano", name, None)) | {"recipe": name} for name in CANDIDATES]
    peers = [row(folder) for folder in peer_exports(work, checkpoint, build)] if build else []
    return {"positions": WINDOWS * WINDOW, "ours": ours, "peers": peers, "ratios": ratios(ours, peers)}


# What is kept of `bench`'s rows.
SPEED_KEYS = (
    *("bytes", "bits_per_weight", "prompt_tokens_per_s", "decode_tokens_per_s"),
    *("peak_rss_bytes", "anonymous_rss_bytes", "rounds"),
)


def speed(work: Path, rounds: int) -> list[dict[str, Any]]:
    """FAST at Fox-1's exact shape: bytes, prompt and decode speed, medians of interleaved rounds."""
    checkpoint = random_checkpoint(work)
    folders = []
    for name in FAST:
        folder = work / folder_name(name)
        folders.append(folder if folder.exists() else export(work, checkpoint, name, "nearest"))
    found = [
        fox_edge(
            *("bench", *folders, "--prompt-tokens", PROMPT_TOKENS, "--decode-tokens", DECODE_TOKENS),
            *("--context", CONTEXT, "--repeats", 1),
        )["results"]
        for _ in range(rounds)
    ]
    rows = medians(found)
    return [
        {"recipe": name, "artifact": Path(row["artifact"]).name, **{key: row[key] for key in SPEED_KEYS}}
        for name, row in zip(FAST, rows, strict=True)
    ]


def _recipe(text: str) -> Any:
    import tempfile

    from fox_edge.quant import read_recipe

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "candidate.toml"
        path.write_text(text, encoding="utf-8")
        return read_recipe(path, GGUF)


def _types(assignments: Mapping[str, Any]) -> dict[str, str]:
    return {name: given.type.name for name, given in assignments.items()}


def main() -> None:
    """Parse, measure, write the results file; a part that is not asked for keeps what the file has."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gguf_rounding", description=__doc__.splitlines()[0]
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--llama-cpp", type=Path, metavar="BUILD")
    parser.add_argument("--part", choices=("fidelity", "speed"))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.results.read_text(encoding="utf-8")) if args.results.exists() else {}
    for part in ("fidelity", "speed") if args.part is None else (args.part,):
        if part == "fidelity":
            if args.data is None:
                parser.error("--data is needed for the part fidelity")
            found: Any = fidelity(args.work / "nano", args.data, args.llama_cpp)
        else:
            found = {"rows": speed(args.work, args.rounds)}
        results[part] = {
            "command": study_command("gguf_rounding"),
            "machine": machine(),
        } | found
        write_results(args.results, results)


if __name__ == "__main__":
    main()
