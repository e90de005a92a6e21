"""Which GGUF to ship: recipes by name, and what they are held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.gguf_rounding import CANDIDATES, folder_name, preset_of, ratios, recipe_text
from fox_edge.checkpoint import Checkpoint
from fox_edge.config import FoxConfig
from fox_edge.quant import EMBEDDING, GGUF, PRESETS, read_recipe

FOX = FoxConfig.fox_1()


def types_of(candidate: str, tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "candidate.toml"
    path.write_text(recipe_text(candidate), encoding="utf-8")
    given = read_recipe(path, GGUF).resolve(FOX.tensor_shapes())
    return {name: assignment.type.name for name, assignment in given.items()}


def test_a_name_is_the_recipe(tmp_path: Path) -> None:
    types = types_of("q3_k, tied q6_k, kv q5_0, ends q8_0, edges q4_k, down iq4_nl", tmp_path)
    layer = "model.layers.{}.{}.weight"
    assert types[EMBEDDING] == "q6_k"
    assert types[layer.format(7, "self_attn.k_proj")] == types[layer.format(0, "self_attn.v_proj")] == "q5_0"
    assert types[layer.format(0, "mlp.down_proj")] == types[layer.format(31, "mlp.down_proj")] == "q8_0"
    assert types[layer.format(31, "self_attn.q_proj")] == "q4_k"
    assert types[layer.format(30, "mlp.down_proj")] == "iq4_nl"
    assert types[layer.format(30, "mlp.up_proj")] == "q3_k"


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_every_candidate_serves_every_shape(candidate: str, tmp_path: Path) -> None:
    assert types_of(candidate, tmp_path)
    path = tmp_path / "candidate.toml"
    read_recipe(path, GGUF).resolve(Checkpoint.open("nano").shapes())


def test_every_preset_is_in_the_table() -> None:
    found = {preset_of(candidate) for candidate in CANDIDATES} - {None}
    assert found == {name for format, name in PRESETS if format == GGUF}
    assert len({folder_name(candidate) for candidate in CANDIDATES}) == len(CANDIDATES)


def row(size: int, kl: float, name: str) -> dict[str, Any]:
    return {
        "weight_bytes": size,
        "mean_kl_nats": kl,
        "artifact": f"peer-{name}",
        "recipe": name,
        "preset": None,
    }


def test_ours_are_held_against_the_best_that_is_no_smaller() -> None:
    peers = [
        row(99, 0.1, "A"),
        row(100, 0.4, "B"),
        row(104, 0.2, "C"),
        row(105, 0.3, "D"),
        row(150, 0.01, "E"),
    ]
    (found,) = ratios([row(100, 0.1, "mine")], peers)
    assert (found["peer"], found["bytes"], found["mean_kl"]) == ("C", 100 / 104, pytest.approx(0.5))
    (found,) = ratios([row(120, 0.1, "mine")], peers)
    assert (found["peer"], found["mean_kl"]) == ("E", pytest.approx(10))
    assert ratios([row(151, 0.1, "mine")], peers) == []
