"""Two hundred damaged copies of a GGUF artifact through inspect, verify and chat, in processes of their own.

A crash or a hang of llama.cpp ends such a process, so it is seen and its seed is named.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from export.gguf import export_gguf
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.quant import GGUF, find_recipe
from tests.runtimes.llama_cpp.mutations import Regions, mutate

REPOSITORY = Path(__file__).parents[3]
SEEDS, BATCH = range(200), 100
TIMEOUT_S = 240

# argv: the artifact's folder, its checkpoint's, a folder to work in, the seeds. One line of JSON per seed.
WORKER = """
import json, shutil, sys, traceback
from pathlib import Path
import torch
from benchmarks.fidelity.verify import limits_of, verify
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import FoxEdgeError
from fox_edge.inspection import inspect
from fox_edge.tokenizer import Tokenizer
from runtimes.base import SessionOptions, open_session
from runtimes.chat.chat import Chat
from tests.runtimes.llama_cpp.mutations import Regions, mutate
torch.set_num_threads(1)
source, checkpoint, folder = Artifact.open(Path(sys.argv[1])), Checkpoint.open(sys.argv[2]), Path(sys.argv[3])
data = source.model_path.read_bytes()
regions = Regions.of(source.model_path)
shutil.copytree(source.path, folder)
TEXT = "the fox and the hello world user model, how many are there in all each day " * 6
def chat(artifact):
    options = SessionOptions(threads=1, context=64)
    with open_session(artifact, options) as session:
        chat = Chat(session, Tokenizer.from_folder(artifact.path), max_tokens=3)
        return "".join(chat.ask("how many?"))
def told(action):
    try:
        return ["ok", str(action())]
    except FoxEdgeError as error:
        return ["sentence", str(error)]
    except Exception:
        return ["bug", traceback.format_exc()]
for seed in map(int, sys.argv[4:]):
    print(json.dumps({"seed": seed}), flush=True)
    path = folder / source.manifest.model_file
    path.unlink()  # a file that someone still has mapped must not change
    path.write_bytes(mutate(data, regions, seed) if seed >= 0 else data)
    artifact = Artifact.open(folder)
    def report():
        found = verify(artifact, checkpoint, limits_of(artifact), text=TEXT, threads=1)
        return json.dumps({c["name"]: c["detail"] for c in found["checks"] if not c["passed"]})
    results = {"inspect": told(lambda: inspect(str(folder))["parameters"]), "verify": told(report)}
    results["chat"] = told(lambda: chat(artifact))
    print(json.dumps({"seed": seed, "results": results}), flush=True)
"""


@pytest.fixture(scope="module")
def artifact(tiny_256: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_gguf(
        tiny_256, tmp_path_factory.mktemp("whole") / "out", find_recipe(GGUF, "int4"), rounding="nearest"
    )


def results_of(artifact: Artifact, checkpoint: Checkpoint, seeds: range, folder: Path) -> dict[int, Any]:
    """What each seed's copy came to; fails with the seed at which the process died or stood still."""
    command = [sys.executable, "-c", WORKER, str(artifact.path), str(checkpoint.path), str(folder)]
    done = subprocess.Popen(
        [*command, *map(str, seeds)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = done.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        done.kill()
        out, err = done.communicate()
    lines = [json.loads(line) for line in out.splitlines()]
    assert done.returncode == 0, (
        f"status {done.returncode} at seed {lines[-1]['seed'] if lines else '?'}: {err}"
    )
    return {line["seed"]: line["results"] for line in lines if "results" in line}


def test_the_same_seed_damages_alike(artifact: Artifact) -> None:
    data, regions = artifact.model_path.read_bytes(), Regions.of(artifact.model_path)
    assert mutate(data, regions, 5) == mutate(data, regions, 5) != mutate(data, regions, 6)
    assert all(mutate(data, regions, seed) != data for seed in SEEDS)


def test_an_undamaged_copy_passes(artifact: Artifact, tiny_256: Checkpoint, tmp_path: Path) -> None:
    found = results_of(artifact, tiny_256, range(-1, 0), tmp_path / "copy")[-1]
    assert found["verify"] == ["ok", "{}"]
    assert found["inspect"] == ["ok", str(tiny_256.config.num_parameters())]
    assert found["chat"][0] == "ok"


_outcomes: Counter[str] = Counter()


@pytest.mark.parametrize("first", SEEDS[::BATCH])
def test_damage_is_seen_and_told_in_one_sentence(
    first: int, artifact: Artifact, tiny_256: Checkpoint, tmp_path: Path
) -> None:
    seeds = SEEDS[first : first + BATCH]
    found = results_of(artifact, tiny_256, seeds, tmp_path / "copy")
    assert list(found) == list(seeds)
    for seed, results in found.items():
        for what, (outcome, text) in results.items():
            assert outcome != "bug", f"seed {seed}, {what}: {text}"
            if outcome == "sentence":
                assert "\n" not in text and 10 < len(text) < 600, f"seed {seed}, {what}: {text!r}"
        # Whatever was damaged, its sha256 is not the manifest's; the other checks are all still told.
        failed = json.loads(results["verify"][1])
        assert artifact.manifest.model_file in failed["files"], f"seed {seed}"
        assert all("\n" not in detail for detail in failed.values()), f"seed {seed}: {failed}"
        outcome, text = results["chat"]
        if outcome == "sentence":
            assert re.search(r"\.gguf: |logits are not numbers|manifest", text), f"seed {seed}: {text}"
        _outcomes["numbers" if "not numbers" in text else outcome] += 1


def test_the_damage_was_of_all_kinds() -> None:
    """Else the seeds prove little: some files still chat, some give no numbers, most are refused."""
    if _outcomes.total() == len(SEEDS):  # not when only some of the batches were asked for
        assert _outcomes["ok"] >= 10 and _outcomes["numbers"] >= 2 and _outcomes["sentence"] >= 100
