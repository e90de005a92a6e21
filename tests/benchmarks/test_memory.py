"""The benchmark of predicted memory: what it asks for, what it measures, what its table says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import memory as module
from benchmarks.memory import CASES, compare, flags, main, table
from benchmarks.processes.launch import run_worker
from benchmarks.readme_runs import memory_table
from export.gguf import export_gguf
from fox_edge import cli
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.quant import GGUF, find_recipe


@pytest.fixture(scope="module")
def artifact(tiny_256: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("memory") / "gguf-int4"
    return export_gguf(tiny_256, folder, find_recipe(GGUF, "int4"), rounding="nearest")


@pytest.mark.parametrize("session", [session for _, session in CASES])
def test_every_case_is_a_command(session: dict[str, object]) -> None:
    args = cli.parse(["inspect", "x", *flags(session)])
    chosen = {name: value for name, value in cli._session(args).items() if name in session}
    assert chosen == session


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_a_worker_fills_the_context_and_tells_its_peak(artifact: Artifact) -> None:
    job = {"task": "memory", "subject": str(artifact.path), "context": 100, "session": {}, "threads": 1}
    found = run_worker(job)
    assert 10e6 < found["before_bytes"] < found["opened_peak_bytes"] <= found["peak_rss_bytes"]
    assert found["anonymous_bytes"] + found["file_bytes"] <= found["peak_rss_bytes"] * 1.02


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_predicted_and_measured_are_of_the_same_thing(artifact: Artifact) -> None:
    """Within a fifth: here nearly all is the interpreter; the benchmark holds real models to less."""
    row = compare(str(artifact.path), 256, {"kv": "q8_0"}, threads=1)
    assert (row["runtime"], row["kv"], row["artifact"]) == ("llama.cpp", "q8_0", "gguf-int4")
    assert 0.8 < row["ratio"] < 1.2
    assert "q8_0" in table([row]) and "q8_0" in memory_table({"rows": [row], "machine": MACHINE})


MACHINE = {"cpu": "a processor", "cores": 2, "memory_bytes": 2**30, "python": "3", "versions": {}}


def test_the_whole_command(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {
        "runtime": "llama.cpp",
        "kv": "f16",
        "context": 256,
        "session": {"repack": False},
        "predicted": {"total_bytes": 99},
        "measured": {"peak_rss_bytes": 100},
        "ratio": 0.99,
    }
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(module, "random_exports", lambda work, shape, exports: None)
    monkeypatch.setattr(module, "compare", lambda target, context, *_: asked.append((target, context)) or row)
    monkeypatch.setattr(sys, "argv", ["memory", "w", "--results", str(tmp_path / "r.json"), "--context", "7"])
    main()
    assert asked[0] == ("w/gguf-int4", 7) and asked[-1] == ("torch:w/checkpoint", 7)
    results = json.loads((tmp_path / "r.json").read_text())
    assert len(results["rows"]) == len(CASES) and results["command"].endswith(
        "w --results r.json --context 7"
    )
    assert "repack False" in capsys.readouterr().out
