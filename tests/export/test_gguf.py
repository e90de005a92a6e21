"""GGUF artifacts as others read them: gguf-py's reader, plain numpy, and llama.cpp's own conventions."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import export.gguf
from export.gguf import export_gguf, interleave_heads, model_file_name
from export.gguf_header import padded_pieces
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import ArtifactError, CheckpointError, RecipeError, TokenizerError, VerificationError
from fox_edge.gguf_format import stored_name
from fox_edge.quant import EMBEDDING, GGUF, ONNX, Recipe, find_recipe
from tests.helpers import TINY, make_checkpoint, write_tokenizer

REPOSITORY = Path(__file__).parents[2]


def recipe(name: str) -> Recipe:
    return find_recipe(GGUF, name)


def read(artifact: Artifact) -> gguf.GGUFReader:
    return gguf.GGUFReader(artifact.model_path)


def tensors(artifact: Artifact) -> dict[str, Any]:
    return {t.name: t for t in read(artifact).tensors}


def test_a_tied_model_holds_its_matrix_once(tiny_256: Checkpoint, tmp_path: Path) -> None:
    artifact = export_gguf(tiny_256, tmp_path / "out", recipe("int4"), rounding="nearest")
    assert Artifact.open(tmp_path / "out") == artifact
    assert list(artifact.changed_files()) == []
    found = tensors(artifact)
    assert set(found) == {stored_name(name) for name in tiny_256.shapes()}
    assert "output.weight" not in found
    assert found["token_embd.weight"].tensor_type.name == "Q6_K"
    assert found["blk.0.ffn_up.weight"].tensor_type.name == "Q4_0"
    assert found["blk.0.ffn_down.weight"].tensor_type.name == "Q5_0"  # the first layer's
    assert found["blk.1.attn_norm.weight"].tensor_type.name == "F32"
    for record in artifact.manifest.tensors:
        assert found[record.stored_as].n_bytes == record.bytes
        assert tuple(found[record.stored_as].shape[::-1]) == record.shape
        assert found[record.stored_as].tensor_type.name.lower() == record.type
    assert artifact.manifest.tied
    assert artifact.manifest.parameters == tiny_256.config.num_parameters()
    assert artifact.manifest.checkpoint_sha256 == tiny_256.digest()


def test_an_untied_model_has_its_head(tiny_untied: Checkpoint, tmp_path: Path) -> None:
    artifact = export_gguf(tiny_untied, tmp_path / "out", recipe("f16"))
    head = tensors(artifact)["output.weight"]
    np.testing.assert_array_equal(head.data, tiny_untied.tensor("lm_head.weight").float().half().numpy())


def test_metadata(tiny: Checkpoint, tmp_path: Path) -> None:
    fields = read(export_gguf(tiny, tmp_path / "out", recipe("int8"))).fields
    config, tokenizer = tiny.config, tiny.tokenizer()
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "tiny",
        "general.size_label": "90K",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q8_0,
        "llama.context_length": config.max_positions,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(config.rms_norm_eps),
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope_theta,
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "llama",
        # The checkpoint's config.json says bos 1 and eos 2, as the published one does.
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.eot_token_id": tokenizer.id_of("<end_of_turn>"),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    assert {key: fields[key].contents() for key in expected} == expected
    pieces = tokenizer.pieces()
    texts = [p.text.replace("\u2581", " ") if p.kind == "user_defined" else p.text for p in pieces]
    assert fields["tokenizer.ggml.tokens"].contents() == texts
    assert "  " in texts and "\u2581\u2581" not in texts
    np.testing.assert_allclose(fields["tokenizer.ggml.scores"].contents(), [p.score for p in pieces])
    kinds = dict(
        zip(range(1, 7), ("normal", "unknown", "control", "user_defined", "unused", "byte"), strict=True)
    )
    types = fields["tokenizer.ggml.token_type"].contents()
    assert [kinds[n] for n in types] == [piece.kind for piece in pieces]
    assert {"control", "user_defined", "byte", "unknown", "normal"} <= {kinds[n] for n in types}


def test_a_llama_like_tokenizer_keeps_its_space_prefix_and_ids(
    tiny_untied: Checkpoint, tmp_path: Path
) -> None:
    fields = read(export_gguf(tiny_untied, tmp_path / "out", recipe("f32"))).fields
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is True
    assert fields["tokenizer.ggml.bos_token_id"].contents() == 1
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert "tokenizer.ggml.padding_token_id" not in fields


def test_where_it_comes_from(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    checkpoint = Checkpoint(folder, "owner/A-Model-1.6B")
    artifact = export_gguf(checkpoint, tmp_path / "out", recipe("int8"))
    assert artifact.manifest.model_file == "A-Model-1.6B-int8.gguf"
    fields = read(artifact).fields
    assert fields["general.name"].contents() == "A-Model-1.6B"
    assert fields["general.license"].contents() == "apache-2.0"
    assert fields["general.base_model.0.organization"].contents() == "owner"
    assert fields["general.base_model.0.repo_url"].contents() == "https://huggingface.co/owner/A-Model-1.6B"


def test_a_file_name_for_every_checkpoint_name(tiny: Checkpoint) -> None:
    odd = Checkpoint(tiny.path, "owner/__Füchse & co")
    assert model_file_name(odd, recipe("int4")) == "F-chse-co-int4.gguf"


def test_bf16_goes_through_byte_for_byte(tmp_path: Path) -> None:
    def edges(tensors: dict[str, torch.Tensor]) -> None:
        # Zeros of both signs, the smallest subnormals, the largest numbers.
        bits = torch.tensor([0, -32768, 1, -32767, 0x7F7F, 0x7F7F - 65536 + 32768], dtype=torch.int16)
        tensors[EMBEDDING][5, :6] = bits.view(torch.bfloat16)

    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "checkpoint", change=edges))
    artifact = export_gguf(checkpoint, tmp_path / "out", recipe("bf16"))
    stored = checkpoint.tensor(EMBEDDING).view(torch.int16).numpy()
    np.testing.assert_array_equal(tensors(artifact)["token_embd.weight"].data.view(np.int16), stored)


def test_q_and_k_rows_are_in_llama_cpps_order(tiny: Checkpoint, tmp_path: Path) -> None:
    found = tensors(export_gguf(tiny, tmp_path / "out", recipe("f32")))
    config = tiny.config
    for short, hf, heads in (("q", "q_proj", config.num_heads), ("k", "k_proj", config.num_kv_heads)):
        rows = tiny.tensor(f"model.layers.1.self_attn.{hf}.weight").float().numpy()
        # The formula of llama.cpp's own converter.
        expected = rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)
        np.testing.assert_array_equal(found[f"blk.1.attn_{short}.weight"].data, expected)
        assert not np.array_equal(expected, rows)
    value = tiny.tensor("model.layers.1.self_attn.v_proj.weight").float().numpy()
    np.testing.assert_array_equal(found["blk.1.attn_v.weight"].data, value)


def list_of_matrices(checkpoint: Checkpoint) -> list[tuple[int, ...]]:
    return [shape for name, shape in checkpoint.shapes().items() if ".layers." in name and len(shape) == 2]


def test_heads_are_interleaved_one_by_one() -> None:
    rows = torch.arange(12)[:, None]
    assert interleave_heads(rows, 6).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@pytest.mark.parametrize("rounding", ["nearest", "search"])
def test_the_file_does_not_depend_on_tasks_and_threads(
    tiny_256: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounding: str
) -> None:
    whole = export_gguf(tiny_256, tmp_path / "whole", recipe("int4"), threads=1, rounding=rounding)
    # Seven rows at once, and one head at once for q and k: many tasks, some of them ragged.
    monkeypatch.setattr(export.gguf, "TASK_WEIGHTS", 7 * 256)
    told: list[tuple[int, int]] = []
    cut = export_gguf(
        tiny_256,
        tmp_path / "cut",
        recipe("int4"),
        threads=5,
        rounding=rounding,
        progress=lambda *now: told.append(now),
    )
    assert cut.manifest.files == whole.manifest.files | {"README.md": cut.manifest.files["README.md"]}
    total = 2 * tiny_256.config.num_parameters()
    if rounding == "search":  # the layers are read once more
        total += 2 * sum(m * n for m, n in list_of_matrices(tiny_256))
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert len(told) > 200


def test_rows_that_a_type_cannot_hold_get_another_and_the_manifest_says_so(
    tiny: Checkpoint, tmp_path: Path
) -> None:
    artifact = export_gguf(tiny, tmp_path / "out", recipe("int4"), rounding="nearest")
    records = {record.name: record for record in artifact.manifest.tensors}
    assert records[EMBEDDING].type == "q8_0"
    assert records[EMBEDDING].reason == "64 columns are no whole number of q6_k blocks of 256"
    assert records["model.norm.weight"].reason is None
    mixed = export_gguf(tiny, tmp_path / "mixed", recipe("q4_k"), rounding="nearest")
    up = {record.name: record for record in mixed.manifest.tensors}["model.layers.0.mlp.up_proj.weight"]
    assert (up.type, up.reason) == ("q5_0", "64 columns are no whole number of q4_k blocks of 256")
    assert tensors(mixed)["blk.0.ffn_up.weight"].tensor_type.name == "Q5_0"


def test_rows_of_a_model_without_a_piece_become_unused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    write_tokenizer(folder, vocab_size=500)
    artifact = export_gguf(Checkpoint.open(folder), tmp_path / "out", recipe("int8"))
    fields = read(artifact).fields
    texts, types = fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.token_type"].contents()
    assert len(texts) == len(set(texts)) == 512
    assert types[500:] == [5] * 12
    assert any("512 rows for 500 pieces" in note for note in artifact.manifest.notes)


@pytest.mark.parametrize("algorithm", ["byte-level-bpe", "unigram"])
def test_other_tokenizers_are_refused(
    tiny: Checkpoint, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny.tokenizer()
    monkeypatch.setattr(type(tokenizer), "algorithm", algorithm)
    with pytest.raises(TokenizerError, match=f"is {algorithm}, but fox-edge writes SentencePiece BPE"):
        padded_pieces(tokenizer, 512)


def test_a_nan_is_found_and_nothing_is_left(tmp_path: Path) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")

    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "checkpoint", change=poison))
    (tmp_path / "outs").mkdir()
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.* nan at row 3, column 4"
    ):
        export_gguf(checkpoint, tmp_path / "outs" / "out", recipe("int8"))
    assert list((tmp_path / "outs").iterdir()) == []


def test_a_weight_beyond_f16_is_refused(tmp_path: Path) -> None:
    def large(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 70000.0

    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "checkpoint", change=large))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight: a weight of 70144 does not fit f16"):
        export_gguf(checkpoint, tmp_path / "out", recipe("f16"))


def test_an_existing_target_stays_unless_told_otherwise(tiny: Checkpoint, tmp_path: Path) -> None:
    target = tmp_path / "out"
    first = export_gguf(tiny, target, recipe("int8"))
    with pytest.raises(ArtifactError, match="exists already"):
        export_gguf(tiny, target, recipe("int4"))
    assert Artifact.open(target) == first
    assert export_gguf(tiny, target, recipe("int4"), replace=True).manifest.quant == "int4"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_is_too_small_is_told_at_once(
    tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ArtifactError, match=r"needs \d+ bytes, but that disk has 1000 free"):
        export_gguf(tiny, tmp_path / "out", recipe("int8"))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(
    tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(ArtifactError, match=r"writing failed.*nothing was kept"):
        export_gguf(tiny, tmp_path / "out", recipe("int8"))
    assert list(tmp_path.iterdir()) == []


def test_writes_that_the_disk_takes_in_parts(
    tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = export_gguf(tiny, tmp_path / "whole", recipe("int8")).model_path.read_bytes()
    pwrite = os.pwrite
    monkeypatch.setattr("os.pwrite", lambda handle, data, offset: pwrite(handle, data[:1000], offset))
    assert export_gguf(tiny, tmp_path / "parts", recipe("int8")).model_path.read_bytes() == whole


def test_a_recipe_for_another_format_is_refused(tiny: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is for onnx"):
        export_gguf(tiny, tmp_path / "out", find_recipe(ONNX, "int8"))


def test_verification_sees_the_finished_folder_and_lands_in_the_manifest(
    tiny: Checkpoint, tmp_path: Path
) -> None:
    seen: list[Artifact] = []

    def verify(artifact: Artifact) -> dict[str, Any]:
        assert tensors(artifact) and not (tmp_path / "out").exists()
        seen.append(artifact)
        return {"passed": True, "mean_kl_nats": 0.00123, "top1_agreement_percent": 99.5}

    artifact = export_gguf(tiny, tmp_path / "out", recipe("int8"), verify=verify)
    assert artifact.manifest.verification == {
        "passed": True,
        "mean_kl_nats": 0.00123,
        "top1_agreement_percent": 99.5,
    }
    assert dataclasses.replace(artifact.manifest, files={}, verification=None) == seen[0].manifest
    assert "manifest.json" not in artifact.manifest.files
    assert "0.00123 nats" in (artifact.path / "README.md").read_text()


def test_a_failed_verification_leaves_nothing(tiny: Checkpoint, tmp_path: Path) -> None:
    def verify(artifact: Artifact) -> dict[str, Any]:
        raise VerificationError("not the model")

    with pytest.raises(VerificationError, match="not the model"):
        export_gguf(tiny, tmp_path / "out", recipe("int8"), verify=verify)
    assert list(tmp_path.iterdir()) == []


def test_kill_9_in_mid_export_leaves_nothing_that_looks_like_a_model(
    tiny_folder: Path, tmp_path: Path
) -> None:
    program = f"""
import os, signal, export.gguf
from fox_edge.checkpoint import Checkpoint
from fox_edge.quant import find_recipe
from pathlib import Path

def kill(done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint, target = Checkpoint.open({str(tiny_folder)!r}), Path({str(tmp_path / "out")!r})
export.gguf.export_gguf(checkpoint, target, find_recipe("gguf", "int8"), progress=kill)
"""
    died = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.") and left.name.endswith(".partial")
    with pytest.raises(ArtifactError, match="not an exported model"):
        Artifact.open(left)


def test_side_files_name_the_tokenizers_ids(tiny: Checkpoint, tmp_path: Path) -> None:
    folder = export_gguf(tiny, tmp_path / "out", recipe("int8")).path
    config = json.loads((folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (2, 1, 0)
    assert config["torch_dtype"] == "bfloat16"
    assert config["vocab_size"] == TINY.vocab_size
