"""A checkpoint becomes an ExecuTorch artifact: `model.pte`, run by XNNPACK on phones and laptops.

The program is built first, with stand-ins for the weights (pte_units.py, pte_program.py), then the file is
laid out (pte_file.py), then the weights stream into their places (rounding.py, pte_weights.py); no float copy
of the model ever exists. Knows the order of these steps and what the manifest says of them; not operators,
bytes, nor what verification checks.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from export.common import (
    Progress,
    Verify,
    copy_side_files,
    finish,
    make_manifest,
    needed_bytes,
    versions,
)
from export.guidance import guidance
from export.pte_tokenizer import write_runner_tokenizer
from export.rounding import Target, write_weights
from fox_edge.artifact import Artifact, ArtifactWriter, TensorRecord
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import MissingPackageError, RecipeError
from fox_edge.processors import available_cores
from fox_edge.quant import EMBEDDING, PTE, Assignment, QuantType, Recipe

MODEL_FILE = "model.pte"
# The methods of a program on one KV cache, and the positions that one call of each takes at most. `forward`'s
# is what prompts are cut into; `score`'s is small, since a program's memory is planned for the largest call
# and a row of logits has a megabyte.
FORWARD, SCORE = "forward", "score"
CHUNK, SCORE_CHUNK = 128, 16
FLOAT32, INT8 = "float32", "int8"
# Positions that a program's caches hold unless asked for others: their memory is taken when it is loaded.
DEFAULT_CONTEXT, LEAST_CONTEXT = 2048, 2


def export_pte(
    checkpoint: Checkpoint,
    target: Path,
    recipe: Recipe,
    *,
    replace: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    verify: Verify | None = None,
    rounding: str | None = None,
    calibrate: Path | None = None,
    imatrix: Path | None = None,
    context: int | None = None,
    kv: str = FLOAT32,
) -> Artifact:
    """Write the artifact folder `target`; `verify` looks at it before it gets its name.

    `rounding`, `calibrate` and `imatrix` as for the other formats. `context` is how many positions the caches
    hold (default: what the model takes, at most DEFAULT_CONTEXT), `kv` what they store: float32 or int8.
    Raises FoxEdgeError's children in one sentence; then nothing is left behind.
    """
    if recipe.format != PTE:
        raise RecipeError(f"recipe {recipe.name} is for {recipe.format}, but this is an export to {PTE}")
    _check_packages()
    context = _check_context(checkpoint, context)
    assignments = recipe.resolve(checkpoint.shapes())
    guide = guidance(checkpoint, recipe, assignments, rounding=rounding, calibrate=calibrate, imatrix=imatrix)
    made_by = versions("executorch", "torchao", "torch")
    with ArtifactWriter(target, replace) as writer:
        with _silence():
            plan = _Plan(checkpoint, assignments, context, kv)
        writer.need(plan.file.nbytes + needed_bytes(checkpoint, {}))
        model = writer.folder / MODEL_FILE
        write_weights(
            model,
            target,
            checkpoint,
            guide,
            {
                "types": {name: given.type.name for name, given in assignments.items()},
                "versions": made_by,
                "context": context,
                "kv": kv,
            },
            prepare=plan.file.begin,
            target=lambda handle: plan.target(handle, checkpoint),
            threads=threads or available_cores(),
            progress=progress,
        )
        plan.file.seal(model)
        copy_side_files(writer, checkpoint)
        write_runner_tokenizer(writer.folder)
        manifest = make_manifest(
            checkpoint,
            recipe,
            model_file=MODEL_FILE,
            tensors=plan.records(assignments),
            checkpoint_sha256=checkpoint.digest(),
            versions=made_by,
            rounding=guide.to_json(),
            pte=plan.to_json(),
        )
        return finish(writer, checkpoint, manifest, verify)


class _Plan:
    """The program of an export and where each tensor lies in its file."""

    def __init__(
        self, checkpoint: Checkpoint, assignments: Mapping[str, Assignment], context: int, kv: str
    ) -> None:
        from export.pte_file import PteFile, Table
        from export.pte_layers import COLUMN_SCALES
        from export.pte_program import build_program, fills
        from export.pte_units import UnitMaker, key_of
        from export.pte_weights import SCALE_BYTES, Stored

        config, shapes = checkpoint.config, checkpoint.shapes()
        self.context, self.kv = context, kv
        types = {name: given.type.of_row(shapes[name][-1]) for name, given in assignments.items()}
        # An untied head's rows are never looked up, so nothing is gained by bringing its columns to one size.
        self.scaled = EMBEDDING if config.tied and types[EMBEDDING].bits else None
        units = list(UnitMaker(config, types.__getitem__, self.scaled is not None).units())
        answers = _answers(checkpoint, context)
        program = build_program(config, units, types[EMBEDDING], context=context, kv=kv, answers=answers)
        keys = {name: _keys(name, type_) for name, type_ in types.items()}
        sizes = {key_of(COLUMN_SCALES): 4 * config.hidden_size} if self.scaled is not None else {}
        for name, (key, scales_key) in keys.items():
            weights = math.prod(shapes[name])
            sizes[key] = weights * (types[name].bits or 32) // 8
            if scales_key is not None:
                sizes[scales_key] = weights // types[name].block_size * SCALE_BYTES[types[name].bits]
        tables = [
            Table(fill, config.vocab_size, key)
            for fill, key in zip(fills(config, types[EMBEDDING]), keys[EMBEDDING], strict=True)
            if key is not None
        ]
        self.file = PteFile(program, sizes, tables)
        places = self.file.places
        self.factors = places.get(key_of(COLUMN_SCALES))
        self.tensors = {
            name: Stored(shapes[name], types[name], places[key], None if scales is None else places[scales])
            for name, (key, scales) in keys.items()
        }

    def target(self, handle: int, checkpoint: Checkpoint) -> Target:
        """What takes the weights of this plan."""
        from export.pte_weights import PteTarget

        return PteTarget(handle, checkpoint, self.tensors, self.scaled, self.factors)

    def records(self, assignments: Mapping[str, Assignment]) -> Iterator[TensorRecord]:
        """One record per checkpoint tensor; the tied matrix counts the factors of its columns."""
        for name, stored in self.tensors.items():
            given = assignments[name]
            size = stored.nbytes + (self.factors.nbytes if self.factors and name == self.scaled else 0)
            yield TensorRecord(name, name, stored.shape, given.type.name, size, given.reason)

    def to_json(self) -> dict[str, Any]:
        """What the manifest keeps: the program's limits, and where every weight lies."""
        embedding: dict[str, Any] = {"tensor": EMBEDDING}
        if self.factors is not None:
            embedding["column_scales_offset"] = self.factors.offset
        return {
            "context": self.context,
            "chunk": min(CHUNK, self.context),
            "score_chunk": min(SCORE_CHUNK, self.context),
            "kv": self.kv,
            "methods": [FORWARD, SCORE],
            "tensors": {name: stored.to_json() for name, stored in self.tensors.items()},
            "embedding": embedding,
        }


def _keys(name: str, type_: QuantType) -> tuple[str, str | None]:
    """What a tensor's data, and those of its scales, are called in the file until they are known."""
    from export.pte_units import key_of

    return key_of(name), f"scale_{key_of(name + '.scales')}" if type_.bits else None


def _answers(checkpoint: Checkpoint, context: int) -> dict[str, Any]:
    """What ExecuTorch's runners ask a program, and what it answers."""
    config, tokenizer = checkpoint.config, checkpoint.tokenizer()
    answers: dict[str, Any] = {
        "get_max_seq_len": min(CHUNK, context),
        "get_max_context_len": context,
        "get_vocab_size": config.vocab_size,
        "get_n_layers": config.num_layers,
        "get_eos_ids": sorted(tokenizer.stop_ids),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }
    return answers if tokenizer.bos_id is None else answers | {"get_bos_id": tokenizer.bos_id}


def _check_context(checkpoint: Checkpoint, asked: int | None) -> int:
    most = checkpoint.config.max_positions
    if asked is None:
        return min(most, DEFAULT_CONTEXT)
    if not LEAST_CONTEXT <= asked <= most:
        raise RecipeError(
            f"a context of {asked} positions was asked for, but {LEAST_CONTEXT} to {most} are possible"
        )
    return asked


@contextmanager
def _silence() -> Iterator[None]:
    """Without what torchao, torch.export and ExecuTorch have to say to their own developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _check_packages() -> None:
    for package in ("executorch", "torchao"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(package, "executorch")
