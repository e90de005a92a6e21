"""What other programs need beside the ONNX model so that they open the same folder, without a second weight.

onnxruntime-genai reads `genai_config.json` and a graph of its own, `genai.onnx`: the very nodes and byte
ranges of the model, whose logits are always the last position's. transformers.js reads a few words in
`config.json`. Optimum and onnxruntime-web need nothing. Knows these programs' files; not what is in the
weights, nor how the graph computes.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from export.onnx_graph import build_graph
from export.onnx_layout import Layout
from fox_edge.config import FoxConfig, read_json_object
from fox_edge.tokenizer import Tokenizer

OPTIMUM = "optimum"
# Clients that want a graph which costs the others something, and what it does for them.
COMPAT = {
    OPTIMUM: "attention leaves out what the attention mask leaves out, for batches padded on the left",
}

GENAI_CONFIG = "genai_config.json"
GENAI_MODEL = "genai.onnx"
GENAI_MAX_LENGTH = 2048
TRANSFORMERS_JS = "transformers.js_config"


def write_client_files(
    folder: Path,
    config: FoxConfig,
    tokenizer: Tokenizer,
    layout: Layout,
    data_file: str,
    *,
    padded: bool = False,
) -> None:
    """Write the files of other clients into a folder that has config.json and the model already."""
    graph = build_graph(config, layout, data_file, last_only=True, padded=padded)
    (folder / GENAI_MODEL).write_bytes(graph.SerializeToString())
    _write(folder / GENAI_CONFIG, genai_config(config, tokenizer))
    fields = read_json_object(folder / "config.json")
    _write(folder / "config.json", fields | {TRANSFORMERS_JS: transformers_js_config()})


def client_notes(folder: Path, compat: Collection[str]) -> list[str]:
    """What a reader of the manifest should know of these clients."""
    notes = [f"made with --compat {client}: {COMPAT[client]}" for client in compat]
    if not (folder / "tokenizer.json").is_file():
        notes.append(
            "the checkpoint has no tokenizer.json, without which onnxruntime-genai, transformers.js and the "
            "browser page have no tokenizer"
        )
    return notes


def genai_config(config: FoxConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """onnxruntime-genai's description of a model: shape, special ids, names in the graph, greedy search.

    Keys and values get one buffer of `max_length` positions, filled with zeros at the start: a whole context
    of Fox-1's would be a gigabyte. A caller who needs more positions sets a larger one.
    """
    # The first one is the end of a text; the others end a turn.
    ends = sorted(tokenizer.stop_ids, key=lambda id: (id != tokenizer.eos_id, id))
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends, "pad_token_id": tokenizer.pad_id}
    if tokenizer.pad_id is None:
        ids["pad_token_id"] = tokenizer.eos_id
    decoder = {
        "session_options": {"provider_options": []},
        "filename": GENAI_MODEL,
        "hidden_size": config.hidden_size,
        "head_size": config.head_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "num_hidden_layers": config.num_layers,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    return {
        "model": {
            "type": "llama",
            "vocab_size": config.vocab_size,
            "context_length": config.max_positions,
            **{name: id for name, id in ids.items() if id is not None},
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "num_beams": 1,
            "max_length": min(config.max_positions, GENAI_MAX_LENGTH),
            "past_present_share_buffer": True,
        },
    }


def transformers_js_config() -> dict[str, Any]:
    """`model.onnx` in its own precision, with one file of external data beside it.

    Without `dtype` a browser would look for `model_quantized.onnx`.
    """
    return {"dtype": "fp32", "use_external_data_format": {"model.onnx": 1}}


def _write(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
