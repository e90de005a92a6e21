"""Artifacts against one checkpoint in real worker processes, beside plain formulas over whole logits."""

import contextlib
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch

from benchmarks.fidelity import job as fidelity_job
from benchmarks.fidelity import task as fidelity_task
from benchmarks.fidelity.task import evaluate_fidelity, fidelity_text
from benchmarks.fidelity.texts import read_windows
from benchmarks.processes.launch import WorkerError
from export.gguf import export_gguf
from fox_edge.cli import main
from fox_edge.errors import FoxEdgeError
from fox_edge.quant import find_recipe
from runtimes.base import SessionOptions, open_session
from tests.benchmarks.conftest import make_checkpoint

WINDOW, WINDOWS = 64, 3
KEYS = {
    *("artifact", "runtime", "format", "quant", "bytes", "positions", "mean_kl_nats", "mean_kl_se_nats"),
    *("median_kl_nats", "p99_kl_nats", "max_kl_nats", "top1_agreement_percent", "top1_se_percent"),
    *("top5_agreement_percent", "reference_perplexity", "perplexity", "perplexity_ratio"),
    *("perplexity_ratio_se", "curve", "seconds"),
}


@pytest.fixture(scope="module")
def artifact(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "int4"
    return export_gguf(checkpoint, folder, find_recipe("gguf", "q4_0"), rounding="nearest", threads=1)


@pytest.fixture(scope="module")
def exact(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "f32"
    return export_gguf(checkpoint, folder, find_recipe("gguf", "f32"), verify=None, threads=1)


def measure(artifacts, checkpoint, **settings):
    asked = {"tokens": WINDOW * WINDOWS, "window": WINDOW, "threads": 1, "session": {"cache": False}}
    return evaluate_fidelity([str(a) for a in artifacts], checkpoint=checkpoint, **(asked | settings))


@pytest.fixture
def here(monkeypatch):
    """The workers' jobs are done in this process, for tests that are not about processes."""
    jobs = {"fidelity-reference": fidelity_job.run_reference_job, "fidelity": fidelity_job.run_job}

    def run_worker(job, progress):
        try:
            return json.loads(json.dumps(jobs[job["task"]](json.loads(json.dumps(job)), progress)))
        except FoxEdgeError as error:
            raise WorkerError(str(error)) from None

    monkeypatch.setattr(fidelity_task, "run_worker", run_worker)


@pytest.fixture(scope="module")
def result(checkpoint, artifact, tmp_path_factory):
    broken = tmp_path_factory.mktemp("artifacts") / "broken"
    shutil.copytree(artifact.path, broken)
    os.truncate(broken / artifact.model_path.name, 50_000)
    return measure([broken, artifact.path, f"torch:{checkpoint.path}"], checkpoint.path)


def test_every_figure_is_the_plain_formula_s_over_whole_logits(result, checkpoint, artifact):
    text = read_windows(
        checkpoint.tokenizer(), checkpoint.config.max_positions, tokens=WINDOW * WINDOWS, window=WINDOW
    )
    model = checkpoint.load_model(torch.float32)
    half = slice(WINDOW // 2, WINDOW - 1)
    kl, same, five, nll = [], [], [], []
    options = SessionOptions(context=WINDOW, threads=1, cache=False)
    with contextlib.closing(open_session(artifact, options)) as session:
        for window in text.windows:
            session.reset()
            with torch.inference_mode():
                a = model(torch.tensor([window]))[0, half].double()
            b = torch.from_numpy(np.concatenate(list(session.score(window[:-1], half.start)))).double()
            p, q = a.log_softmax(-1), b.log_softmax(-1)
            kl.append((p.exp() * (p - q)).sum(-1))
            same.append(a.argmax(-1) == b.argmax(-1))
            pairs = zip(a.topk(5).indices.tolist(), b.topk(5).indices.tolist(), strict=True)
            five += [len(set(x) & set(y)) / 5 for x, y in pairs]
            came = torch.tensor(window[WINDOW // 2 + 1 :])[:, None]
            nll.append(-torch.stack((p.gather(1, came)[:, 0], q.gather(1, came)[:, 0])))
    kl, same, nll = torch.stack(kl), torch.cat(same).double(), torch.cat(nll, 1)
    found = json.loads(json.dumps(result))["results"][1]
    assert set(found) >= KEYS
    assert found["positions"] == kl.numel() == WINDOWS * (WINDOW // 2 - 1)
    assert found["mean_kl_nats"] > 1e-4  # the export has something to show
    near = {"rel": 1e-4}  # the reference is streamed, here it is not
    assert found["mean_kl_nats"] == pytest.approx(float(kl.mean()), **near)
    assert found["mean_kl_se_nats"] == pytest.approx(float(kl.std()) / kl.numel() ** 0.5, **near)
    assert found["max_kl_nats"] == pytest.approx(float(kl.max()), **near)
    by_window = float(kl.mean(1).std()) / WINDOWS**0.5
    assert found["mean_kl_se_by_window_nats"] == pytest.approx(by_window, **near)
    assert found["top1_agreement_percent"] == pytest.approx(100 * float(same.mean()))
    assert found["top5_agreement_percent"] == pytest.approx(100 * np.mean(five))
    assert found["reference_perplexity"] == pytest.approx(float(nll[0].mean().exp()), rel=1e-5)
    assert found["perplexity"] == pytest.approx(float(nll[1].mean().exp()), **near)
    assert found["perplexity_ratio"] == pytest.approx(float((nll[1] - nll[0]).mean().exp()), **near)
    first = found["curve"][0]
    assert (first["from"], first["to"], found["curve"][-1]["to"]) == (32, 36, 63)
    assert first["mean_kl_nats"] == pytest.approx(float(kl[:, :4].mean()), **near)


def test_an_artifact_that_dies_leaves_the_others_their_rows(result, checkpoint):
    broken, int4, bf16 = result["results"]
    assert "broken" in broken["error"] and "mean_kl_nats" not in broken
    assert int4["mean_kl_nats"] > bf16["mean_kl_nats"] > 0
    assert int4["reference_perplexity"] == bf16["reference_perplexity"]
    assert (result["schema"], result["task"]) == (2, "fidelity")
    assert result["text"]["tokens"] == WINDOW * WINDOWS and result["checkpoint"] == str(checkpoint.path)
    text = fidelity_text(result)
    assert f"{broken['artifact']}: {broken['error']}" in text
    assert f"{int4['mean_kl_nats']:.5f} ± {int4['mean_kl_se_nats']:.5f}" in text
    assert "32 to 35:" in text


def test_one_that_is_killed_in_mid_run_is_a_row_too(checkpoint, artifact, monkeypatch):
    run, told = fidelity_task.run_worker, []

    def run_worker(job, progress):
        if job.get("subject") != "torch:doomed":
            return run(job, progress)  # the reference's
        told.append(job)
        dying = "import os, signal, sys; sys.stdin.read(); os.kill(os.getpid(), signal.SIGKILL)"
        return run(job, progress, (sys.executable, "-c", dying))

    opened = fidelity_task.open_subject(f"torch:{checkpoint.path}")
    monkeypatch.setattr(fidelity_task, "run_worker", run_worker)
    monkeypatch.setattr(
        fidelity_task,
        "open_subject",
        lambda spec: type(opened)(**{**opened.__dict__, "spec": "torch:doomed"}),
    )
    rows = measure(["torch:doomed"], checkpoint.path)["results"]
    assert len(told) == 1 and rows[0]["error"].startswith("the process was killed by SIGKILL")


def test_an_artifact_can_be_the_reference(here, checkpoint, artifact, exact):
    held_to_it = measure([artifact.path, exact.path], str(exact.path))
    against_itself = held_to_it["results"][1]
    assert against_itself["mean_kl_nats"] < 1e-9
    assert against_itself["top1_agreement_percent"] == against_itself["top5_agreement_percent"] == 100
    assert against_itself["perplexity_ratio"] == pytest.approx(1, abs=1e-9)
    held_to_checkpoint = measure([artifact.path], checkpoint.path)["results"][0]
    # llama.cpp keeps keys and values in float16, even of a float32 model.
    assert held_to_it["results"][0]["mean_kl_nats"] == pytest.approx(
        held_to_checkpoint["mean_kl_nats"], rel=0.02
    )


def test_another_vocabulary_is_told(here, checkpoint, tmp_path):
    wider = make_checkpoint(tmp_path / "wider", vocab_size=8320)
    row = measure([f"torch:{wider.path}"], checkpoint.path)["results"][0]
    assert row["error"] == "it has a vocabulary of 8320 tokens, the reference one of 8192"


def test_what_is_not_there_is_one_sentence(here, checkpoint, artifact, tmp_path):
    with pytest.raises(FoxEdgeError, match="none: no such artifact"):
        measure([tmp_path / "none"], checkpoint.path)
    with pytest.raises(FoxEdgeError, match="nowhere"):
        measure([artifact.path], str(tmp_path / "nowhere"))
    short = tmp_path / "short.txt"
    short.write_text("A fox.")
    with pytest.raises(FoxEdgeError, match=r"short\.txt: \d+ tokens of text, but one window takes 64"):
        measure([artifact.path], checkpoint.path, text=short)
    with pytest.raises(FoxEdgeError, match="2000 tokens does not fit the model's 512"):
        measure([artifact.path], checkpoint.path, window=2000)


def test_hidden_states_that_do_not_fit_on_the_disk_are_one_sentence(checkpoint, tmp_path):
    asked = {"text": None, "tokens": 8, "window": 8, "score_from": None, "threads": None}
    job = {**asked, "checkpoint": str(checkpoint.path), "hidden": str(tmp_path / "no folder" / "hidden")}
    # Positions 4 to 6 of one window, 64 columns of float32.
    with pytest.raises(FoxEdgeError, match="cannot hold 768 bytes of hidden states"):
        fidelity_job.run_reference_job(job, lambda done, total: None)


# --- the command line ---------------------------------------------------------------------------------


def test_the_verb_prints_the_report(here, checkpoint, artifact, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("a fox has dens. " * 40)
    asked = ["eval", str(artifact.path), "--task", "fidelity", "--checkpoint", str(checkpoint.path)]
    asked += ["--text", str(text), "--tokens", "40", "--window", "20", "--threads", "1", "--no-cache"]
    assert main([*asked, "--score-from", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == {
        "source": "text.txt",
        "tokens": 40,
        "windows": 2,
        "window": 20,
        "scored_from": 0,
        "scored_per_window": 19,
    }
    assert found["results"][0]["artifact"] == str(artifact.path)
    assert found["results"][0]["curve"][0]["from"] == 0
    assert main(asked) == 0
    shown = capsys.readouterr().out
    assert "2 windows of 20, 9 predictions of each, from position 10 on" in shown


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--task", "fidelity"], "--task fidelity compares with --checkpoint; give one"),
        (["--text", "x.txt"], "--text is for --task fidelity, not gsm8k"),
        (["--task", "word-problems", "--score-from", "3"], "--score-from is for --task fidelity, not word-p"),
        (["--task", "fidelty"], "unknown task 'fidelty'; known: .*fidelity"),
    ],
)
def test_words_that_do_not_go_together_are_one_sentence(artifact, capsys, words, sentence):
    assert main(["eval", str(artifact.path), *words]) == 2
    assert re.search(sentence, capsys.readouterr().err)
