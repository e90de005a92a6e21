"""Keys and values of several conversations in one block of device memory, a slot for each.

Knows which slots are taken; not how far each is filled, which is its conversation's business. Shapes: L
layers, K key/value heads, S positions, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fox_edge.config import FoxConfig
from fox_edge.errors import FoxEdgeError


def scratch_slots(count: int) -> int:
    """Slots beside those of the conversations: where the rows write that fill a batch up.

    One conversation is a batch by itself and needs none.
    """
    return 1 if count > 1 else 0


class Slots:
    """The KV cache: keys and values (L, slots, K, S, D) each; the last slot may be `scratch`."""

    def __init__(
        self, config: FoxConfig, count: int, positions: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        slots = count + scratch_slots(count)
        shape = (config.num_layers, slots, config.num_kv_heads, positions, config.head_dim)
        # Zeros: what is masked out must be a number, wherever a kernel reads it.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.count, self.positions, self.scratch = count, positions, slots - 1
        self._free = set(range(count))

    def take(self) -> int:
        """A slot that nobody has; raises FoxEdgeError when all are taken."""
        if not self._free:
            raise FoxEdgeError(
                f"this model was opened for {self.count} conversation{'s' if self.count > 1 else ''} at a "
                f"time, and another one would be number {self.count + 1}"
            )
        slot = min(self._free)
        self._free.remove(slot)
        return slot

    def give_back(self, slot: int) -> bool:
        """A slot whose conversation is closed; returns whether it was the last one taken."""
        self._free.add(slot)
        return len(self._free) == self.count

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` positions of one slot to another, bit by bit."""
        held: Tensor
        for held in (self.keys, self.values):
            held[:, target, :, :length] = held[:, source, :, :length]
