from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from fox_edge.config import FoxConfig, read_json_object
from fox_edge.errors import CheckpointError
from tests.helpers import TINY

# The published config.json of Fox-1-1.6B, its swapped token ids included.
PUBLISHED = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 16,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 256000,
}


def test_published_shape() -> None:
    fox = FoxConfig.from_hf(PUBLISHED)
    assert fox == FoxConfig.fox_1()
    assert fox.num_parameters() == 1_665_271_808
    assert fox.kv_bytes_per_token == 64 * 1024


@pytest.mark.parametrize(
    "config", [FoxConfig.fox_1(), FoxConfig.nano(), dataclasses.replace(TINY, tied=False)]
)
def test_parameters_are_the_sum_of_the_tensors(config: FoxConfig) -> None:
    shapes = config.tensor_shapes()
    assert config.num_parameters() == sum(math.prod(shape) for shape in shapes.values())
    assert ("lm_head.weight" in shapes) != config.tied


@pytest.mark.parametrize("config", [FoxConfig.fox_1(), dataclasses.replace(TINY, tied=False)])
def test_round_trip_through_transformers(config: FoxConfig) -> None:
    theirs = LlamaConfig(**config.to_hf()).to_dict()
    assert FoxConfig.from_hf(theirs) == config


def test_defaults_of_old_config_files() -> None:
    fields = {k: v for k, v in PUBLISHED.items() if k not in ("num_key_value_heads", "tie_word_embeddings")}
    config = FoxConfig.from_hf(fields)
    assert config.num_kv_heads == 16 and not config.tied and config.head_dim == 128


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, ["model_type", "gpt2"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, ["rope_scaling"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"num_key_value_heads": 5}, ["16", "5"]),
        ({"hidden_size": "2048"}, ["hidden_size", "2048"]),
        ({"vocab_size": 0}, ["vocab_size", "0"]),
        ({"vocab_size": 1 << 40}, ["vocab_size", str(1 << 40)]),
        ({"num_hidden_layers": 100_000}, ["100000"]),
        ({"num_attention_heads": 0}, ["num_attention_heads"]),
        ({"head_dim": 63}, ["63"]),
        ({"rms_norm_eps": "small"}, ["rms_norm_eps", "small"]),
        ({"rope_theta": -1.0}, ["-1.0"]),
        ({"rms_norm_eps": float("nan")}, ["nan"]),
        ({"max_position_embeddings": True}, ["True"]),
    ],
)
def test_refuses_what_it_does_not_compute(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(CheckpointError) as error:
        FoxConfig.from_hf(PUBLISHED | change)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_names_missing_fields() -> None:
    fields = {k: v for k, v in PUBLISHED.items() if k not in ("vocab_size", "hidden_size")}
    with pytest.raises(CheckpointError, match="vocab_size, hidden_size missing"):
        FoxConfig.from_hf(fields)


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", "\ud800".encode("utf-16-le", "surrogatepass").hex(), "[" * 100_000]
)
def test_damaged_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_json_object(path)


def test_json_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"a": "b" * 100}))
    with pytest.raises(CheckpointError, match=r"109 bytes, but at most 50"):
        read_json_object(path, limit_bytes=50)
    with pytest.raises(CheckpointError, match="no such file"):
        read_json_object(tmp_path / "other.json")
