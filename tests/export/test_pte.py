"""The ExecuTorch export: the program computes the reference on one copy of the tied matrix."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.pte import export_pte
from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.cli import main
from fox_edge.errors import ArtifactError, MissingPackageError, RecipeError
from fox_edge.model import Fox
from fox_edge.pte_format import PteProgram, read_program
from fox_edge.quant import EMBEDDING, INT8_LIMITS, PTE, Recipe, find_recipe
from runtimes.base import SessionOptions
from runtimes.executorch.session import PteSession
from runtimes.executorch.weights import read_places
from tests.helpers import TINY, make_checkpoint

TOKENS = [int(t) for t in np.random.default_rng(3).integers(0, TINY.vocab_size, 70)]


# Without rounded weights.
PLAIN = Recipe("plain", PTE, "float32", (), INT8_LIMITS)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """An untied model in which each of two key/value heads has three query heads."""
    config, folder = replace(TINY, num_heads=6, num_kv_heads=2), tmp_path_factory.mktemp("checkpoints")
    return Checkpoint.open(make_checkpoint(folder / "untied", config, tied=False, gemma=False))


@pytest.fixture(scope="module")
def plain(untied: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """That model, its cache in int8."""
    target = tmp_path_factory.mktemp("artifacts") / "plain-pte"
    return export_pte(untied, target, PLAIN, kv="int8", context=96)


@pytest.fixture
def copy(tiny_pte: Artifact, tmp_path: Path) -> Artifact:
    """A copy to be damaged."""
    shutil.copytree(tiny_pte.path, tmp_path / "copy")
    return Artifact.open(tmp_path / "copy")


def logits_of(artifact: Artifact, tokens: list[int] = TOKENS) -> np.ndarray:
    session = PteSession(artifact, SessionOptions(threads=1))
    try:
        return np.concatenate(list(session.score(tokens)))
    finally:
        session.close()


def reference(model: Fox, tokens: list[int] = TOKENS) -> np.ndarray:
    with torch.inference_mode():
        logits: np.ndarray = model(torch.tensor([tokens]))[0].numpy()
    return logits


def as_stored(artifact: Artifact, checkpoint: Checkpoint) -> Fox:
    """The reference model with the weights that the file holds."""
    places, model = read_places(artifact, program_of(artifact)), Fox(checkpoint.config)
    data = artifact.model_path.read_bytes()
    weights = {
        name: torch.from_numpy(place.decode(data, 0, place.rows)).reshape(checkpoint.shapes()[name])
        for name, place in places.items()
    }
    model.load_state_dict(weights)
    return model.eval()


def program_of(artifact: Artifact) -> PteProgram:
    return read_program(artifact.model_path)


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Root mean square of the difference over that of what is wanted."""
    return float(np.sqrt(np.square(found - wanted).mean() / np.square(wanted).mean()))


def test_a_program_of_whole_numbers_computes_what_its_weights_say(
    tiny_pte: Artifact, tiny: Checkpoint
) -> None:
    """Only activations are rounded beyond what the file holds."""
    assert error(logits_of(tiny_pte), reference(as_stored(tiny_pte, tiny))) < 0.03


def test_a_program_of_floats_computes_the_reference(plain: Artifact, untied: Checkpoint) -> None:
    """Only the cache is rounded."""
    assert error(logits_of(plain), reference(untied.load_model())) < 0.01


@pytest.mark.parametrize("name", ["tiny_pte", "plain"])
def test_a_prompt_in_any_chunks_ends_in_the_same_logits(name: str, request: pytest.FixtureRequest) -> None:
    artifact: Artifact = request.getfixturevalue(name)
    rows = logits_of(artifact)
    session = PteSession(artifact, SessionOptions(threads=1))
    try:
        assert error(session.prefill(TOKENS), rows[-1]) < 0.01
        session.truncate(5)
        session.prefill(TOKENS[5:23])
        for token in TOKENS[23:31]:
            last = session.step(token)
        assert error(last, rows[30]) < 0.01
    finally:
        session.close()


def test_a_lone_token_attends_as_it_would_among_others(untied: Checkpoint, tmp_path: Path) -> None:
    """In floats nothing hides a difference. The first tokens' heads do not look together yet."""
    artifact = export_pte(untied, tmp_path / "pte", PLAIN, context=16)
    rows = logits_of(artifact, TOKENS[:12])
    assert error(rows, reference(untied.load_model(), TOKENS[:12])) < 1e-5
    session = PteSession(artifact, SessionOptions(threads=1))
    try:
        steps = np.stack([session.step(token) for token in TOKENS[:12]])
    finally:
        session.close()
    assert error(steps, rows) < 1e-5


def test_head_and_lookup_read_the_same_bytes(copy: Artifact, tiny: Checkpoint) -> None:
    """The tied matrix is in the file once, and what is changed there changes for both."""
    data = bytearray(copy.model_path.read_bytes())
    told = (copy.manifest.pte or {})["tensors"][EMBEDDING]
    row_bytes = told["columns"] // 2
    token = 77
    at = told["offset"] + token * row_bytes
    assert data.count(bytes(data[at : at + row_bytes])) == 1
    others = [t for t in TOKENS if t != token][:20]
    before, looked_up = logits_of(copy, others), logits_of(copy, [token])
    data[at : at + row_bytes] = bytes(0xFF - byte for byte in data[at : at + row_bytes])
    copy.model_path.write_bytes(data)
    after, looked_up_after = logits_of(copy, others), logits_of(copy, [token])
    changed = np.flatnonzero(np.abs(after - before).max(0) > 1e-3)
    assert changed.tolist() == [token]
    assert error(looked_up_after, looked_up) > 0.1
    assert error(looked_up_after, reference(as_stored(copy, tiny), [token])) < 0.03


def test_the_program_itself_says_that_the_bytes_are_the_same(tiny_pte: Artifact) -> None:
    program, told = program_of(tiny_pte), (tiny_pte.manifest.pte or {})["tensors"][EMBEDDING]
    named = {region.offset for region in program.named.values()}
    for name in ("forward", "score"):
        constants = {t.constant for t in program.methods[name].tensors if t.constant is not None}
        assert {told["offset"], told["scales_offset"]} <= constants & named


def test_weights_are_named_by_their_digests(tiny_pte: Artifact) -> None:
    data, program = tiny_pte.model_path.read_bytes(), program_of(tiny_pte)
    for key, region in program.named.items():
        digest = hashlib.sha256(data[region.offset : region.offset + region.bytes]).hexdigest()
        assert key.removeprefix("scale_") == digest
    assert len(program.named) >= 7 * 2 * TINY.num_layers


def test_the_file_is_hardly_larger_than_its_weights(tiny_pte: Artifact) -> None:
    manifest = tiny_pte.manifest
    # Per method a table of some kilobytes, per layer a delegate's payload of 8 KB.
    assert tiny_pte.model_path.stat().st_size < manifest.weight_bytes + 120_000
    types = {record.name: record.type for record in manifest.tensors}
    assert types[EMBEDDING] == "q4s32" and types["model.layers.1.mlp.up_proj.weight"] == "float32"


def test_the_program_answers_what_runners_ask(tiny_pte: Artifact, plain: Artifact, tiny: Checkpoint) -> None:
    program, tokenizer = program_of(tiny_pte), tiny.tokenizer()
    assert program.constant("get_vocab_size") == TINY.vocab_size
    assert program.constant("get_max_context_len") == TINY.max_positions
    assert program.constant("get_max_seq_len") == 128
    assert program.constant("get_bos_id") == tokenizer.bos_id
    eos = program.constant("get_eos_ids")
    assert ({eos} if isinstance(eos, int) else set(eos)) == set(tokenizer.stop_ids)
    assert program.constant("use_kv_cache") is True
    assert program_of(plain).constant("get_max_context_len") == 96


def bad_calls() -> Iterator[tuple[dict[str, object], str]]:
    yield {"context": 257}, "a context of 257 positions was asked for, but 2 to 256 are possible"
    yield {"context": 1}, "a context of 1 positions was asked for, but 2 to 256 are possible"
    yield {"recipe": find_recipe("onnx", "int4")}, "recipe int4 is for onnx, but this is an export to pte"


@pytest.mark.parametrize(("change", "sentence"), bad_calls())
def test_what_cannot_be_exported(
    change: dict[str, object], sentence: str, tiny: Checkpoint, tmp_path: Path
) -> None:
    fields = {"recipe": find_recipe(PTE, "int8"), **change}
    with pytest.raises(RecipeError, match=sentence):
        export_pte(tiny, tmp_path / "out", **fields)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_its_extra(
    tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else find(name, *rest)
    )
    with pytest.raises(MissingPackageError, match=r"torchao is not installed.*fox-edge\[executorch\]"):
        export_pte(tiny, tmp_path / "out", find_recipe(PTE, "int8"))


def test_an_existing_target_is_refused_before_any_work(tiny: Checkpoint, tiny_pte: Artifact) -> None:
    with pytest.raises(ArtifactError, match="exists already"):
        export_pte(tiny, tiny_pte.path, find_recipe(PTE, "int8"))


@pytest.mark.parametrize("flag", [("--context", "64"), ("--kv", "int8")])
def test_flags_of_this_format_alone(
    flag: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "nano", str(tmp_path / "out"), "--format", "gguf", *flag]) == 2
    assert f"{flag[0]} is for --format pte, not gguf" in capsys.readouterr().err


def test_the_lines_of_the_docs_read_a_row(tiny_pte: Artifact, tiny: Checkpoint) -> None:
    text = (Path(__file__).parents[2] / "docs" / "pte.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert lines.count("\n") <= 35
    found: dict[str, Any] = {}
    exec(compile(lines, "docs/pte.md", "exec"), found)
    wanted = as_stored(tiny_pte, tiny).model.embed_tokens.weight.detach().numpy()
    for token in (0, 5, TINY.vocab_size - 1):
        assert np.allclose(found["embedding_row"](tiny_pte.path, token), wanted[token], rtol=1e-6, atol=0)
