"""Measuring in real worker processes, what a dead one leaves, and the arithmetic of shares and spreads."""

import json
import sys
import time

import numpy as np
import pytest

from benchmarks import measure
from benchmarks.bench import bench, bench_text
from benchmarks.processes import WorkerError, run_worker
from benchmarks.subject import open_subject
from benchmarks.table import WIDTH
from fox_edge.artifact import ArtifactWriter, Manifest, TensorRecord
from fox_edge.config import FoxConfig
from fox_edge.errors import CheckpointError, FoxEdgeError

KEYS = [
    "artifact",
    "runtime",
    "load_s",
    "time_to_first_token_s",
    "prompt_tokens_per_s",
    "decode_tokens_per_s",
    "peak_rss_bytes",
    "bytes_per_token",
    "roofline_percent",
]


def write_artifact(folder, checkpoint, content: bytes = b"no model at all", **fields):
    """An artifact whose manifest is sound and whose model file is not."""
    config: FoxConfig = checkpoint.config
    records = [
        TensorRecord(name, name, shape, "q8_0", 34 * int(np.prod(shape)) // 32)
        for name, shape in config.tensor_shapes().items()
    ]
    manifest = Manifest(
        format="gguf",
        quant="int8",
        model_file="model.gguf",
        tied=config.tied,
        parameters=config.num_parameters(),
        context=config.max_positions,
        checkpoint=checkpoint.name,
        checkpoint_sha256=checkpoint.digest(),
        tensors=tuple(records),
        recipe={},
        versions={},
    )
    with ArtifactWriter(folder) as writer:
        (writer.folder / "model.gguf").write_bytes(content)
        (writer.folder / "config.json").write_text(json.dumps(config.to_hf()))
        for path in checkpoint.tokenizer_files():
            (writer.folder / path.name).write_bytes(path.read_bytes())
        return writer.commit(manifest)


@pytest.fixture(scope="module")
def result(checkpoint, tmp_path_factory):
    broken = write_artifact(tmp_path_factory.mktemp("artifacts") / "broken", checkpoint)
    return bench(
        [f"torch:{checkpoint.path}", broken.path], prompt_tokens=40, decode_tokens=4, repeats=2, threads=1
    )


def test_a_result_has_every_key_and_consistent_figures(result, checkpoint):
    row = json.loads(json.dumps(result))["results"][0]
    assert set(KEYS) <= set(row)
    assert (row["runtime"], row["quant"], row["runs"]) == ("torch", "bf16", 2)
    assert row["bits_per_weight"] == 16
    kv = 2 * 3 * 2 * 16 * 2 * (40 + 2)  # keys and values, layers, heads, size, bytes, positions so far
    assert row["bytes_per_token"] == 2 * checkpoint.config.num_parameters() + kv
    assert row["time_to_first_token_s"] >= 40 / row["prompt_tokens_per_s"] * 0.99
    assert row["roofline_percent"] == pytest.approx(
        100 * row["decode_tokens_per_s"] / row["ceiling_tokens_per_s"]
    )
    assert 0 < row["roofline_percent"] < 100
    for key, (low, high) in row["spread"].items():
        assert low <= row[key] <= high
    if sys.platform == "linux":
        assert row["anonymous_rss_bytes"] + row["file_rss_bytes"] <= row["peak_rss_bytes"] * 1.02
        assert row["empty_rss_bytes"] < row["peak_rss_bytes"]


def test_a_broken_subject_says_so_in_its_row_and_the_others_go_on(result):
    row = result["results"][1]
    assert "model.gguf" in row["error"]
    assert "decode_tokens_per_s" not in row
    assert "error" not in result["results"][0]


def test_the_report_names_machine_settings_ceiling_and_the_baseline_that_is_not_ours(result):
    assert result["settings"]["context"] == 256
    assert result["machine"]["versions"]["torch"]
    assert result["bandwidth"][0]["bytes_per_s"] > 1e8
    assert result["baseline"]["ours"] is False
    assert result["baseline"]["decode_tokens_per_s"] == 200
    assert result["baseline"]["peak_rss_bytes"] == 3_703_000_000


def test_the_text_fits_a_terminal_and_tells_everything(result):
    text = bench_text(result)
    table = text.splitlines()[:3]
    assert max(map(len, table)) <= WIDTH
    assert table[0].split()[0] == "artifact"
    assert "not ours: Fox-1 1.6B BF16, H100" in text
    assert result["results"][1]["error"] in text


def test_mistakes_are_told_before_anything_runs(checkpoint, tmp_path):
    with pytest.raises(FoxEdgeError, match=r"nowhere: no such artifact .*torch:CHECKPOINT"):
        bench(["nowhere"])
    with pytest.raises(CheckpointError):
        bench([f"torch:{tmp_path / 'nowhere'}"])
    with pytest.raises(FoxEdgeError, match="500 tokens and 65 more do not fit a context of 512"):
        bench([f"torch:{checkpoint.path}"], prompt_tokens=500)


def test_a_subject_knows_its_sizes(checkpoint, tmp_path):
    artifact = write_artifact(tmp_path / "made", checkpoint)
    subject = open_subject(artifact.path)
    assert subject.bytes == sum(p.stat().st_size for p in artifact.path.iterdir())
    assert subject.weight_bytes == artifact.manifest.weight_bytes
    assert subject.bits_per_weight == pytest.approx(8.5, abs=0.01)
    config = checkpoint.config
    assert subject.bytes_per_token(10) == artifact.manifest.weight_bytes + 10 * config.kv_bytes_per_token
    assert subject.tokenizer().vocab_size == checkpoint.tokenizer().vocab_size


def test_an_untied_embedding_is_read_one_row_per_token(tmp_path):
    from .conftest import make_checkpoint

    untied = make_checkpoint(tmp_path / "untied", tied=False, num_layers=1)
    subject = open_subject(f"torch:{untied.path}")
    unread = 2 * 8191 * 64  # all rows of the embedding but one, in bfloat16
    assert subject.bytes_per_token(0) == 2 * untied.config.num_parameters() - unread


def test_timing_counts_what_it_says(monkeypatch):
    class Slow:
        """20 ms for a prompt, 5 ms for a token."""

        length, context, vocab_size = 0, 100, 4
        steps = 0

        def reset(self):
            self.steps = 0

        def prefill(self, tokens):
            time.sleep(0.02)
            return np.arange(4, dtype=np.float32)

        def step(self, token):
            self.steps += 1
            time.sleep(0.005)
            return np.arange(4, dtype=np.float32)

    monkeypatch.setattr(measure, "MEASURE_S", 0.1)
    session = Slow()
    found = measure.measure(session, [1] * 10, 8)
    assert session.steps == 8
    assert 250 < found["prompt_tokens_per_s"] <= 500
    assert 100 < found["decode_tokens_per_s"] <= 200
    assert 0.02 <= found["time_to_first_token_s"] < 0.04
    assert 1 < found["passes"] <= 5


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import sys, os, json; json.load(sys.stdin); {code}"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL; the system may have run out of memory"),
        ("os.abort()", "killed by SIGABRT"),
        ("raise RuntimeError('the reason')", "status 1: RuntimeError: the reason"),
        ("sys.exit(3)", "status 3: it said nothing"),
        ("print('no json')", "status 0: it said nothing"),
        ("print(json.dumps({'error': 'one sentence'}))", "^one sentence$"),
    ],
)
def test_how_a_worker_died_is_told(code, message):
    with pytest.raises(WorkerError, match=message):
        run_worker({}, command=python(code))


def test_a_worker_that_dies_before_it_listens_is_told_too():
    job = {"prompt": list(range(100_000))}
    with pytest.raises(WorkerError, match="status 5"):
        run_worker(job, command=[sys.executable, "-c", "import sys; sys.exit(5)"])


def test_progress_is_passed_on_and_noise_is_not():
    seen = []
    code = "print('noise'); print('{\"progress\": [1, 2]}'); print('{\"result\": {\"x\": 1}}')"
    assert run_worker({}, lambda *p: seen.append(p), command=python(code)) == {"x": 1}
    assert seen == [(1, 2)]
