"""Scales for a KV cache of int8: measured once on the model itself, kept beside the artifact.

A channel's scale must be known before the first token is cached. The model runs a short text of problems and
a chat with its ordinary cache; the largest key and value of each channel, and some room above, become 127.
Knows texts, extremes and scales; not graphs or sessions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fox_edge.artifact import Artifact
from fox_edge.nano.problems import generate
from fox_edge.tokenizer import Tokenizer
from runtimes.artifact_cache import cache_folder, key_of, read_record, write_record

# Tokens that are run: half of them plain text, half a chat.
CALIBRATION_TOKENS = 512
# Room above the largest value seen; a key or value beyond it is cut off.
HEADROOM = 1.5
_SCHEMA = 1
_SEED = 3
_LARGEST = 127
# Of each layer: keys and values, each (kv_heads, head_dim).
LayerPairs = Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]]


def kv_scales(artifact: Artifact, measure: Callable[[list[int]], LayerPairs], keep: bool) -> LayerPairs:
    """Scales of every layer's keys and values.

    `measure(tokens)` runs tokens and returns the largest magnitudes. With `keep`, what was measured before
    for the same files is used, and what is measured now is kept where the artifact's folder can be written.
    """
    files = {name: digest for name, digest in artifact.manifest.files.items() if name.startswith("model.")}
    made_for = {"schema": _SCHEMA, "tokens": CALIBRATION_TOKENS, "headroom": HEADROOM, "files": files}
    folder = cache_folder(artifact.path) if keep else None
    path = folder and folder / f"kv-scales-{key_of(made_for)}.json"
    fields = read_record(path) if path else None
    if fields is not None and (kept := _kept(fields)):
        return kept
    tokens = _tokens(Tokenizer.from_folder(artifact.path))
    scales = [(_scale(keys), _scale(values)) for keys, values in measure(tokens)]
    if folder and path:
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True)
            write_record(path, {"scales": [[part.tolist() for part in pair] for pair in scales]})
    return scales


def _tokens(tokenizer: Tokenizer) -> list[int]:
    problems = generate(_SEED, CALIBRATION_TOKENS // 16)
    text = "\n\n".join(f"{problem.question}\n{problem.answer}" for problem in problems)
    chat = [
        {"role": role, "content": content}
        for problem in problems
        for role, content in (("user", problem.question), ("assistant", problem.answer))
    ]
    half = CALIBRATION_TOKENS // 2
    return tokenizer.encode(text, bos=True)[:half] + tokenizer.encode_chat(chat)[:half]


def _scale(largest: NDArray[np.float32]) -> NDArray[np.float32]:
    """The step between two stored integers; a channel that was always zero may hold what others do."""
    floor = largest.max(axis=-1, keepdims=True) / _LARGEST
    return (np.maximum(np.maximum(largest, floor), 1e-6) * (HEADROOM / _LARGEST)).astype(np.float32)


def _kept(fields: dict[str, object]) -> LayerPairs | None:
    """Scales from a record; None for one that holds something else."""
    try:
        layers = np.array(fields["scales"], np.float32)
    except (KeyError, TypeError, ValueError):
        return None
    if layers.ndim != 4 or layers.shape[1] != 2 or not (np.isfinite(layers) & (layers > 0)).all():
        return None
    return [(pair[0], pair[1]) for pair in layers]
