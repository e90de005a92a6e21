"""The table of types against gguf-py's, and recipes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import pytest

from fox_edge.config import FoxConfig
from fox_edge.errors import RecipeError
from fox_edge.quant import (
    EMBEDDING,
    GGUF,
    HEAD,
    ONNX,
    PRESETS,
    TYPES,
    Limits,
    Recipe,
    find_recipe,
    read_recipe,
    type_names,
)
from tests.helpers import TINY, TINY_256

FOX = FoxConfig.fox_1()
Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


@pytest.mark.parametrize("name", type_names(GGUF))
def test_gguf_blocks_are_ggufs(name: str) -> None:
    ours = TYPES[GGUF, name]
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
    assert (ours.block_size, ours.block_bits) == (block, 8 * size)
    assert ours.row_bytes(Q, 4 * block) == 4 * size


@pytest.mark.parametrize(
    ("name", "bits_per_weight", "row"),
    [
        ("q4s32", 5.0, 2048 // 2 + 4 * 64),
        ("q4s128", 4.25, 2048 // 2 + 4 * 16),
        ("q4a128", 4.28125, 2048 // 2 + 4 * 16 + 8),
        ("q8s128", 8.25, 2048 + 4 * 16),
        ("q8a32", 9.25, 2048 + 4 * 64 + 64),
        ("float32", 32, 4 * 2048),
    ],
)
def test_onnx_bits_by_hand(name: str, bits_per_weight: float, row: int) -> None:
    assert TYPES[ONNX, name].bits_per_weight == bits_per_weight
    assert TYPES[ONNX, name].row_bytes(Q, 2048) == row


def test_row_that_is_no_whole_number_of_blocks() -> None:
    with pytest.raises(RecipeError, match=rf"{Q}: a row of 100 weights .* q4_k blocks of 256"):
        TYPES[GGUF, "q4_k"].row_bytes(Q, 100)


@pytest.mark.parametrize(("format", "name"), PRESETS)
def test_presets_fit_fox(format: str, name: str) -> None:
    given = PRESETS[format, name].resolve(FOX.tensor_shapes())
    assert set(given) == set(FOX.tensor_shapes())
    assert all(a.reason is None for a in given.values())
    vector = "f32" if format == GGUF else "float32"
    assert {a.type.name for n, a in given.items() if "norm" in n} == {vector}


def test_ggufs_int4_keeps_the_tied_matrix_wider() -> None:
    given = PRESETS[GGUF, "int4"].resolve(FOX.tensor_shapes())
    assert given[EMBEDDING].type.name == "q6_k" and given[Q].type.name == "q4_0"
    untied = dataclasses.replace(FOX, tied=False)
    assert PRESETS[GGUF, "int4"].resolve(untied.tensor_shapes())[HEAD].type.name == "q6_k"
    onnx = PRESETS[ONNX, "int4"].resolve(FOX.tensor_shapes())
    assert onnx[EMBEDDING].type.name == onnx[Q].type.name == "q4a128"


def test_only_narrow_types_are_worth_more_than_the_nearest_unless_asked() -> None:
    shapes = FOX.tensor_shapes()
    for quant, want in (("int4", "compensated"), ("q2s32", "compensated"), ("int8", "nearest")):
        recipe = find_recipe(ONNX, quant)
        assert recipe.rounding_of(recipe.resolve(shapes)) == want
        assert recipe.rounding_of(recipe.resolve(shapes), "search") == "search"
    floats = find_recipe(GGUF, "bf16")
    assert floats.rounding_of(floats.resolve(shapes), "compensated") == "nearest"
    mixed = dataclasses.replace(find_recipe(ONNX, "int8"), rules=((Q, "q4a32"),), rounding="search")
    assert mixed.rounding_of(mixed.resolve(shapes)) == "search"
    assert mixed.rounding_of(mixed.resolve(shapes), "nearest") == "nearest"


@pytest.mark.parametrize(
    ("format", "asked", "columns", "given"),
    [
        (GGUF, "q4_k", 256, "q4_k"),
        (GGUF, "q4_k", 96, "q5_0"),
        (GGUF, "q5_k", 96, "q5_1"),
        (GGUF, "q6_k", 96, "q8_0"),
        (GGUF, "iq4_xs", 96, "iq4_nl"),
        (GGUF, "q2_k", 96, "iq4_nl"),
        (GGUF, "q4_k", 100, "f16"),
        (GGUF, "q8_0", 100, "f16"),
        (GGUF, "bf16", 100, "bf16"),
        (ONNX, "q4a128", 256, "q4a128"),
        (ONNX, "q4a128", 96, "q4a32"),
        (ONNX, "q8s128", 208, "q8s16"),
        (ONNX, "q4s128", 100, "float32"),
    ],
)
def test_fallbacks(format: str, asked: str, columns: int, given: str) -> None:
    assignment = find_recipe(format, asked).resolve({Q: (64, columns)})[Q]
    assert assignment.type.name == given
    assert (assignment.reason is None) == (asked == given)
    if assignment.reason is not None:
        assert str(columns) in assignment.reason and asked in assignment.reason


@pytest.mark.parametrize("format", [GGUF, ONNX])
def test_every_type_gives_every_tensor_something_that_holds_it(format: str) -> None:
    for name in type_names(format):
        for config in (TINY, TINY_256, dataclasses.replace(TINY, hidden_size=50, tied=False)):
            shapes = config.tensor_shapes()
            given = find_recipe(format, name).resolve(shapes)
            assert all(a.type.holds(shapes[n][-1]) for n, a in given.items())


def test_the_first_and_the_last_layer_have_names() -> None:
    rules = (("*.layers.first.*", "q8_0"), ("*.layers.last.mlp.*", "q6_k"), ("*.layers.30.*", "q5_k"))
    given = Recipe("r", GGUF, "q4_k", rules, Limits(1, 0)).resolve(FOX.tensor_shapes())
    types = {n: given[f"model.layers.{n}.mlp.down_proj.weight"].type.name for n in (0, 1, 30, 31)}
    assert types == {0: "q8_0", 1: "q4_k", 30: "q5_k", 31: "q6_k"}
    assert given["model.layers.31.self_attn.q_proj.weight"].type.name == "q4_k"


def test_first_rule_wins() -> None:
    recipe = Recipe("r", GGUF, "q4_k", (("*.layers.0.*q_proj*", "q8_0"), ("*q_proj*", "q6_k")), Limits(1, 0))
    given = recipe.resolve(FOX.tensor_shapes())
    assert given[Q].type.name == "q8_0"
    assert given[Q.replace("0", "1", 1)].type.name == "q6_k"
    assert given[EMBEDDING].type.name == "q4_k"


def test_rule_that_names_nothing() -> None:
    recipe = Recipe("r", GGUF, "q4_k", (("model.layer.*", "q8_0"),), Limits(1, 0))
    with pytest.raises(RecipeError, match=r"'model\.layer\.\*' names none of (the )?290 tensors"):
        recipe.resolve(FOX.tensor_shapes())


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        # The same tensor twice, by its name.
        (((Q, "q8_0"), (Q, "q6_k")), rf"'{Q}' decides nothing after '{Q}'.* \(.*q_proj\.weight, 1 in all"),
        # An exception behind the pattern that swallows it.
        ((("*q_proj*", "q8_0"), ("*.layers.0.*q_proj*", "q6_k")), r"after '\*q_proj\*', which takes all"),
        # The same type does not make a rule that decides nothing any less of a mistake.
        ((("*", "q8_0"), (EMBEDDING, "q8_0")), r"after '\*'"),
        # No single rule takes all of its tensors, but two together do.
        ((("*q_proj*", "q8_0"), ("*k_proj*", "q6_k"), ("*[qk]_proj*", "q5_k")), r"after '\*q_proj\*', '\*k_"),
    ],
)
def test_a_second_rule_for_the_same_tensors(rules: tuple[tuple[str, str], ...], words: str) -> None:
    with pytest.raises(RecipeError, match=words) as error:
        Recipe("r", GGUF, "q4_k", rules, Limits(1, 0)).resolve(FOX.tensor_shapes())
    assert "two rules for one tensor" in str(error.value) and "\n" not in str(error.value)


def test_rules_that_overlap_and_each_decide_something() -> None:
    rules = ((EMBEDDING, "q6_k"), ("*.layers.0.*", "q8_0"), ("*q_proj*", "q5_k"), (HEAD, "q6_k"))
    given = Recipe("r", GGUF, "q4_k", rules, Limits(1, 0)).resolve(FOX.tensor_shapes())
    assert given[Q].type.name == "q8_0" and given[Q.replace("0", "1", 1)].type.name == "q5_k"


def test_the_same_pattern_twice_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(
        'default = "q4_k"\n[tensors]\n"*q_proj*" = "q8_0"\n"*q_proj*" = "q6_k"\n'
    )
    with pytest.raises(RecipeError, match=r"r\.toml: not readable as TOML \(Cannot overwrite a value"):
        read_recipe(tmp_path / "r.toml", GGUF)


@pytest.mark.parametrize("format", [GGUF, ONNX])
def test_unknown_names_list_the_known(format: str) -> None:
    with pytest.raises(RecipeError) as error:
        find_recipe(format, "q4_km")
    for known in ("int8", "int4", "recipe.toml", *type_names(format)):
        assert known in str(error.value)
    recipe = Recipe("r", format, "int9", (), Limits(1, 0))
    with pytest.raises(RecipeError, match=r"unknown .* type 'int9'; known: "):
        recipe.resolve(TINY.tensor_shapes())


def test_types_of_the_other_format_are_unknown() -> None:
    with pytest.raises(RecipeError, match="unknown gguf quantization 'q4s32'"):
        find_recipe(GGUF, "q4s32")
    with pytest.raises(RecipeError, match="unknown format 'pdf'; known: gguf, onnx"):
        find_recipe("pdf", "int4")


def test_limits_follow_the_width() -> None:
    assert find_recipe(GGUF, "int8").limits == find_recipe(GGUF, "q8_0").limits == Limits(0.005, 32)
    assert find_recipe(GGUF, "q4_0").limits == Limits(0.1, 0)
    assert find_recipe(GGUF, "q2_k").limits.mean_kl_nats > 0.1


RECIPE = """
default = "q4_k"
[tensors]
"model.embed_tokens.weight" = "q6_k"
"*down_proj*" = "q5_k"
[limits]
mean_kl_nats = 0.05
"""


def test_recipe_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(RECIPE)
    recipe = find_recipe(GGUF, str(path))
    assert recipe.name == "mine" and recipe.limits == Limits(0.05, 0)
    given = recipe.resolve(FOX.tensor_shapes())
    assert given[EMBEDDING].type.name == "q6_k"
    assert given["model.layers.9.mlp.down_proj.weight"].type.name == "q5_k"
    assert given[Q].type.name == "q4_k"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("default = ", "not readable as TOML"),
        ("[tensors]\n", "'default' must name"),
        ("default = 4", "'default' must name"),
        ('default = "q4_k"\nlimit = 1', "unknown key 'limit'"),
        ('default = "q4_k"\n[tensors]\nx = 4', "must map patterns to type names"),
        ('default = "q4_k"\ntensors = 4', "must map patterns to type names"),
        ('default = "nope"', "unknown gguf type 'nope'; known: f32"),
        ('default = "q4_k"\n[limits]\nkl = 1', "mean_kl_nats, greedy_tokens and nothing else"),
        ('default = "q4_k"\n[limits]\nmean_kl_nats = 0', "must be a number above 0"),
        ('default = "q4_k"\n[limits]\nmean_kl_nats = nan', "must be a number above 0"),
        ('default = "q4_k"\n[limits]\nmean_kl_nats = true', "must be a number above 0"),
        ('default = "q4_k"\n[limits]\ngreedy_tokens = -1', "whole number from 0"),
    ],
)
def test_damaged_recipe(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=words):
        read_recipe(path, GGUF)


def test_missing_and_huge_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe file"):
        find_recipe(GGUF, str(tmp_path / "none.toml"))
    (tmp_path / "big.toml").write_bytes(b"#" * (1 << 21))
    with pytest.raises(RecipeError, match=f"{1 << 21} bytes"):
        find_recipe(GGUF, str(tmp_path / "big.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(RecipeError, match="not readable"):
        find_recipe(GGUF, str(tmp_path / "folder.toml"))


def test_a_recipe_says_how_to_round(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('default = "q4a32"\nrounding = "search"\n')
    recipe = read_recipe(path, ONNX)
    assert recipe.rounding_of(recipe.resolve(FOX.tensor_shapes())) == "search"
    path.write_text('default = "q4a32"\nrounding = "up"\n')
    with pytest.raises(RecipeError, match="rounding is 'up', but must be nearest or search or compensated"):
        read_recipe(path, ONNX)
    path.write_text('default = "q4_k"\nrounding = "search"\n')
    assert read_recipe(path, GGUF).rounding == "search"
