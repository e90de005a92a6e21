"""The report as a reader gets it: well formed, self-contained, escaped, complete, narrow on a terminal."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmarks.common.table import WIDTH, Column, render
from benchmarks.report.document import FILES, make_report, need_folder, read_report, report_text, write_report
from benchmarks.report.figures import COLUMNS, short_names
from benchmarks.report.findings import findings
from benchmarks.report.markdown import report_markdown
from benchmarks.report.page import report_html
from fox_edge.errors import FoxEdgeError
from tests.benchmarks.sample_report import (
    NAMES,
    PROFILES,
    answers,
    bench_result,
    evaluation,
    fidelity,
    full_evaluation,
    full_fidelity,
    full_result,
)

VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Checks that tags close in order; collects text, attributes and table rows."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if ("td" in self.open or "th" in self.open) and "small" not in self.open:
            self.rows[-1][-1] += data


@pytest.fixture
def report():
    """What an early bench, verification and eval found of nano."""
    return make_report(
        bench_result(),
        checkpoint="nano",
        names=NAMES,
        fidelity=fidelity(),
        evaluations=[evaluation()],
        answers=answers(),
        question="How many apples are left?",
        commands=["fox-edge demo --out out"],
    )


@pytest.fixture
def full():
    """Everything that schema 2 holds, at Fox-1's shape."""
    return make_report(
        full_result(),
        checkpoint="tensoropera/Fox-1-1.6B",
        fidelity=full_fidelity(),
        evaluations=[full_evaluation()],
        profiles=PROFILES,
    )


def test_rows_are_joined_by_artifact(report):
    row = json.loads(json.dumps(report))["rows"][2]
    assert (row["name"], row["artifact"]) == ("GGUF int4", "out/gguf-int4")
    assert row["mean_kl_nats"] == 1.4e-3
    assert (row["correct"], row["n"], row["accuracy_percent"]) == (31, 50, 62.0)
    assert row["answer"].endswith("#### 19")
    assert report["schema"] == 2


def test_a_fidelity_result_and_paired_answers_are_joined_too(full):
    row = full["rows"][3]
    assert row["name"] == "gguf-phone"
    assert (row["mean_kl_nats"], row["mean_kl_se_nats"]) == (9.7e-3, pytest.approx(3.88e-4))
    assert len(row["curve"]) == 8 and full["text"]["tokens"] == 8192
    asked = row["tasks"][0]
    assert (asked["task"], asked["correct"], asked["paired"]["verdict"]) == ("gsm8k", 33, "not told apart")
    assert asked["answers"][32:34] == [{"expected": "32", "right": True}, {"expected": "33", "right": False}]
    assert full["tasks"] == [{"task": "gsm8k", "description": "GSM8K, 5-shot, greedy", "n": 100}]
    assert [a["profile"] for a in full["advice"]] == ["phone-8gb", "phone-4gb", "pi5", "this"]


def test_two_tasks_and_one_that_failed_stand_side_by_side():
    failed = {"task": "other", "results": [{"artifact": "out/gguf-int8", "error": "killed by SIGKILL"}]}
    report = make_report(full_result(), checkpoint=None, evaluations=[full_evaluation(), failed])
    row = report["rows"][1]
    assert [t["task"] for t in row["tasks"]] == ["gsm8k", "other"]
    assert row["accuracy_percent"] == 35 and row["tasks"][1]["error"] == "killed by SIGKILL"
    assert [t["task"] for t in report["rows"][2]["tasks"]] == ["gsm8k"]
    assert "killed by SIGKILL" in report_markdown(report)
    Page(report_html(report))


def test_names_are_as_short_as_tells_them_apart():
    assert short_names(["out/a/int8", "out/b/int8", "out/b/int4", "torch:nano"]) == {
        "out/a/int8": "a/int8",
        "out/b/int8": "b/int8",
        "out/b/int4": "int4",
        "torch:nano": "torch:nano",
    }
    assert short_names(["int8", "out/int8", "x/x", "/"]) == {
        "int8": "int8",
        "out/int8": "out/int8",
        "x/x": "x",
        "/": "/",
    }


def test_rows_for_several_users_are_told_apart_and_stand_once_in_the_front():
    bench = full_result(2)
    bench["results"].append({**bench["results"][1], "users": 4, "decode_tokens_per_s": 9.0})
    bench["settings"]["users"] = [1, 4]
    report = make_report(bench, checkpoint="fox", fidelity=full_fidelity(2), profiles=PROFILES)
    assert [r["name"] for r in report["rows"]] == ["torch:fox", "gguf-int8", "gguf-int8, 4 users"]
    html = report_html(report)
    front = html[html.index("Quality for size") : html.index("Speed against the ceiling")]
    assert front.count("<circle") == 1
    assert "1 and 4 users at once" in html
    assert "22.8 tok/s (measured)" in report["advice"][3]["sentence"]


def test_the_page_is_well_formed_and_complete(report):
    page = Page(report_html(report))
    text = "".join(page.texts)
    heading, *rows, published = page.rows
    assert len(heading) == len(COLUMNS) == 14
    assert [row[0] for row in rows] == list(NAMES.values())
    assert rows[2][1:7] == ["5.2", "6.34", "0.31", "42", "9,900", "1,100.0"]
    assert rows[2][7:] == ["–", "5.0", "–", "80", "0.0014", "98.7", "62"]
    assert published[0] == "Fox-1 1.6B BF16, H100not ours"
    assert (published[1], published[6], published[10]) == ("–", "over 200.0", "3,703")
    for said in (
        "How many apples are left?",
        "fox-edge demo --out out",
        "140 GB/s from 4 MiB",
        "torch 2.13.0",
        "1,034.0 to 1,133.0",
        "52 to 78",
    ):
        assert said in text


def test_the_full_page_has_conditions_ranks_ratios_caps_and_devices(full):
    page = Page(report_html(full))
    text = "".join(page.texts)
    by_name = {row[0]: row for row in page.rows if len(row) == 14}
    assert by_name["gguf-phone"][7:10] == ["1 =", "91.0", "0.16"]
    assert by_name["gguf-laptop"][7] == "3"
    for said in (
        "governor performance",
        "clock 3.4 to 3.3 GHz",
        "temperature 41 to 63 °C",
        "1.4 % between equal pieces of work: quiet",
        "page cache warm",
        "workload paper",
        "8,192 tokens in 4 windows of a <text>",
        "728 billion bf16 operations/s",
        "phone-4gb: 1,500 MB",
        "Projected, not measured",
        "235 MB too much",
        "11 % · worse",
        "30.8 / 34.5 / 49.2 ms",
        "Caps far beyond the right edge: this 16,000 MB.",
    ):
        assert said in text, said
    assert "noisy" not in text
    full["conditions"] |= {"noisy": True, "noise_percent": 31.0}
    assert "took times 31 % apart" in report_html(full)


def test_nothing_projected_stands_in_a_figure_of_measurements(full):
    html = report_html(full)
    figures = re.findall(r"<figure>.*?</figure>", html, re.DOTALL)
    projected = [f for f in figures if "class='projected'" in f or 'class="projected"' in f]
    assert len(figures) == 9 and len(projected) == 3
    for figure in projected:
        assert not re.search(r'<rect[^>]*class="is-', figure)
        assert "not measured" in figure and "Computed from" in figure


@pytest.mark.parametrize("count", [1, 2, 12])
def test_any_number_of_rows(count):
    report = make_report(
        full_result(count),
        checkpoint="fox",
        fidelity=full_fidelity(count),
        evaluations=[full_evaluation(count)],
        profiles=PROFILES,
    )
    page = Page(report_html(report))
    assert len([row for row in page.rows if len(row) == 14]) == count + 2
    assert report_markdown(report).count("gsm8k") >= count
    assert len(report_text(report).splitlines()) > count


def test_no_rows_at_all():
    report = make_report(full_result(0), checkpoint=None, profiles=PROFILES)
    Page(report_html(report))
    assert report["advice"][0]["sentence"] == "No export was measured, so there is none to ship."
    assert report_markdown(report).startswith("# Artifacts, exported and measured")


def test_the_page_asks_nothing_from_outside_and_runs_nothing(full):
    html = report_html(full)
    page = Page(html)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#hatch)", html)
    assert not {"script", "img", "iframe"} & {tag for tag, _, _ in page.attributes}
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert value == "data:,"
    assert "default-src 'none'" in html


def spoiled(value, bad):
    """The same record with every text replaced."""
    if isinstance(value, str):
        return bad
    if isinstance(value, dict):
        return {k: v if k in ("format", "created") else spoiled(v, bad) for k, v in value.items()}
    return [spoiled(v, bad) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "bad", ["<script>alert('x')</script>\"&", "]]></style></svg><img src=x onerror=y>", "a|b`c`[d](e)\n# f"]
)
def test_whatever_any_text_says_is_escaped(full, report, bad):
    for record in (spoiled(full, bad), spoiled(report, bad)):
        html = report_html(record)
        page = Page(html)
        assert not {"script", "img"} & {tag for tag, _, _ in page.attributes}
        assert html.count("</style>") == 1
        markdown = report_markdown(record)
        fence = re.search(r"^(`{3,})\n.*?^\1$", markdown, re.DOTALL | re.MULTILINE)
        outside = markdown.replace(fence[0], "") if fence else markdown
        assert not re.search(r"(?<!\\)[<\[]", outside)
        assert len(re.findall("^# ", outside, re.MULTILINE)) == 1
        table = [line for line in outside.splitlines() if line.startswith("|")]
        cells = [len(re.findall(r"(?<!\\)\|", line)) - 1 for line in table]
        assert cells[0] == 14 and set(cells) <= {14, 5, 2, len(PROFILES) + 1}


def test_texts_that_no_file_could_hold_are_made_fit():
    bench = bench_result()
    bench["results"][0]["artifact"] = "torch:\udcff\x1b[31mx"
    report = make_report(bench, checkpoint=None)
    assert report["rows"][0]["artifact"] == "torch:��[31mx"
    report_html(report).encode()


def test_missing_figures_are_dashes_and_failed_rows_say_why(report):
    first, second = report["rows"][:2]
    report["rows"] = [
        {"artifact": "a", "name": first["name"], "format": "torch", "error": "killed by SIGKILL"},
        {"artifact": "b", "name": second["name"], "format": "gguf", "bytes": None, "mean_kl_nats": None},
    ]
    page = Page(report_html(report))
    assert page.rows[1] == ["PyTorch BF16", "killed by SIGKILL"]
    assert page.rows[2] == ["GGUF int8", *["–"] * 13]
    assert "killed by SIGKILL" in report_text(report)
    assert "**PyTorch BF16** failed: killed by SIGKILL" in report_markdown(report)


def test_the_terminal_table_fits_and_marks_the_published_row(report):
    lines = report_text(report).splitlines()
    table = lines[:8]
    assert max(map(len, table)) <= WIDTH
    assert table[-1].startswith("not ours: H100")
    assert len({line.rindex("  ") for line in table[:1]}) == 1
    assert [line.split("  ")[0] for line in table[2:7]] == list(NAMES.values())


def test_a_measured_baseline_is_not_called_somebody_elses(full):
    full["baseline"] = {"name": "ours", "ours": True, "decode_tokens_per_s": 150.0, "source": "a file"}
    assert "not ours" not in report_text(full) + report_markdown(full) + report_html(full)
    assert "baseline: ours, 150 tok/s per user; a file" in report_text(full)


def test_the_terminal_ends_with_the_advice(full):
    lines = report_text(full).splitlines()
    assert [line.split(":")[0] for line in lines[-4:]] == ["phone-8gb", "phone-4gb", "pi5", "this"]


def test_a_table_too_wide_cuts_the_first_column_from_its_left():
    columns = [Column("path", "path"), Column("n", "n", "{:d}")]
    text = render(columns, [{"path": "/a/very/long/path/to/int4", "n": 5}], width=16)
    assert text.splitlines()[2].split() == ["…path/to/int4", "5"]
    assert max(map(len, text.splitlines())) == 16


def test_findings_compare_with_the_reference(report):
    said = findings(report["rows"])
    assert said[0] == "Smallest: GGUF int4, 38 % of the BF16 checkpoint's bytes."
    assert said[1] == "Fastest at decoding: GGUF int4, 5.2 times the BF16 PyTorch model."
    assert "GGUF int8, mean KL 3.1e-05" in said[2]
    assert findings(report["rows"][1:]) == []


def test_findings_call_no_winner_that_the_intervals_do_not(full):
    rows = [r for r in full["rows"] if r["name"] != "gguf-tiny"]
    assert findings(rows)[1].endswith("not told apart from onnx-int4.")
    rows[4] |= {"mean_kl_nats": 6.3e-4, "mean_kl_se_nats": 2e-5}  # onnx-int8, beside gguf-int8's 6.1e-4
    assert findings(rows)[2].endswith("; not told apart from onnx-int8.")


def test_markdown_has_the_advice_the_figures_and_the_conditions(full):
    text = report_markdown(full)
    assert text.startswith(
        "# tensoropera/Fox-1-1.6B, exported and measured\n\n## What to ship\n\n- **phone-8gb**: "
    )
    assert "| gguf-phone | 1,072.0 | 5.15 |" in text and "32.5 (31.5 to 33.1) | 1 = | 91.0 | 0.16 |" in text
    assert "*not ours: Fox-1 1.6B BF16, H100*" in text and "*over 200.0*" in text
    assert "| gguf-tiny | gsm8k | 11 of 100 | 2 to 21 % | worse (p 0.0001) |" in text
    assert "## Projected, not measured" in text
    assert "```\nfox-edge bench out/gguf-int8 out/gguf-phone --workload paper --report report\n```" in text


# --- files -------------------------------------------------------------------------------------------------


def test_files_are_written_and_read_again(full, tmp_path):
    written = write_report(full, tmp_path / "new" / "out")
    assert [p.name for p in written] == list(FILES)
    assert sorted(p.name for p in (tmp_path / "new" / "out").iterdir()) == sorted(FILES)
    assert json.loads(written[0].read_text(encoding="utf-8")) == full
    assert read_report(written[0]) == full
    assert written[2].read_text(encoding="utf-8").startswith("<!doctype html>")
    assert written[2].stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_report_takes_the_place_of_an_older_one_or_leaves_it(full, tmp_path, monkeypatch):
    write_report(full, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    # A disk that is full when the last file is written.
    real = os.fsync
    calls = []

    def fsync(number: int) -> None:
        calls.append(number)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(FoxEdgeError, match="cannot be written \\(No space left on device\\)"):
        write_report({**full, "checkpoint": "other"}, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    monkeypatch.undo()
    write_report({**full, "checkpoint": "other"}, tmp_path)
    assert read_report(tmp_path / "report.json")["checkpoint"] == "other"


def test_a_place_where_no_report_can_be_is_named_before_and_after(full, tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FoxEdgeError, match="the report cannot be written"):
            need_folder(folder)
        with pytest.raises(FoxEdgeError, match="the report cannot be written"):
            write_report(full, folder)
    need_folder(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    (tmp_path / "out" / "report.md").mkdir(parents=True)
    with pytest.raises(FoxEdgeError, match=r"report\.md: .* \(a folder has its name\)"):
        write_report(full, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["report.md"]


def test_a_report_of_schema_1_gets_what_it_lacks():
    path = Path(__file__).parent / "schema1.json"
    report = read_report(path)
    assert report["schema"] == 2 and report["advice"] == [] and report["tasks"]
    assert report["rows"][0]["tasks"][0]["correct"] == report["rows"][0]["correct"]
    Page(report_html(report))
    report_markdown(report)
