"""The reference model run one layer at a time, for work that must never have all of it in memory.

Several streams of activations go through the layers side by side, such as one as the checkpoint has it and
one behind weights that were rounded. The layers are the reference model's own (model.py); each matrix is
replaced by a stand-in that shows what it reads and asks which weights to go on with. Knows nothing of
rounding, of formats, or of what the activations are for.

Shapes: N windows of T tokens, C columns, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fox_edge.checkpoint import Checkpoint
from fox_edge.model import Block, RMSNorm, rotary_tables

# Name of a matrix and what it reads in each stream, float32 (N * T, C) -> the float32 weights (R, C) that
# each stream goes on with.
Visit = Callable[[str, Sequence[Tensor]], Sequence[Tensor]]
# Activations (..., C) and weights (R, C) -> (..., R), float32.
Product = Callable[[Tensor, Tensor], Tensor]
# Told after each layer: how many are done, and the streams, (streams, N, T, C).
AfterLayer = Callable[[int, Tensor], None]


@torch.inference_mode()
def walk(
    checkpoint: Checkpoint,
    streams: Tensor,
    visit: Visit,
    *,
    product: Product = F.linear,
    first_layer: int = 0,
    after_layer: AfterLayer | None = None,
) -> Tensor:
    """Take float32 streams (streams, N, T, C), as they enter `first_layer`, through the layers that are left.

    Returns what the head reads, float32 (streams, N * T, C). `visit` is called for each matrix in the order
    of a forward pass, q, k, v, o, gate, up, down, and layer after layer; matrices that read the same input
    are shown the same tensors.
    """
    config, count = checkpoint.config, len(streams)
    cos, sin = rotary_tables(config, torch.arange(streams.shape[2]))
    x = streams.flatten(0, 1)
    for layer in range(first_layer, config.num_layers):
        with torch.device("meta"):
            block = Block(config, layer)
        prefix = f"model.layers.{layer}."
        for name, child in list(block.named_modules()):
            if isinstance(child, nn.Linear):
                parent, _, last = name.rpartition(".")
                shown = _Shown(f"{prefix}{name}.weight", count, visit, product)
                setattr(block.get_submodule(parent), last, shown)
        x = _with_norms(block, prefix, checkpoint)(x, cos, sin, None)
        if after_layer is not None:
            after_layer(layer + 1, x.unflatten(0, (count, -1)))
    with torch.device("meta"):
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    return _with_norms(norm, "model.norm.", checkpoint)(x).view(count, -1, config.hidden_size)


def original(checkpoint: Checkpoint, name: str) -> Tensor:
    """A matrix (R, C) as the checkpoint has it, float32; its pages go back to the system."""
    rows = checkpoint.float_rows(name)
    checkpoint.release(name)
    return rows


def native_product(x: Tensor, weight: Tensor) -> Tensor:
    """x times the transposed weight, in bfloat16 where the processor multiplies that natively.

    Rounds every value by up to 2^-9 of it.
    """
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return F.linear(x.bfloat16(), weight.bfloat16()).float()
    return F.linear(x, weight)


class _Shown(nn.Module):
    """Stands in for one matrix of a layer."""

    def __init__(self, name: str, streams: int, visit: Visit, product: Product) -> None:
        super().__init__()
        self.name, self.streams, self.visit, self.product = name, streams, visit, product

    def forward(self, x: Tensor) -> Tensor:
        """(streams * N, T, C) -> (streams * N, T, R)."""
        inputs = x.chunk(self.streams)
        weights = self.visit(self.name, [part.view(-1, x.shape[-1]) for part in inputs])
        if self.streams == 1:
            return self.product(x, weights[0])
        out = x.new_empty(*x.shape[:-1], weights[0].shape[0])
        for part, rows, weight in zip(out.chunk(self.streams), inputs, weights, strict=True):
            part.copy_(self.product(rows, weight))
        return out


def _with_norms(module: nn.Module, prefix: str, checkpoint: Checkpoint) -> nn.Module:
    """A module made on the meta device, its norms filled from the checkpoint."""
    weights = {key: checkpoint.float_rows(prefix + key)[0] for key in module.state_dict()}
    module.load_state_dict(weights, assign=True)
    return module.eval()
