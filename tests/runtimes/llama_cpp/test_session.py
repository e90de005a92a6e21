"""llama.cpp as a session: its logits are the reference model's, its cache does what the protocol says."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import math
import struct
import subprocess
import sys
from pathlib import Path

import llama_cpp.llama_cpp as lib
import numpy as np
import pytest
import torch

from export.gguf import export_gguf
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import ArtifactError, ContextOverflowError, FoxEdgeError, MissingPackageError
from fox_edge.quant import GGUF, find_recipe
from runtimes.base import SCORE_CHUNK, Session, SessionOptions, open_session
from runtimes.llama_cpp.session import BATCH, LlamaCppSession
from tests.helpers import TINY, TINY_256, make_checkpoint

F32, FLASH_OFF = 0, 0
# Two threads wait for each other by spinning: on a busy machine that takes ten times as long.
ONE = SessionOptions(threads=1)


@pytest.fixture(scope="module")
def artifact(tiny_256: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_gguf(tiny_256, tmp_path_factory.mktemp("llama") / "out", find_recipe(GGUF, "f32"))


@pytest.fixture
def exact_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 KV cache and plain attention, so that only mistakes are left as differences."""
    defaults = lib.llama_context_default_params

    def params() -> lib.llama_context_params:
        found = defaults()
        found.type_k = found.type_v = F32
        found.flash_attn_type = FLASH_OFF
        return found

    monkeypatch.setattr(lib, "llama_context_default_params", params)


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(8, 512, size=count).tolist()


def reference(checkpoint: Checkpoint, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return checkpoint.load_model()(torch.tensor([ids]))[0].numpy()


def scored(session: Session, ids: list[int], start: int = 0) -> np.ndarray:
    return np.concatenate(list(session.score(ids, start)))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (16, 1)])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("quant", "dtype"), [("f32", torch.bfloat16), ("f16", torch.float16)])
def test_logits_are_the_reference_models(
    heads: int, kv_heads: int, tied: bool, quant: str, dtype: torch.dtype, tmp_path: Path, exact_cache: None
) -> None:
    config = dataclasses.replace(TINY, num_heads=heads, num_kv_heads=kv_heads, head_dim=64 // heads * 2)
    folder = make_checkpoint(tmp_path / "checkpoint", config, tied=tied, dtype=dtype)
    checkpoint = Checkpoint.open(folder)
    artifact = export_gguf(checkpoint, tmp_path / "out", find_recipe(GGUF, quant), rounding="nearest")
    ids = tokens(100)
    expected = reference(checkpoint, ids)
    with LlamaCppSession(artifact, ONE) as session:
        assert session.vocab_size == 512
        # With f16 weights llama.cpp rounds the activations to f16 too.
        tolerance = 2e-4 if quant == "f32" else 2e-2
        np.testing.assert_allclose(scored(session, ids), expected, atol=tolerance)
    assert expected.std() > 1


def test_the_default_cache_is_close(artifact: Artifact, tiny_256: Checkpoint) -> None:
    ids = tokens(100)
    expected = reference(tiny_256, ids)
    with LlamaCppSession(artifact, ONE) as session:
        assert np.abs(scored(session, ids) - expected).max() < 0.02 * expected.std()


def test_int8_and_int4_stay_near(tiny_256: Checkpoint, tmp_path: Path) -> None:
    ids = tokens(100)
    expected = reference(tiny_256, ids)
    for quant, most in (("int8", 0.05), ("int4", 0.5)):
        made = export_gguf(tiny_256, tmp_path / quant, find_recipe(GGUF, quant), rounding="nearest")
        with LlamaCppSession(made, ONE) as session:
            error = np.sqrt(np.square(scored(session, ids) - expected).mean()) / expected.std()
            assert 1e-4 < error < most


def test_whole_chunks_and_steps_agree(artifact: Artifact, exact_cache: None) -> None:
    ids = tokens(SCORE_CHUNK + 20)
    with LlamaCppSession(artifact, ONE) as session:
        chunks = list(session.score(ids))
        assert [chunk.shape for chunk in chunks] == [(SCORE_CHUNK, 512), (20, 512)]
        assert all(chunk.dtype == np.float32 for chunk in chunks)
        whole = np.concatenate(chunks)
        assert session.length == len(ids)

        session.reset()
        assert session.length == 0
        steps = [session.prefill(ids[:7]), *(session.step(token) for token in ids[7:])]
        assert steps[0].shape == (512,)
        np.testing.assert_allclose(np.stack(steps), whole[6:], atol=2e-4)

        session.reset()
        first = session.prefill(ids[:30])
        np.testing.assert_allclose(first, whole[29], atol=2e-4)
        np.testing.assert_allclose(scored(session, ids[30:], start=11), whole[41:], atol=2e-4)


def test_prompts_of_several_batches(tiny_256: Checkpoint, tmp_path: Path, exact_cache: None) -> None:
    config = dataclasses.replace(TINY, max_positions=2 * BATCH + 100)
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "checkpoint", config))
    made = export_gguf(checkpoint, tmp_path / "out", find_recipe(GGUF, "f32"))
    ids = tokens(2 * BATCH + 50)
    expected = reference(checkpoint, ids)
    with LlamaCppSession(made, ONE) as session:
        assert session.context == config.max_positions
        np.testing.assert_allclose(session.prefill(ids), expected[-1], atol=2e-4)
        session.reset()
        last = scored(session, ids, start=BATCH + 77)
        np.testing.assert_allclose(last, expected[BATCH + 77 :], atol=2e-4)


def test_truncate_forgets_the_rest(artifact: Artifact, exact_cache: None) -> None:
    ids, other = tokens(40), tokens(5, seed=1)
    with LlamaCppSession(artifact, ONE) as session:
        session.prefill(ids[:20])
        straight = session.prefill(other)
        session.reset()
        session.prefill(ids)
        session.truncate(20)
        assert session.length == 20
        session.truncate(100)
        assert session.length == 20
        np.testing.assert_allclose(session.prefill(other), straight, atol=2e-4)


def test_logits_are_the_callers_own(artifact: Artifact) -> None:
    with LlamaCppSession(artifact, ONE) as session:
        first = session.prefill([5, 6, 7])
        kept = first.copy()
        session.step(8)
        np.testing.assert_array_equal(first, kept)


def test_numpy_integers_are_tokens_too(artifact: Artifact) -> None:
    with LlamaCppSession(artifact, ONE) as session:
        expected = session.prefill([9, 10])
        session.reset()
        np.testing.assert_array_equal(session.prefill(np.array([9, 10])), expected)  # type: ignore[arg-type]


def test_a_prompt_longer_than_the_context_changes_nothing(artifact: Artifact) -> None:
    with LlamaCppSession(artifact, SessionOptions(context=32, threads=1)) as session:
        expected = session.prefill(tokens(10))
        with pytest.raises(ContextOverflowError, match="10 tokens and 23 more do not fit a context of 32"):
            session.prefill(tokens(23))
        with pytest.raises(ContextOverflowError, match="10 tokens and 30 more"):
            next(session.score(tokens(30)))
        assert session.length == 10
        session.truncate(9)
        np.testing.assert_allclose(session.step(tokens(10)[-1]), expected, atol=1e-2)
        session.prefill(tokens(22))
        assert session.length == 32
        with pytest.raises(ContextOverflowError):
            session.step(5)


@pytest.mark.parametrize("context", [0, 257])
def test_a_context_beyond_the_model(artifact: Artifact, context: int) -> None:
    with pytest.raises(
        ContextOverflowError, match=f"a context of {context} tokens, but the model has 1 to 256"
    ):
        LlamaCppSession(artifact, SessionOptions(context=context))


@pytest.mark.parametrize("ids", [[-1], [512], [5, 100_000]])
def test_ids_outside_the_vocabulary(artifact: Artifact, ids: list[int]) -> None:
    with LlamaCppSession(artifact, ONE) as session, pytest.raises(FoxEdgeError, match="vocabulary of 512"):
        session.prefill(ids)


def test_nothing_to_go_on_from(artifact: Artifact) -> None:
    with LlamaCppSession(artifact, ONE) as session, pytest.raises(FoxEdgeError, match="at least one token"):
        session.prefill([])


def test_closing(artifact: Artifact) -> None:
    session = open_session(artifact, SessionOptions(threads=1))
    assert isinstance(session, LlamaCppSession) and isinstance(session, Session)
    session.prefill([5])
    session.close()
    session.close()
    with pytest.raises(FoxEdgeError, match="closed"):
        session.step(5)
    del session
    gc.collect()


def test_a_file_that_was_cut_short(artifact: Artifact, tmp_path: Path) -> None:
    data = artifact.model_path.read_bytes()
    for size in (0, 100, 5000, len(data) - 100):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / artifact.manifest.model_file).write_bytes(data[:size])
        with pytest.raises(ArtifactError, match=r"tiny_256-f32\.gguf: "):
            LlamaCppSession(Artifact(folder, artifact.manifest))


@pytest.mark.parametrize(
    ("key", "code", "value", "sentence"),
    [
        ("llama.block_count", "I", 0, "num_layers is 0, "),
        ("llama.block_count", "I", 0xFFFFFFFF, "num_layers is 4294967295, "),
        ("llama.block_count", "I", 7, "7 layers, but the weights of 2"),
        ("llama.attention.head_count_kv", "I", 3, "4 heads cannot share 3 KV heads"),
        ("llama.attention.layer_norm_rms_epsilon", "f", math.nan, "rms_norm_eps nan"),
        ("llama.rope.freq_base", "f", -1.0, "rope_theta -1.0"),
    ],
)
def test_numbers_that_would_end_the_process(
    key: str, code: str, value: float, sentence: str, artifact: Artifact, tmp_path: Path
) -> None:
    """llama.cpp aborts over some of these; a user is told instead."""
    data = bytearray(artifact.model_path.read_bytes())
    # Behind a key come the type of its value and the value.
    struct.pack_into("<" + code, data, data.index(key.encode()) + len(key) + 4, value)
    (tmp_path / artifact.manifest.model_file).write_bytes(data)
    with pytest.raises(ArtifactError, match=sentence):
        LlamaCppSession(Artifact(tmp_path, artifact.manifest))


def test_another_architecture(artifact: Artifact, tmp_path: Path) -> None:
    data = artifact.model_path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0qwen9")
    (tmp_path / artifact.manifest.model_file).write_bytes(data)
    with pytest.raises(ArtifactError, match="architecture 'qwen9', not llama"):
        LlamaCppSession(Artifact(tmp_path, artifact.manifest))


@pytest.mark.parametrize(
    ("package", "module", "told"),
    [
        ("gguf", "runtimes.llama_cpp.gguf_file", "gguf"),
        ("llama_cpp.llama_cpp", "runtimes.llama_cpp.session", "llama-cpp-python"),
    ],
)
def test_a_missing_package_names_the_extra(
    package: str, module: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(MissingPackageError, match=rf"{told} is not installed.*fox-edge\[gguf\]"):
        importlib.import_module(module)


def test_what_llama_cpp_refuses_is_one_sentence_with_its_reason(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It would refuse the file first.
    monkeypatch.setattr("runtimes.llama_cpp.session.read_config", lambda path: TINY_256)
    data = artifact.model_path.read_bytes()
    damaged = data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_no.weight")
    (tmp_path / artifact.manifest.model_file).write_bytes(damaged)
    with pytest.raises(ArtifactError, match=r"llama\.cpp cannot open it \(llama\.cpp: .*ffn_up") as raised:
        LlamaCppSession(Artifact(tmp_path, artifact.manifest))
    assert "\n" not in str(raised.value)


def test_it_is_silent_and_ends_well(artifact: Artifact) -> None:
    """A session that nobody closed, in a process of its own: no output, exit status 0."""
    program = f"""
from pathlib import Path
from fox_edge.artifact import Artifact
from runtimes.base import open_session
from runtimes.base import SessionOptions
session = open_session(Artifact.open(Path({str(artifact.path)!r})), SessionOptions(threads=1))
session.prefill([5, 6])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[3], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
