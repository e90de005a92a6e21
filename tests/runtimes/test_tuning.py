"""Tuned choices: what a user says wins, a record is for one machine, and a strange one is not used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from export.gguf import export_gguf
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import FoxEdgeError
from fox_edge.quant import GGUF, ONNX, find_recipe
from runtimes import tuning
from runtimes.artifact_cache import write_record
from runtimes.base import SessionOptions, open_session
from runtimes.tuning import checked, made_for, record_path, store, with_tuning, words


@pytest.fixture
def artifact(tiny_256: Checkpoint, tmp_path: Path) -> Artifact:
    return export_gguf(tiny_256, tmp_path / "out", find_recipe(GGUF, "int4"), rounding="nearest")


def test_without_a_record_nothing_changes(artifact: Artifact) -> None:
    options = SessionOptions(context=100)
    assert with_tuning(artifact, options) == (options, None)


def test_what_was_tuned_fills_in_for_what_was_not_said(artifact: Artifact) -> None:
    path = store(artifact, {"threads": 1, "repack": False, "mmap": False}, "balance", [])
    assert path.parent == artifact.path / ".fox-edge"
    options, remark = with_tuning(artifact, SessionOptions(context=100, mmap=True))
    assert options == SessionOptions(context=100, threads=1, repack=False, mmap=True)
    assert remark == "tuned for balance here: threads 1, repack off (--no-cache: without)"
    untouched = SessionOptions(cache=False)
    assert with_tuning(artifact, untouched) == (untouched, None)
    # What was tuned is a processor's.
    on_card = SessionOptions(context=100, device="cuda")
    assert with_tuning(artifact, on_card) == (on_card, None)


def test_choices_that_hang_together_are_not_mixed(artifact: Artifact) -> None:
    store(artifact, {"flash_attention": False, "prompt_threads": 1, "threads": 1}, "prompt", [])
    # A quantized cache needs the attention that was tuned away; threads for all are threads for prompts.
    options, _ = with_tuning(artifact, SessionOptions(kv="q8_0", threads=3))
    assert options == SessionOptions(kv="q8_0", threads=3)


def test_a_session_opens_with_them_and_says_so(
    artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    store(artifact, {"kv": "q8_0", "threads": 1}, "memory", [])
    with open_session(artifact, SessionOptions()) as session:  # type: ignore[attr-defined]
        session.prefill([5, 6, 7])
        assert session._options.kv == "q8_0"
    assert capsys.readouterr().err.startswith("tuned for memory here: kv q8_0, threads 1 (")
    with open_session(artifact, SessionOptions(threads=1, cache=False)) as session:  # type: ignore[attr-defined]
        assert session._options.kv is None
    assert capsys.readouterr().err == ""


def test_another_machine_another_record(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    here = store(artifact, {"repack": False}, "memory", [])
    monkeypatch.setattr(tuning, "_cpu", lambda: "another processor")
    assert with_tuning(artifact, SessionOptions())[1] is None
    there = store(artifact, {"mmap": False}, "memory", [])
    assert here != there and here.exists() and there.exists()
    monkeypatch.undo()
    assert with_tuning(artifact, SessionOptions())[0] == SessionOptions(repack=False)


def test_a_record_is_of_these_files_and_this_library(artifact: Artifact) -> None:
    fields = made_for(artifact)
    assert fields["files"] == {
        artifact.manifest.model_file: artifact.manifest.files[artifact.manifest.model_file]
    }
    assert fields["library"][0] == "llama-cpp-python" and fields["library"][1]
    other = replace(artifact.manifest, files={**artifact.manifest.files, artifact.manifest.model_file: "0"})
    assert record_path(Artifact(artifact.path, other)) != record_path(artifact)


@pytest.mark.parametrize(
    "choices",
    [
        {"threads": 0},
        {"threads": 10**9},
        {"threads": True},
        {"threads": "4"},
        {"prompt_threads": -1},
        {"kv": "f64"},
        {"kv": ["q8_0"]},
        {"repack": 1},
        {"context": 4096},
        {"accuracy_level": 1},
        {"cache": False},
        ["repack"],
        None,
        "repack",
    ],
)
def test_a_record_with_anything_else_is_not_used(
    choices: object, artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    path = record_path(artifact)
    assert path is not None
    path.parent.mkdir()
    write_record(path, {"prefer": "memory", "choices": choices})
    options, remark = with_tuning(artifact, SessionOptions())
    assert options == SessionOptions()
    assert remark == f"{path} is not what fox-edge tune wrote: not used"


@pytest.mark.parametrize(
    "text",
    ["", "{}", "x" * 100, "[" * 100_000, json.dumps({"choices": {"threads": 1}})],
    ids=["empty", "no keys", "no JSON", "deep", "choices only"],
)
def test_a_record_that_was_edited_is_not_used(text: str, artifact: Artifact) -> None:
    path = store(artifact, {"repack": False}, "balance", [])
    path.write_text(text)
    options, remark = with_tuning(artifact, SessionOptions())
    assert options == SessionOptions() and remark is not None and "not used" in remark


def test_a_preference_from_elsewhere_is_not_repeated(artifact: Artifact) -> None:
    path = record_path(artifact)
    assert path is not None
    path.parent.mkdir()
    write_record(path, {"prefer": "\x1b[31mall of it", "choices": {"repack": False}})
    options, remark = with_tuning(artifact, SessionOptions())
    assert options == SessionOptions() and remark is not None and "\x1b" not in remark


def test_a_folder_that_is_a_link_is_not_followed(artifact: Artifact, tmp_path: Path) -> None:
    path = store(artifact, {"repack": False}, "balance", [])
    path.parent.rename(tmp_path / "elsewhere")
    path.parent.symlink_to(tmp_path / "elsewhere")
    assert with_tuning(artifact, SessionOptions()) == (SessionOptions(), None)
    with pytest.raises(FoxEdgeError, match="behind a link"):
        store(artifact, {}, "balance", [])


def test_a_folder_that_cannot_be_written(artifact: Artifact) -> None:
    (artifact.path / ".fox-edge").write_text("a file")
    with pytest.raises(FoxEdgeError, match=r"tuned-.*\.json: cannot be written"):
        store(artifact, {}, "balance", [])


def test_onnx_has_threads_and_the_cache_alone() -> None:
    assert checked({"threads": 1, "kv": "int8"}, ONNX) == {"threads": 1, "kv": "int8"}
    assert checked({"repack": False}, ONNX) is None
    assert checked({"kv": "int8"}, GGUF) is None
    assert checked({}, ONNX) == {}


def test_words() -> None:
    assert words({}) == "as it comes"
    assert words({"threads": 2, "flash_attention": True}) == "threads 2, flash attention on"
