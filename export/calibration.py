"""What the reference model's matrices read on real text: the activations that guide rounding.

Streams: one layer's float weights are in memory at a time, and all calibration tokens go through it together.
The layers are the reference model's own (fox_edge/model.py), each of its matrices replaced by a stand-in that
shows its input and asks which weights to go on with: the originals, or what they have just been rounded to.
Knows nothing of rounding, formats or files.

Shapes: N windows of T tokens, C columns, R rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import FoxEdgeError
from fox_edge.model import Block, RMSNorm, rotary_tables
from fox_edge.tokenizer import Tokenizer

WINDOW = 256
# Enough for a 4,096 x 4,096 Gram matrix of full rank, twice; mean squares settle much sooner.
GRAM_TOKENS = 8192
MEAN_SQUARE_TOKENS = 1024
MAX_TEXT_BYTES = 64 << 20
# Several kinds of prose, and problems of nano's families after each paragraph.
_BUILT_IN, _SEED, _PROBLEMS = "calibration.txt", 7, 8

# Name of a matrix and what it reads, float32 (N * T, C) -> the float32 weights (R, C) to go on with.
Visit = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Calibration:
    """Windows of token ids (N, T) and where their text came from."""

    windows: Tensor
    source: str  # 'built-in', or the file's name
    sha256: str  # of the token ids, int64

    @property
    def tokens(self) -> int:
        """Token ids in all windows."""
        return self.windows.numel()

    def to_json(self) -> dict[str, Any]:
        """What the manifest keeps."""
        return {"source": self.source, "tokens": self.tokens, "sha256": self.sha256}

    def first(self, tokens: int) -> Calibration:
        """The first windows, about so many tokens of them and at least one window."""
        count = max(1, tokens // self.windows.shape[1])
        return Calibration(self.windows[:count], self.source, self.sha256)


def read_calibration(tokenizer: Tokenizer, context: int, file: Path | None = None) -> Calibration:
    """Cut a UTF-8 file, or the built-in text, into windows that each begin with <bos>.

    Raises FoxEdgeError for a file that is not there, too large, no UTF-8, or shorter than one window.
    """
    ids = _built_in(tokenizer) if file is None else tokenizer.encode(_read(file), bos=False)
    length = min(WINDOW, context)
    head = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
    step = length - len(head)
    count = min(len(ids) // step, -(-GRAM_TOKENS // length))
    if count == 0:
        raise FoxEdgeError(f"{file}: {len(ids)} tokens of calibration text, but a window takes {step}")
    windows = torch.tensor([head + ids[i * step : (i + 1) * step] for i in range(count)])
    digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    return Calibration(windows, "built-in" if file is None else file.name, digest)


def _read(file: Path) -> str:
    try:
        size = file.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise FoxEdgeError(f"{file}: {size} bytes, but calibration text has at most {MAX_TEXT_BYTES}")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FoxEdgeError(f"{file}: not readable as UTF-8 text ({error})") from None


def _built_in(tokenizer: Tokenizer) -> list[int]:
    """Prose of several kinds, written for this purpose, with word problems in between, plain and as chats."""
    from fox_edge.nano.problems import generate

    prose = resources.files(__package__).joinpath(_BUILT_IN).read_text(encoding="utf-8").split("\n\n")
    problems = iter(generate(_SEED, _PROBLEMS * len(prose)))
    found: list[int] = []
    for paragraph in prose:
        found += tokenizer.encode(f"{paragraph}\n\n", bos=False)
        for k in range(_PROBLEMS):
            problem = next(problems)
            if k % 2:
                plain = f"Question: {problem.question}\nAnswer: {problem.answer}\n\n"
                found += tokenizer.encode(plain, bos=False)
            else:  # as the model's users ask it
                asked = tokenizer.encode_chat([{"role": "user", "content": problem.question}])
                found += asked[1:] if asked[0] == tokenizer.bos_id else asked
                found += tokenizer.encode(f"{problem.answer}\n\n", bos=False)
    return found


@torch.inference_mode()
def walk(checkpoint: Checkpoint, embedded: Tensor, visit: Visit) -> Tensor:
    """Take embedded tokens (N, T, C) through all layers; returns what the head reads, float32 (N * T, C).

    `visit` is called for each matrix in the order of a forward pass, q, k, v, o, gate, up, down, and layer
    after layer; matrices that read the same input are shown the same tensor.
    """
    config = checkpoint.config
    cos, sin = rotary_tables(config, torch.arange(embedded.shape[1]))
    x = embedded
    for layer in range(config.num_layers):
        with torch.device("meta"):
            block = Block(config, layer)
        prefix = f"model.layers.{layer}."
        for name, child in list(block.named_modules()):
            if isinstance(child, nn.Linear):
                parent, _, last = name.rpartition(".")
                setattr(block.get_submodule(parent), last, _Shown(f"{prefix}{name}.weight", visit))
        x = _with_norms(block, prefix, checkpoint)(x, cos, sin, None)
    with torch.device("meta"):
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    return _with_norms(norm, "model.norm.", checkpoint)(x).flatten(0, 1)


class _Shown(nn.Module):
    """Stands in for one matrix of a layer."""

    def __init__(self, name: str, visit: Visit) -> None:
        super().__init__()
        self.name, self.visit = name, visit

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) -> (N, T, R)."""
        return product(x, self.visit(self.name, x.view(-1, x.shape[-1])))


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x times the transposed weight, in bfloat16 where the processor multiplies that natively.

    Its rounding, 2^-9 of a value, is far below that of any type that is calibrated for.
    """
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return F.linear(x.bfloat16(), weight.bfloat16()).float()
    return F.linear(x, weight)


def _with_norms(module: nn.Module, prefix: str, checkpoint: Checkpoint) -> nn.Module:
    """A module made on the meta device, its norms filled from the checkpoint."""
    weights = {key: checkpoint.float_rows(prefix + key)[0] for key in module.state_dict()}
    module.load_state_dict(weights, assign=True)
    return module.eval()
