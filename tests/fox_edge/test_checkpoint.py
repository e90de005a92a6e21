"""Checkpoints as they come, and every way in which one can be wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fox_edge.checkpoint import Checkpoint
from fox_edge.config import FoxConfig
from fox_edge.errors import CheckpointError, TokenizerError
from tests.helpers import TINY, make_checkpoint, message_of, random_tensors, save_shards, write_tokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", ["one", "sharded", "bin"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_layout(tmp_path: Path, dtype: torch.dtype, layout: str, tied: bool) -> None:
    folder = make_checkpoint(
        tmp_path / "model",
        tied=tied,
        dtype=dtype,
        shards=3 if layout == "sharded" else 1,
        torch_bin=layout == "bin",
    )
    checkpoint = Checkpoint.open(folder)
    expected = random_tensors(dataclasses.replace(TINY, tied=tied), dtype=dtype)
    assert checkpoint.name == "model"
    assert checkpoint.shapes() == {name: tuple(t.shape) for name, t in expected.items()}
    for name, tensor in expected.items():
        assert checkpoint.dtype(name) == dtype
        assert torch.equal(checkpoint.tensor(name), tensor)
        checkpoint.release(name)
        rows = tensor.float()[None] if tensor.dim() == 1 else tensor.float()
        assert torch.equal(checkpoint.float_rows(name), rows)
    assert torch.equal(checkpoint.float_rows(EMBEDDING, 5, 9), expected[EMBEDDING][5:9].float())
    seen: list[tuple[int, int]] = []
    checkpoint.check_finite(lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(t.numel() for t in expected.values()) * dtype.itemsize


@torch.no_grad()
def test_loaded_model_is_hugging_faces(tmp_path: Path) -> None:
    """A folder that transformers wrote, read by both."""
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**TINY.to_hf(), initializer_range=0.3)).float().eval()
    theirs.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    ours = Checkpoint.open(tmp_path).load_model()
    tokens = torch.randint(0, TINY.vocab_size, (1, 17))
    assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())


def test_loaded_model_is_a_private_copy(tiny: Checkpoint) -> None:
    model = tiny.load_model(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    before = tiny.tensor(EMBEDDING).clone()
    model.model.embed_tokens.weight.zero_()
    assert torch.equal(tiny.tensor(EMBEDDING), before)


def test_loading_takes_the_weights_once(tmp_path: Path) -> None:
    """Peak memory of loading in BF16, measured in a fresh process, is near the weights' own size."""
    config = FoxConfig(512, 1024, 4096, 8, 8, 2, 128, 64)
    folder = make_checkpoint(tmp_path / "big", config)
    code = (
        "import resource, sys, torch\n"
        "from fox_edge.checkpoint import Checkpoint\n"
        "torch.set_num_threads(1)\n"
        "checkpoint = Checkpoint.open(sys.argv[1])\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "model = checkpoint.load_model(torch.bfloat16)\n"
        "print(peak() - before)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(folder)], check=True, capture_output=True, text=True
    )
    grown_bytes = int(out.stdout) * (1 if sys.platform == "darwin" else 1024)
    weights_bytes = 2 * config.num_parameters()
    # The piece on its way (32 MiB) and the allocator's slack do not grow with the model.
    assert grown_bytes < weights_bytes + (48 << 20), (grown_bytes, weights_bytes)


def test_nano_by_name() -> None:
    checkpoint = Checkpoint.open("nano")
    assert checkpoint.name == "nano" and checkpoint.config == FoxConfig.nano()


# ---- the digest -------------------------------------------------------------------------------------


def test_digest_is_of_the_content(tmp_path: Path, tiny: Checkpoint) -> None:
    digest = tiny.digest()
    assert len(digest) == 64 and tiny.digest() == digest
    assert Checkpoint.open(make_checkpoint(tmp_path / "sharded", shards=4)).digest() == digest
    assert Checkpoint.open(make_checkpoint(tmp_path / "seed", seed=1)).digest() != digest
    assert Checkpoint.open(make_checkpoint(tmp_path / "tokenizer", gemma=False)).digest() != digest
    theta = make_checkpoint(tmp_path / "theta", fields={"rope_theta": 5e5})
    assert Checkpoint.open(theta).digest() != digest


def test_digest_sees_one_bit(tmp_path: Path, tiny: Checkpoint) -> None:
    folder = make_checkpoint(tmp_path / "model")
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert Checkpoint.open(folder).digest() != tiny.digest()


# ---- a tied model's head ----------------------------------------------------------------------------


def test_equal_duplicate_head_is_dropped(tmp_path: Path) -> None:
    def copy_head(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()

    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "model", change=copy_head))
    assert HEAD not in checkpoint.shapes()
    assert any("duplicate lm_head.weight was dropped" in note for note in checkpoint.notes)


def test_differing_duplicate_head_is_an_error(tmp_path: Path) -> None:
    def other_head(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][77, 3] += 1

    text = message_of(make_checkpoint(tmp_path / "model", change=other_head))
    assert "lm_head.weight" in text and "row 77" in text and "tied" in text


def test_untied_without_head_says_so(tmp_path: Path) -> None:
    text = message_of(make_checkpoint(tmp_path / "model", tied=False, change=lambda t: t.pop(HEAD)))
    assert "lm_head.weight" in text and "not tied" in text


# ---- wrong tensors ----------------------------------------------------------------------------------


def _set(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.__setitem__(name, tensor)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(Q), ["1 of 20 tensors missing", Q]),
        (
            _set("model.layers.2.mlp.up_proj.weight", torch.zeros(96, 64)),
            ["1 unexpected", "model.layers.2", "2 layers"],
        ),
        (_set("model.layers.0.self_attn.q_proj.bias", torch.zeros(64)), ["1 unexpected", "q_proj.bias"]),
        (_set(Q, torch.zeros(64, 63)), [Q, "[64, 63]", "[64, 64]"]),
        (_set(Q, torch.zeros(4096)), [Q, "[4096]", "[64, 64]"]),
        (_set(Q, torch.zeros(64, 64, dtype=torch.int8)), [Q, "I8", "BF16, F16, F32"]),
        (_set(Q, torch.zeros(64, 64, dtype=torch.float64)), [Q, "F64"]),
    ],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_wrong_tensors(tmp_path: Path, change: Any, words: list[str], shards: int) -> None:
    folder = make_checkpoint(tmp_path / "model", change=change, shards=shards)
    text = message_of(folder)
    assert str(folder) in text and all(word in text for word in words), text


def test_old_rotary_tables_are_ignored(tmp_path: Path, tiny: Checkpoint) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        for n in range(2):
            tensors[f"model.layers.{n}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "model", change=add))
    assert checkpoint.digest() == tiny.digest()
    assert any(note.startswith("2 saved rotary tables") for note in checkpoint.notes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_not_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    folder = make_checkpoint(tmp_path / "m", dtype=dtype, change=lambda t: t[Q].__setitem__((33, 7), value))
    checkpoint = Checkpoint.open(folder)
    where = rf"model\.safetensors: tensor '{Q}' holds {value} at row 33, column 7"
    with pytest.raises(CheckpointError, match=where):
        checkpoint.float_rows(Q, 30, 40)
    with pytest.raises(CheckpointError, match=where):
        checkpoint.check_finite()
    assert checkpoint.float_rows(Q, 0, 30).isfinite().all()


def test_huge_finite_values_are_no_error(tmp_path: Path) -> None:
    """Values whose sum is infinite, though none of them is."""
    folder = make_checkpoint(tmp_path / "m", dtype=torch.float32, change=lambda t: t[Q].fill_(3e38))
    assert Checkpoint.open(folder).float_rows(Q).max() == pytest.approx(3e38)


def test_unknown_tensor_name(tiny: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor 'lm_head\.weight' among the 20"):
        tiny.tensor(HEAD)


# ---- shards -----------------------------------------------------------------------------------------


def _edit_index(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    path = folder / "model.safetensors.index.json"
    fields = json.loads(path.read_text())
    edit(fields)
    path.write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(
    "file",
    [
        "../secret.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "C:\\x.safetensors",
        "..",
        "",
        ".x.bin",
        7,
        None,
    ],
)
def test_index_that_leaves_its_folder(tmp_path: Path, file: Any) -> None:
    folder = make_checkpoint(tmp_path / "m", shards=2)
    shutil.copy(folder / "model-00001-of-00002.safetensors", tmp_path / "secret.safetensors")
    text = message_of(_edit_index(folder, lambda f: f["weight_map"].__setitem__(EMBEDDING, file)))
    assert EMBEDDING in text and "no shard of this folder" in text


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda f: f["weight_map"].__setitem__(EMBEDDING, "gone.safetensors"),
            "gone.safetensors, which is missing",
        ),
        (
            lambda f: f["weight_map"].__setitem__(EMBEDDING, "model-00002-of-00002.safetensors"),
            "model-00002-of-00002.safetensors, which does not hold it",
        ),
        (lambda f: f.pop("weight_map"), "no 'weight_map'"),
        (lambda f: f.__setitem__("weight_map", []), "no 'weight_map'"),
    ],
)
def test_index_that_lies(tmp_path: Path, edit: Any, words: str) -> None:
    assert words in message_of(_edit_index(make_checkpoint(tmp_path / "m", shards=2), edit))


def test_truncated_shard_says_both_sizes(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", shards=3)
    path = folder / "model-00002-of-00003.safetensors"
    whole = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(whole - 4096)
    text = message_of(folder)
    assert str(path) in text and f"{whole} bytes" in text and str(whole - 4096) in text


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    save_shards(folder, random_tensors(TINY), 2)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "again.safetensors")
    edit = _edit_index(folder, lambda f: f["weight_map"].__setitem__(EMBEDDING, "again.safetensors"))
    assert "is in" in message_of(edit)


# ---- .bin -------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (os.environ["BOMB"],))


def test_pickled_code_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    folder = make_checkpoint(tmp_path / "m", torch_bin=True)
    torch.save({EMBEDDING: Bomb()}, folder / "pytorch_model.bin")
    assert "pickled code" in message_of(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    message_of(folder)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\3\4 not a zip"])
def test_damaged_bin(tmp_path: Path, content: bytes) -> None:
    folder = make_checkpoint(tmp_path / "m", torch_bin=True)
    (folder / "pytorch_model.bin").write_bytes(content)
    assert "pytorch_model.bin" in message_of(folder)


def test_bin_without_names(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", torch_bin=True)
    torch.save([torch.zeros(3)], folder / "pytorch_model.bin")
    assert "no dictionary of named tensors" in message_of(folder)


# ---- tokenizer and ids ------------------------------------------------------------------------------


def test_bos_eos_trap(tiny: Checkpoint) -> None:
    """Both config files say bos 1, eos 2, as the published Fox's do; its tokenizer says 2, 1."""
    tokenizer = tiny.tokenizer()
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 1)
    (note,) = tiny.notes
    assert note == (
        "config.json and generation_config.json: bos_token_id is 1 (2 in the tokenizer), "
        "eos_token_id is 2 (1 in the tokenizer); the tokenizer decides"
    )
    corrected = tiny.generation_config()
    assert corrected["bos_token_id"] == 2 and corrected["pad_token_id"] == 0
    assert set(corrected["eos_token_id"]) == tokenizer.stop_ids
    assert tokenizer.bos_id not in tokenizer.stop_ids


def test_agreeing_ids_need_no_note(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", gemma=False)
    checkpoint = Checkpoint.open(folder)
    assert not [note for note in checkpoint.notes if "token_id" in note]


def test_other_generation_settings_stay(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    (folder / "generation_config.json").write_text('{"temperature": 0.7, "eos_token_id": [1, 2]}')
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.generation_config()["temperature"] == 0.7
    assert any("generation_config.json: eos_token_id is [1, 2]" in note for note in checkpoint.notes)


def test_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    small = dataclasses.replace(TINY, vocab_size=480)
    folder = make_checkpoint(tmp_path / "m", small)
    write_tokenizer(folder, vocab_size=512)
    text = message_of(folder, TokenizerError)
    assert "512 pieces" in text and "480 rows" in text


def test_padded_vocabulary_is_noted(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", dataclasses.replace(TINY, vocab_size=576))
    write_tokenizer(folder, vocab_size=512)
    assert any("576 rows for 512 pieces" in note for note in Checkpoint.open(folder).notes)


def test_no_tokenizer(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    (folder / "tokenizer.model").unlink()
    assert "no tokenizer.model and no tokenizer.json" in message_of(folder, TokenizerError)


def test_tokenizer_files_are_listed(tiny: Checkpoint) -> None:
    assert [path.name for path in tiny.tokenizer_files()] == ["tokenizer.model", "tokenizer_config.json"]
