"""The shape of a Fox: a frozen, validated record, read from and written to Hugging Face's config.json.

Knows nothing of weights, files other than config.json, or token meanings: the special ids of a
published Fox config.json are wrong (bos and eos swapped), so ids come from the tokenizer alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fox_edge.errors import CheckpointError

MAX_CONFIG_BYTES = 1 << 20
# Far above any model of this family, far below what would make an allocation from a hostile header hurt.
MAX_DIMENSION = 1 << 20
MAX_LAYERS = 1024


@dataclass(frozen=True)
class FoxConfig:
    """Dimensions of a Llama-architecture decoder. Counts are of rows, heads, layers or tokens."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    tied: bool = True

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_positions",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_DIMENSION:
                raise CheckpointError(
                    f"config.json: {name} is {value!r}, but must be an integer from 1 to {MAX_DIMENSION}"
                )
        if self.num_layers > MAX_LAYERS:
            raise CheckpointError(f"config.json: {self.num_layers} layers, but at most {MAX_LAYERS} are read")
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"config.json: {self.num_heads} heads cannot share {self.num_kv_heads} KV heads evenly"
            )
        if self.head_dim % 2:
            raise CheckpointError(
                f"config.json: head_dim is {self.head_dim}, but rotary needs an even number"
            )
        if not self.rms_norm_eps > 0 or not self.rope_theta > 0:
            raise CheckpointError(
                f"config.json: rms_norm_eps {self.rms_norm_eps}, rope_theta {self.rope_theta}: not above 0"
            )

    @classmethod
    def fox_1(cls) -> FoxConfig:
        """The published Fox-1-1.6B (technical report, section 2.1.2, and the model's config.json)."""
        return cls(
            vocab_size=256_000,
            hidden_size=2048,
            intermediate_size=4096,
            num_layers=32,
            num_heads=16,
            num_kv_heads=4,
            head_dim=128,
            max_positions=8192,
        )

    @classmethod
    def nano(cls) -> FoxConfig:
        """The embedded model: Fox-1's proportions at 6.56M parameters."""
        return cls(
            vocab_size=8192,
            hidden_size=256,
            intermediate_size=512,
            num_layers=8,
            num_heads=4,
            num_kv_heads=1,
            head_dim=64,
            max_positions=1024,
        )

    @property
    def kv_dim(self) -> int:
        """Columns of one layer's keys (or values) for one position."""
        return self.num_kv_heads * self.head_dim

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one position takes in a float16 KV cache, all layers, keys and values."""
        return 2 * self.num_layers * self.kv_dim * 2

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face name -> shape (rows = outputs, columns = inputs) of every weight, in file order.

        A tied model has no `lm_head.weight`: the logits come from `model.embed_tokens.weight`.
        """
        h, i, q, kv = self.hidden_size, self.intermediate_size, self.num_heads * self.head_dim, self.kv_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, h)}
        for n in range(self.num_layers):
            layer = f"model.layers.{n}."
            shapes |= {
                layer + "input_layernorm.weight": (h,),
                layer + "self_attn.q_proj.weight": (q, h),
                layer + "self_attn.k_proj.weight": (kv, h),
                layer + "self_attn.v_proj.weight": (kv, h),
                layer + "self_attn.o_proj.weight": (h, q),
                layer + "post_attention_layernorm.weight": (h,),
                layer + "mlp.gate_proj.weight": (i, h),
                layer + "mlp.up_proj.weight": (i, h),
                layer + "mlp.down_proj.weight": (h, i),
            }
        shapes["model.norm.weight"] = (h,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, h)
        return shapes

    def num_parameters(self) -> int:
        """Weights in the model; a tied matrix counts once."""
        h, q = self.hidden_size, self.num_heads * self.head_dim
        layer = 2 * h + 2 * q * h + 2 * self.kv_dim * h + 3 * self.intermediate_size * h
        return self.vocab_size * h * (1 if self.tied else 2) + self.num_layers * layer + h

    @classmethod
    def from_hf(cls, fields: dict[str, Any]) -> FoxConfig:
        """Read Hugging Face's config.json fields; refuse what the reference model does not compute.

        Raises CheckpointError naming the field.
        """
        model_type = fields.get("model_type")
        if model_type != "llama":
            raise CheckpointError(
                f"config.json: model_type is {model_type!r}, but fox-edge reads Fox-1's, 'llama'"
            )
        for name, harmless in _MUST_BE.items():
            if fields.get(name, harmless[0]) not in harmless:
                raise CheckpointError(
                    f"config.json: {name} is {fields[name]!r}, which fox-edge does not compute"
                )
        required = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
        missing = [name for name in required if name not in fields]
        if missing:
            raise CheckpointError(f"config.json: {', '.join(missing)} missing")
        heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
        if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
            raise CheckpointError(
                f"config.json: num_attention_heads {heads!r}, hidden_size {hidden!r}: not integers from 1"
            )
        kv_heads = fields.get("num_key_value_heads")
        head_dim = fields.get("head_dim")
        return cls(
            vocab_size=fields["vocab_size"],
            hidden_size=hidden,
            intermediate_size=fields["intermediate_size"],
            num_layers=fields["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=heads if kv_heads is None else kv_heads,
            head_dim=hidden // heads if head_dim is None else head_dim,
            max_positions=fields.get("max_position_embeddings", 2048),
            rms_norm_eps=_number(fields, "rms_norm_eps", 1e-6),
            rope_theta=_number(fields, "rope_theta", 10_000.0),
            tied=bool(fields.get("tie_word_embeddings", False)),
        )

    @classmethod
    def read(cls, path: Path) -> FoxConfig:
        """Read a config.json file; raises CheckpointError with the path."""
        return cls.from_hf(read_json_object(path))

    def to_hf(self) -> dict[str, Any]:
        """The fields of config.json, as transformers' LlamaConfig reads them (without token ids)."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": "bfloat16",
        }


# Field -> the values under which the model is the one that model.py computes.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}

SHAPES = {"fox-1-1.6b": FoxConfig.fox_1, "nano": FoxConfig.nano}


def _number(fields: dict[str, Any], name: str, default: float) -> float:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"config.json: {name} is {value!r}, but must be a number")
    return float(value)


def read_json_object(path: Path, limit_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Parse a small JSON file that must hold an object; raises CheckpointError naming the file."""
    try:
        size = path.stat().st_size
        if size > limit_bytes:
            raise CheckpointError(f"{path}: {size} bytes, but at most {limit_bytes} are read")
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(fields).__name__}, but an object is due")
    return fields
