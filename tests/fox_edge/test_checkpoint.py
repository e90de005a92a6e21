from __future__ import annotations

from fox_edge.checkpoint import Checkpoint


def test_opens(tiny: Checkpoint) -> None:
    assert tiny.shapes() == tiny.config.tensor_shapes()
