"""The graph of a sweep by hand, what is kept of its steps, and the order in which they are done."""

import dataclasses
import errno
import json
import os
from concurrent.futures import Future

import pytest

from benchmarks.sweep.file import Sweep, read_sweep
from benchmarks.sweep.plan import Step, digest, make_plan, plain_name
from benchmarks.sweep.run import LocalPool, _Loop
from benchmarks.sweep.step import do_elsewhere, with_threads
from benchmarks.sweep.store import Store
from fox_edge.errors import FoxEdgeError
from tests.helpers import make_checkpoint

TEXT = """
checkpoints = "tiny"
[[exports]]
format = "gguf"
quant = ["q8_0", "mine.toml", "more/mine.toml"]
rounding = "nearest"
[tasks.word-problems]
limit = 5
[tasks.fidelity]
tokens = 128
window = 64
[run]
questions_per_step = 2
"""


@pytest.fixture
def asked(tmp_path) -> Sweep:
    make_checkpoint(tmp_path / "tiny")
    (tmp_path / "more").mkdir()
    (tmp_path / "mine.toml").write_text('default = "q8_0"\n[tensors]\n"*.down_proj.weight" = "f16"\n')
    (tmp_path / "more" / "mine.toml").write_text('default = "q4_0"\n')
    (tmp_path / "sweep.toml").write_text(TEXT)
    return read_sweep(tmp_path / "sweep.toml")


def test_the_graph_of_a_sweep(asked, tmp_path):
    plan = make_plan(asked, tmp_path / "out")
    reference, first, second, third = plan.subjects
    assert reference.spec == f"torch:{tmp_path / 'tiny'}" and reference.export is None
    assert first.name == "tiny-gguf-q8_0-nearest" and first.spec == str(
        tmp_path / "out/artifacts" / first.name
    )
    # Two recipes of one name are told apart by their digests.
    assert second.name != third.name
    assert {s.name.rpartition("-")[0] for s in (second, third)} == {"tiny-gguf-mine-nearest"}
    (hidden,) = plan.shared
    assert first.fidelity.needs == (first.export.identity, hidden.identity)
    assert reference.fidelity.needs == (hidden.identity,)
    for subject in plan.subjects:
        parts = subject.answers["word-problems"]
        assert [len(step.job["prompts"]) for step in parts] == [2, 2, 1]
        assert [p for step in parts for p in step.job["prompts"]] == plan.tasks["word-problems"].prompts
    identities = [step.identity for step in plan.steps]
    assert len(set(identities)) == len(identities) == 3 + 1 + 4 * (3 + 1)
    assert first.export.job["words"][:5] == [
        *("export", str(tmp_path / "tiny"), first.spec, "--format", "gguf"),
    ]


def test_an_identity_is_the_sha256_of_what_a_result_depends_on():
    step = Step("answer", "label", {"threads": 4}, {"b": [1, "é"], "a": None})
    # printf '%s' '{"a":null,"b":[1,"é"],"kind":"answer"}' | sha256sum
    assert step.identity == "d16178537e2e4218bddebd4084ca6b341457d680e5e155136d939fcb30f945f5"
    assert dataclasses.replace(step, job={}, label="", memory_bytes=1).identity == step.identity
    assert digest({"x": 1, "y": 2}) == digest({"y": 2, "x": 1}) != digest({"x": 2, "y": 1})


def test_identities_change_with_what_they_depend_on_and_with_nothing_else(asked, tmp_path):
    out = tmp_path / "out"
    before = make_plan(asked, out).subjects
    # Elsewhere, with other threads and memory: the same work.
    run = dataclasses.replace(asked.run, threads=3, memory_bytes=1 << 33)
    same = make_plan(dataclasses.replace(asked, run=run), tmp_path / "elsewhere").subjects
    assert [[s.identity for s in subject.steps] for subject in same] == [
        [s.identity for s in subject.steps] for subject in before
    ]
    # More questions: those that were asked need not be asked again.
    tasks = {**asked.tasks, "word-problems": {"limit": 8}}
    more = make_plan(dataclasses.replace(asked, tasks=tasks), out).subjects[1].answers["word-problems"]
    old = before[1].answers["word-problems"]
    assert [a.identity == b.identity for a, b in zip(old, more, strict=False)] == [True, True, False]
    # Another recipe changes its own row; other weights all of them.
    (tmp_path / "mine.toml").write_text('default = "q8_0"\n')
    changed = make_plan(asked, out).subjects
    assert [a.digest == b.digest for a, b in zip(before, changed, strict=True)] == [True, True, False, True]
    make_checkpoint(tmp_path / "tiny", seed=1)
    assert not {s.digest for s in make_plan(asked, out).subjects} & {s.digest for s in changed}


def test_what_cannot_be_planned_names_the_sweep_file(asked, tmp_path):
    (tmp_path / "mine.toml").write_text('default = "q8_0"\n[tensors]\n"*.q_prj.weight" = "f16"\n')
    with pytest.raises(FoxEdgeError, match=r"sweep\.toml: checkpoint '.*tiny': recipe mine: .*names none"):
        make_plan(asked, tmp_path / "out")
    with pytest.raises(FoxEdgeError, match=r"sweep\.toml: checkpoint '/no/such': .*no such folder"):
        make_plan(dataclasses.replace(asked, checkpoints=("/no/such",)), tmp_path / "out")
    few = dataclasses.replace(asked, tasks={"word-problems": {"limit": 201}})
    with pytest.raises(FoxEdgeError, match=r"sweep\.toml: \[tasks\.word-problems\] 201 word problems"):
        make_plan(few, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("fox", "fox"),
        ("owner/fox 1.6b", "owner-fox-1.6b"),
        ("../../etc", "etc"),
        ("..", "unnamed"),
        ("/", "unnamed"),
    ],
)
def test_names_cannot_lead_out_of_a_folder(text, name):
    assert plain_name(text) == name


# --- what is kept ----------------------------------------------------------------------------------------


def test_a_record_is_whole_or_not_there(tmp_path):
    with Store(tmp_path / "out") as store:
        assert store.read("a") is None
        store.write("a", {"result": {"x": 1}})
        assert store.write("a", {"error": "no"})["attempt"] == 2
        path = tmp_path / "out" / "steps" / "a.json"
        assert store.read("a")["error"] == "no" == json.loads(path.read_text())["error"]
        for text in (path.read_text()[:-9], "[]", '{"identity": "b", "result": {}}', '{"identity": "a"}', ""):
            path.write_text(text)
            assert store.read("a") is None


def test_two_sweeps_cannot_share_a_folder(tmp_path):
    with (
        Store(tmp_path),
        pytest.raises(FoxEdgeError, match="another sweep is running in this folder"),
        Store(tmp_path),
    ):
        pass
    with Store(tmp_path):
        pass


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Store(tmp_path) as store:
        store.write("a", {"result": {"kept": True}})
        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(FoxEdgeError, match=r"a\.json: cannot be written \(No space left on device\)"):
            store.write("a", {"result": {"kept": False}})
        assert store.read("a")["result"] == {"kept": True}
    assert [path.name for path in (tmp_path / "steps").iterdir()] == ["a.json"]


def test_a_folder_that_cannot_be_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FoxEdgeError, match=r"file/out: cannot be written"), Store(tmp_path / "file" / "out"):
        pass


# --- the order of things ----------------------------------------------------------------------------------


class FakePool:
    """Does one step at a time, at once, as a script says: outcomes, or errors that only mean a loss."""

    def __init__(self, script: dict[str, list] | None = None) -> None:
        self.script, self.order = script or {}, []

    def fits(self, step):
        return True

    def start(self, step):
        self.order.append(step.label)
        future = Future()
        said = self.script.get(step.label, [])
        outcome = said.pop(0) if said else {"result": {}, "seconds": 0.0}
        future.set_exception(outcome) if isinstance(outcome, Exception) else future.set_result(outcome)
        return future

    def lost(self, error):
        return "its worker was lost" if isinstance(error, ConnectionError) else None

    def check(self):
        pass


def chain(*labels: str) -> list[Step]:
    """Steps that each need the one before."""
    steps: list[Step] = []
    for label in labels:
        needs = (steps[-1].identity,) if steps else ()
        steps.append(Step("answer", label, {}, {"label": label}, needs))
    return steps


def run(store: Store, pool: FakePool, steps: list[Step]) -> dict:
    records: dict = {}
    _Loop(list(steps), records, store, pool).run()
    return records


def test_a_step_waits_for_what_it_needs_and_is_dropped_when_that_failed(tmp_path):
    good, bad = chain("a", "b"), chain("c", "d", "e")
    pool = FakePool({"c": [{"error": "refused", "seconds": 0.1}]})
    with Store(tmp_path) as store:
        records = run(store, pool, [good[1], good[0], *bad])
        assert pool.order == ["a", "c", "b"]
        assert [store.read(step.identity) is not None for step in (*good, *bad)] == [True] * 3 + [False] * 2
    assert records[bad[0].identity]["error"] == "refused"


def test_a_lost_worker_s_step_is_done_again_and_a_bug_is_not(tmp_path, capsys):
    (step,) = chain("a")
    with Store(tmp_path) as store:
        pool = FakePool({"a": [ConnectionError(), ConnectionError()]})
        assert run(store, pool, [step])[step.identity]["attempt"] == 1
        assert (
            pool.order == ["a"] * 3 and "a: its worker was lost; it is done again" in capsys.readouterr().err
        )
        lost = run(store, FakePool({"a": [ConnectionError()] * 9}), [step])[step.identity]
        assert lost["error"] == "its worker was lost, 5 times"
        with pytest.raises(ZeroDivisionError):
            run(store, FakePool({"a": [ZeroDivisionError()]}), [step])


def test_steps_share_a_machine_as_processors_and_memory_allow(monkeypatch):
    monkeypatch.setattr("benchmarks.sweep.run.available_cores", lambda: 4)
    monkeypatch.setattr("benchmarks.sweep.run.memory_bytes", lambda: 10)
    small, big, huge = (Step("answer", str(n), {}, {}, memory_bytes=n) for n in (4, 7, 99))
    pool = LocalPool(2)
    assert all(pool.fits(step) for step in (small, big, huge))
    pool._running = {small: None}
    assert pool.fits(small) and not pool.fits(big) and not pool.fits(huge)
    pool._running = {small: None, Step("answer", "", {}, {}, memory_bytes=1): None}
    assert not pool.fits(Step("answer", "", {}, {}, memory_bytes=1))


def test_a_job_is_told_its_threads():
    assert with_threads({"task": "sweep-export", "words": ["export"]}, 3)["words"] == [
        "export",
        "--threads",
        "3",
    ]
    assert with_threads({"task": "answer"}, 3) == {"task": "answer", "threads": 3}


def test_a_machine_that_sees_another_folder_or_has_other_libraries_is_told(tmp_path):
    blind = do_elsewhere({}, str(tmp_path / "out" / ".seen"), {})
    assert "does not see" in blind["error"] and str(tmp_path / "out") in blind["error"]
    sight = tmp_path / ".seen"
    sight.touch()
    assert "has no such-package, but" in do_elsewhere({}, str(sight), {"such-package": "1"})["error"]
    other = do_elsewhere({}, str(sight), {"numpy": "0.1"})["error"]
    assert "has numpy" in other and other.endswith("but the sweep was started with 0.1")
