"""How far an artifact's predictions are from the reference's, on the same text.

Knows rows of logits; not which models they came from, nor tokens' meanings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fox_edge.errors import VerificationError
from runtimes.base import Logits


@dataclass(frozen=True)
class Fidelity:
    """KL(reference || artifact) over positions, in nats, and how often both prefer the same token."""

    positions: int
    mean_kl_nats: float
    median_kl_nats: float
    p99_kl_nats: float
    max_kl_nats: float
    top1_agreement_percent: float

    def to_json(self) -> dict[str, Any]:
        """The figures under the keys that reports use."""
        return dict(self.__dict__)


def compare(reference: Iterable[Logits], artifact: Iterable[Logits]) -> Fidelity:
    """Compare two streams of logits chunks (n, V) over the same text; the chunks' sizes may differ.

    Holds one row of each at a time, and one float64 per position. Raises VerificationError when the
    streams differ in length or vocabulary, or hold something that is no number.
    """
    divergences: list[float] = []
    agreed = 0
    wanted, found = _rows(reference), _rows(artifact)
    for position, row in enumerate(wanted):
        other = next(found, None)
        if other is None:
            raise VerificationError(f"the artifact gave logits for {position} positions, the reference more")
        if row.shape != other.shape:
            raise VerificationError(
                f"the artifact gives {other.size} logits per position, the reference {row.size}"
            )
        nats = kl_nats(row, other)
        if not np.isfinite(nats):
            raise VerificationError(f"position {position}: the divergence of the logits is {nats}")
        divergences.append(nats)
        agreed += int(row.argmax() == other.argmax())
    if next(found, None) is not None:
        raise VerificationError(f"the artifact gave logits for more than the {len(divergences)} positions")
    if not divergences:
        raise VerificationError("there are no positions to compare")
    return _summary(np.array(divergences), agreed)


def kl_nats(reference: Logits, artifact: Logits) -> float:
    """KL(p || q) = sum p (log p - log q), p and q the softmax of two rows of logits (V,), in float64.

    Written as sum p (a - b) - (logsumexp a - logsumexp b), with both rows shifted by their own maximum.
    """
    a = reference.astype(np.float64)
    b = artifact.astype(np.float64)
    a -= a.max()
    b -= b.max()
    weights = np.exp(a)
    mass = weights.sum()
    divergence = float(weights @ (a - b) / mass - np.log(mass) + np.log(np.exp(b).sum()))
    return 0.0 if -1e-9 < divergence < 0 else divergence  # rounding, never a true value


def _rows(chunks: Iterable[Logits]) -> Iterator[Logits]:
    for chunk in chunks:
        yield from chunk


def _summary(divergences: NDArray[np.float64], agreed: int) -> Fidelity:
    median, p99 = np.percentile(divergences, (50, 99))
    return Fidelity(
        positions=divergences.size,
        mean_kl_nats=float(divergences.mean()),
        median_kl_nats=float(median),
        p99_kl_nats=float(p99),
        max_kl_nats=float(divergences.max()),
        top1_agreement_percent=100 * agreed / divergences.size,
    )


@cache
def reference_text() -> str:
    """The text that exports are verified on: held-out word problems with their worked answers.

    The project's own, the same every time, about 10,000 characters: over 1,000 tokens of any vocabulary.
    """
    from fox_edge.nano.problems import held_out

    return "\n\n".join(f"Question: {p.question}\nAnswer: {p.answer}" for p in held_out(60))
