"""A sweep on a real Ray cluster of two nodes, one of which is killed in the middle; addresses without one."""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from benchmarks.accuracy.evaluate import evaluate
from benchmarks.sweep.run import sweep
from fox_edge.cli import main
from fox_edge.grammar import EXIT_MISTAKE
from tests.benchmarks.harness_data import gsm8k_row, rows, write_jsonl
from tests.clients.helpers import REQUIRED

if "ray" not in REQUIRED:
    pytest.importorskip("ray")

QUESTIONS = 6
TEXT = f"""
checkpoints = "nano"
reference = false
[[exports]]
format = "gguf"
quant = "q8_0"
rounding = "nearest"
[tasks.gsm8k]
limit = {QUESTIONS}
shots = 3
data = "test.jsonl"
train = "train.jsonl"
[run]
threads = 1
questions_per_step = 1
"""
_STORE_BYTES = 80 << 20


@pytest.fixture
def file(tmp_path) -> Path:
    write_jsonl(tmp_path / "train.jsonl", rows(gsm8k_row, 3, 3))
    write_jsonl(tmp_path / "test.jsonl", rows(gsm8k_row, 20, QUESTIONS))
    (tmp_path / "sweep.toml").write_text(TEXT)
    return tmp_path / "sweep.toml"


def descendants(root: int) -> list[int]:
    """The living processes below one."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(path.parent.name)] = int(fields[1])
    found, reached = [], {root}
    while reached:
        reached = {pid for pid, parent in parents.items() if parent in reached}
        found += reached
    return found


def answering(root: int) -> int | None:
    """A process below this one that is answering a question."""
    for pid in descendants(root):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"benchmarks.processes.worker" in words:
            return pid
    return None


def stopped(pid: int) -> bool:
    """Stop a process; False when it was about to end, and so has ended."""
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGSTOP)
        while True:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state in "TZX":
                return state == "T"
            time.sleep(0.01)
    return False


class Killer(threading.Thread):
    """Waits for answers to be there, stops a process that answers on a node, and kills that node whole."""

    def __init__(self, cluster, node, steps: Path) -> None:
        super().__init__(daemon=True)
        self.cluster, self.node, self.steps, self.killed = cluster, node, steps, None

    def run(self) -> None:
        raylet = self.node.all_processes["raylet"][0].process.pid
        until = time.monotonic() + 400
        while self.killed is None and time.monotonic() < until:
            # The export and an answer are there: what runs now is an answer.
            pid = answering(raylet) if len(list(self.steps.glob("[!.]*.json"))) >= 2 else None
            if pid is not None and stopped(pid):  # it must not be done when its node goes
                self.cluster.remove_node(self.node, allow_graceful=False)
                self.killed = pid
            time.sleep(0.02)


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else other work on this machine starves the cluster
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    from ray.cluster_utils import Cluster

    # A stopped process whose group is orphaned gets SIGHUP, then SIGCONT: where the tests run under nohup, it
    # would ignore the first, go on, and be done before anybody sees that its node is gone.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    shape = {"num_cpus": 1, "memory": 4 << 30, "object_store_memory": _STORE_BYTES}
    found = Cluster(initialize_head=True, head_node_args={**shape, "include_dashboard": False})
    try:
        yield found, found.add_node(**shape)
    finally:
        found.shutdown()
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found through /proc")
def test_a_node_is_killed_and_the_answers_are_those_of_one_machine(file, tmp_path, cluster, capsys):
    found, node = cluster
    out = tmp_path / "out"
    killer = Killer(found, node, out / "steps")
    killer.start()
    result = sweep(file, out=out, ray=found.address)
    killer.join(timeout=30)
    said = capsys.readouterr().err
    assert killer.killed is not None, "no question was answered on the second node"
    assert "its worker was lost" in said and "it is done again" in said
    assert not Path(f"/proc/{killer.killed}").exists()
    assert result["steps"] == {"total": 1 + QUESTIONS, "taken": 0, "failed": 0}

    (row,) = json.loads((out / "eval-gsm8k.json").read_text())["results"]
    tmp = file.parent
    alone = evaluate(
        [row["artifact"]],
        task="gsm8k",
        limit=QUESTIONS,
        shots=3,
        data=tmp / "test.jsonl",
        train=tmp / "train.jsonl",
        threads=1,
    )["results"][0]
    assert row["answers"] == alone["answers"] and len(row["answers"]) == QUESTIONS
    assert any(answer["text"].strip() for answer in row["answers"])
    assert (row["correct"], row["ci95_percent"]) == (alone["correct"], alone["ci95_percent"])
    # And this machine alone, in the same folder, has nothing left to do.
    assert sweep(file, out=out)["steps"]["taken"] == 1 + QUESTIONS


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nonsense", "'nonsense' is no Ray cluster's address; say auto, local, or HOST:PORT"),
        ("127.0.0.1:1", "no Ray cluster answers at '127.0.0.1:1' (Connection refused)"),
        ("127.0.0.1:99999", "no Ray cluster answers at '127.0.0.1:99999' ("),
    ],
)
def test_an_address_without_a_cluster_is_one_sentence(file, tmp_path, address, message, capsys):
    out = str(tmp_path / "out")
    assert main(["sweep", str(file), "--out", out, "--ray", address]) == EXIT_MISTAKE
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_a_listener_that_is_no_cluster_does_not_hold_up_the_sweep(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.sweep.ray._ANSWER_S", 0.2)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        assert main(["sweep", str(file), "--out", str(tmp_path / "out"), "--ray", address]) == EXIT_MISTAKE
    assert f"no Ray cluster answers at '{address}' (timed out)" in capsys.readouterr().err
