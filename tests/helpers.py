"""Small random checkpoints for every test: quick to make, whole, and with a real SentencePiece tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor

from fox_edge.checkpoint import Checkpoint
from fox_edge.config import FoxConfig
from fox_edge.errors import CheckpointError, FoxEdgeError
from fox_edge.sentencepiece_model import KIND_NUMBERS
from fox_edge.tokenizer import Tokenizer

VOCAB = 512

# Everything small and different, so that a transposed matrix or a wrong head count cannot pass.
TINY = FoxConfig(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=1,
    head_dim=16,
    max_positions=256,
)
# Rows of a whole number of 256-weight blocks, for the K types and wide ONNX blocks.
TINY_256 = FoxConfig(
    vocab_size=VOCAB,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_positions=256,
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

# Text on which tokenizers differ: spaces at every place, newlines, digits, emoji, CJK, control tokens.
PROBES = [
    "Hello world",
    " leading space",
    "   three leading, two  inside, trailing ",
    "line\nline\n\nline\n\n\n\tTab",
    "12345 and 3.14 and 1,000,000",
    "emoji 🦊🇪🇺👩‍👩‍👧 end",
    "狐狸很快。日本語のテキスト",
    "Ünïcödé, čeština, Ελληνικά",
    "<bos>user wrote<eos> control <start_of_turn>user\nHi<end_of_turn>\n",
    "\n",
    " ",
    "a",
]


@functools.cache
def sentencepiece_bytes(gemma: bool = True, vocab_size: int = VOCAB, algorithm: str = "bpe") -> bytes:
    """A trained tokenizer.model: Gemma's special ids and no space prefix, or Llama's ids and the prefix."""
    rng = random.Random(7)
    syllables = [a + b for a in "bdfklmnprst" for b in ("a", "e", "i", "o", "u", "an", "er")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(400)]
    text = "the fox and hello world user model how many are there in all each day costs total"
    words += text.split()

    def corpus() -> Iterable[str]:
        for _ in range(600):
            yield " ".join(rng.choices(words, k=9)) + f" {rng.randint(0, 999)}, {rng.choice('?.!:;')}"

    model = io.BytesIO()
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3} if gemma else {}
    names = {"eos_piece": "<eos>", "bos_piece": "<bos>", "pad_piece": "<pad>"} if gemma else {}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        model_type=algorithm,
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=not gemma,
        user_defined_symbols=["\n", "\n\n", "\u2581\u2581"] if gemma else [],
        control_symbols=["<start_of_turn>", "<end_of_turn>"],
        minloglevel=2,
        num_threads=1,
        **ids,
        **names,
    )
    return model.getvalue()


def write_tokenizer(folder: Path, gemma: bool = True, vocab_size: int = VOCAB) -> None:
    """tokenizer.model and tokenizer_config.json (with a chat template)."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_bytes(gemma, vocab_size))
    bos, eos = ("<bos>", "<eos>") if gemma else ("<s>", "</s>")
    settings = {
        "tokenizer_class": "GemmaTokenizer" if gemma else "LlamaTokenizer",
        "add_bos_token": True,
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": "<unk>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def random_tensors(
    config: FoxConfig, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Weights of a sane scale: logits spread by a few nats, norms near 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in config.tensor_shapes().items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            tensors[name] = (1 + 0.1 * noise).to(dtype)
        else:
            tensors[name] = (noise * (0.3 if "embed" in name or "lm_head" in name else shape[1] ** -0.5)).to(
                dtype
            )
    return tensors


def make_checkpoint(
    folder: Path,
    config: FoxConfig = TINY,
    *,
    seed: int = 0,
    tied: bool | None = None,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    gemma: bool = True,
    torch_bin: bool = False,
    change: Callable[[dict[str, Tensor]], Any] | None = None,
    fields: dict[str, Any] | None = None,
) -> Path:
    """Write a random checkpoint into `folder` (made if missing) and return it.

    `tied` overrides the config's; `shards` > 1 writes an index; `gemma` picks the tokenizer; `torch_bin`
    writes pytorch_model.bin; `change` edits the dictionary of tensors before it is saved; `fields` are put
    into config.json. config.json has the published Fox's swapped bos and eos ids.
    """
    if tied is not None:
        config = dataclasses.replace(config, tied=tied)
    folder.mkdir(parents=True, exist_ok=True)
    swapped = {"bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps({**config.to_hf(), **swapped, **(fields or {})}))
    (folder / "generation_config.json").write_text(json.dumps(swapped))
    write_tokenizer(folder, gemma, config.vocab_size)
    tensors = random_tensors(config, seed, dtype)
    if change is not None:
        change(tensors)
    if torch_bin:
        torch.save(tensors, folder / "pytorch_model.bin")
    elif shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    else:
        save_shards(folder, tensors, shards)
    return folder


def save_shards(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    """Deal the tensors round into `shards` files with an index."""
    weight_map = {}
    for n in range(shards):
        file = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[n::shards])
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def message_of(folder: Path | str, kind: type[FoxEdgeError] = CheckpointError) -> str:
    """What the user is told on opening this; always one sentence."""
    with pytest.raises(kind) as error:
        Checkpoint.open(folder)
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    return text


def vocabulary_in_llama_cpp(tokenizer: Tokenizer, path: Path) -> Any:
    """A llama_cpp.Llama on a GGUF that holds nothing but the tokenizer's own account of itself."""
    import gguf
    import llama_cpp

    pieces = tokenizer.pieces()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    # llama.cpp looks for user-defined pieces in the text itself, where a space is a space.
    texts = [p.text.replace("\u2581", " ") if p.kind == "user_defined" else p.text for p in pieces]
    writer.add_token_list([text.encode() for text in texts])
    writer.add_token_scores([p.score for p in pieces])
    writer.add_token_types([KIND_NUMBERS[p.kind] for p in pieces])
    assert tokenizer.bos_id is not None and tokenizer.eos_id is not None
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_add_space_prefix(tokenizer.add_space_prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
