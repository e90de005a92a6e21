"""A model in the browser as a subject of fox-edge bench: figures by its own clock, and what it has not."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.subject import Subject, open_subject
from benchmarks.devices.fit import needs_of
from benchmarks.latency import bench as bench_module
from benchmarks.latency import measure
from benchmarks.latency.bench import bench
from fox_edge import cli
from fox_edge.artifact import Artifact
from fox_edge.errors import FoxEdgeError
from fox_edge.tokenizer import Tokenizer
from runtimes.base import RemoteSession, SessionOptions
from runtimes.browser.server import HERE as PAGE
from runtimes.browser.server import VENDORED
from runtimes.browser.session import BrowserSession
from tests.clients.helpers import Asked, need, need_chromium

OPTIONS = SessionOptions(context=256, threads=1)


@pytest.fixture
def browser() -> None:
    """A browser, and a page that was built."""
    need_chromium()
    need("node", (PAGE / "vendor" / VENDORED[-1]).is_file(), "`make clients` was not run")


def artifact_of(format: str, exported: Artifact, nano_gguf: Artifact) -> Artifact:
    return exported if format == "onnx" else nano_gguf


@pytest.mark.usefixtures("browser")
@pytest.mark.parametrize("format", ["onnx", "gguf"])
def test_conversations_by_the_page_s_clock(format: str, exported: Artifact, nano_gguf: Artifact) -> None:
    artifact = artifact_of(format, exported, nano_gguf)
    tokenizer = Tokenizer.from_folder(artifact.path)
    first = tokenizer.encode("Tom has 12 apples and buys 7 more apples.", bos=True)
    then = tokenizer.encode(" How many apples does Tom have now?", bos=False)
    with contextlib.closing(BrowserSession(artifact, OPTIONS)) as session:
        assert isinstance(session, RemoteSession)
        assert (session.context, session.vocab_size, session.threads) == (256, 8192, 1)
        assert 0 < session.load_s < 60
        turns = session.converse([first, then], 6)
        again = session.converse([first], 3)
        # A browser without the model, and with it: 64 KiB pages of WebAssembly, and the library.
        taken = session.occupied()
        with pytest.raises(FoxEdgeError, match=r"no logits: only fox-edge bench"):
            session.prefill(first)
    assert [len(turn.stamps_s) for turn in turns + again] == [7, 7, 4]
    # All of the first turn; of the second what is new, and the last token of the answer before.
    assert [turn.prompt_tokens for turn in turns] == [len(first), len(then) + 1]
    assert again[0].prompt_tokens == len(first)
    for turn in turns + again:
        assert turn.stamps_s == sorted(turn.stamps_s)
        assert turn.asked_s + turn.prompt_s == pytest.approx(turn.stamps_s[0])
        assert turn.prompt_s > 0
    assert turns[1].asked_s >= turns[0].stamps_s[-1]
    assert taken.empty is not None and taken.peak > taken.empty > 50e6
    assert taken.peak >= (taken.anonymous or 0) > artifact.manifest.weight_bytes


@pytest.mark.usefixtures("browser")
def test_a_row_of_bench(nano_gguf: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the worker finds is what the page's clock says, and the memory the browser's."""
    monkeypatch.setattr(measure, "MEASURE_S", 0.0)
    seen: list[Any] = []
    real = BrowserSession.converse

    def converse(self: BrowserSession, turns: Sequence[Sequence[int]], decode_tokens: int) -> Any:
        seen.append(real(self, turns, decode_tokens))
        return seen[-1]

    monkeypatch.setattr(BrowserSession, "converse", converse)
    job = {
        "subject": f"browser:{nano_gguf.path}",
        "context": 64,
        "threads": 1,
        "waves": [[[Tokenizer.from_folder(nano_gguf.path).encode("Tom has 12 apples.", bos=True)]]],
        "decode_tokens": 5,
        "page_cache": "warm",
    }
    found = measure.run_job(job, lambda *_: None)
    warm_up, (turn,) = seen
    assert found["output_tokens"] == 6 and found["passes"] == 1
    span = turn.stamps_s[-1] - turn.stamps_s[0]
    assert found["decode_tokens_per_s"] == pytest.approx(5 / span)
    assert found["prompt_tokens_per_s"] == pytest.approx(turn.prompt_tokens / turn.prompt_s)
    assert found["cold_time_to_first_token_s"] == pytest.approx(warm_up[0].prompt_s)
    assert found["peak_rss_bytes"] > found["empty_rss_bytes"] > 50e6


@pytest.mark.usefixtures("browser")
def test_what_the_page_refuses_is_the_row_s_error(exported: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    folder.mkdir()
    for path in exported.path.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "model.onnx").write_bytes((exported.path / "model.onnx").read_bytes()[:5000])
    with pytest.raises(FoxEdgeError, match=r"cut: in the browser: .{10}"):
        BrowserSession(Artifact.open(folder), OPTIONS)


def test_what_a_browser_does_not_have_is_said_before_anything_runs(
    answers: dict[str, Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = f"browser:{answers['int4'].folder}"
    monkeypatch.setattr(bench_module, "run_worker", lambda *_, **__: pytest.fail("something ran"))
    with pytest.raises(FoxEdgeError, match=r"--profile pi5: no cap is kept on the memory of a browser"):
        bench([spec], profile="pi5")
    with pytest.raises(FoxEdgeError, match=r"browser:.* with --users 2: a browser has one user"):
        bench([answers["int4"].folder], runtimes=["browser"], users=[1, 2])
    for options, said in (
        (SessionOptions(kv="int8"), "--kv int8: browser has float32"),
        (SessionOptions(device="cuda"), "--device cuda: browser computes on cpu"),
        (SessionOptions(speculate=4), "--speculate: the page in the browser does not guess ahead"),
    ):
        with pytest.raises(FoxEdgeError, match=said):
            open_subject(spec).open_session(options)


def test_every_artifact_gets_one_more_row(answers: dict[str, Asked], monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[str, str]] = []

    def enough(subjects: Sequence[Subject], *_: Any) -> None:
        rows.extend((subject.spec, subject.runtime) for subject in subjects)
        raise FoxEdgeError("enough")

    monkeypatch.setattr(bench_module, "_cases", enough)
    int8, int4 = (str(answers[quant].folder) for quant in ("int8", "int4"))
    assert cli.main(["bench", int8, int4, "--runtime", "browser"]) == 2
    native = [(int8, "onnxruntime"), (int4, "onnxruntime")]
    assert rows == native + [(f"browser:{folder}", "browser") for folder, _ in native]


def test_no_sum_is_made_of_what_a_browser_takes(answers: dict[str, Asked]) -> None:
    """The native runtime's sum would be wrong for it."""
    folder = answers["int4"].folder
    assert needs_of(open_subject(folder), [256], {})[256]["runtime"] == "onnxruntime"
    assert needs_of(open_subject(f"browser:{folder}"), [256], {}) == {}
