"""Ways of rounding, whatever the format: each better than the one before, told of the head's column scales,
and gone on with where it was cut off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import export.gguf
from export.gguf import export_gguf
from export.guidance import importance_of
from export.imatrix import write_imatrix
from export.rounding import Guide, Rounding
from fox_edge.artifact import Artifact
from fox_edge.calibration import MEAN_SQUARE_TOKENS, read_calibration
from fox_edge.checkpoint import Checkpoint
from fox_edge.nano.problems import held_out
from fox_edge.quant import EMBEDDING, GGUF, HEAD, Recipe, find_recipe
from runtimes.llama_cpp.gguf_file import GgufFile


def recipe(name: str) -> Recipe:
    return find_recipe(GGUF, name)


def divergence(checkpoint: Checkpoint, artifact: Artifact) -> float:
    """Mean KL of the stored weights' model, nats, on problems that are none of the calibration's."""
    text = "\n\n".join(f"Question: {p.question}\nAnswer: {p.answer}" for p in held_out(6))
    tokens = torch.tensor(checkpoint.tokenizer().encode(text, bos=True)[: checkpoint.config.max_positions])
    model = checkpoint.load_model()
    with torch.inference_mode():
        want = model(tokens[None])[0].log_softmax(-1)
        file = GgufFile(artifact)
        for name, weight in model.state_dict().items():
            rows = weight.shape[0] if weight.dim() == 2 else 1
            weight.copy_(torch.from_numpy(file.rows(name, 0, rows)).view_as(weight))
        got = model(tokens[None])[0].log_softmax(-1)
    return float((want.exp() * (want - got)).sum(-1).mean())


@pytest.mark.parametrize(
    ("which", "quant", "gain"),
    [("nano", "q3_k", 0.75), ("tiny_256", "iq3_s", 0.97), ("tiny_untied", "q4_0", 0.95)],
)
def test_each_way_of_rounding_is_better_than_the_one_before(
    which: str, quant: str, gain: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    checkpoint: Checkpoint = request.getfixturevalue(which)
    found = {}
    for how in ("nearest", "search", "compensated"):
        artifact = export_gguf(checkpoint, tmp_path / how, recipe(quant), rounding=how)
        assert artifact.manifest.recipe["rounding"] == how
        found[how] = divergence(checkpoint, artifact)
    assert found["search"] < 1.02 * found["nearest"]
    assert found["compensated"] < gain * found["search"]


def test_an_importance_matrix_is_measured_once_and_used_again(tiny_256: Checkpoint, tmp_path: Path) -> None:
    text = read_calibration(tiny_256.tokenizer(), tiny_256.config.max_positions)
    measured = importance_of(tiny_256, text.first(MEAN_SQUARE_TOKENS), None)
    write_imatrix(tmp_path / "mine.gguf", measured, tiny_256.config)
    direct = export_gguf(tiny_256, tmp_path / "direct", recipe("q2_k"), rounding="search")
    reused = export_gguf(tiny_256, tmp_path / "reused", recipe("q2_k"), imatrix=tmp_path / "mine.gguf")
    assert reused.model_path.read_bytes() == direct.model_path.read_bytes()
    assert reused.manifest.recipe["imatrix"] == "mine.gguf"
    plain = export_gguf(tiny_256, tmp_path / "plain", recipe("q2_k"), rounding="nearest")
    assert plain.model_path.read_bytes() != direct.model_path.read_bytes()


class NotingTarget:
    """Takes rows as any format does, notes the guides; the columns of its head have scales 1, 2, 3, ..."""

    def __init__(self, head: str, columns: int) -> None:
        self.head, self.scales = head, torch.arange(1.0, columns + 1)
        self.guides: dict[str, Guide] = {}

    def is_rounded(self, name: str) -> bool:
        return True

    def task_rows(self, name: str, guide: Guide) -> int:
        return 1 << 20

    def column_scales(self, name: str) -> torch.Tensor | None:
        return self.scales if name == self.head else None

    def put(
        self, name: str, start: int, rows: torch.Tensor, guide: Guide, keep: torch.Tensor | None
    ) -> torch.Tensor | None:
        self.guides[name] = guide
        return None


@pytest.mark.parametrize("tied", [True, False])
def test_the_heads_importance_is_that_of_its_columns_as_they_are_rounded(
    tied: bool, request: pytest.FixtureRequest
) -> None:
    """What was W x is rounded as (W / s) (s x): an error in column c costs s_c^2 of what it would."""
    checkpoint: Checkpoint = request.getfixturevalue("tiny" if tied else "tiny_untied")
    columns, head = checkpoint.config.hidden_size, EMBEDDING if tied else HEAD
    target = NotingTarget(head, columns)
    squares = {head: torch.full((columns,), 4.0)}
    with Rounding(checkpoint, target, 1) as work:
        work.nearest(squares)
    costs = target.scales.square()
    want = (costs / costs.mean()).clamp(min=0.01)
    assert isinstance(target.guides[head], torch.Tensor)
    torch.testing.assert_close(target.guides[head], want)
    if not tied:  # rows are looked up: every column counts alike
        torch.testing.assert_close(target.guides[EMBEDDING], torch.ones(columns))


def test_work_that_was_cut_off_goes_on_where_it_was(
    tiny_256: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = export_gguf(tiny_256, tmp_path / "whole", recipe("q4_k"))
    target, rounded = tmp_path / "out", []

    def cut_off(done: int, total: int) -> None:
        if any(tmp_path.glob(".out.unfinished/step-1.npy")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(tiny_256, target, recipe("q4_k"), progress=cut_off)
    assert not target.exists() and not any(tmp_path.glob("*.partial"))
    put = export.gguf.GgufTarget.put
    monkeypatch.setattr(
        export.gguf.GgufTarget,
        "put",
        lambda self, name, *rest: (rounded.append(name), put(self, name, *rest))[1],
    )
    again = export_gguf(tiny_256, target, recipe("q4_k"))
    assert "going on behind layer 1 of 2" in capsys.readouterr().err
    assert EMBEDDING not in rounded and not any(".layers.0.mlp" in name for name in rounded)
    assert any(".layers.1.mlp" in name for name in rounded)
    assert again.model_path.read_bytes() == whole.model_path.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def test_unfinished_work_of_another_kind_is_not_taken_up(
    tiny_256: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def cut_off(done: int, total: int) -> None:
        if any(tmp_path.glob(".out.unfinished/step-1.npy")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(tiny_256, tmp_path / "out", recipe("q4_k"), progress=cut_off)
    export_gguf(tiny_256, tmp_path / "out", recipe("q3_k"))
    assert "going on" not in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
