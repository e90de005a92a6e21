"""The registry: a runtime is a row; and the bytes that a token must read, by hand."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import benchmarks
from benchmarks.common.subject import open_subject
from benchmarks.latency import measure
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import FoxEdgeError
from runtimes import kv_types
from runtimes.base import PREFIXES, RUNTIMES, Logits, Runtime, SessionOptions, split_prefix
from tests.benchmarks.conftest import make_checkpoint
from tests.benchmarks.latency.test_bench import write_artifact

BENCHMARKS = Path(benchmarks.__file__).parent


class EchoSession:
    """A runtime to come: it says the token that it was given."""

    def __init__(self, source: Any, options: SessionOptions) -> None:
        self.source, self.context, self.vocab_size, self.length = source, options.context or 512, 8192, 0

    def prefill(self, tokens: Sequence[int]) -> Logits:
        self.length += len(tokens)
        logits = np.zeros(self.vocab_size, np.float32)
        logits[tokens[-1]] = 1
        return logits

    def step(self, token: int) -> Logits:
        return self.prefill([token])

    def score(self, tokens: Sequence[int], start: int = 0) -> Iterator[Logits]:
        for token in tokens[start:]:
            yield self.prefill([token])[None]

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)

    def reset(self) -> None:
        self.length = 0

    def close(self) -> None:
        pass


ECHO = f"{__name__}:EchoSession"


def job(spec: str) -> dict[str, Any]:
    waves = [[[[2, 100, 200, 300]]]]
    return {
        "subject": spec,
        "context": 64,
        "threads": 1,
        "waves": waves,
        "decode_tokens": 4,
        "page_cache": "warm",
    }


def test_a_format_and_its_runtime_are_added_by_a_row(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RUNTIMES, "gguf", Runtime("echo", ECHO))
    monkeypatch.setattr(measure, "MEASURE_S", 0.0)
    artifact = write_artifact(tmp_path / "made", checkpoint)
    subject = open_subject(artifact.path)
    assert (subject.runtime, subject.session_class) == ("echo", ECHO)
    found = measure.run_job(job(str(artifact.path)), lambda *_: None)
    assert found["decode_tokens_per_s"] > 0 and found["output_tokens"] == 5


def test_a_format_of_its_own_says_what_its_cache_stores(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = write_artifact(tmp_path / "made", checkpoint)
    other = Artifact(artifact.path, dataclasses.replace(artifact.manifest, format="new"))
    monkeypatch.setattr(Artifact, "open", lambda _path: other)
    with pytest.raises(FoxEdgeError, match="no runtime opens the format 'new'; known: gguf, onnx"):
        open_subject(artifact.path)
    monkeypatch.setitem(RUNTIMES, "new", Runtime("another", ECHO))
    monkeypatch.setattr(kv_types, "KV_TYPES", {**kv_types.KV_TYPES, "new": {"int8": (1, 1)}})
    monkeypatch.setattr("benchmarks.common.subject.KV_TYPES", kv_types.KV_TYPES)
    subject = open_subject(artifact.path)
    assert (subject.runtime, subject.format) == ("another", "new")
    assert subject.kv_bytes_per_position == 2 * 3 * 2 * 16


@pytest.mark.parametrize(("opens", "kind"), [("artifact", Artifact), ("checkpoint", Checkpoint)])
def test_a_word_chooses_a_runtime_by_a_row(
    opens: Any, kind: type, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """browser:ARTIFACT, torch-cuda:CHECKPOINT: what stands behind the word is opened by that runtime."""
    monkeypatch.setitem(PREFIXES, "other:", Runtime("another", ECHO, opens))
    target = checkpoint.path if kind is Checkpoint else write_artifact(tmp_path / "made", checkpoint).path
    subject = open_subject(f"other:{target}")
    assert (subject.spec, subject.target) == (f"other:{target}", str(target))
    assert subject.runtime == "another" and isinstance(subject.source, kind)
    assert isinstance(subject.open_session(SessionOptions(context=64)), EchoSession)


def test_words_are_split_off_once() -> None:
    assert split_prefix("torch:nano") == (PREFIXES["torch:"], "nano")
    assert split_prefix("torch:torch:nano")[1] == "torch:nano"
    assert split_prefix("out/torch") == (None, "out/torch")


def test_no_condition_in_the_way_of_a_measurement_names_a_runtime() -> None:
    """Which runtime runs is the registry's to say, on the whole way from a word to a row of figures."""
    names = {"torch", "llama.cpp", "onnxruntime", "gguf", "onnx", "TORCH", "GGUF", "ONNX", "TORCH_PREFIX"}
    on_the_way = {
        "common": ("subject",),
        "devices": ("fit", "projection", "compute"),
        "latency": ("bench", "bounds", "rows", "measure", "users"),
    }
    for path in (BENCHMARKS / room / f"{name}.py" for room, files in on_the_way.items() for name in files):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tests = [n.test for n in ast.walk(tree) if isinstance(n, ast.If | ast.IfExp | ast.While)]
        tests += [n for n in ast.walk(tree) if isinstance(n, ast.Compare)]
        for test in tests:
            said = {n.value for n in ast.walk(test) if isinstance(n, ast.Constant)}
            said |= {n.id for n in ast.walk(test) if isinstance(n, ast.Name)}
            assert not said & names, f"{path}, line {test.lineno}: {said & names}"


# --- bytes per token ---------------------------------------------------------------------------------------

# keys and values x 3 layers x 2 KV heads x 16 numbers
KV_NUMBERS = 2 * 3 * 2 * 16


@pytest.mark.parametrize(("kv", "bits"), [(None, 16), ("f16", 16), ("q8_0", 8.5), ("q4_0", 4.5)])
def test_a_token_reads_every_weight_once_and_the_cache_so_far(
    kv: str | None, bits: float, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """q8_0 and q4_0: 32 numbers of 8 or 4 bits and a scale of 16."""
    artifact = write_artifact(tmp_path / "made", checkpoint)
    subject = open_subject(artifact.path, kv)
    weights = sum(t.bytes for t in artifact.manifest.tensors)
    assert subject.bytes_per_token(0) == weights
    assert subject.bytes_per_token(100) - weights == 100 * KV_NUMBERS * bits / 8


@pytest.mark.parametrize(("kv", "bits"), [(None, 32), ("float32", 32), ("int8", 8)])
def test_onnx_caches_by_their_types(
    kv: str | None, bits: int, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = write_artifact(tmp_path / "made", checkpoint)
    other = Artifact(artifact.path, dataclasses.replace(artifact.manifest, format="onnx"))
    monkeypatch.setattr(Artifact, "open", lambda _path: other)
    subject = open_subject(artifact.path, kv)
    assert subject.bytes_per_token(100) - subject.bytes_per_token(0) == 100 * KV_NUMBERS * bits // 8


def test_an_untied_artifact_s_embedding_gives_one_row(tmp_path: Path) -> None:
    untied = make_checkpoint(tmp_path / "untied", tied=False)
    artifact = write_artifact(tmp_path / "made", untied)
    sizes = {t.name: t.bytes for t in artifact.manifest.tensors}
    embedding = sizes["model.embed_tokens.weight"]
    assert sizes["lm_head.weight"] == embedding
    read = sum(sizes.values()) - embedding + embedding // 8192
    assert open_subject(artifact.path).bytes_per_token(0) == read
