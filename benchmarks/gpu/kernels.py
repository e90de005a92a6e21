"""Every kernel against plain arithmetic on unpacked weights, on the device itself, and what it takes there.

The reference is written out here, in float32, from what runtimes/cuda/ops.py promises: it shares no code with
either implementation. Inputs are random, drawn anew for every check. Times are of many calls in a row on
weights that together are larger than the card's cache, as in a model. Knows matrices; no model, no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.devices.card_rates import timed
from fox_edge.config import FoxConfig
from runtimes.cuda import ops
from runtimes.cuda.ops import Dense, Matrix, Packed

# What a product may be off by, relative to the whole result: BF16 operands are at 1e-3 to 1e-2.
TOLERANCE = 1e-2


class Form(NamedTuple):
    """How a matrix of integers is made: bits, columns that share a scale, and what else it has."""

    bits: int
    block: int
    symmetric: bool = False  # no offsets
    factors: bool = False  # a factor per column


# What matrices come as: a checkpoint's own, the ONNX presets, and ggml's short blocks with float16 scales.
FORMS: Mapping[str, Form | None] = {
    "bf16": None,
    "int8, blocks of 128": Form(8, 128, symmetric=True),
    "int4, blocks of 128": Form(4, 128),
    "int4, blocks of 32, factors": Form(4, 32, symmetric=True, factors=True),
}
# One, a few that fill no power of two, and many: the three ways in which a product is done.
USERS = (1, 3, 32)
_POSITIONS, _FILLED = 1024, 700
# Operations that have several ways to run, of which the quickest is found beforehand.
_TUNED = ("norm_linear", "linear_add", "norm_gate_up", "head")
_COLD_BYTES = 256 << 20  # several times a card's cache
_MOST_COPIES = 24


@dataclass(frozen=True)
class Setting:
    """Where and on what: a shape, a device, and how long one kernel is timed."""

    config: FoxConfig
    device: str
    seconds: float
    generator: torch.Generator
    dtype: torch.dtype = torch.bfloat16

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Random numbers on the device."""
        made = torch.randn(shape, generator=self.generator, device=self.device)
        return made.mul_(scale).to(dtype or self.dtype)


class Call(NamedTuple):
    """One kernel with inputs of its own. `run` may be called again, and gives the same.

    `due` is called after it; `seen` are the bytes that it must move, `matrix` is what it multiplies by.
    `left` gives what it must have left behind elsewhere, and what is due there.
    """

    run: Callable[[], Tensor]
    due: Callable[[], Tensor]
    seen: int
    matrix: Matrix | None = None
    left: Callable[[], tuple[Tensor, Tensor]] | None = None


def check_kernel(
    name: str, setting: Setting, forms: Sequence[str] = tuple(FORMS), users: Sequence[int] = USERS
) -> Iterator[dict[str, Any]]:
    """A row for every form and number of users: how far a kernel is off, and what a call takes."""
    if name == "attend":
        forms = ("bf16",)
    if name == "dequantize":
        users = (1,)
    for form in forms:
        for count in users:
            yield {"kernel": name, "form": form, "users": count, **_checked(name, setting, form, count)}


def _checked(name: str, setting: Setting, form: str, users: int) -> dict[str, Any]:
    """One kernel at one size; timed where the setting gives it time."""
    make = KERNELS[name]
    call = make(setting, FORMS[form], users)
    error = relative_error(call.run().float(), call.due())
    if call.left is not None:
        error = max(error, relative_error(*call.left()))
    row: dict[str, Any] = {"relative_error": error, "passed": error < TOLERANCE, "bytes": call.seen}
    if not setting.seconds:
        return row
    copies = min(_MOST_COPIES, max(1, _COLD_BYTES // max(1, call.seen)))
    calls = [call, *(make(setting, FORMS[form], users) for _ in range(copies - 1))]
    if name in _TUNED:
        row |= _tuned(name, [one.matrix for one in calls if one.matrix is not None], users, setting)
    seconds = _seconds(calls, setting)
    return {**row, "seconds": seconds, "bytes_per_s": call.seen / seconds}


def _tuned(name: str, matrices: Sequence[Matrix], users: int, setting: Setting) -> dict[str, Any]:
    """What was found quickest, and the seconds by each kernel that could do it; nothing without a card."""
    ops.tune(name, matrices, users, setting.dtype)
    if not setting.device.startswith("cuda"):
        return {}
    from runtimes.cuda import ops_choices, ops_triton

    chosen = str(ops_choices.choice_of(name, matrices[0], users))
    try:
        found = ops_triton.times(name, matrices, users, setting.dtype)
    except Exception as error:
        # The kernel in use works; one of the others may not fit the card, and compilers raise what they like.
        return {"way": chosen, "ways_failed": f"{type(error).__name__}: {error}"[:300]}
    return {"way": chosen, "ways_s": {str(way): seconds for way, seconds in found.items()}}


def relative_error(found: Tensor, due: Tensor) -> float:
    """The length of the difference over that of what is due; infinite where anything is no number."""
    if found.shape != due.shape or not torch.isfinite(found).all():
        return float("inf")
    return float((found.double() - due.double()).norm() / due.double().norm())


def _seconds(calls: Sequence[Call], setting: Setting) -> float:
    """Seconds of one call, of all in turn: as one CUDA graph, so that starting them does not count."""

    def all_of_them() -> None:
        for call in calls:
            call.run()

    replay: Callable[[], object] = all_of_them
    if setting.device.startswith("cuda"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            all_of_them()  # outside the graph first: what a library makes once must not be captured
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_of_them()
        replay = graph.replay
    replay()
    once = timed(replay, setting.device, 1)
    rounds = max(1, min(200, round(setting.seconds / 5 / max(once, 1e-6))))
    return min(timed(replay, setting.device, rounds) for _ in range(5)) / rounds / len(calls)


# --- matrices --------------------------------------------------------------------------------------------


def make_matrix(setting: Setting, form: Form | None, rows: int, columns: int) -> tuple[Matrix, Tensor]:
    """A random matrix of a form (None: plain numbers), and its weights (rows, columns) in float32."""
    deviation = columns**-0.5
    if form is None:
        weight = setting.normal(rows, columns, scale=deviation)
        return Dense(weight), weight.float()
    most, size = 2**form.bits, (rows, columns // form.block)
    integers = torch.randint(
        0, most, (rows, columns), generator=setting.generator, device=setting.device, dtype=torch.uint8
    )
    # Integers spread evenly over so many steps: their deviation is that number over the root of 12.
    scales = (setting.normal(*size, dtype=torch.float32).abs() + 0.5) * deviation * 12**0.5 / most
    offsets = -scales * (most / 2)
    if not form.symmetric:
        offsets = offsets + scales * setting.normal(*size, dtype=torch.float32)
    values = integers.view(*size, form.block).float() * scales[..., None] + offsets[..., None]
    values = values.view(rows, columns)
    factors = None
    if form.factors:
        factors = 1 + setting.normal(columns, scale=0.3, dtype=torch.float32).abs()
        values = values * factors
    stored = integers if form.bits == 8 else integers[:, 0::2] | integers[:, 1::2] << 4
    kept = None if form.symmetric else offsets
    return Packed(stored.contiguous(), scales, kept, form.bits, form.block, factors), values


# --- kernels ---------------------------------------------------------------------------------------------


def _embed(s: Setting, form: Form | None, users: int) -> Call:
    c = s.config
    matrix, values = make_matrix(s, form, c.vocab_size, c.hidden_size)
    tokens = torch.randint(0, c.vocab_size, (users,), generator=s.generator, device=s.device)
    seen = users * c.hidden_size * (matrix.nbytes // (c.vocab_size * c.hidden_size) + 2)
    return Call(lambda: ops.embed(matrix, tokens, s.dtype), lambda: values[tokens], seen)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang and Sennrich, 2019), float32."""
    h = x.float()
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight.float()


def _norm_linear(s: Setting, form: Form | None, users: int) -> Call:
    c = s.config
    matrix, values = make_matrix(s, form, c.num_heads * c.head_dim + 2 * c.kv_dim, c.hidden_size)
    x, norm = s.normal(users, c.hidden_size), 1 + s.normal(c.hidden_size, scale=0.1)
    return Call(
        lambda: ops.norm_linear(x, norm, c.rms_norm_eps, matrix),
        lambda: _normed(x, norm, c.rms_norm_eps) @ values.T,
        matrix.nbytes,
        matrix,
    )


def _linear_add(s: Setting, form: Form | None, users: int) -> Call:
    c = s.config
    matrix, values = make_matrix(s, form, c.hidden_size, c.intermediate_size)
    x, residual = s.normal(users, c.intermediate_size), s.normal(users, c.hidden_size)
    given = residual.clone()

    def run() -> Tensor:
        residual.copy_(given)
        ops.linear_add(x, matrix, residual)
        return residual

    return Call(run, lambda: given.float() + x.float() @ values.T, matrix.nbytes, matrix)


def _norm_gate_up(s: Setting, form: Form | None, users: int) -> Call:
    c = s.config
    matrix, values = make_matrix(s, form, 2 * c.intermediate_size, c.hidden_size)
    x, norm = s.normal(users, c.hidden_size), 1 + s.normal(c.hidden_size, scale=0.1)

    def due() -> Tensor:
        gate, up = (_normed(x, norm, c.rms_norm_eps) @ values.T).chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    return Call(lambda: ops.norm_gate_up(x, norm, c.rms_norm_eps, matrix), due, matrix.nbytes, matrix)


def _head(s: Setting, form: Form | None, users: int) -> Call:
    c = s.config
    matrix, values = make_matrix(s, form, c.vocab_size, c.hidden_size)
    x, norm = s.normal(users, c.hidden_size), 1 + s.normal(c.hidden_size, scale=0.1)
    return Call(
        lambda: ops.head(x, norm, c.rms_norm_eps, matrix),
        lambda: _normed(x, norm, c.rms_norm_eps) @ values.T,
        matrix.nbytes,
        matrix,
    )


def _dequantize(s: Setting, form: Form | None, users: int) -> Call:
    c = s.config
    matrix, values = make_matrix(s, form, 2 * c.intermediate_size, c.hidden_size)
    out = torch.full_like(values, float("nan"), dtype=s.dtype)  # what is not written shows
    seen = matrix.nbytes + out.numel() * out.element_size()
    return Call(lambda: ops.dequantize(matrix, out), lambda: values, seen)


def _attend(s: Setting, form: Form | None, users: int) -> Call:
    """Conversations of different lengths in slots that are not in order."""
    c = s.config
    heads, kv, size = c.num_heads, c.num_kv_heads, c.head_dim
    shape = (users + 1, kv, _POSITIONS, size)
    keys, values, qkv = s.normal(*shape), s.normal(*shape), s.normal(users, (heads + 2 * kv) * size)
    slots = torch.randperm(users + 1, generator=s.generator, device=s.device)[:users].int()
    spread = torch.linspace(0.3, 1.0, users, device=s.device) if users > 1 else torch.ones(1, device=s.device)
    positions = (_FILLED * spread).int()
    frequencies = c.rope_theta ** (-torch.arange(0, size, 2, device=s.device) / size)
    angles = torch.arange(_POSITIONS, device=s.device)[:, None] * frequencies
    cos, sin = angles.cos().float(), angles.sin().float()
    held, kept = keys.clone(), values.clone()

    def run() -> Tensor:
        return ops.attend(qkv, keys, values, slots, positions, cos, sin)

    def due() -> Tensor:
        rows = [
            _attended(qkv[n], held[slot], kept[slot], at, (cos[at], sin[at]), c)
            for n, (slot, at) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True))
        ]
        return torch.stack(rows)

    def left() -> tuple[Tensor, Tensor]:
        """The new position's keys and values; no number where anything else has changed."""
        news = qkv.float().view(users, -1, size)[:, heads:]
        found, wanted = [], []
        for n, (slot, at) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
            wanted += [_turned(news[n, :kv], cos[at], sin[at]), news[n, kv:]]
            for cache, before in ((keys, held), (values, kept)):
                found.append(cache[slot, :, at].float())
                before[slot, :, at] = cache[slot, :, at]
        same = torch.equal(keys, held) and torch.equal(values, kept)
        return torch.stack(found) * (1 if same else float("nan")), torch.stack(wanted)

    filled = int((positions + 1).sum())
    return Call(run, due, 2 * filled * kv * size * keys.element_size(), left=left)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(heads, D) at one position: dimension i with i + D/2 (Su et al., 2021, as Llama has it)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _attended(
    qkv: Tensor, keys: Tensor, values: Tensor, at: int, turn: tuple[Tensor, Tensor], c: FoxConfig
) -> Tensor:
    """One conversation: (H + 2K) * D and its caches (K, S, D) -> (H * D), float32."""
    q, k, v = qkv.float().view(-1, c.head_dim).split((c.num_heads, c.num_kv_heads, c.num_kv_heads))
    seen = torch.cat((keys[:, :at].float(), _turned(k, *turn)[:, None]), dim=1)
    read = torch.cat((values[:, :at].float(), v[:, None]), dim=1)
    group = c.num_heads // c.num_kv_heads
    grouped = _turned(q, *turn).view(c.num_kv_heads, group, -1) * c.head_dim**-0.5
    scores = torch.einsum("kgd,ksd->kgs", grouped, seen)
    return torch.einsum("kgs,ksd->kgd", scores.softmax(dim=-1), read).flatten()


KERNELS: Mapping[str, Callable[[Setting, Form | None, int], Call]] = {
    "embed": _embed,
    "norm_linear": _norm_linear,
    "attend": _attend,
    "linear_add": _linear_add,
    "norm_gate_up": _norm_gate_up,
    "head": _head,
    "dequantize": _dequantize,
}
