"""How far an artifact's predictions are from the reference's, on the same text, in one pass over both.

Two streams of logits go by; of each position a few numbers stay. In memory at once: what the streams hand
over, and blocks of float64 that stay in a core's cache. Knows rows of logits; not which models they came
from, nor tokens' meanings. The formulas and how sure they are: docs/fidelity.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.fidelity.texts import word_problems
from fox_edge.errors import VerificationError
from runtimes.base import Logits

# How many of the likeliest tokens are compared beside the first.
TOP = 5
# Elements of a float64 block: 64 rows x 2,048 columns are 1 MB, and a handful of such blocks live at once.
_BLOCK = 1 << 17
# Columns of a group whose largest logit stands for it while the likeliest are looked for.
_GROUP = 512

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Positions:
    """What was found at each of n positions, in order; arrays (n,).

    `shared` is the share of the reference's TOP likeliest tokens that are among the artifact's. The two `nll`
    are -log p of the token that came, in nats; empty when nobody said which came.
    """

    kl_nats: Floats
    same_first: NDArray[np.bool_]
    shared: Floats
    reference_nll: Floats
    artifact_nll: Floats

    @property
    def count(self) -> int:
        """n."""
        return self.kl_nats.size


@dataclass(frozen=True)
class Fidelity:
    """KL(reference || artifact) over positions, in nats, and how often both prefer the same tokens.

    Standard errors take positions as independent, as llama-perplexity's do; 0 for a single one.
    """

    positions: int
    mean_kl_nats: float
    mean_kl_se_nats: float
    median_kl_nats: float
    median_kl_se_nats: float
    p99_kl_nats: float
    p99_kl_se_nats: float
    max_kl_nats: float
    top1_agreement_percent: float
    top1_se_percent: float
    top5_agreement_percent: float
    top5_se_percent: float

    def to_json(self) -> dict[str, Any]:
        """The figures under the keys that reports use."""
        return dict(self.__dict__)


def compare(reference: Iterable[Logits], artifact: Iterable[Logits]) -> Fidelity:
    """Compare two streams of logits chunks (n, V) over the same text; the chunks' sizes may differ.

    Raises VerificationError when the streams differ in length or vocabulary, or hold something that is no
    number.
    """
    return summary(look(reference, artifact))


def look(
    reference: Iterable[Logits], artifact: Iterable[Logits], targets: Sequence[int] | None = None
) -> Positions:
    """Every position of two streams of chunks (n, V); `targets`: the token that came after each.

    A chunk need not outlive the asking for its stream's next. Raises VerificationError as `compare` does.
    """
    found: list[Positions] = []
    done = 0
    for a, b in side_by_side(reference, artifact):
        came = None if targets is None else targets[done : done + len(a)]
        found.append(_look_at_chunk(a, b, came, done))
        done += len(a)
    return Positions(*(np.concatenate([getattr(p, name) for p in found]) for name in _FIELDS))


_FIELDS = tuple(Positions.__dataclass_fields__)


def kl_nats(reference: Logits, artifact: Logits) -> float:
    """KL(p || q), p and q the softmax of two rows of logits (V,)."""
    a, b = (torch.from_numpy(row[None]) for row in (reference, artifact))
    return float(_divergence(a, b)[0])


def side_by_side(reference: Iterable[Logits], artifact: Iterable[Logits]) -> Iterator[tuple[Logits, Logits]]:
    """Views (n, V) of the same positions of both streams, wherever their chunks end."""
    wanted, found = iter(reference), iter(artifact)
    a, b, done = next(wanted, None), next(found, None), 0
    while True:
        a, b = _refilled(a, wanted), _refilled(b, found)
        if a is None or b is None:
            break
        if a.shape[1] != b.shape[1]:
            raise VerificationError(
                f"the artifact gives {b.shape[1]} logits per position, the reference {a.shape[1]}"
            )
        count = min(len(a), len(b))
        yield a[:count], b[:count]
        a, b, done = a[count:], b[count:], done + count
    if a is not None:
        raise VerificationError(f"the artifact gave logits for {done} positions, the reference more")
    if b is not None:
        raise VerificationError(f"the artifact gave logits for more than the {done} positions")
    if not done:
        raise VerificationError("there are no positions to compare")


def _refilled(chunk: Logits | None, stream: Iterator[Logits]) -> Logits | None:
    """What is left of a chunk, or the stream's next that has rows; None at its end."""
    while chunk is not None and not len(chunk):
        chunk = next(stream, None)
    return chunk


# --- one chunk ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def _look_at_chunk(a: Logits, b: Logits, targets: Sequence[int] | None, before: int) -> Positions:
    """Both models' logits (n, V) after the positions from `before` on."""
    reference, artifact = torch.from_numpy(a), torch.from_numpy(b)
    divergence, log_mass, other_log_mass = _divergence(reference, artifact)
    bad = (~divergence.isfinite()).nonzero()
    if len(bad):
        row = int(bad[0])
        raise VerificationError(
            f"position {before + row}: the divergence of the logits is {float(divergence[row])}"
        )
    best = min(TOP, a.shape[1])
    shared = likeliest(reference, best)[:, :, None] == likeliest(artifact, best)[:, None, :]
    none = np.empty(0)
    return Positions(
        kl_nats=divergence.numpy(),
        # numpy's own search is vectorized, and takes the first of equals, as llama.cpp does.
        same_first=a.argmax(1) == b.argmax(1),
        shared=shared.sum((1, 2)).double().div_(best).numpy(),
        reference_nll=none if targets is None else _nll(a, log_mass, targets),
        artifact_nll=none if targets is None else _nll(b, other_log_mass, targets),
    )


def _divergence(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL(p || q) (n,) of float32 logits (n, V), and logsumexp of each; all float64.

    sum p (log p - log q) = sum p (a - b) - logsumexp a + logsumexp b, both rows shifted by their own maximum
    first, which takes most of the cancellation away. Float64 throughout, a block of columns at a time.
    """
    rows, columns = a.shape
    top_a, top_b = (x.amax(1, keepdim=True).double() for x in (a, b))
    mass, other_mass, weighted = torch.zeros(3, rows, dtype=torch.float64)
    step = max(1, _BLOCK // rows)
    for start in range(0, columns, step):
        x = a[:, start : start + step].double().sub_(top_a)
        y = b[:, start : start + step].double().sub_(top_b)
        difference = x - y
        p = x.exp_()
        mass += p.sum(1)
        weighted += difference.mul_(p).sum(1)
        other_mass += y.exp_().sum(1)
    log_mass, other_log_mass = mass.log(), other_mass.log()
    divergence = weighted / mass - log_mass + other_log_mass
    # Below zero by rounding only, never truly.
    return divergence.clamp_(min=0), log_mass + top_a[:, 0], other_log_mass + top_b[:, 0]


def _nll(logits: Logits, log_mass: Tensor, targets: Sequence[int]) -> Floats:
    """-log p (n,) of one token per row of logits (n, V), whose logsumexp is `log_mass`."""
    chosen = logits[np.arange(len(logits)), list(targets)].astype(np.float64)
    nll: Floats = log_mass.numpy() - chosen
    return nll


def likeliest(rows: Tensor, count: int) -> Tensor:
    """Columns (n, count) of the `count` largest of each row (n, V), in no order that can be relied on.

    The largest lie in the groups of columns whose own maxima are largest: two short searches behind one pass
    for maxima, which is as fast as memory. Exact; of equals, some.
    """
    whole = rows.shape[1] // _GROUP
    if whole <= count:
        return rows.topk(count).indices
    inside = whole * _GROUP
    groups = rows[:, :inside].unflatten(1, (whole, _GROUP)).amax(2).topk(count).indices
    columns = (groups[:, :, None] * _GROUP + torch.arange(_GROUP)).flatten(1)
    rest = torch.arange(inside, rows.shape[1]).expand(len(rows), -1)
    columns = torch.cat((columns, rest), 1)
    return columns.gather(1, rows.gather(1, columns).topk(count).indices)


# --- over all positions ------------------------------------------------------------------------------------


def summary(found: Positions) -> Fidelity:
    """The figures of all positions, with standard errors."""
    kl, same, shared = found.kl_nats, found.same_first, found.shared
    median, p99 = np.percentile(kl, (50, 99))
    return Fidelity(
        positions=found.count,
        mean_kl_nats=float(kl.mean()),
        mean_kl_se_nats=standard_error(kl),
        median_kl_nats=float(median),
        median_kl_se_nats=quantile_error(kl, 0.5),
        p99_kl_nats=float(p99),
        p99_kl_se_nats=quantile_error(kl, 0.99),
        max_kl_nats=float(kl.max()),
        top1_agreement_percent=100 * float(same.mean()),
        top1_se_percent=100 * standard_error(same),
        top5_agreement_percent=100 * float(shared.mean()),
        top5_se_percent=100 * standard_error(shared),
    )


def perplexities(found: Positions) -> dict[str, float]:
    """Perplexity of both models on the tokens that came, and their ratio with its standard error.

    The ratio is exp of the mean of paired differences of -log p, so that what both find hard cancels; its
    error is the mean's times the ratio (first order).
    """
    difference = found.artifact_nll - found.reference_nll
    ratio = math.exp(difference.mean())
    return {
        "reference_perplexity": math.exp(found.reference_nll.mean()),
        "perplexity": math.exp(found.artifact_nll.mean()),
        "perplexity_ratio": ratio,
        "perplexity_ratio_se": ratio * standard_error(difference),
    }


def curve(kl: Floats, first: int, buckets: int = 8) -> list[dict[str, Any]]:
    """Mean KL over the context, from divergences (windows, positions of each from `first` on).

    `from` is a bucket's first position in the window, `to` the one after its last.
    """
    width = -(-kl.shape[1] // buckets)
    return [
        {
            "from": first + start,
            "to": first + min(start + width, kl.shape[1]),
            "mean_kl_nats": float(kl[:, start : start + width].mean()),
            "mean_kl_se_nats": standard_error(kl[:, start : start + width].ravel()),
        }
        for start in range(0, kl.shape[1], width)
    ]


def standard_error(values: NDArray[Any]) -> float:
    """Of the mean: sample deviation / sqrt(n); for yes and no, sqrt(p (1 - p) / (n - 1))."""
    return float(values.std(ddof=1, dtype=np.float64)) / math.sqrt(values.size) if values.size > 1 else 0.0


def quantile_error(values: Floats, share: float) -> float:
    """Of a quantile: half the distance of those one binomial deviation to its sides (Woodruff, 1952)."""
    aside = math.sqrt(share * (1 - share) / values.size)
    low, high = np.quantile(values, np.clip((share - aside, share + aside), 0, 1))
    return float(high - low) / 2


@cache
def reference_text() -> str:
    """The text that exports are verified on: held-out word problems with their worked answers.

    The project's own, the same every time, about 10,000 characters: over 1,000 tokens of any vocabulary.
    """
    return word_problems(60)
