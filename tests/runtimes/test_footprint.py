"""What a process will take: the parts, the sum, and what a session refuses because of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from export.gguf import export_gguf
from fox_edge import cli
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import ContextOverflowError, FoxEdgeError, NotEnoughMemoryError
from fox_edge.quant import GGUF, find_recipe
from runtimes import footprint as module
from runtimes import memory
from runtimes.base import SessionOptions
from runtimes.footprint import TOKENIZER_BYTES, TOKENIZER_PIECE_BYTES, footprint, footprint_text
from runtimes.llama_cpp import memory as llama_cpp_memory
from runtimes.llama_cpp.memory import copied_bytes
from runtimes.llama_cpp.session import LlamaCppSession
from runtimes.torch import TorchSession
from tests.helpers import TINY_256

# 2 (keys, values) x 2 layers x 2 KV heads x 64
KV_VALUES = 2 * 2 * 2 * 64


@pytest.fixture(scope="module")
def artifact(tiny_256: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_gguf(
        tiny_256, tmp_path_factory.mktemp("footprint") / "out", find_recipe(GGUF, "int4"), rounding="nearest"
    )


def test_a_checkpoint_is_reckoned_as_pytorch_opens_it(tiny_256: Checkpoint) -> None:
    found = footprint(str(tiny_256.path), SessionOptions(context=100))
    assert (found["runtime"], found["kv"], found["context"]) == ("torch", "bfloat16", 100)
    assert found["weights_bytes"] == 2 * TINY_256.num_parameters()
    assert found["kv_bytes"] == KV_VALUES * 100 * 2
    # Opening a checkpoint reads it too.
    assert found["tokenizer_bytes"] == TOKENIZER_BYTES + 2 * TOKENIZER_PIECE_BYTES * 512


@pytest.mark.parametrize(("kv", "bits"), [(None, 16), ("f16", 16), ("q8_0", 8.5), ("q4_0", 4.5)])
def test_an_artifact_by_its_kv_cache(kv: str | None, bits: float, artifact: Artifact) -> None:
    found = footprint(str(artifact.path), SessionOptions(context=100, kv=kv))
    assert (found["runtime"], found["kv"]) == ("llama.cpp", kv or "f16")
    # llama.cpp makes room in steps of 256 positions.
    assert found["kv_bytes"] == KV_VALUES * 256 * bits / 8
    parts = ("weights", "kv", "buffers", "tokenizer", "process")
    assert found["total_bytes"] == sum(found[f"{part}_bytes"] for part in parts)
    assert found["process_bytes"] > 10e6


def test_what_is_copied_is_reckoned_unless_it_is_turned_off(artifact: Artifact) -> None:
    file = artifact.model_path.stat().st_size
    with_copies = footprint(str(artifact.path), SessionOptions())["weights_bytes"]
    copies = sum(copied_bytes(t, tied=True) for t in artifact.manifest.tensors)
    assert with_copies == file + copies
    assert footprint(str(artifact.path), SessionOptions(repack=False))["weights_bytes"] == file


def test_ggml_copies_what_it_says(artifact: Artifact, capfd: pytest.CaptureFixture[str]) -> None:
    """llama.cpp's own account of the buffers that it made, from a process that lets it speak."""
    import subprocess
    import sys

    program = """
import os, sys
import llama_cpp.llama_cpp as lib
lib.llama_backend_init()
params = lib.llama_model_default_params()
lib.llama_model_load_from_file(os.fsencode(sys.argv[1]), params)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(artifact.model_path)], capture_output=True, text=True
    )
    said = [line for line in done.stderr.splitlines() if "CPU_REPACK model buffer size" in line]
    copies = sum(copied_bytes(t, tied=True) for t in artifact.manifest.tensors)
    megabytes = float(said[0].split("=")[1].split()[0]) if said else 0.0
    assert copies / 2**20 == pytest.approx(megabytes, abs=0.006)


def test_an_untied_embedding_is_never_copied(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp_memory, "_packed_bytes", lambda kind, rows, columns: rows * columns)
    tensors = {t.name: t for t in artifact.manifest.tensors}
    embedding = tensors["model.embed_tokens.weight"]
    assert copied_bytes(embedding, tied=False) == 0
    assert copied_bytes(embedding, tied=True) == 512 * 256
    assert copied_bytes(tensors["model.norm.weight"], tied=True) == 0


def test_attention_that_is_not_in_one_pass_holds_scores(artifact: Artifact) -> None:
    plain, scores = (
        LlamaCppSession.need(artifact, SessionOptions(context=256, flash_attention=flash))
        for flash in (None, False)
    )
    # a mask and 4 heads' scores in float32 instead of a mask in float16, for each of the 256 tokens
    assert scores.scratch(256) - plain.scratch(256) == 256 * 256 * (4 * 5 - 2)


def test_sessions_that_do_not_fit_are_refused_before_anything_is_loaded(
    artifact: Artifact, tiny_256: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = LlamaCppSession.need(artifact, SessionOptions(context=256))
    monkeypatch.setattr(memory, "available_bytes", lambda: need.total(256) - 1)
    monkeypatch.setattr("runtimes.llama_cpp.context.load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(NotEnoughMemoryError, match=r"of KV cache .* no context would fit"):
        LlamaCppSession(artifact, SessionOptions(context=256))
    need = TorchSession.need(tiny_256, SessionOptions())
    monkeypatch.setattr(memory, "available_bytes", lambda: need.total(100))
    monkeypatch.setattr(Checkpoint, "load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(NotEnoughMemoryError, match="a context of 100 would fit"):
        TorchSession(tiny_256, SessionOptions(context=256))


def test_who_asks_for_no_context_gets_what_fits(
    tiny_256: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = TorchSession.need(tiny_256, SessionOptions())
    monkeypatch.setattr(memory, "available_bytes", lambda: need.total(100))
    assert TorchSession(tiny_256).context == 100


def test_what_fits_here_and_now(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    need = LlamaCppSession.need(artifact, SessionOptions(context=256))
    room = need.total(256) + TOKENIZER_BYTES + 512 * TOKENIZER_PIECE_BYTES
    monkeypatch.setattr(module, "available_bytes", lambda: room)
    assert footprint(str(artifact.path), SessionOptions())["largest_context"] == 256
    monkeypatch.setattr(module, "available_bytes", lambda: room - 1)
    found = footprint(str(artifact.path), SessionOptions())
    assert found["largest_context"] == 0 and "no context fits" in footprint_text(found)[1]
    monkeypatch.setattr(module, "available_bytes", lambda: None)
    found = footprint(str(artifact.path), SessionOptions())
    assert found["largest_context"] is None and len(footprint_text(found)) == 1


def test_mistakes(artifact: Artifact) -> None:
    with pytest.raises(ContextOverflowError, match="257 was asked for, but it goes up to 256"):
        footprint(str(artifact.path), SessionOptions(context=257))
    with pytest.raises(FoxEdgeError, match=r"--kv int8: llama\.cpp has f16 or q8_0 or q4_0"):
        footprint(str(artifact.path), SessionOptions(kv="int8"))


def test_inspect_from_the_command_line(artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["inspect", str(artifact.path), "--context", "100", "--kv", "q8_0"]
    assert cli.main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["quant"] == "int4"
    assert result["memory"]["kv_bytes"] == KV_VALUES * 256 * 8.5 / 8
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    assert "memory at 100 tokens in llama.cpp: weights" in text and "KV cache (q8_0)" in text
    assert cli.main(["inspect", str(artifact.path), "--kv", "int8"]) == 2


def test_without_the_runtime_inspect_still_tells_the_rest(
    artifact: Artifact, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llama_cpp.llama_cpp", None)
    for name in ("runtimes.llama_cpp.session", "runtimes.llama_cpp.choices", "runtimes.llama_cpp.memory"):
        monkeypatch.delitem(sys.modules, name)
    assert cli.main(["inspect", str(artifact.path)]) == 0
    assert "what memory it takes is not known: llama-cpp-python is not" in capsys.readouterr().out


def test_paths_that_are_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
