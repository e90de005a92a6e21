"""What a checkpoint says of itself, and how the GGUF header repeats it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from export.gguf import export_gguf
from export.gguf_header import file_type, padded_pieces
from export.identity import identify, sampling_of
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import TokenizerError
from fox_edge.quant import GGUF, INT4_LIMITS, Recipe, find_recipe, type_names
from fox_edge.vocabulary import Piece
from tests.helpers import make_checkpoint


def checkpoint(
    folder: Path, name: str, card: str = "", generation: dict[str, Any] | None = None
) -> Checkpoint:
    make_checkpoint(folder)
    (folder / "README.md").write_text(card)
    (folder / "generation_config.json").write_text(json.dumps(generation or {}))
    return Checkpoint(folder, name)


def test_the_parts_of_a_name_and_the_card(tmp_path: Path) -> None:
    card = "---\nlicense: apache-2.0\nlanguage:\n- en\n- de\ntags: [fox, 'small']\npipeline_tag: chat\n---\n"
    found = identify(checkpoint(tmp_path, "tensoropera/Fox-1-90K-Instruct-v0.1", card))
    assert (found.name, found.basename, found.finetune) == ("Fox-1-90K-Instruct-v0.1", "Fox-1", "Instruct")
    assert (found.version, found.size_label) == ("v0.1", "90K")
    assert found.languages == ("en", "de") and found.tags == ("fox", "small", "chat")
    # A size that cannot be this model's is no size.
    assert identify(Checkpoint(tmp_path, "Fox-1-1.6B")).size_label == "90K"
    assert identify(Checkpoint.open("nano")).size_label == "6.6M"


@pytest.mark.parametrize(
    "card", ["", "no front", "---\nlanguage: {a: b}\ntags:\n  x: y\n---", "---\nlanguage: [\n---"]
)
def test_odd_cards_say_nothing(card: str, tmp_path: Path) -> None:
    found = identify(checkpoint(tmp_path, "x", card))
    assert found.tags == () and found.languages == ()


def test_sampling() -> None:
    asked = {"temperature": 0.6, "top_k": 50, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2}
    want = {"temperature": 0.6, "top_k": 50, "top_p": 0.9, "min_p": 0.05, "repeat_penalty": 1.2}
    assert sampling_of(asked) == want
    assert sampling_of(asked | {"do_sample": False}) == {"repeat_penalty": 1.2}
    odd = {"temperature": True, "top_k": 2.5, "top_p": float("nan"), "min_p": "0.1", "repetition_penalty": -1}
    assert sampling_of(odd) == {}
    assert sampling_of({"temperature": float("inf"), "top_k": 1 << 40}) == {}


def test_the_header_repeats_it(tmp_path: Path) -> None:
    source = checkpoint(
        tmp_path / "checkpoint",
        "tensoropera/Fox-1-90K-Instruct-v0.1",
        "---\nlanguage: en\npipeline_tag: text-generation\n---\n",
        {"temperature": 0.5, "top_k": 40, "repetition_penalty": 1.1},
    )
    artifact = export_gguf(source, tmp_path / "out", find_recipe(GGUF, "int8"))
    fields = gguf.GGUFReader(artifact.model_path).fields
    expected = {
        "general.basename": "Fox-1",
        "general.finetune": "Instruct",
        "general.version": "v0.1",
        "general.languages": ["en"],
        "general.tags": ["text-generation"],
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 40,
        "general.sampling.penalty_repeat": pytest.approx(1.1),
    }
    assert {key: fields[key].contents() for key in expected} == expected
    assert fields["general.sampling.top_k"].types == [gguf.GGUFValueType.INT32]
    assert "general.sampling.top_p" not in fields


def test_every_type_has_a_file_type() -> None:
    for name in type_names(GGUF):
        number = gguf.LlamaFileType(file_type(find_recipe(GGUF, name)))
        assert number != gguf.LlamaFileType.GUESSED, name
        assert number.name.split("_", 1)[1].lower().startswith(name.removesuffix("_moe"))
    # llama-quantize's own mixtures, by name.
    mixture = Recipe("q4_k_m", GGUF, "q4_k", (), INT4_LIMITS)
    assert file_type(mixture) == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert file_type(find_recipe(GGUF, "int4")) == gguf.LlamaFileType.MOSTLY_Q4_0


def test_a_vocabulary_without_all_bytes_is_refused(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny.tokenizer()
    pieces = [Piece("odd", p.score, "normal") if p.text == "<0x7F>" else p for p in tokenizer.pieces()]
    monkeypatch.setattr(type(tokenizer), "pieces", lambda self: pieces)
    with pytest.raises(TokenizerError, match=r"no piece for 1 of 256 bytes \(the first: 127\)"):
        padded_pieces(tokenizer, 512)
