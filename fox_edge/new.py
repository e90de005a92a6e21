"""A random checkpoint of a real shape, to rehearse an export with: the size is true, the words are not.

Weights are drawn a few rows at a time, so the memory it takes does not grow with the shape.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fox_edge.checkpoint import Checkpoint, Progress, write_checkpoint
from fox_edge.config import SHAPES, FoxConfig
from fox_edge.errors import CheckpointError
from fox_edge.locate import NANO
from fox_edge.stand_in import stand_in_files

# Standard deviation of the weights before training (transformers' initializer_range for Llama). What writes
# to the residual stream is smaller: else every layer drowns the one before it, rounding errors grow
# from layer to layer as they do in no trained model, and no 4-bit export of it would pass verification.
_DEVIATION = 0.02
_RESIDUAL_WRITERS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
_PIECE_WEIGHTS = 1 << 22
_GEMMA_IDS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}


def new_checkpoint(folder: Path, shape: str, seed: int, progress: Progress | None = None) -> Checkpoint:
    """Write and open a random BF16 checkpoint of a shape in SHAPES: normal, norms 1.

    The same seed gives the same file. `progress(done_bytes, total_bytes)` is called as it goes. Raises
    CheckpointError for an unknown shape, an existing folder, or a disk that cannot hold it.
    """
    if shape not in SHAPES:
        raise CheckpointError(f"unknown shape '{shape}'; known: {', '.join(SHAPES)}")
    config = SHAPES[shape]()
    nano = Path(__file__).parent / NANO
    if config.vocab_size == FoxConfig.nano().vocab_size:
        names = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
        files = {name: (nano / name).read_bytes() for name in names}
    else:
        files = stand_in_files(nano, config.vocab_size)
    tensors = random_rows(config, seed, progress)
    write_checkpoint(folder, config, tensors, token_ids=_GEMMA_IDS, extra_files=files)
    return Checkpoint.open(folder)


def random_rows(
    config: FoxConfig, seed: int, progress: Progress | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, next rows) of every tensor of a model, bfloat16, at most 4M weights at a time.

    Every tensor has a random sequence of its own, drawn from the seed and its name.
    """
    total, done = config.num_parameters() * 2, 0
    for name, shape in config.tensor_shapes().items():
        if len(shape) == 1:
            yield name, torch.ones(shape, dtype=torch.bfloat16)
        else:
            key = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
            step = max(1, _PIECE_WEIGHTS // shape[1])
            residual = name.endswith(_RESIDUAL_WRITERS)
            deviation = _DEVIATION / (2 * config.num_layers) if residual else _DEVIATION
            for start in range(0, shape[0], step):
                rows = min(step, shape[0] - start)
                drawn = torch.randn((rows, shape[1]), generator=generator)
                yield name, drawn.mul_(deviation).to(torch.bfloat16)
                if progress is not None:
                    progress(done + 2 * (start + rows) * shape[1], total)
        done += 2 * math.prod(shape)
