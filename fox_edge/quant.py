"""The table of quantization types, and recipes: which tensor gets which type.

Knows names, block sizes, bytes and error bounds; not how a format stores the blocks (the exporters do)
and not where weights come from. A recipe is data: what it decides is written into the manifest.
"""

from __future__ import annotations

import fnmatch
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fox_edge.errors import RecipeError

GGUF, ONNX, PTE = "gguf", "onnx", "pte"
FORMATS = (GGUF, ONNX, PTE)
MAX_RECIPE_BYTES = 1 << 20
WHOLE_ROW = 0
# Ways of rounding, from quick to good; the exporters say what each does.
NEAREST, SEARCH, COMPENSATED = "nearest", "search", "compensated"
ROUNDINGS = (NEAREST, SEARCH, COMPENSATED)
# How far compensation may move a row before it rounds it, as a share of the row's length.
MOST_DRIFT = 0.1

# The input embedding, which is the output head too when the model is tied; and the head when it is not.
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class QuantType:
    """One way to store weights.

    `block_size` consecutive weights of a row take `block_bits` bits, scales and zero points included. With
    the block size 0 (`WHOLE_ROW`) a block is a whole row, and `block_bits` is what it takes beside its
    integers: `of_row` gives the type for rows of a certain length.
    `bits` is the width of one stored integer (0: a float type). `max_error` bounds, tensor by tensor, the
    root-mean-square of (dequantized - original) over that of the original; verification holds exports to it.
    """

    name: str
    format: str
    bits: int
    block_size: int
    block_bits: int
    max_error: float
    symmetric: bool = True
    positive: bool = False  # whether a kernel takes scales above 0 only

    @property
    def bits_per_weight(self) -> float:
        """Storage per weight, scales and zero points included (but for whole rows: their scales)."""
        return self.block_bits / self.block_size if self.block_size else self.bits

    def of_row(self, columns: int) -> QuantType:
        """This type for rows of this many weights."""
        if self.block_size != WHOLE_ROW:
            return self
        return replace(self, block_size=columns, block_bits=columns * self.bits + self.block_bits)

    @property
    def is_narrow(self) -> bool:
        """Whether it rounds so coarsely that choosing well between two neighbours pays."""
        return 0 < self.bits <= 4

    def holds(self, columns: int) -> bool:
        """Whether a row of this many weights is a whole number of blocks."""
        return self.block_size == WHOLE_ROW or columns % self.block_size == 0

    def row_bytes(self, tensor: str, columns: int) -> int:
        """Bytes of one row; raises RecipeError when the row is not a whole number of blocks."""
        if not self.holds(columns):
            raise RecipeError(
                f"{tensor}: a row of {columns} weights is not a whole number of {self.name} blocks "
                f"of {self.block_size}"
            )
        type_ = self.of_row(columns)
        return -(-(columns // type_.block_size) * type_.block_bits // 8)


def _gguf(name: str, bits: int, block_size: int, block_bytes: int, max_error: float) -> QuantType:
    return QuantType(name, GGUF, bits, block_size, 8 * block_bytes, max_error)


def _onnx(bits: int, block_size: int, symmetric: bool) -> QuantType:
    """MatMulNBits storage: packed integers, a float32 scale and, unless symmetric, a zero point per block."""
    return QuantType(
        name=f"q{bits}{'s' if symmetric else 'a'}{block_size}",
        format=ONNX,
        bits=bits,
        block_size=block_size,
        block_bits=bits * block_size + 32 + (0 if symmetric else bits),
        # Rounding noise is step / sqrt(12), a step at most the block's norm / 2^(bits - 1): as when one
        # outlier holds all of it. Above 0.9 the bound would no longer tell weights from zeros.
        max_error=min(0.9, math.sqrt(block_size / 12) / 2 ** (bits - 1)),
        symmetric=symmetric,
    )


def _pte(bits: int, block_size: int) -> QuantType:
    """XNNPACK's storage: packed integers around zero, and a scale above 0 per block of 4-bit ones (bfloat16)
    or per row of 8-bit ones (float32)."""
    whole_row = block_size == WHOLE_ROW
    return QuantType(
        name=f"q{bits}row" if whole_row else f"q{bits}s{block_size}",
        format=PTE,
        bits=bits,
        block_size=block_size,
        block_bits=32 if whole_row else bits * block_size + 16,
        # As for ONNX; a row has thousands of weights.
        max_error=min(0.9, math.sqrt((block_size or 1 << 14) / 12) / 2 ** (bits - 1)),
        positive=True,
    )


# GGUF block sizes and bytes: the block structures of llama.cpp's ggml-common.h. Error bounds: about twice
# what each type loses on normally distributed weights; below 2 bits the error is as large as the weights, and
# only the divergence of the whole model says what is left.
_TABLE: tuple[QuantType, ...] = (
    _gguf("f32", 0, 1, 4, 1e-6),
    _gguf("f16", 0, 1, 2, 1e-3),
    _gguf("bf16", 0, 1, 2, 8e-3),
    _gguf("q8_0", 8, 32, 34, 0.02),
    _gguf("q6_k", 6, 256, 210, 0.05),
    _gguf("q5_k", 5, 256, 176, 0.1),
    _gguf("q5_1", 5, 32, 24, 0.12),
    _gguf("q5_0", 5, 32, 22, 0.15),
    _gguf("q4_k", 4, 256, 144, 0.2),
    _gguf("q4_1", 4, 32, 20, 0.2),
    _gguf("q4_0", 4, 32, 18, 0.25),
    _gguf("iq4_nl", 4, 32, 18, 0.2),
    _gguf("iq4_xs", 4, 256, 136, 0.2),
    _gguf("mxfp4", 4, 32, 17, 0.45),
    _gguf("nvfp4", 4, 64, 36, 0.25),
    _gguf("q3_k", 3, 256, 110, 0.4),
    _gguf("iq3_s", 3, 256, 110, 0.4),
    _gguf("iq3_xxs", 3, 256, 98, 0.5),
    _gguf("q2_k", 2, 256, 84, 0.7),
    _gguf("iq2_s", 2, 256, 82, 0.7),
    _gguf("iq2_xs", 2, 256, 74, 0.75),
    _gguf("iq2_xxs", 2, 256, 66, 0.95),
    _gguf("tq2_0", 2, 256, 66, 0.9),
    _gguf("tq1_0", 2, 256, 54, 0.9),
    _gguf("iq1_m", 1, 256, 56, 1.2),
    _gguf("iq1_s", 1, 256, 50, 1.2),
    _gguf("q1_0", 1, 128, 18, 2.0),
    QuantType("float32", ONNX, 0, 1, 32, 1e-6),
    *(
        _onnx(bits, block_size, symmetric)
        for bits in (8, 4, 2)
        for block_size in (16, 32, 64, 128, 256)
        for symmetric in (True, False)
    ),
    QuantType("float32", PTE, 0, 1, 32, 1e-6),
    _pte(8, WHOLE_ROW),
    *(_pte(4, block_size) for block_size in (32, 64, 128, 256)),
)
TYPES: dict[tuple[str, str], QuantType] = {(t.format, t.name): t for t in _TABLE}

# What a row that is no whole number of blocks gets instead: first of the same width or more that holds it.
_FALLBACKS = {
    GGUF: {
        "q6_k": "q8_0",
        "q5_k": "q5_1",
        "q4_k": "q5_0",
        "iq4_xs": "iq4_nl",
        "q3_k": "iq4_nl",
        "iq3_s": "iq4_nl",
        "iq3_xxs": "iq4_nl",
        "q2_k": "iq4_nl",
        "iq2_s": "iq4_nl",
        "iq2_xs": "iq4_nl",
        "iq2_xxs": "iq4_nl",
        "tq2_0": "iq4_nl",
        "tq1_0": "iq4_nl",
        "iq1_m": "iq4_nl",
        "iq1_s": "iq4_nl",
        "nvfp4": "mxfp4",
        "q1_0": "iq4_nl",
    },
}
_PLAIN = {GGUF: "f16", ONNX: "float32", PTE: "float32"}
# Vectors (the norms) stay in float32 everywhere: a thousandth of the bytes, read at every token.
_VECTOR = {GGUF: "f32", ONNX: "float32", PTE: "float32"}


def type_names(format: str) -> list[str]:
    """The names that a recipe for this format may use, widest first."""
    return [t.name for t in _TABLE if t.format == format]


@dataclass(frozen=True)
class Limits:
    """What verification demands of an export made by a recipe."""

    mean_kl_nats: float
    greedy_tokens: int  # the same greedy text for this many tokens; 0: not demanded


@dataclass(frozen=True)
class Assignment:
    """The type one tensor gets; `reason` says why it is not the one the recipe asked for."""

    type: QuantType
    reason: str | None = None


@dataclass(frozen=True)
class Recipe:
    """Which tensor gets which type: the first matching (pattern, type) rule, else `default`."""

    name: str
    format: str
    default: str
    rules: tuple[tuple[str, str], ...]
    limits: Limits
    rounding: str | None = None  # one of ROUNDINGS; None: what its types are worth

    def resolve(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Assignment]:
        """Tensor name -> what it gets, for every name in `shapes` (rows, columns).

        Raises RecipeError for an unknown type, and for a rule that decides nothing: it names no tensor, or
        only such as rules before it have taken.
        """
        for _, type_name in (*self.rules, ("", self.default)):
            self._type(type_name)
        names = _with_places(shapes)
        self._check_rules(names)
        return {name: self._assign(name, shape, names[name]) for name, shape in shapes.items()}

    def _check_rules(self, names: dict[str, tuple[str, ...]]) -> None:
        """Every rule must decide about some tensor: name one that no rule before it has taken."""
        taken: dict[str, str] = {}  # tensor -> the rule that decides about it
        for pattern, _ in self.rules:
            named = [name for name, also in names.items() if _matches(also, pattern)]
            # A rule about the head is for untied models; it is no mistake in a recipe that serves both.
            if not named and pattern != HEAD:
                raise RecipeError(f"recipe {self.name}: '{pattern}' names none of {len(names)} tensors")
            free = [name for name in named if name not in taken]
            if named and not free:
                earlier = "', '".join(dict.fromkeys(taken[name] for name in named))
                raise RecipeError(
                    f"recipe {self.name}: two rules for one tensor: the first match wins, so '{pattern}' "
                    f"decides nothing after '{earlier}', which takes all it names "
                    f"({named[0]}, {len(named)} in all)"
                )
            taken |= dict.fromkeys(free, pattern)

    def rounding_of(self, assignments: Mapping[str, Assignment], asked: str | None = None) -> str:
        """How an export by this recipe rounds: as asked, as the recipe says, else what its types are worth.

        That is compensation when some have at most 4 bits; wider ones hardly gain from it. Without integers
        there is nothing to choose.
        """
        types = [given.type for given in assignments.values()]
        if not any(type_.bits for type_ in types):
            return NEAREST
        return asked or self.rounding or (COMPENSATED if any(t.is_narrow for t in types) else NEAREST)

    def _type(self, name: str) -> QuantType:
        found = TYPES.get((self.format, name))
        if found is None:
            raise RecipeError(
                f"recipe {self.name}: unknown {self.format} type '{name}'; "
                f"known: {', '.join(type_names(self.format))}"
            )
        return found

    def _assign(self, name: str, shape: tuple[int, ...], names: tuple[str, ...]) -> Assignment:
        if len(shape) == 1:
            return Assignment(self._type(_VECTOR[self.format]))
        asked = next((t for pattern, t in self.rules if _matches(names, pattern)), self.default)
        given = self._type(asked)
        if not given.holds(shape[1]):
            given = self._fallback(given, shape[1])
        if given.name == asked:
            return Assignment(given)
        return Assignment(
            given,
            f"{shape[1]} columns are no whole number of {asked} blocks of {self._type(asked).block_size}",
        )

    def _fallback(self, asked: QuantType, columns: int) -> QuantType:
        if asked.format != GGUF:
            smaller = [
                t
                for t in _TABLE
                if (t.format, t.bits, t.symmetric) == (asked.format, asked.bits, asked.symmetric)
                and t.block_size < asked.block_size
                and t.holds(columns)
            ]
            if smaller:
                return max(smaller, key=lambda t: t.block_size)
        elif asked.name in _FALLBACKS[GGUF]:
            next_type = self._type(_FALLBACKS[GGUF][asked.name])
            return next_type if next_type.holds(columns) else self._fallback(next_type, columns)
        return self._type(_PLAIN[asked.format])


def _with_places(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
    """Tensor name -> the names that a rule may know it by: those of the first and last layer have two."""
    layers = [int(found[1]) for name in shapes if (found := re.match(r"model\.layers\.(\d+)\.", name))]
    places = {0: "first", max(layers, default=0): "last"}
    return {
        name: (
            name,
            *(
                name.replace(f".layers.{number}.", f".layers.{place}.")
                for number, place in places.items()
                if f".layers.{number}." in name
            ),
        )
        for name in shapes
    }


def _matches(names: tuple[str, ...], pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


INT8_LIMITS = Limits(mean_kl_nats=0.005, greedy_tokens=32)
INT4_LIMITS = Limits(mean_kl_nats=0.1, greedy_tokens=0)

# Parts of a model that are worth another type than the rest (measured: docs/gguf.md). The tied matrix is read
# twice, as embedding and as head; keys and values are a few rows that everything reads; what the first and
# the last layer put into the residual stream nothing else makes good.
PARTS: dict[str, tuple[str, ...]] = {
    "tied": (EMBEDDING, HEAD),
    "kv": ("*.[kv]_proj.weight",),
    "ends": ("*.layers.first.mlp.down*", "*.layers.last.mlp.down*"),
    "edges": ("*.layers.first.*", "*.layers.last.*"),
    "down": ("*.down_proj.weight",),
}


def mixed_rules(parts: str) -> tuple[tuple[str, str], ...]:
    """Rules of a recipe in few words: 'tied q6_k, kv q5_0' gives each part of PARTS its type."""
    words = [part.split() for part in parts.split(", ")] if parts else []
    return tuple((pattern, type_name) for part, type_name in words for pattern in PARTS[part])


def _gguf_preset(name: str, body: str, parts: str, limits: Limits = INT4_LIMITS) -> Recipe:
    return Recipe(name, GGUF, body, mixed_rules(parts), limits)


# ONNX's and PTE's tied matrix has column scales, so that it needs no more bits than the body.
PRESETS: dict[tuple[str, str], Recipe] = {
    (GGUF, "int8"): _gguf_preset("int8", "q8_0", "", INT8_LIMITS),
    (GGUF, "laptop"): _gguf_preset("laptop", "q4_0", "tied q8_0, kv q8_0, ends q8_0"),
    (GGUF, "int4"): _gguf_preset("int4", "q4_0", "tied q6_k, kv q5_0, ends q5_0"),
    (GGUF, "phone"): _gguf_preset("phone", "q3_k", "tied q5_k, kv q5_0, ends q8_0, edges q4_k, down iq4_nl"),
    (GGUF, "tiny"): _gguf_preset(
        "tiny", "q2_k", "tied q5_k, kv q4_0, ends q5_0, edges q4_k", Limits(mean_kl_nats=0.3, greedy_tokens=0)
    ),
    (ONNX, "int8"): Recipe("int8", ONNX, "q8s128", (), INT8_LIMITS),
    (ONNX, "int4"): Recipe("int4", ONNX, "q4a128", (), INT4_LIMITS),
    (PTE, "int8"): Recipe("int8", PTE, "q8row", (), INT8_LIMITS),
    (PTE, "int4"): Recipe("int4", PTE, "q4s128", (), INT4_LIMITS),
}


def _default_limits(type_: QuantType) -> Limits:
    if type_.bits in (0, 8):
        return INT8_LIMITS
    return INT4_LIMITS if type_.bits >= 4 else Limits(mean_kl_nats=1.0, greedy_tokens=0)


def find_recipe(format: str, quant: str) -> Recipe:
    """A preset ('int8', 'int4'), a type's own name ('q4_k': every matrix gets it), or a .toml file.

    Raises RecipeError that lists what is known.
    """
    if format not in FORMATS:
        raise RecipeError(f"unknown format '{format}'; known: {', '.join(FORMATS)}")
    if quant.endswith(".toml"):
        return read_recipe(Path(quant), format)
    if (format, quant) in PRESETS:
        return PRESETS[format, quant]
    if (format, quant) in TYPES:
        return Recipe(quant, format, quant, (), _default_limits(TYPES[format, quant]))
    presets = [name for f, name in PRESETS if f == format]
    raise RecipeError(
        f"unknown {format} quantization '{quant}'; known: {', '.join(presets + type_names(format))}, "
        "or a recipe.toml"
    )


def read_recipe(path: Path, format: str) -> Recipe:
    """Read a recipe file:

        default = "q4_k"
        rounding = "nearest"           # optional: nearest, search or compensated
        [tensors]                      # first match wins, so exceptions come first; shell patterns over
                                       # Hugging Face names; a rule that decides nothing is refused;
                                       # "layers.first" and "layers.last" are names too
        "model.embed_tokens.weight" = "q6_k"
        [limits]                       # optional
        mean_kl_nats = 0.1
        greedy_tokens = 0

    Raises RecipeError naming the file and the key.
    """
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise RecipeError(
                f"{path}: {path.stat().st_size} bytes, but a recipe has at most {MAX_RECIPE_BYTES}"
            )
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe file") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: not readable as TOML ({error})") from None
    unknown = sorted(set(fields) - {"default", "rounding", "tensors", "limits"})
    if unknown:
        raise RecipeError(f"{path}: unknown key '{unknown[0]}'; known: default, rounding, tensors, limits")
    default, tensors = fields.get("default"), fields.get("tensors", {})
    rounding = fields.get("rounding")
    if rounding not in (None, *ROUNDINGS):
        raise RecipeError(f"{path}: rounding is {rounding!r}, but must be {' or '.join(ROUNDINGS)}")
    if not isinstance(default, str):
        raise RecipeError(f"{path}: 'default' must name a quantization type")
    if not isinstance(tensors, dict) or not all(isinstance(t, str) for t in tensors.values()):
        raise RecipeError(f"{path}: [tensors] must map patterns to type names")
    recipe = Recipe(path.stem, format, default, tuple(tensors.items()), INT4_LIMITS)
    limits = _read_limits(path, fields.get("limits", {}), _default_limits(recipe._type(default)))
    return Recipe(recipe.name, format, default, recipe.rules, limits, rounding)


def _read_limits(path: Path, fields: Any, default: Limits) -> Limits:
    known = ("mean_kl_nats", "greedy_tokens")
    if not isinstance(fields, dict) or set(fields) - set(known):
        raise RecipeError(f"{path}: [limits] has {', '.join(known)} and nothing else")
    kl, greedy = fields.get(known[0], default.mean_kl_nats), fields.get(known[1], default.greedy_tokens)
    if isinstance(kl, bool) or not isinstance(kl, int | float) or not kl > 0:
        raise RecipeError(f"{path}: mean_kl_nats is {kl!r}, but must be a number above 0")
    if isinstance(greedy, bool) or not isinstance(greedy, int) or greedy < 0:
        raise RecipeError(f"{path}: greedy_tokens is {greedy!r}, but must be a whole number from 0")
    return Limits(float(kl), greedy)
