"""What an export is rounded by: the way that was asked for, and what is known of each matrix's inputs.

That is calibration text, the mean squares that a run of the model over text finds, or an importance matrix
that somebody measured before. Knows recipes, texts and the model as it is; not how or when anything is
rounded (rounding.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from export.common import Progress
from fox_edge.calibration import MEAN_SQUARE_TOKENS, Calibration, read_calibration
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import RecipeError
from fox_edge.quant import EMBEDDING, HEAD, NEAREST, SEARCH, Assignment, Recipe
from fox_edge.walk import Visit, native_product, original, walk

if TYPE_CHECKING:
    from export.imatrix import Importance


@dataclass(frozen=True)
class Guidance:
    """How an export is rounded, and what it is told of the inputs."""

    rounding: str
    calibration: Calibration | None = None
    # Per matrix (C,), when they were measured before.
    mean_squares: Mapping[str, Tensor] | None = None
    imatrix: str | None = None

    def to_json(self) -> dict[str, Any]:
        """What the manifest keeps."""
        told = {"rounding": self.rounding, "calibration": self.calibration and self.calibration.to_json()}
        return told if self.imatrix is None else told | {"imatrix": self.imatrix}


def guidance(
    checkpoint: Checkpoint,
    recipe: Recipe,
    assignments: Mapping[str, Assignment],
    *,
    rounding: str | None,
    calibrate: Path | None,
    imatrix: Path | None = None,
) -> Guidance:
    """What an export of these types will be rounded by.

    `rounding` is one of quant.ROUNDINGS or None, `calibrate` a text file, `imatrix` an importance matrix of
    this model. Raises RecipeError for what does not go together, FoxEdgeError for files that will not do.
    """
    if imatrix is not None:
        return _measured(checkpoint, recipe, rounding, calibrate, imatrix)
    chosen = recipe.rounding_of(assignments, rounding)
    if chosen != NEAREST:
        text = read_calibration(checkpoint.tokenizer(), checkpoint.config.max_positions, calibrate)
        return Guidance(chosen, text.first(MEAN_SQUARE_TOKENS) if chosen == SEARCH else text)
    if calibrate is not None:
        raise RecipeError(f"{calibrate}: calibration text, but nothing of this export is rounded by it")
    return Guidance(NEAREST)


def _measured(
    checkpoint: Checkpoint, recipe: Recipe, rounding: str | None, calibrate: Path | None, imatrix: Path
) -> Guidance:
    from export.imatrix import read_imatrix

    if (rounding or recipe.rounding or SEARCH) != SEARCH:
        raise RecipeError(f"{imatrix}: an importance matrix is for {SEARCH} rounding, not for {rounding}")
    if calibrate is not None:
        raise RecipeError(f"{calibrate}: calibration text, but {imatrix} says already what text shows")
    found = read_imatrix(imatrix, checkpoint.config)
    squares = {name: torch.from_numpy(found.mean_squares(name)) for name in found.sums}
    return Guidance(SEARCH, None, squares, imatrix.name)


def mean_squares(
    checkpoint: Checkpoint, calibration: Calibration, tell: Callable[[str], None]
) -> dict[str, Tensor]:
    """Per matrix, mean squares of its columns' inputs (C,) in the model as it is.

    Of a tied matrix, what it reads as the head; of an untied embedding nothing: rows are looked up. `tell` is
    given the name of each matrix that the text has gone through.
    """
    squares: dict[str, Tensor] = {}

    def visit(name: str, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        squares[name] = inputs[0].square().mean(0)
        weights = original(checkpoint, name)
        tell(name)
        return [weights]

    hidden = walk_text(checkpoint, calibration, visit)
    squares[EMBEDDING if checkpoint.config.tied else HEAD] = hidden.square().mean(0)
    return squares


def importance_of(checkpoint: Checkpoint, calibration: Calibration, progress: Progress | None) -> Importance:
    """Sums of squares of what every matrix of a checkpoint reads on a text, the tied head's included."""
    from export.imatrix import Importance

    layers = [name for name in checkpoint.shapes() if name.startswith("model.layers.")]

    def tell(name: str) -> None:
        if progress is not None:
            progress(layers.index(name) + 1, len(layers))

    squares = mean_squares(checkpoint, calibration, tell)
    return Importance(
        sums={name: (found * calibration.tokens).numpy() for name, found in squares.items()},
        counts=dict.fromkeys(squares, calibration.tokens),
        chunk_size=calibration.windows.shape[1],
        chunk_count=len(calibration.windows),
        datasets=(calibration.source,),
        ids_sha256=calibration.sha256,
        checkpoint_sha256=checkpoint.digest(),
    )


def walk_text(checkpoint: Checkpoint, calibration: Calibration, visit: Visit) -> Tensor:
    """What the head reads (tokens, C), by a walk that begins at the checkpoint's own embedding."""
    ids, places = torch.unique(calibration.windows, return_inverse=True)
    return walk(checkpoint, embeddings(checkpoint, ids)[places][None], visit, product=native_product)[0]


def embeddings(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    """Rows of the checkpoint's embedding, float32."""
    rows = checkpoint.tensor(EMBEDDING)[ids].float()
    checkpoint.release(EMBEDDING)
    return rows
