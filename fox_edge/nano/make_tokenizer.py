"""Train nano's tokenizer and write every file that belongs to it, in Gemma's conventions.

SentencePiece's `tokenizer.model` is the source; `tokenizer.json` is the same tokenizer for Hugging Face's
`tokenizers`, its merges recovered from the pieces' scores. Knows nothing of the model's weights.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece as spm

from fox_edge.config import FoxConfig

VOCAB_SIZE = 8192
PAD, EOS, BOS, UNK = range(4)
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
TURNS = ("<start_of_turn>", "<end_of_turn>")
# Gemma keeps runs of up to 31 newlines or spaces as pieces of their own.
NEWLINES = tuple("\n" * n for n in range(1, 32))
SPACES = tuple("▁" * n for n in range(2, 32))

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set opening = messages[0]['content'] | trim + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set opening = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (opening if loop.first else '')"
    " + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def train_sentencepiece(texts: Iterable[str]) -> bytes:
    """A serialized BPE model of exactly VOCAB_SIZE pieces, trained on `texts`."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        pad_id=PAD,
        eos_id=EOS,
        bos_id=BOS,
        unk_id=UNK,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=[*TURNS, *NEWLINES, *SPACES],
        character_coverage=0.9999,
        max_sentence_length=1 << 16,
        # One thread keeps the result the same on every machine.
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _merges(pieces: dict[str, tuple[int, float]]) -> list[list[str]]:
    """Every way to join two pieces into a third, in the order in which SentencePiece prefers the results."""
    found = []
    for piece, (_, score) in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                found.append((-score, pieces[left][0], pieces[right][0], left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def tokenizer_json(processor: spm.SentencePieceProcessor) -> dict[str, Any]:
    """The same tokenizer in the format of Hugging Face's `tokenizers`."""
    ids = range(processor.vocab_size())
    vocab = {processor.id_to_piece(i): i for i in ids}
    fixed = {*TURNS, *NEWLINES, *SPACES}
    normal = {
        piece: (i, processor.get_score(i))
        for piece, i in vocab.items()
        if piece not in fixed
        and not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))
    }
    added = [
        {
            "id": vocab[piece],
            "content": piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            # Runs of spaces are matched after the normalizer has written them as "▁▁".
            "normalized": piece in SPACES,
            "special": piece in SPECIAL or piece in TURNS,
        }
        for piece in (*SPECIAL, *TURNS, *NEWLINES, *SPACES)
    ]
    sequence = {"id": "A", "type_id": 0}
    begin = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, {"Sequence": sequence}],
            "pair": [begin, {"Sequence": sequence}, begin, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [BOS], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(normal),
        },
    }


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "GemmaTokenizer",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "additional_special_tokens": list(TURNS),
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False,
        "sp_model_kwargs": {},
        "use_default_system_prompt": False,
        "model_max_length": FoxConfig.nano().max_positions,
        "chat_template": CHAT_TEMPLATE,
    }


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON with a final newline."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_model_files(folder: Path, texts: Iterable[str]) -> spm.SentencePieceProcessor:
    """Train the tokenizer on `texts` and write all of the model's files but its weights into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    proto = train_sentencepiece(texts)
    (folder / "tokenizer.model").write_bytes(proto)
    processor = spm.SentencePieceProcessor(model_proto=proto)
    # One line per vocabulary entry would be most of the file; merges and vocabulary stay compact.
    compact = json.dumps(tokenizer_json(processor), ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(compact + "\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", _tokenizer_config())
    names = ("pad_token", "eos_token", "bos_token", "unk_token")
    special = dict(zip(names, SPECIAL, strict=True)) | {"additional_special_tokens": list(TURNS)}
    write_json(folder / "special_tokens_map.json", special)
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    write_json(folder / "config.json", FoxConfig.nano().to_hf() | ids)
    end_of_turn = processor.piece_to_id("<end_of_turn>")
    write_json(folder / "generation_config.json", ids | {"eos_token_id": [EOS, end_of_turn]})
    return processor
