"""A real sweep over the embedded model: killed outright in the middle, gone on with, graded like `eval`."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.accuracy.evaluate import evaluate
from benchmarks.common.table import WIDTH
from benchmarks.sweep.rows import sweep_text
from benchmarks.sweep.run import sweep
from fox_edge.artifact import Artifact
from fox_edge.cli import EXIT_OK, main
from fox_edge.grammar import EXIT_MISTAKE

QUESTIONS = 4
TEXT = f"""
checkpoints = "nano"
reference = false
[[exports]]
format = "gguf"
quant = "q8_0"
rounding = "nearest"
[[exports]]                          # no rounding to 4 bits is that close
format = "gguf"
quant = "q4_0"
rounding = "nearest"
max_mean_kl = 1e-9
[tasks.word-problems]
limit = {QUESTIONS}
[tasks.fidelity]
tokens = 128
window = 64
[tasks.bench]
prompt_tokens = 8
decode_tokens = 4
repeats = 1
[run]
threads = 1
questions_per_step = 1
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "sweep.toml"
    path.write_text(TEXT)
    return path


def begin(file: Path, out: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "fox_edge.cli", "sweep", str(file), "--out", str(out)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def done(out: Path) -> dict[Path, tuple[int, str]]:
    """Every step that is kept: when it was written, and what it says."""
    return {path: (path.stat().st_mtime_ns, path.read_text()) for path in (out / "steps").glob("[!.]*.json")}


def children(pid: int) -> list[int]:
    """The living processes that this one started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def test_a_sweep_that_is_killed_goes_on_where_it_was(file, tmp_path, capsys):
    out = tmp_path / "out"
    running = begin(file, out)
    answered = 0
    while answered < 2:
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.05)
        answered = sum('"answer"' in text for _, text in done(out).values())
    # Meanwhile the folder is taken.
    assert main(["sweep", str(file), "--out", str(out)]) == EXIT_MISTAKE
    assert f"{out}: another sweep is running in this folder" in capsys.readouterr().err
    workers = children(running.pid)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    if sys.platform == "linux":  # nobody goes on working for a sweep that is gone
        until = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < until:
            time.sleep(0.05)
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    before = done(out)
    assert 2 + 2 <= len(before) < 2 + QUESTIONS + 2 + 1  # exports and answers, but not all

    assert main(["sweep", str(file), "--out", str(out), "--json"]) == EXIT_OK
    printed = capsys.readouterr()
    assert f"{len(before)} steps were done before and are taken" in printed.err
    after = done(out)
    assert len(after) == 2 + QUESTIONS + 2 + 1  # exports, answers, fidelity's two, timing
    assert {path: after[path] for path in before} == before
    assert all(json.loads(text)["attempt"] == 1 for _, text in after.values())
    result = json.loads(printed.out)
    check_result(result, out)
    check_failures(file, out, after, result)


def check_result(result: dict, out: Path) -> None:
    """Rows, files and page; the answers are those of `eval` on the same artifact."""
    good, bad = result["rows"]
    assert result["steps"]["failed"] == 1 and json.loads((out / "sweep.json").read_text()) == result
    assert not (out / "hidden").exists()
    manifest = Artifact.open(out / "artifacts" / "nano-gguf-q8_0-nearest").manifest
    assert good["export"]["bits_per_weight"] == manifest.bits_per_weight
    assert good["export"]["mean_kl_nats"] == manifest.verification["mean_kl_nats"]
    assert 0 < good["fidelity"]["mean_kl_nats"] < 0.01 and good["bench"][0]["decode_tokens_per_s"] > 0
    alone = evaluate([good["artifact"]], task="word-problems", limit=QUESTIONS, threads=1)["results"][0]
    kept = json.loads((out / "eval-word-problems.json").read_text())["results"]
    assert kept[0]["answers"] == alone["answers"] and kept[0]["runtime"] == alone["runtime"]
    assert good["tasks"]["word-problems"]["correct"] == alone["correct"]
    assert not (out / "artifacts" / "nano-gguf-q4_0-nearest").exists()
    assert "failed verification" in bad["error"] and "failed verification" in kept[1]["error"]
    text = sweep_text(result)
    assert "export nano-gguf-q4_0-nearest: " in text and "failed: 1; --retry" in text
    assert all(len(line) <= WIDTH for line in text.splitlines()[:4])
    page = (out / "report" / "report.html").read_text()
    assert "nano-gguf-q8_0-nearest" in page


def check_failures(file: Path, out: Path, after: dict, result: dict) -> None:
    """What failed is kept, and tried again when that is asked for; an artifact that is gone is made anew."""
    again = sweep(file, out=out)
    assert again["steps"]["taken"] == again["steps"]["total"] and done(out) == after
    assert again["rows"] == result["rows"] and again["failures"] == result["failures"]
    # The same folder under another name.
    other = out.with_name("other")
    other.symlink_to(out)
    moved = sweep(file, out=other)
    assert moved["steps"]["taken"] == moved["steps"]["total"]
    assert moved["rows"][0]["artifact"] == str(other / "artifacts" / "nano-gguf-q8_0-nearest")
    assert moved["rows"][0]["bench"][0]["load_s"] == result["rows"][0]["bench"][0]["load_s"]
    model = Artifact.open(out / "artifacts" / "nano-gguf-q8_0-nearest").path
    shutil.rmtree(model)
    retried = sweep(file, out=out, retry=True)
    changed = {path.name for path, kept in done(out).items() if kept != after[path]}
    attempts = [json.loads((out / "steps" / name).read_text()) for name in changed]
    assert sorted((step["label"], step["attempt"]) for step in attempts) == [
        ("export nano-gguf-q4_0-nearest", 2),
        ("export nano-gguf-q8_0-nearest", 2),
    ]
    assert model.is_dir() and retried["steps"]["failed"] == 1


def test_a_link_out_of_the_folder_is_refused(file, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "artifacts").symlink_to(tmp_path / "elsewhere")
    assert main(["sweep", str(file), "--out", str(tmp_path / "out")]) == EXIT_MISTAKE
    assert "artifacts: leads out of the sweep's folder" in capsys.readouterr().err
    assert not list((tmp_path / "elsewhere").iterdir())
