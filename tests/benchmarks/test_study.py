"""One command for the whole report: what is missing is told before anything runs, nothing is half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import study as module
from benchmarks.report.document import FILES, read_report
from benchmarks.study import study, study_json, study_text
from fox_edge.cli import main
from fox_edge.errors import FoxEdgeError
from tests.benchmarks.conftest import NANO, Checkpoint
from tests.benchmarks.sample_report import full_result

SPEC = "torch:nano"


def measured() -> dict[str, Any]:
    """A bench of the one row that the embedded checkpoint is."""
    bench = full_result(1)
    bench["results"][0]["artifact"] = SPEC
    return bench


def never() -> dict[str, Any]:
    raise AssertionError("nothing may be measured")


@pytest.mark.parametrize(
    ("artifact", "words", "said"),
    [
        ("nowhere", {}, "nowhere: no such artifact"),
        (SPEC, {"checkpoint": "/nowhere/at/all"}, "/nowhere/at/all"),
        (SPEC, {"task": "riddles"}, "unknown task 'riddles'"),
        (SPEC, {"task": "gsm8k", "train": Path("/nowhere.jsonl"), "data": Path("/x")}, "nowhere.jsonl"),
    ],
)
def test_what_is_not_there_is_told_before_anything_is_measured(
    tmp_path: Path, artifact: str, words: dict[str, Any], said: str
) -> None:
    with pytest.raises(FoxEdgeError, match=said):
        study([artifact], tmp_path / "report", never, **words)
    assert not (tmp_path / "report").exists()


def test_a_place_that_takes_no_report_is_told_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FoxEdgeError, match="file: the report cannot be written"):
        study([SPEC], tmp_path / "file", never)


def test_a_measurement_that_fails_leaves_no_files(tmp_path: Path) -> None:
    def fails() -> dict[str, Any]:
        raise FoxEdgeError("no")

    with pytest.raises(FoxEdgeError, match="no"):
        study([SPEC], tmp_path / "report", fails)
    assert not (tmp_path / "report").exists()


def test_all_that_was_found_is_joined_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def fidelity(artifacts: list[str], **words: Any) -> dict[str, Any]:
        asked.append({"artifacts": artifacts, **words})
        row = {"artifact": SPEC, "mean_kl_nats": 0.002, "mean_kl_se_nats": 0.0001}
        return {"results": [row], "text": {"source": "t", "tokens": 64, "windows": 1}}

    def evaluate(artifacts: list[str], **words: Any) -> dict[str, Any]:
        asked.append({"artifacts": artifacts, **words})
        row = {"artifact": SPEC, "n": 4, "correct": 3, "accuracy_percent": 75.0, "ci95_percent": [30, 95]}
        return {"task": "word-problems", "description": "d", "n": 4, "results": [row]}

    monkeypatch.setattr(module, "evaluate_fidelity", fidelity)
    monkeypatch.setattr(module, "evaluate", evaluate)
    study([SPEC], tmp_path / "report", measured, checkpoint="nano", task="word-problems", limit=4, threads=1)
    assert asked[0] == {"artifacts": [SPEC], "checkpoint": "nano", "threads": 1, "session": None}
    assert (asked[1]["task"], asked[1]["limit"], asked[1]["threads"]) == ("word-problems", 4, 1)
    report = read_report(tmp_path / "report" / "report.json")
    row = report["rows"][0]
    assert (row["mean_kl_nats"], row["correct"], row["decode_tokens_per_s"]) == (0.002, 3, 9.8)
    assert {p["name"] for p in report["profiles"]} >= {"laptop", "phone-8gb", "phone-4gb", "pi5", "this"}
    assert [a["profile"] for a in report["advice"]] == [p["name"] for p in report["profiles"]]
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == sorted(FILES)


def test_what_an_export_found_of_itself_stands_in_for_fidelity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint
) -> None:
    from export.gguf import export_gguf
    from fox_edge.quant import GGUF, find_recipe

    folder = tmp_path / "small-int8"
    artifact = export_gguf(checkpoint, folder, find_recipe(GGUF, "int8"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["verification"] = {
        "mean_kl_nats": 0.004,
        "top1_agreement_percent": "a stranger's",
        "passed": True,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    bench = full_result(1)
    bench["results"][0] |= {"artifact": str(artifact.path), "format": "gguf"}
    ((_, report),) = study([artifact.path], tmp_path / "report", lambda: bench)
    row = report["rows"][0]
    assert row["mean_kl_nats"] == 0.004 and "top1_agreement_percent" not in row
    assert "as verified when each was exported" in (tmp_path / "report" / "report.html").read_text()


def two_models(tmp_path: Path, checkpoint: Checkpoint, name: str) -> tuple[str, dict[str, Any]]:
    """An export that says it was made of `name`, and a bench of it beside the embedded checkpoint."""
    from export.gguf import export_gguf
    from fox_edge.quant import GGUF, find_recipe

    folder = tmp_path / "small-int8"
    export_gguf(checkpoint, folder, find_recipe(GGUF, "int8"))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"checkpoint": name}))
    bench = full_result(2)
    bench["results"][0]["artifact"] = SPEC
    bench["results"][1] |= {"artifact": str(folder), "format": "gguf", "rank": 2}
    return str(folder), bench


def test_exports_of_two_models_get_a_report_each(tmp_path: Path, checkpoint: Checkpoint) -> None:
    folder, bench = two_models(tmp_path, checkpoint, "../owner/Small Fox")
    written = study([SPEC, folder], tmp_path / "report", lambda: bench)
    places = {w.folder.relative_to(tmp_path).as_posix(): w.report for w in written}
    assert list(places) == ["report/nano", "report/owner-Small-Fox"]
    assert [[row["artifact"] for row in report["rows"]] for report in places.values()] == [[SPEC], [folder]]
    assert [report["rows"][0]["rank"] for report in places.values()] == [1, 1]
    for w in written:
        assert read_report(w.folder / "report.json")["rows"] == w.report["rows"]
        assert sorted(p.name for p in w.folder.iterdir()) == sorted(FILES)
    assert [r["folder"] for r in study_json(written)["reports"]] == [str(w.folder) for w in written]
    assert study_json(written[:1]) is written[0].report
    assert study_text(written).count("report.html") == 2


def test_the_reports_of_two_models_are_written_all_or_none(tmp_path: Path, checkpoint: Checkpoint) -> None:
    folder, bench = two_models(tmp_path, checkpoint, "small")
    first, second = (tmp_path / "report" / name for name in ("nano", "small"))
    study([SPEC, folder], tmp_path / "report", lambda: bench)
    before = (first / "report.json").read_bytes()
    (second / "report.html").unlink()
    (second / "report.html").mkdir()
    with pytest.raises(FoxEdgeError, match=r"small/report\.html: the report cannot be written"):
        study([SPEC, folder], tmp_path / "report", lambda: bench | {"command": "another"})
    assert (first / "report.json").read_bytes() == before
    assert not [path for path in (tmp_path / "report").rglob("*") if path.name.endswith(".partial")]


def test_one_checkpoint_is_no_reference_for_two_models(tmp_path: Path, checkpoint: Checkpoint) -> None:
    folder, _ = two_models(tmp_path, checkpoint, "small")
    with pytest.raises(FoxEdgeError, match="exports of one model, but these are of 2: nano, small"):
        study([SPEC, folder], tmp_path / "report", never, checkpoint="nano")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--checkpoint", "nano"], "--checkpoint is for --report DIR, which is missing"),
        (["--task", "gsm8k"], "--task is for --report DIR, which is missing"),
        (["--report", "r", "--limit", "3"], "--limit is for --task, which is missing"),
    ],
)
def test_words_that_need_another(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(NANO)
    assert main(["bench", SPEC, *words]) == 2
    assert capsys.readouterr().err == f"fox-edge bench: {said}\n"
