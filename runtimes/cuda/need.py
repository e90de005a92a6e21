"""What a model will take of the device's memory, told before any of it is loaded, and what is left there.

Adds up weights, the KV cache of all conversations, and what computing needs beside them. Knows the buffers of
this runtime's parts; not how a session opens.
"""

from __future__ import annotations

import torch

from fox_edge.config import FoxConfig
from runtimes.base import SessionOptions
from runtimes.cuda import choose, prompts
from runtimes.cuda.decoder import SIZES, size_of
from runtimes.cuda.form import FLOATS
from runtimes.cuda.slots import scratch_slots
from runtimes.cuda.sources import PIECE_WEIGHTS, Source
from runtimes.cuda.weights import Ruler, lay_out
from runtimes.kv_types import TORCH, kv_bytes_per_position
from runtimes.memory import MemoryNeed, Room, mb

# Rows of logits that `score` makes at once.
SCORE_ROWS = 16
# Two workspaces of cuBLAS on a Hopper, and what the allocator rounds up.
_LIBRARY_BYTES = (2 * 32 << 20) + (20 << 20)
# A piece of a file while it is taken apart: raw, as integers, and as float32 a few times.
_BYTES_PER_PIECE_WEIGHT = 24
# What a process takes of a GPU beside its tensors: the driver's context and the kernels.
_CONTEXT_BYTES = 600 << 20
# Below that, memory that nobody accounts for is the driver's own.
_NOTEWORTHY_BYTES = 512 << 20


def name_of(dtype: torch.dtype) -> str:
    """'bfloat16', 'float32'."""
    return str(dtype).removeprefix("torch.")


def memory_need(source: Source, options: SessionOptions, dtype: torch.dtype, device_type: str) -> MemoryNeed:
    """Told from headers alone, for `options.conversations` at a time."""
    ruler, config = Ruler(), source.config
    weights, _ = lay_out(source, dtype, ruler.take)
    held = options.conversations + scratch_slots(options.conversations)
    positions = min(options.context or source.context, source.context)
    chunk = min(positions, prompts.CUDA_CHUNK if device_type == "cuda" else prompts.CPU_CHUNK)
    scratch = dtype.itemsize * weights.largest()
    running = scratch + chunk * _activations(config, dtype.itemsize) + _logits(config, options.conversations)
    if device_type == "cuda":
        running += _graphs(config, dtype.itemsize, positions)
    forms = {source.form(name) for name in config.tensor_shapes()}
    loading = PIECE_WEIGHTS * _BYTES_PER_PIECE_WEIGHT if forms != {FLOATS} else 0
    return MemoryNeed(
        weights=ruler.nbytes,
        buffers=max(running, loading) + (_LIBRARY_BYTES if device_type == "cuda" else 0),
        per_position=held * kv_bytes_per_position(config, TORCH, name_of(dtype)),
        scratch_per_position=4 * config.head_dim,  # cosines and sines
    )


def _activations(config: FoxConfig, itemsize: int) -> int:
    """Bytes per token of a prompt's chunk: the residual stream, and attention's or feed-forward's part."""
    queries = config.num_heads * config.head_dim
    # q, k and v; q while it is turned, in float32; q turned, and the result.
    attention = itemsize * (3 * queries + 2 * config.kv_dim) + 16 * queries
    return 2 * itemsize * config.hidden_size + max(attention, 3 * itemsize * config.intermediate_size)


def _graphs(config: FoxConfig, itemsize: int, positions: int) -> int:
    """Bytes that the graphs of short prompts share: activations, and what they see of a slot, with a bias."""
    length, reach = min(positions, prompts.LENGTHS[-1]), min(positions, prompts.REACHES[-1])
    seen = reach * (2 * itemsize * config.kv_dim + (itemsize + 1) * length)
    return length * _activations(config, itemsize) + seen


def _logits(config: FoxConfig, conversations: int) -> int:
    """Bytes of the logits of every size of batch, and what scoring and sampling make of them."""
    largest = size_of(min(conversations, SIZES[-1]))
    rows = sum(size for size in SIZES if size <= largest) + SCORE_ROWS
    sampled = choose.BYTES_PER_WEIGHT * min(conversations, choose.ROWS_AT_ONCE)
    return config.vocab_size * (4 * rows + sampled)


def device_room(device: torch.device) -> Room:
    """What is left on a GPU for this process, and who holds the rest."""
    free, total = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_reserved(device)
    available = free + ours - torch.cuda.memory_allocated(device)
    others = total - free - ours - _CONTEXT_BYTES
    words = f"{mb(available)} of the GPU's {mb(total)} are free"
    if others > _NOTEWORTHY_BYTES:
        words += f" (another process holds some {mb(others)} of it)"
    return Room(available, words)
