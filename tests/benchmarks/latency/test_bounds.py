"""A benchmark as a device: what fits is measured under its cap, what does not is told with the sum."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.devices import profiles
from benchmarks.devices.compute import INT8, Compute
from benchmarks.devices.profiles import PROFILES, Profile
from benchmarks.latency import bounds as module
from benchmarks.latency.bench import bench, bench_text
from benchmarks.latency.bounds import Bounds
from fox_edge import cli
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import FoxEdgeError
from fox_edge.processors import available_cores
from tests.benchmarks.conftest import make_checkpoint

RATE = 1e12
# The small model takes what PyTorch takes, about 300 MB; the wide one has 300 MB of weights besides.
BOX = Profile("box", "a box", 1, 550_000_000, 384, 10e9, "its label")
WIDE = 1 << 18


@pytest.fixture(autouse=True)
def _box(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device of our own among the others, and no time spent on measuring arithmetic."""
    known = {**PROFILES, "box": BOX}
    monkeypatch.setattr(profiles, "PROFILES", known)
    monkeypatch.setattr(module, "PROFILES", known)
    fake = [Compute(kind, RATE, "made up", 1, {"made up": RATE}) for kind in ("float32", "bf16", INT8)]
    monkeypatch.setattr(module, "measure_compute", lambda *_: fake)
    yield


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model whose sum passes the box: only its headers are read, so its file can be a hole."""
    folder = tmp_path_factory.mktemp("wide") / "wide"
    made = make_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"intermediate_size": WIDE}
    (folder / "config.json").write_text(json.dumps(config))
    names = {name: shape for name, shape in made.config.tensor_shapes().items() if ".mlp." in name}
    write_hole(folder / "model.safetensors", made, names, WIDE)
    return Checkpoint.open(folder)


def write_hole(path: Path, made: Checkpoint, wide: dict[str, tuple[int, ...]], size: int) -> None:
    """A safetensors file of bfloat16 zeros that takes no room on the disk, its MLPs so many wide."""
    header: dict[str, Any] = {}
    at = 0
    for name, shape in made.config.tensor_shapes().items():
        if name in wide:
            shape = tuple(size if n == made.config.intermediate_size else n for n in shape)
        count = 2
        for n in shape:
            count *= n
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + count]}
        at += count
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def run(*artifacts: str, **more: Any) -> dict[str, Any]:
    return bench(artifacts, prompt_tokens=20, decode_tokens=4, repeats=1, **more)


def test_what_does_not_fit_is_a_row_with_the_sum_and_the_others_go_on(
    wide: Checkpoint, checkpoint: Checkpoint
) -> None:
    result = run(f"torch:{wide.path}", f"torch:{checkpoint.path}", profile="box")
    refused, measured = json.loads(json.dumps(result))["results"]
    weights = 2 * wide.config.num_parameters()
    assert f"does not fit box: at 384 tokens {weights / 1e6:,.0f} MB of weights + " in refused["error"]
    assert refused["error"].endswith("but 550 MB can be had there")
    assert "decode_tokens_per_s" not in refused and "error" not in measured
    assert measured["peak_rss_bytes"] < BOX.memory_bytes
    for row in (refused, measured):
        assert (row["profile"], row["memory_cap_bytes"], row["threads"]) == ("box", BOX.memory_bytes, 1)
    # What was not started was not measured, but its ceiling there is known all the same.
    projected = {p["profile"]: p for p in refused["projections"]}
    assert projected["box"]["fits"] is False and projected["laptop"]["decode_tokens_per_s"] is None
    assert projected["laptop"]["ceiling_tokens_per_s"] == pytest.approx(89.6e9 / refused["bytes_per_token"])
    settings = result["settings"]
    assert (settings["profile"], settings["context"], settings["threads"]) == ("box", 384, 1)
    assert "watched" in settings["memory_cap_kept_by"]
    text = bench_text(result)
    assert refused["error"] in text
    assert "as box: 1 threads (the device: 1), a context of 384, at most 550 MB (" in text
    assert f"torch:{wide.path}, computed, not measured: does not fit " in text


def test_what_grows_past_the_cap_after_all_is_ended_and_the_others_go_on(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime whose sum was too small: nobody reckons, and the cap is below what PyTorch takes."""
    monkeypatch.setattr(module, "needs_of", lambda *_: {})
    tight = Profile("box", "a box", 1, 60_000_000, 384, 10e9, "its label")
    monkeypatch.setitem(profiles.PROFILES, "box", tight)  # type: ignore[attr-defined]
    result = run(f"torch:{checkpoint.path}", profile="box")
    [row] = result["results"]
    assert "ended at its memory cap: it held" in row["error"] and "the cap is 60.0 MB" in row["error"]
    assert row["memory"] == [] and row["rank"] is None


def test_every_row_has_its_ceiling_its_ratios_its_needs_and_its_projections(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    before = tmp_path / "before.json"
    before.write_text(json.dumps({"results": [{"artifact": "then", "decode_tokens_per_s": 10.0}]}))
    result = run(f"torch:{checkpoint.path}", threads=1, baseline=before)
    [row] = json.loads(json.dumps(result))["results"]
    assert row["profile"] is None and row["memory_cap_bytes"] is None
    assert result["settings"]["memory_cap_kept_by"] is None
    assert row["prompt_ceiling_tokens_per_s"] == pytest.approx(RATE / row["prompt_operations_per_token"])
    share = 100 * row["prompt_tokens_per_s"] / row["prompt_ceiling_tokens_per_s"]
    assert row["prompt_roofline_percent"] == pytest.approx(share)
    assert row["baseline_ratio"] == {
        "decode_tokens_per_s": pytest.approx(row["decode_tokens_per_s"] / 10),
        "peak_rss_bytes": None,
    }
    assert result["baseline"]["name"] == "then" and result["baseline"]["ours"] is True
    kv = 2 * 3 * 2 * 16 * 2  # keys and values, layers, heads, size, bytes
    # The model has 512 positions; the run opened 256, and the box 384.
    contexts = {"laptop": 512, "phone-8gb": 512, "phone-4gb": 512, "pi5": 512, "this": 256, "box": 384}
    assert {need["profile"]: need["context"] for need in row["memory"]} == contexts
    assert all(need["kv_bytes"] == kv * need["context"] for need in row["memory"])
    box = next(p for p in row["projections"] if p["profile"] == "box")
    assert box["decode_tokens_per_s"] == pytest.approx(
        10e9 / row["bytes_per_token"] * row["roofline_percent"] / 100
    )
    assert [p["name"] for p in result["profiles"]] == [*PROFILES, "box"]
    text = bench_text(result)
    assert "measured before: then: 10 tok/s per user (before.json)" in text
    assert "x the baseline's speed" in text and "million operations per token of a prompt" in text


def test_the_user_s_words_go_before_the_profile_s() -> None:
    chosen = Bounds.choose("laptop", None, None, None, 768)
    assert (chosen.threads, chosen.context) == (min(8, available_cores()), 8192)
    assert chosen.cap_bytes == PROFILES["laptop"].memory_bytes
    said = Bounds.choose("laptop", None, 1, 512, 768)
    assert (said.threads, said.context) == (1, 512)
    plain = Bounds.choose(None, None, None, None, 768)
    assert (plain.threads, plain.context, plain.cap_bytes) == (None, 768, None)


def test_mistakes_are_told_before_anything_runs(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(FoxEdgeError, match="no device profile is called 'fridge'"):
        run(f"torch:{checkpoint.path}", profile="fridge")
    with pytest.raises(FoxEdgeError, match=r"nowhere\.json: cannot be read \(No such file"):
        run(f"torch:{checkpoint.path}", baseline=tmp_path / "nowhere.json")
    with pytest.raises(FoxEdgeError, match="not fit a context of 384"):
        bench([f"torch:{checkpoint.path}"], prompt_tokens=400, profile="box")


def test_the_user_s_mistakes_end_with_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["bench", "torch:nano", "--profile", "fridge"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "there are laptop, phone-8gb, phone-4gb, pi5, this" in told
    newer = tmp_path / "newer.json"
    newer.write_text(json.dumps({"schema": 3, "results": []}))
    assert cli.main(["bench", "torch:nano", "--baseline", str(newer)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "written in schema 3 by a later fox-edge; this one reads up to 2" in told


def test_measuring_imports_nothing_that_the_runtime_does_not() -> None:
    """PyTorch alone is 200 MB: were it imported to measure llama.cpp, it would be in llama.cpp's figures."""
    code = (
        "import sys, benchmarks.processes.worker, benchmarks.latency.measure, benchmarks.devices.fit; "
        "print([m for m in ('torch', 'llama_cpp', 'onnxruntime', 'onnx', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
