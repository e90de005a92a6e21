"""The tokenizer against sentencepiece, tokenizers, transformers and llama.cpp."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from transformers import AutoTokenizer, LlamaTokenizer

from fox_edge.errors import TokenizerError
from fox_edge.sentencepiece_model import SentencePieceModel, with_kinds
from fox_edge.tokenizer import Tokenizer
from tests.helpers import PROBES, vocabulary_in_llama_cpp, write_tokenizer

NANO = Path(__file__).parents[2] / "fox_edge" / "nano"
MESSAGES = [
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "Three."},
    {"role": "user", "content": "And now?"},
]


def settings(folder: Path, **changes: Any) -> Path:
    """Change tokenizer_config.json; None removes a key."""
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in {**fields, **changes}.items() if v is not None}))
    return folder


@pytest.fixture(scope="module", params=["gemma", "llama", "nano"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "nano":
        return NANO
    folder = tmp_path_factory.mktemp(request.param)
    write_tokenizer(folder, gemma=request.param == "gemma")
    return folder


@pytest.fixture(scope="module")
def opened(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def nano() -> Tokenizer:
    return Tokenizer.from_folder(NANO)


@pytest.fixture
def gemma(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path, gemma=False)
    return tmp_path


@pytest.fixture(scope="module")
def nano_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nano's tokenizer without tokenizer.model."""
    folder = tmp_path_factory.mktemp("json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((NANO / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def from_json(nano_json: Path) -> Tokenizer:
    return Tokenizer.from_folder(nano_json)


# ---- agreement with independent implementations -----------------------------------------------------


@pytest.mark.parametrize("text", PROBES)
def test_plain_text_is_sentencepieces(folder: Path, opened: Tokenizer, text: str) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    text = text.replace("_of_turn>", "")  # nano's model file finds its turn markers in plain text too
    assert opened.encode(text) == theirs.encode(text)
    assert opened.decode(opened.encode(text)) == theirs.decode(theirs.encode(text)) == text


@pytest.mark.parametrize("text", PROBES)
def test_json_is_the_same_tokenizer(
    nano: Tokenizer, from_json: Tokenizer, nano_json: Path, text: str
) -> None:
    theirs = tokenizers.Tokenizer.from_file(str(nano_json / "tokenizer.json"))
    for special in (False, True):
        ids = from_json.encode(text, special=special)
        assert ids == nano.encode(text, special=special)
        assert from_json.decode(ids, skip_special=False) == text
    assert ids == theirs.encode(text, add_special_tokens=False).ids


def test_json_has_the_same_pieces(nano: Tokenizer, from_json: Tokenizer) -> None:
    ours, theirs = from_json.pieces(), nano.pieces()
    assert [(p.text, p.kind) for p in ours] == [(p.text, p.kind) for p in theirs]
    for name in (
        "vocab_size",
        "bos_id",
        "eos_id",
        "pad_id",
        "unk_id",
        "stop_ids",
        "add_bos",
        "add_space_prefix",
    ):
        assert getattr(from_json, name) == getattr(nano, name), name


def test_llama_cpp_gives_the_same_ids(opened: Tokenizer, tmp_path: Path) -> None:
    theirs = vocabulary_in_llama_cpp(opened, tmp_path / "vocabulary.gguf")
    for text in PROBES:
        for special in (False, True):
            expected = theirs.tokenize(text.encode(), add_bos=False, special=special)
            assert opened.encode(text, special=special) == expected, (text, special)


def test_random_text_agrees_everywhere(nano: Tokenizer, from_json: Tokenizer, tmp_path: Path) -> None:
    rng = random.Random(1)
    words = [
        "fox",
        " ",
        "  ",
        "\n",
        "\n\n\n",
        "12",
        "🦊",
        "狐",
        "\t",
        "<eos>",
        "é",
        "\u0301",
        ".",
        "<<3+4=7>>",
        "the",
    ]
    llama = vocabulary_in_llama_cpp(nano, tmp_path / "vocabulary.gguf")
    for _ in range(100):
        text = "".join(rng.choices(words, k=rng.randint(1, 30)))
        ids = nano.encode(text, special=True)
        assert ids == from_json.encode(text, special=True), text
        assert ids == llama.tokenize(text.encode(), add_bos=False, special=True), text
        assert nano.decode(ids, skip_special=False) == text


def test_transformers_agrees_with_bos_and_chat(nano: Tokenizer) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(NANO), nano
    for text in PROBES:
        assert ours.encode(text, bos=True, special=True) == theirs(text).input_ids
    rendered = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(MESSAGES) == rendered
    assert ours.encode_chat(MESSAGES) == theirs.apply_chat_template(MESSAGES, add_generation_prompt=True)


def test_byte_level_json(tmp_path: Path) -> None:
    """The other family of tokenizer.json, GPT-2's alphabet of bytes."""
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(PROBES * 3, vocab_size=400, special_tokens=["<|endoftext|>", "<|im_end|>"])
    trained.save(str(tmp_path / "tokenizer.json"))
    settings(tmp_path, eos_token="<|endoftext|>")
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.algorithm == "byte-level-bpe" and not ours.add_space_prefix and not ours.add_bos
    assert ours.stop_ids == {0, 1}
    for text in PROBES:
        ids = ours.encode(text)
        assert ids == trained.encode(text).ids
        assert ours.decode(ids) == text
        assert stream_of(ours, ids) == text


# ---- special tokens ---------------------------------------------------------------------------------


def test_special_ids(gemma: Path) -> None:
    t = Tokenizer.from_folder(gemma)
    assert (t.pad_id, t.eos_id, t.bos_id, t.unk_id) == (0, 1, 2, 3)
    assert t.add_bos and not t.add_space_prefix and t.vocab_size == 512
    assert t.stop_ids == {1, t.id_of("<end_of_turn>")}


def test_special_ids_of_llama(llama: Path) -> None:
    t = Tokenizer.from_folder(llama)
    assert (t.unk_id, t.bos_id, t.eos_id, t.pad_id) == (0, 1, 2, None)
    assert t.add_bos and t.add_space_prefix


def test_special_tokens_only_where_asked(gemma: Path) -> None:
    t = Tokenizer.from_folder(gemma)
    plain, special = t.encode("a<eos>b"), t.encode("a<eos>b", special=True)
    assert t.eos_id not in plain and special.count(1) == 1
    assert special == [*t.encode("a"), 1, *t.encode("b")]
    assert t.decode(special) == "ab" and t.decode(special, skip_special=False) == "a<eos>b"
    assert t.encode("x", bos=True) == [2, *t.encode("x")]
    assert t.encode("") == [] and t.encode("", bos=True) == [2] and t.encode("", special=True) == []


def test_space_prefix_comes_again_after_a_special_token(llama: Path) -> None:
    t = Tokenizer.from_folder(llama)
    assert t.encode("one</s>two", special=True) == [*t.encode("one"), 2, *t.encode("two")]
    assert t.pieces()[t.encode("two")[0]].text.startswith("\u2581")


def test_settings_choose_the_end(gemma: Path) -> None:
    """A fine-tune that ends with its turn says so in tokenizer_config.json."""
    t = Tokenizer.from_folder(settings(gemma, eos_token={"content": "<end_of_turn>", "special": True}))
    assert t.eos_id == t.id_of("<end_of_turn>") and t.stop_ids == {t.eos_id}


def test_special_tokens_map_is_read(gemma: Path) -> None:
    settings(gemma, eos_token=None)
    (gemma / "special_tokens_map.json").write_text('{"eos_token": "<end_of_turn>"}')
    t = Tokenizer.from_folder(gemma)
    assert t.eos_id == t.id_of("<end_of_turn>")


def test_without_settings_the_model_file_speaks(gemma: Path) -> None:
    (gemma / "tokenizer_config.json").unlink()
    t = Tokenizer.from_folder(gemma)
    assert (t.pad_id, t.eos_id, t.bos_id, t.unk_id) == (0, 1, 2, 3)
    assert any("no chat template" in note for note in t.notes)


def test_end_token_that_does_not_exist(gemma: Path) -> None:
    with pytest.raises(TokenizerError, match=r"eos_token '<stop>' is none of the 512 pieces"):
        Tokenizer.from_folder(settings(gemma, eos_token="<stop>"))


def test_pad_token_that_does_not_exist_is_noted(llama: Path) -> None:
    t = Tokenizer.from_folder(settings(llama, pad_token="[PAD]"))
    assert t.pad_id is None and any("[PAD]" in note for note in t.notes)


def test_added_tokens_extend_the_vocabulary(gemma: Path) -> None:
    added = {
        "512": {"content": "<|im_end|>", "special": True},
        "514": {"content": "<tool>", "special": False},
    }
    t = Tokenizer.from_folder(settings(gemma, added_tokens_decoder=added, eos_token="<|im_end|>"))
    assert t.vocab_size == 515 and t.eos_id == 512
    assert [p.kind for p in t.pieces()[512:]] == ["control", "unused", "user_defined"]
    assert t.encode("a<tool>b<|im_end|>", special=True) == [*t.encode("a"), 514, *t.encode("b"), 512]
    assert t.decode([514, 512]) == "<tool>"


def test_added_tokens_agree_with_transformers(llama: Path) -> None:
    """A Llama with the two tokens that ChatML adds; the slow tokenizer is the original's behaviour."""
    added = {
        "512": {"content": "<|im_start|>", "special": True},
        "513": {"content": "<|im_end|>", "special": True},
    }
    ours = Tokenizer.from_folder(settings(llama, added_tokens_decoder=added, eos_token="<|im_end|>"))
    theirs = LlamaTokenizer(vocab_file=str(llama / "tokenizer.model"), legacy=True)
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    text = "<|im_start|>user\nHello  world<|im_end|>"
    assert ours.encode(text, bos=True, special=True) == theirs(text).input_ids


def test_declared_special_pieces_become_control(gemma: Path) -> None:
    """Gemma's model file calls its turn markers user-defined; the settings call them special."""
    model = SentencePieceModel.parse((gemma / "tokenizer.model").read_bytes(), "x")
    turn = next(id for id, p in enumerate(model.pieces) if p.text == "<start_of_turn>")
    data = with_kinds((gemma / "tokenizer.model").read_bytes(), {turn: "user_defined"})
    (gemma / "tokenizer.model").write_bytes(data)
    assert turn in Tokenizer.from_folder(gemma).encode("<start_of_turn>")
    t = Tokenizer.from_folder(settings(gemma, additional_special_tokens=["<start_of_turn>"]))
    assert t.pieces()[turn].kind == "control"
    assert turn not in t.encode("<start_of_turn>")
    assert t.encode("<start_of_turn>", special=True) == [turn]


def test_absurd_added_id(gemma: Path) -> None:
    with pytest.raises(TokenizerError, match="'<x>' has id 99999999, but there are 512 pieces"):
        Tokenizer.from_folder(settings(gemma, added_tokens_decoder={"99999999": {"content": "<x>"}}))


@pytest.mark.parametrize(
    ("eos", "extra"),
    [
        (2, set()),
        ([1, 2], set()),
        (0, set()),
        ([1, 4], {4}),
        (9, set()),
        ("1", set()),
        ([True, 99999], set()),
    ],
)
def test_generation_config_is_believed_only_where_it_can_be_right(
    gemma: Path, eos: Any, extra: set[int]
) -> None:
    (gemma / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    t = Tokenizer.from_folder(gemma)
    assert t.stop_ids == {1, t.id_of("<end_of_turn>")} | extra


# ---- streaming --------------------------------------------------------------------------------------


def stream_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = tokenizer.stream()
    parts = [stream.push(id) for id in ids]
    for part in parts:
        assert "\ufffd" not in part or "\ufffd" in tokenizer.decode(ids)
        part.encode("utf-8")
    return "".join(parts) + stream.flush()


@pytest.mark.parametrize("text", PROBES)
def test_stream_equals_decode(opened: Tokenizer, text: str) -> None:
    ids = opened.encode(text, bos=True)
    assert stream_of(opened, ids) == opened.decode(ids) == text


def test_stream_holds_back_half_characters(gemma: Path) -> None:
    t = Tokenizer.from_folder(gemma)
    ids = [i for byte in "🦊".encode() if (i := t.id_of(f"<0x{byte:02X}>")) is not None]
    stream = t.stream()
    assert [stream.push(id) for id in ids] == ["", "", "", "🦊"]
    assert stream.flush() == ""


def test_stream_of_broken_bytes(gemma: Path) -> None:
    t = Tokenizer.from_folder(gemma)
    first = t.id_of("<0xF0>")
    assert first is not None
    ids = [first, *t.encode("a"), first]
    assert stream_of(t, ids) == t.decode(ids) == "\ufffda\ufffd"


def test_random_ids_stream_like_they_decode(opened: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(opened.vocab_size) for _ in range(20)]
        assert stream_of(opened, ids) == opened.decode(ids)


def test_id_outside_the_vocabulary(gemma: Path) -> None:
    t = Tokenizer.from_folder(gemma)
    for id in (-1, 512):
        with pytest.raises(TokenizerError, match=f"token id {id} is outside the vocabulary of 512"):
            t.decode([id])


# ---- damaged files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [b"", b"hello world", b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x00"]
)
def test_damaged_model_file(gemma: Path, data: bytes) -> None:
    (gemma / "tokenizer.model").write_bytes(data)
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        Tokenizer.from_folder(gemma)


def test_truncated_model_file(gemma: Path) -> None:
    data = (gemma / "tokenizer.model").read_bytes()
    (gemma / "tokenizer.model").write_bytes(data[: len(data) // 2 + 3])
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        Tokenizer.from_folder(gemma)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not readable"),
        ("{}", "not readable"),
        ("[" * 100_000, "not readable"),
        ('{"model": {"type": "Unigram", "vocab": []}}', "'Unigram' tokenizer"),
        ('{"model": {"type": "BPE", "vocab": {"a": 99999999}, "merges": []}}', "'a' has id 99999999"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}}', "share id 0"),
        ('{"model": {"type": "BPE", "vocab": {"a": "0"}, "merges": []}}', "'a' has id '0'"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}}', "merge 0"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}', "tokenizers cannot open"),
        ('{"added_tokens": [7], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}', "added_tokens"),
    ],
)
def test_damaged_json_file(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match=words) as error:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(error.value)


def test_damaged_settings(gemma: Path) -> None:
    (gemma / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        Tokenizer.from_folder(gemma)


def test_file_too_large(gemma: Path) -> None:
    with (gemma / "tokenizer.model").open("r+b") as file:
        file.truncate(300 << 20)
    with pytest.raises(TokenizerError, match=f"{300 << 20} bytes"):
        Tokenizer.from_folder(gemma)


@pytest.mark.parametrize("more", [" two three", "two", "\n\ntwo<end_of_turn>\n", "<end_of_turn>two", " ", ""])
def test_a_text_that_goes_on_gets_no_space_of_its_own(gemma: Path, llama: Path, more: str) -> None:
    for folder in (gemma, llama):
        t = Tokenizer.from_folder(folder)
        start, mark, rest = more.partition("<end_of_turn>")
        ids, after = t.encode_on(more), t.encode(mark + rest, special=True)
        split = len(ids) - len(after)
        assert ids[split:] == after
        assert b"".join(map(t.piece_bytes, ids[:split])).decode() == start


def test_the_template_s_own_end_of_turn_stops(gemma: Path) -> None:
    """A marker that is in no list of well-known ones, between answer and next question."""
    added = {
        "512": {"content": "<|done|>", "special": True},
        "513": {"content": "<|ask|>", "special": True},
    }
    asks = "{% for m in messages %}<|ask|>{{ m['content'] }}"
    settings(gemma, added_tokens_decoder=added, chat_template=asks + "\n<|done|>{% endfor %}")
    t = Tokenizer.from_folder(gemma)
    assert t.stop_ids == {1, 512, t.id_of("<end_of_turn>")}
    # Where nothing ends an answer, the marker that opens the next turn does; <bos> never.
    settings(gemma, chat_template=asks + "{% endfor %}")
    assert 513 in Tokenizer.from_folder(gemma).stop_ids
    settings(gemma, chat_template=asks + "<bos>{% endfor %}")
    assert Tokenizer.from_folder(gemma).stop_ids == {1, t.id_of("<end_of_turn>")}


def test_foxs_own_format_stops_at_eos(gemma: Path) -> None:
    t = Tokenizer.from_folder(settings(gemma, chat_template=None))
    assert t._turn_end() == t.eos_id == 1


def test_a_decoder_knows_when_it_holds_a_part_of_a_character_back(gemma: Path) -> None:
    t = Tokenizer.from_folder(gemma)
    stream, seen = t.stream(), []
    for id in t.encode("狐"):  # not in the vocabulary: three byte pieces
        stream.push(id)
        seen.append(stream.whole)
    assert seen[-4:] in ([True, False, False, True], [False, False, True])
