"""What may be chosen for llama.cpp reaches it, changes answers only where it says so, or is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import llama_cpp.llama_cpp as lib
import numpy as np
import pytest

from export.gguf import export_gguf
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import FoxEdgeError
from fox_edge.quant import GGUF, find_recipe
from runtimes.base import SessionOptions
from runtimes.llama_cpp.choices import choose_for_context, choose_for_model
from runtimes.llama_cpp.session import LlamaCppSession
from tests.helpers import TINY, TINY_256, make_checkpoint

IDS = np.random.default_rng(0).integers(8, 512, size=100).tolist()


@pytest.fixture(scope="module")
def artifact(tiny_256: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_gguf(
        tiny_256, tmp_path_factory.mktemp("choices") / "out", find_recipe(GGUF, "int4"), rounding="nearest"
    )


def scored(artifact: Artifact, **choices: object) -> np.ndarray:
    options = SessionOptions(threads=1, **choices)  # type: ignore[arg-type]
    with LlamaCppSession(artifact, options) as session:
        return np.concatenate(list(session.score(IDS)))


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Root-mean-square of the difference, over the spread of what is expected."""
    return float(np.sqrt(np.square(found - expected).mean()) / expected.std())


@pytest.fixture(scope="module")
def plain(artifact: Artifact) -> np.ndarray:
    return scored(artifact)


def test_a_quantized_cache_changes_logits_a_little(artifact: Artifact, plain: np.ndarray) -> None:
    q8_0, q4_0 = (distance(scored(artifact, kv=kv), plain) for kv in ("q8_0", "q4_0"))
    assert 1e-4 < q8_0 < 0.1
    assert 2 * q8_0 < q4_0 < 0.6


def test_the_default_cache_by_its_name(artifact: Artifact, plain: np.ndarray) -> None:
    np.testing.assert_array_equal(scored(artifact, kv="f16"), plain)


def test_how_the_file_is_read_changes_nothing(artifact: Artifact, plain: np.ndarray) -> None:
    np.testing.assert_array_equal(scored(artifact, mmap=False), plain)
    np.testing.assert_array_equal(scored(artifact, mmap=True), plain)


@pytest.mark.parametrize("choice", [{"repack": False}, {"flash_attention": False}, {"prompt_threads": 2}])
def test_other_kernels_give_the_same_but_for_rounding(
    choice: dict[str, object], artifact: Artifact, plain: np.ndarray
) -> None:
    # Activations are rounded to 8 bits on the way: a last bit grows, but to nothing like a quantized cache's.
    assert distance(scored(artifact, **choice), plain) < 0.03


def test_choices_reach_llama_cpp() -> None:
    model, context = lib.llama_model_default_params(), lib.llama_context_default_params()
    choose_for_model(model, SessionOptions())
    assert (model.use_extra_bufts, model.load_mode) == (True, lib.LLAMA_LOAD_MODE_AUTO)
    choose_for_model(model, SessionOptions(repack=False, mmap=False))
    assert (model.use_extra_bufts, model.load_mode) == (False, lib.LLAMA_LOAD_MODE_NONE)
    choose_for_context(context, SessionOptions(threads=3, prompt_threads=5))
    assert (context.n_threads, context.n_threads_batch) == (3, 5)
    assert context.flash_attn_type == lib.LLAMA_FLASH_ATTN_TYPE_AUTO
    choose_for_context(context, SessionOptions(threads=3, flash_attention=False))
    assert (context.n_threads_batch, context.flash_attn_type) == (3, lib.LLAMA_FLASH_ATTN_TYPE_DISABLED)
    choose_for_context(context, SessionOptions(kv="q4_0"))
    assert (context.type_k, context.type_v) == (lib.GGML_TYPE_Q4_0, lib.GGML_TYPE_Q4_0)
    assert context.flash_attn_type == lib.LLAMA_FLASH_ATTN_TYPE_ENABLED


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        ({"kv": "int8"}, "--kv int8: llama.cpp has f16 or q8_0 or q4_0"),
        ({"kv": "q8_0", "flash_attention": False}, "--flash-attention off: a KV cache of q8_0 needs it on"),
        ({"accuracy_level": 1}, "--accuracy-level 1: llama.cpp has no such choice"),
    ],
)
def test_what_does_not_go_is_refused(choices: dict[str, object], sentence: str, artifact: Artifact) -> None:
    with pytest.raises(FoxEdgeError, match=f"^{sentence}$"):
        LlamaCppSession(artifact, SessionOptions(**choices))  # type: ignore[arg-type]


def test_heads_that_are_no_whole_blocks(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "checkpoint", TINY))
    made = export_gguf(checkpoint, tmp_path / "out", find_recipe(GGUF, "f16"))
    with pytest.raises(FoxEdgeError, match="heads of 16 values are no whole blocks of 32; use f16"):
        LlamaCppSession(made, SessionOptions(kv="q8_0"))


def test_whole_blocks_of_the_heads_suffice(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY_256, head_dim=32)
    made = export_gguf(
        Checkpoint.open(make_checkpoint(tmp_path / "checkpoint", config)),
        tmp_path / "out",
        find_recipe(GGUF, "f16"),
    )
    assert np.isfinite(scored(made, kv="q4_0")).all()
