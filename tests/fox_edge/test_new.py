"""Random checkpoints, and the tokenizer that stands in for a real one."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch

from fox_edge import new
from fox_edge.checkpoint import Checkpoint
from fox_edge.config import SHAPES, FoxConfig
from fox_edge.errors import CheckpointError, TokenizerError
from fox_edge.new import new_checkpoint, random_rows
from fox_edge.sentencepiece_model import SentencePieceModel
from fox_edge.stand_in import stand_in_files, stand_in_pieces
from fox_edge.tokenizer import Tokenizer
from fox_edge.vocabulary import Piece
from tests.helpers import PROBES, TINY, vocabulary_in_llama_cpp

NANO = Path(__file__).parents[2] / "fox_edge" / "nano"
SIZE = 12_000


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return stand_in_files(NANO, SIZE)


@pytest.fixture(scope="module")
def folder(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand_in")
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


def nano_pieces() -> list[Piece]:
    return SentencePieceModel.parse((NANO / "tokenizer.model").read_bytes(), "nano").pieces


def test_gemmas_places(tokenizer: Tokenizer) -> None:
    pieces = tokenizer.pieces()
    assert len(pieces) == SIZE == len({p.text for p in pieces})
    assert [p.text for p in pieces[:5]] == ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    assert [p.text for p in pieces[106:109]] == ["<start_of_turn>", "<end_of_turn>", "\n"]
    assert pieces[139].text == "\u2581\u2581"
    assert [p.text for p in pieces[217:473]] == [f"<0x{n:02X}>" for n in range(256)]
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert tokenizer.stop_ids == {1, 107} and not tokenizer.add_space_prefix


def test_three_libraries_agree(tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    spm = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    hf = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert spm.vocab_size() == hf.get_vocab_size() == SIZE
    llama = vocabulary_in_llama_cpp(tokenizer, tmp_path / "vocabulary.gguf")
    rng = random.Random(0)
    made_up = [p.text.replace("\u2581", " ") for p in tokenizer.pieces()[-3000:]]
    texts = PROBES + ["".join(rng.choices(made_up, k=12)) for _ in range(100)]
    for text in texts:
        ids = tokenizer.encode(text, special=True)
        assert ids == hf.encode(text, add_special_tokens=False).ids, text
        assert ids == llama.tokenize(text.encode(), add_bos=False, special=True), text
        if "<" not in text:
            assert ids == spm.encode(text)
        assert tokenizer.decode(ids, skip_special=False) == text


def test_made_up_pieces_are_used(tokenizer: Tokenizer) -> None:
    """A piece that no merge could reach would be dead weight in the vocabulary."""
    pieces = tokenizer.pieces()
    made_up = range(SIZE - 2000, SIZE)
    found = [id for id in made_up if tokenizer.encode(pieces[id].text.replace("\u2581", " ")) == [id]]
    assert len(found) > len(made_up) // 2


def test_stand_in_is_deterministic(files: dict[str, bytes]) -> None:
    assert stand_in_files(NANO, SIZE) == files


def test_size_of_fox() -> None:
    """256,000 pieces, all different, in a moderate tokenizer.json."""
    files = stand_in_files(NANO, 256_000)
    vocab = json.loads(files["tokenizer.json"])["model"]["vocab"]
    assert len(vocab) == 256_000 and sorted(vocab.values()) == list(range(256_000))
    assert len(files["tokenizer.json"]) < 25e6
    assert sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"]).vocab_size() == 256_000


@pytest.mark.parametrize("size", [100, 8192, 10**9])
def test_sizes_that_cannot_be(size: int) -> None:
    with pytest.raises(TokenizerError, match=r"\d+"):
        stand_in_pieces(nano_pieces(), size)


def test_new_nano(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    checkpoint = new_checkpoint(tmp_path / "a", "nano", 0, lambda done, total: seen.append((done, total)))
    assert checkpoint.config == FoxConfig.nano() and checkpoint.notes == []
    assert (tmp_path / "a" / "model.safetensors").stat().st_size < 14e6
    assert seen[-1][1] == 2 * FoxConfig.nano().num_parameters()
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    embedding = checkpoint.float_rows("model.embed_tokens.weight")
    assert embedding.std() == pytest.approx(0.02, rel=0.01) and abs(embedding.mean()) < 1e-4
    assert torch.equal(checkpoint.float_rows("model.norm.weight"), torch.ones(1, 256))
    assert new_checkpoint(tmp_path / "b", "nano", 0).digest() == checkpoint.digest()
    assert new_checkpoint(tmp_path / "c", "nano", 1).digest() != checkpoint.digest()


def test_new_larger_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "toy", lambda: dataclasses.replace(TINY, vocab_size=SIZE, tied=False))
    checkpoint = new_checkpoint(tmp_path / "toy", "toy", 3)
    assert checkpoint.tokenizer().vocab_size == checkpoint.config.vocab_size == SIZE
    assert checkpoint.notes == []
    head, embedding = checkpoint.tensor("lm_head.weight"), checkpoint.tensor("model.embed_tokens.weight")
    assert not torch.equal(head, embedding)
    tokens = torch.tensor([checkpoint.tokenizer().encode_chat([{"role": "user", "content": "Hi"}])])
    assert checkpoint.load_model()(tokens).isfinite().all()


def test_rows_come_in_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(new, "_PIECE_WEIGHTS", 1000)
    sizes = [rows.numel() for _, rows in random_rows(TINY, 0)]
    assert max(sizes) <= 1000 and sum(sizes) == TINY.num_parameters()


def test_unknown_shape_and_existing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"unknown shape 'giant'; known: fox-1-1\.6b, nano"):
        new_checkpoint(tmp_path / "x", "giant", 0)
    with pytest.raises(CheckpointError, match="exists already"):
        new_checkpoint(tmp_path, "nano", 0)
    assert isinstance(Checkpoint.open("nano"), Checkpoint)
