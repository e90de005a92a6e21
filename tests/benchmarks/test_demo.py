"""The demo end to end on the embedded model, and the README's tables from what it wrote."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.demo import EXPORTS, demo
from benchmarks.readme_exports import full_shape_table
from benchmarks.readme_runs import demo_table
from fox_edge.artifact import Artifact


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    out, shown = tmp_path_factory.mktemp("demo"), []
    demo(out, problems=3, show=shown.append)
    return out, shown


def test_four_exports_are_left_verified(finished: tuple[Path, list[str]]) -> None:
    for format, quant in EXPORTS:
        manifest = Artifact.open(finished[0] / f"nano-{format}-{quant}").manifest
        assert (manifest.format, manifest.quant) == (format, quant)
        assert manifest.verification is not None and manifest.verification["passed"]
        assert manifest.verification["mean_kl_nats"] <= {"int8": 0.005, "int4": 0.1}[quant]


def test_the_report_has_every_figure_of_every_row(finished: tuple[Path, list[str]]) -> None:
    report = json.loads((finished[0] / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == [
        "GGUF int8",
        "GGUF int4",
        "ONNX int8",
        "ONNX int4",
        "PyTorch BF16",
    ]
    figures = (
        *("bytes", "load_s", "time_to_first_token_s", "prompt_tokens_per_s", "decode_tokens_per_s"),
        *("peak_rss_bytes", "mean_kl_nats", "top1_agreement_percent", "accuracy_percent"),
    )
    for row in report["rows"]:
        assert all(isinstance(row[figure], int | float) for figure in figures), row
        assert row["answer"]
        assert row["n"] == 3
    assert report["baseline"]["ours"] is False


def test_the_page_stands_alone(finished: tuple[Path, list[str]]) -> None:
    page = (finished[0] / "report.html").read_text()
    assert page.count("<svg") >= 2
    assert "src=" not in page and "@import" not in page and "http:" not in page and "https:" not in page
    assert all(link.startswith("data:") for link in re.findall(r"href=['\"]([^'\"]*)", page))
    assert "H100" in page


def test_what_is_shown(finished: tuple[Path, list[str]]) -> None:
    text = "\n".join(finished[1])
    assert "not ours: H100, BF16" in text
    assert "report.html" in text and "How many does she have left?" in text


def test_the_readme_table_of_a_report(finished: tuple[Path, list[str]]) -> None:
    table = demo_table(json.loads((finished[0] / "report.json").read_text()))
    assert table.count("\n| ") == 1 + 5 + 1  # rule, rows, the published row
    assert "not ours" in table


def test_the_readme_table_of_full_shape_results() -> None:
    machine = {"cpu": "C", "cores": 2, "memory_bytes": 24 << 30, "python": "3.11", "versions": {"torch": "2"}}
    export = {"who": "fox-edge", "artifact": "gguf-int4", "bytes": 1.1e9, "seconds": 40.0}
    run = {"who": "llama-bench", "artifact": "peer-Q4_0.gguf", "prompt_tokens_per_s": 170.4}
    results = {
        "prompt_tokens": 234,
        "machine": machine,
        "peers": {"onnxruntime-genai": "0.18.0"},
        "exports": [export | {"peak_anonymous_bytes": 3e8, "peak_rss_bytes": 1.2e9}],
        "runs": [run | {"decode_tokens_per_s": 32.5, "peak_rss_bytes": 1.7e9}],
        "ratios": [{"what": "GGUF int4 export, wall", "ratio": 0.55}],
    }
    table = full_shape_table(results)
    assert "| **fox-edge** gguf-int4 | 1,100 | 40.0 | 300 | 1,200 |" in table
    assert "| llama-bench Q4_0.gguf | 170 | 32.5 | 1,700 |" in table
    assert "| GGUF int4 export, wall | 0.55 |" in table
