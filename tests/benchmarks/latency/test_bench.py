"""Measuring in real worker processes, what a dead one leaves, and the arithmetic of shares and spreads."""

import json
import sys

import numpy as np
import pytest

from benchmarks.common.subject import open_subject
from benchmarks.common.table import WIDTH
from benchmarks.latency import bench as bench_module
from benchmarks.latency import measure
from benchmarks.latency.bench import bench, bench_text
from benchmarks.latency.intervals import widened
from benchmarks.latency.rows import FIGURES, figures, rank_rows
from benchmarks.processes.launch import WorkerError, run_worker
from fox_edge.artifact import ArtifactWriter, Manifest, TensorRecord
from fox_edge.cli import main
from fox_edge.config import FoxConfig
from fox_edge.errors import CheckpointError, FoxEdgeError
from tests.benchmarks.fake_session import Clock, FakeSession

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
        assert [low, high] == [min(row["samples"][key]), max(row["samples"][key])]
        least, most = row["interval"][key]
        assert least <= row[key] <= most
        # Memory is of the rounds alone; what a clock measured is as uncertain as the machine is unsteady.
        if key.endswith("_bytes"):
            assert low <= least <= most <= high
        else:
            assert least <= low * 1.001 and most >= high / 1.001
        assert len(row["samples"][key]) == 2
    assert set(FIGURES) - set(row["samples"]) <= {
        "peak_device_bytes",
        "device_energy_joules_per_token",
        "energy_joules_per_token",
        "anonymous_rss_bytes",
        "file_rss_bytes",
    }
    assert row["token_p50_s"] <= row["token_p95_s"] <= row["token_p99_s"]
    assert row["total_tokens_per_s"] == pytest.approx(row["decode_tokens_per_s"])
    assert (row["workload"], row["users"], row["page_cache"]) == ("custom", 1, "warm")
    assert (row["rank"], row["rank_shared_with"]) == (1, [])
    if sys.platform == "linux":
        assert row["anonymous_rss_bytes"] + row["file_rss_bytes"] <= row["peak_rss_bytes"] * 1.02
        assert row["empty_rss_bytes"] < row["peak_rss_bytes"]


def test_a_broken_subject_says_so_in_its_row_and_the_others_go_on(result):
    row = result["results"][1]
    assert "model.gguf" in row["error"]
    assert "decode_tokens_per_s" not in row
    assert (row["rank"], row["users"]) == (None, 1)
    assert "error" not in result["results"][0]


def test_the_report_names_machine_settings_ceiling_and_the_baseline_that_is_not_ours(result):
    settings = result["settings"]
    assert (result["schema"], settings["context"], settings["workload"]) == (2, 256, "custom")
    assert (settings["prompt_tokens"], settings["decode_tokens"]) == (40, 4)
    conditions = result["conditions"]
    assert conditions["noise_percent"] >= 0
    assert conditions["noisy"] == (conditions["noise_percent"] > 10)
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
    assert "conditions: noise" in text
    assert "page cache warm; medians of 2 rounds (95 % intervals take 5" in text
    assert result["results"][1]["error"] in text


def test_mistakes_are_told_before_anything_runs(checkpoint, tmp_path):
    with pytest.raises(FoxEdgeError, match=r"nowhere: no such artifact .*torch:CHECKPOINT"):
        bench(["nowhere"])
    with pytest.raises(CheckpointError):
        bench([f"torch:{tmp_path / 'nowhere'}"])
    with pytest.raises(FoxEdgeError, match="500 tokens and 65 more do not fit a context of 512"):
        bench([f"torch:{checkpoint.path}"], prompt_tokens=500)


def test_choices_that_do_not_go_together_are_told(checkpoint):
    spec = f"torch:{checkpoint.path}"
    with pytest.raises(FoxEdgeError, match="no workload is named 'papr'"):
        bench([spec], workload="papr")
    with pytest.raises(FoxEdgeError, match="871 tokens and 513 more do not fit a context of 512 "):
        bench([spec], workload="paper")
    with pytest.raises(FoxEdgeError, match="the page cache can be warm or cold, not 'lukewarm'"):
        bench([spec], page_cache="lukewarm")
    with pytest.raises(FoxEdgeError, match="--users 4 with --speculate"):
        bench([spec], users=[1, 4], session={"speculate": "auto"})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workload", "papr"], "no workload is named 'papr'; there are custom, paper, short, long, chat"),
        (["--workload", "long"], "4000 tokens and 65 more do not fit a context of 512"),
        (["--workload", "long", "--prompt-tokens", "9"], "--prompt-tokens 9 goes with --workload custom"),
        (["--users", "1,x"], "argument --users: '1,x' is not whole numbers, like 1,4"),
        (["--users", "4,0"], "--users: 0 is not a whole number from 1"),
        (["--users", "1,257"], "--users 1,257: from 1 to 256 at once"),
        (["--page-cache", "hot"], "invalid choice: 'hot'"),
    ],
)
def test_the_user_s_words_are_answered_in_one_line(checkpoint, words, message, capsys):
    try:
        status = main(["bench", f"torch:{checkpoint.path}", *words])
    except SystemExit as ended:
        status = ended.code
    said = capsys.readouterr().err
    assert status == 2
    assert message in said and said.count("\n") == 1


def test_what_was_typed_is_kept_and_reaches_the_benchmark(checkpoint, capsys, monkeypatch):
    asked = {}
    monkeypatch.setattr(bench_module, "bench", lambda artifacts, **options: asked.update(options) or {})
    words = ["bench", "a b", "--workload", "chat", "--users", "4,1,4", "--page-cache", "cold", "--json"]
    assert main(words) == 0
    assert asked["command"] == "fox-edge bench 'a b' --workload chat --users 4,1,4 --page-cache cold --json"
    assert (asked["workload"], asked["users"], asked["page_cache"]) == ("chat", [4, 1], "cold")
    assert (asked["prompt_tokens"], asked["decode_tokens"], asked["repeats"]) == (None, None, 5)
    assert capsys.readouterr().out == "{}\n"


def test_a_chat_by_two_users_in_real_processes(checkpoint, known_machine):
    result = bench(
        [f"torch:{checkpoint.path}"],
        workload="chat",
        decode_tokens=2,
        users=[2],
        page_cache="cold",
        repeats=1,
        threads=1,
        command="fox-edge bench x",
    )
    (row,) = result["results"]
    assert (row["users"], row["page_cache"], row["rank"]) == (2, "cold", 1)
    assert row["total_tokens_per_s"] > row["decode_tokens_per_s"]
    assert row["samples"]["total_tokens_per_s"] == [row["total_tokens_per_s"]]
    assert row["interval"] == {}  # one round
    # 300 tokens were said in six turns; one of every answer but the last is run with the next turn.
    assert (row["computed_prompt_tokens"], row["output_tokens"]) == (2 * (300 + 5), 2 * 6 * 3)
    assert result["command"] == "fox-edge bench x"
    text = bench_text(result)
    assert "chat: 6 turns of 50 tokens on average, 2 out; page cache cold" in text
    assert "(one round: no intervals, no ranks)" in text
    assert "users" in text.splitlines()[0]


class Script:
    """Runs that a worker would have given; notes the order in which they were asked for."""

    def __init__(self, speeds, dies=None):
        self.speeds, self.dies, self.order = speeds, dies, []

    def __call__(self, job, **_):
        spec = job["subject"]
        self.order.append(spec[-1])
        turn = self.order.count(spec[-1]) - 1
        if (spec[-1], turn) == self.dies:
            raise WorkerError("the process was killed by SIGKILL")
        speed = self.speeds[spec[-1]][turn]
        run = dict.fromkeys(FIGURES, 1.0)
        run |= {"decode_tokens_per_s": speed, "total_tokens_per_s": speed, "energy_joules_per_token": None}
        return run | {"notes": ["not quite warm"]}


@pytest.fixture
def three(checkpoint, tmp_path, known_machine):
    """Three artifacts on a machine that needs no measuring."""
    return [write_artifact(tmp_path / name, checkpoint).path for name in "abc"]


def test_rounds_go_back_and_forth_and_paired_rounds_rank(three, monkeypatch):
    # b is always 2 % ahead of a in the same round, though rounds differ by far more; c is far behind.
    drift = (1.0, 1.5, 0.7, 1.2, 0.9)
    speeds = {"a": [100 * d for d in drift], "b": [102 * d for d in drift], "c": [30 * d for d in drift]}
    script = Script(speeds)
    monkeypatch.setattr(bench_module, "run_worker", script)
    result = bench(three, prompt_tokens=8, decode_tokens=2, threads=1)
    assert "".join(script.order) == "abccbaabccbaabc"
    assert [row["rank"] for row in result["results"]] == [2, 1, 3]
    assert all(row["rank_shared_with"] == [] for row in result["results"])
    row = result["results"][0]
    assert (row["decode_tokens_per_s"], row["samples"]["decode_tokens_per_s"]) == (100, speeds["a"])
    drift = result["conditions"]["drift_percent"]
    assert row["interval"]["decode_tokens_per_s"] == pytest.approx(widened((70, 150), 100, drift))
    assert row["energy_joules_per_token"] is None
    notes = [note for note in result["conditions"]["notes"] if "not quite warm" in note]
    assert notes == [f"{path}: not quite warm" for path in three]  # once each, not once per round


def test_who_cannot_be_told_apart_shares_a_rank_and_the_text_says_so(three, monkeypatch):
    speeds = {"a": [100, 90, 110, 95, 104], "b": [98, 93, 108, 99, 101], "c": [30, 31, 29, 30, 30]}
    monkeypatch.setattr(bench_module, "run_worker", Script(speeds))
    result = bench(three, prompt_tokens=8, decode_tokens=2, threads=1)
    a, b, c = result["results"]
    assert [a["rank"], b["rank"], c["rank"]] == [1, 1, 3]
    assert (a["rank_shared_with"], b["rank_shared_with"]) == ([b["artifact"]], [a["artifact"]])
    calm = result | {"conditions": result["conditions"] | {"noisy": False}}
    line = f"not told apart by decode speed in 5 rounds: {a['artifact']}, {b['artifact']}"
    assert bench_text(calm).splitlines().count(line) == 1
    loud = result | {"conditions": result["conditions"] | {"noisy": True, "noise_percent": 31.4}}
    assert "in 5 rounds on a machine whose speed varies by 31 %: " in bench_text(loud)


def test_one_that_dies_in_mid_run_is_not_tried_again_and_the_others_are_ranked(three, monkeypatch):
    speeds = {name: [100, 101, 99] for name in "abc"} | {"c": [50, 51, 49]}
    script = Script(speeds, dies=("b", 1))
    monkeypatch.setattr(bench_module, "run_worker", script)
    result = bench(three, prompt_tokens=8, decode_tokens=2, threads=1, repeats=3)
    assert "".join(script.order) == "abccbaac"
    assert result["results"][1]["error"] == "the process was killed by SIGKILL"
    assert [row["rank"] for row in result["results"]] == [1, None, 2]


def test_ranks_are_apart_for_every_number_of_users():
    def made(artifact, users, speed):
        found = figures([{"decode_tokens_per_s": speed + n / 100} for n in range(5)])
        return {"artifact": artifact, "users": users, **found}

    rows = [made("a", 1, 9.0), made("a", 4, 2.0), made("b", 1, 8.0), made("b", 4, 3.0)]
    rank_rows(rows)
    assert [row["rank"] for row in rows] == [1, 2, 2, 1]


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
    from tests.benchmarks.conftest import make_checkpoint

    untied = make_checkpoint(tmp_path / "untied", tied=False, num_layers=1)
    subject = open_subject(f"torch:{untied.path}")
    unread = 2 * 8191 * 64  # all rows of the embedding but one, in bfloat16
    assert subject.bytes_per_token(0) == 2 * untied.config.num_parameters() - unread


def test_passes_are_repeated_until_enough_time_was_measured(monkeypatch):
    monkeypatch.setattr(measure, "MEASURE_S", 0.1)
    clock = Clock()
    session = FakeSession(clock, token_s=0.002, steps_s=(0.005,))  # a pass: 20 ms and 8 times 5 ms
    found = measure.measure_waves([session], [[[[1] * 10]]], 8, clock)
    assert found["passes"] == 2
    assert sum(what == "step" for _, what, _ in session.log) == 4 + 2 * 8  # four to warm up
    assert found["prompt_tokens_per_s"] == pytest.approx(500)
    assert found["decode_tokens_per_s"] == pytest.approx(200)
    assert found["time_to_first_token_s"] == pytest.approx(0.02)
    fast = FakeSession(clock, token_s=1e-6, steps_s=(1e-6,))
    assert measure.measure_waves([fast], [[[[1]]]], 1, clock)["passes"] == measure.MAX_PASSES
    slow = FakeSession(clock, token_s=1.0, steps_s=(1.0,))
    assert measure.measure_waves([slow], [[[[1]]]], 1, clock)["passes"] == 1


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
