"""What a GGUF file says before its weights: llama.cpp's tensor names, the metadata, the vocabulary.

Knows the llama architecture's keys; not how weights are quantized or written. Special ids come from the
tokenizer alone, never from config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.common import hub_id, license_of
from export.ggml import TYPE_NUMBERS
from export.identity import identify
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import MissingPackageError, TokenizerError
from fox_edge.quant import Recipe
from fox_edge.tokenizer import Piece, Tokenizer

try:
    import gguf
except ImportError:
    raise MissingPackageError("gguf", "gguf") from None

END_OF_TURN = ("<end_of_turn>", "<|im_end|>", "<|eot_id|>")

# enum llama_ftype is named after llama-quantize's mixtures; a type's name stands for the plainest of them.
_FILE_TYPES = {
    "f32": "ALL_F32",
    "q5_k": "MOSTLY_Q5_K_S",
    "q4_k": "MOSTLY_Q4_K_S",
    "q3_k": "MOSTLY_Q3_K_S",
    "mxfp4": "MOSTLY_MXFP4_MOE",
}

# gguf-py's words for two of the sampling parameters.
_SAMPLING = {"temperature": "temp", "repeat_penalty": "penalty_repeat"}

_TOKEN_TYPES = {"normal": 1, "unknown": 2, "control": 3, "user_defined": 4, "unused": 5, "byte": 6}


@dataclass(frozen=True)
class TensorPlace:
    """One tensor of the file to be: `offset` counts from the first tensor's first byte."""

    name: str  # Hugging Face's
    stored_as: str
    shape: tuple[int, ...]
    type: str
    bytes: int
    offset: int


def write_header(path: Path, checkpoint: Checkpoint, recipe: Recipe, places: Sequence[TensorPlace]) -> int:
    """Create the file with everything before the weights; returns where they start.

    Raises TokenizerError for a vocabulary that a llama GGUF cannot carry.
    """
    writer = gguf.GGUFWriter(path, "llama")
    try:
        _add_general(writer, checkpoint, recipe)
        _add_architecture(writer, checkpoint)
        _add_vocabulary(writer, checkpoint)
        for place in places:
            kind = gguf.GGMLQuantizationType(TYPE_NUMBERS[place.type])
            writer.add_tensor_info(
                place.stored_as, place.shape, np.dtype(np.float32), place.bytes, raw_dtype=kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    return pad(path.stat().st_size)


def pad(size: int) -> int:
    """The next multiple of GGUF's default alignment."""
    return int(gguf.GGUFWriter.ggml_pad(size, gguf.GGUF_DEFAULT_ALIGNMENT))


def file_type(recipe: Recipe) -> int:
    """llama.cpp's number for the whole file: the recipe's own name if it is one, else its default type's.

    A hint for people ("mostly ..."): loaders read each tensor's own type.
    """
    default = _FILE_TYPES.get(recipe.default, f"MOSTLY_{recipe.default.upper()}")
    known = gguf.LlamaFileType.__members__
    found = (known.get(name) for name in (f"MOSTLY_{recipe.name.upper()}", default, "GUESSED"))
    return int(next(value for value in found if value is not None))


def _add_general(writer: gguf.GGUFWriter, checkpoint: Checkpoint, recipe: Recipe) -> None:
    identity = identify(checkpoint)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(identity.name)
    writer.add_size_label(identity.size_label)
    writer.add_file_type(file_type(recipe))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    licence, hub = license_of(checkpoint), hub_id(checkpoint)
    texts: dict[Callable[[Any], None], Any] = {
        writer.add_basename: identity.basename,
        writer.add_finetune: identity.finetune,
        writer.add_version: identity.version,
        writer.add_license: licence,
        writer.add_tags: identity.tags,
        writer.add_languages: identity.languages,
    }
    for add, said in texts.items():
        if said:
            add(said)
    for key, value in identity.sampling.items():
        getattr(writer, f"add_sampling_{_SAMPLING.get(key, key)}")(value)
    if hub:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, hub[1])
        writer.add_base_model_organization(0, hub[0])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{hub[0]}/{hub[1]}")


def _add_architecture(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_vocabulary(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    tokenizer = checkpoint.tokenizer()
    pieces = padded_pieces(tokenizer, checkpoint.config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.text for piece in pieces])
    writer.add_token_scores([float(piece.score) for piece in pieces])
    writer.add_token_types([_TOKEN_TYPES[piece.kind] for piece in pieces])
    ids = {
        writer.add_bos_token_id: tokenizer.bos_id,
        writer.add_eos_token_id: tokenizer.eos_id,
        writer.add_unk_token_id: tokenizer.unk_id,
        writer.add_pad_token_id: tokenizer.pad_id,
        writer.add_eot_token_id: end_of_turn_id(tokenizer, pieces),
    }
    for add, token_id in ids.items():
        if token_id is not None:
            add(token_id)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_eos_token(False)
    # llama.cpp assumes true; Gemma's vocabulary, Fox's, was made without.
    writer.add_add_space_prefix(tokenizer.add_space_prefix)
    writer.add_chat_template(tokenizer.chat_template)


def padded_pieces(tokenizer: Tokenizer, vocab_size: int) -> list[Piece]:
    """The tokenizer's pieces, followed by unused ones up to the rows of the embedding.

    llama.cpp wants one distinct text per id. Raises TokenizerError for more pieces than rows, for two
    pieces of the same text, and for another algorithm than SentencePiece's BPE: byte-level or unigram
    pieces would be read as if they were, and text cut differently.
    """
    if tokenizer.algorithm != "bpe":
        raise TokenizerError(
            f"the tokenizer is {tokenizer.algorithm}, but fox-edge writes SentencePiece BPE vocabularies, "
            "which Fox-1 has, to GGUF"
        )
    pieces = [_as_llama_cpp_writes(piece) for piece in tokenizer.pieces()]
    if len(pieces) > vocab_size:
        raise TokenizerError(
            f"the tokenizer has {len(pieces)} pieces, but the model has {vocab_size} rows of embedding"
        )
    seen: dict[str, int] = {}
    for token_id, piece in enumerate(pieces):
        if seen.setdefault(piece.text, token_id) != token_id:
            raise TokenizerError(
                f"the tokenizer's pieces {seen[piece.text]} and {token_id} have the same text {piece.text!r}"
            )
    bytes_left = [n for n in range(256) if f"<0x{n:02X}>" not in seen and chr(n) not in seen]
    if bytes_left:
        raise TokenizerError(
            f"the tokenizer has no piece for {len(bytes_left)} of 256 bytes (the first: {bytes_left[0]}); "
            "without one llama.cpp dies of a text that no other piece covers"
        )
    unused = (f"<unused_row_{n}>" for n in range(len(pieces), vocab_size))
    return pieces + [Piece(text, 0.0, "unused") for text in unused]


def _as_llama_cpp_writes(piece: Piece) -> Piece:
    """llama.cpp looks for user-defined pieces before it turns spaces into U+2581, so they hold spaces."""
    if piece.kind != "user_defined":
        return piece
    return Piece(piece.text.replace("\u2581", " "), piece.score, piece.kind)


def end_of_turn_id(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> int | None:
    """The piece that ends a chat turn, when it is one of its own and stops generation."""
    turns = [i for i in sorted(tokenizer.stop_ids) if i != tokenizer.eos_id]
    named = [i for i in turns if pieces[i].text in END_OF_TURN]
    return next(iter(named or turns), None)
