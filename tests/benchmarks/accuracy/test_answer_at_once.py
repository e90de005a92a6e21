"""Several prompts answered at once: the same answers, the shared start run once, told as they come."""

from __future__ import annotations

import json

import pytest

from benchmarks.accuracy import answer, evaluate
from benchmarks.accuracy.answer import answer_all, prompt_digest
from benchmarks.accuracy.tasks import TaskOptions, make_task
from benchmarks.common.subject import open_subject
from fox_edge.cli import main
from fox_edge.errors import FoxEdgeError
from runtimes.base import BatchingSession, SessionOptions
from runtimes.llama_cpp.session import LlamaCppSession
from tests.benchmarks.accuracy.scripted import Pass, Scripted, Speller

SCRIPT = {"a": "x\n#### 3\nQuestion: more", "b": "x Question: y", "c": "done", "d": "z" * 50, "e": ""}
STOPS = ["Question:"]


def ask(session, prompts, at_once=3, shared="", keep=lambda place, answer: None):
    return answer_all(session, Speller(), prompts, 30, STOPS, keep, shared, at_once)


def said(answers):
    return [(a.text, a.cut, a.prompt_tokens, a.answer_tokens) for a in answers]


@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 50])
def test_answers_are_those_of_one_by_one_and_in_the_order_of_the_prompts(at_once):
    prompts = ["a", "dd", "b", "e", "c", "d", "cc", "a"]
    session = Pass(SCRIPT)
    assert isinstance(session, BatchingSession)
    alone = answer_all(Scripted(SCRIPT), Speller(), prompts, 30, STOPS)
    told = []
    answers = ask(session, prompts, at_once, keep=lambda place, one: told.append((place, one)))
    assert said(answers) == said(alone)
    assert sorted(place for place, _ in told) == list(range(8))
    assert all(one is answers[place] for place, one in told)
    # As many as there are prompts, at most; all but the session's own are closed, and that is of use again.
    assert session.opened == session.closed == min(at_once, 8) - 1
    assert said(ask(session, prompts, at_once)) == said(alone)


def test_an_answer_is_told_when_it_is_there_and_its_place_is_taken_by_the_next():
    told = []
    session = Pass(SCRIPT)
    ask(session, ["d", "b", "c", "c"], 2, keep=lambda place, one: told.append(place))
    # 'b' ends after 11 characters, both 'c' after 4 and a stop; 'd' is cut after 30.
    assert told == [1, 2, 3, 0]
    # The first token comes of the prompt: 29 further ones of 'd', all but the last few beside another answer.
    assert len(session.passes) == 29
    assert sum(session.passes) == 29 + 10 + 2 * 4


def test_shared_examples_are_run_once_and_copied():
    shared = "E" * 60
    prompts = [f"{shared}{n}?" for n in range(5)]
    session = Pass({"?": "ok"})
    answers = ask(session, prompts, 3, shared)
    assert [one.text for one in answers] == ["ok"] * 5
    # <bos> and the examples but for their last token, which a question may change; then what is left of each.
    assert session.total == 60 + 5 * 3
    assert session.copies == [60, 60]
    assert [one.reused_tokens for one in answers] == [0, 60, 60, 60, 60]


def test_a_prompt_that_begins_otherwise_is_run_whole_and_its_place_gets_the_start_copied_again():
    session = Pass({"?": "ok"})
    answers = ask(session, ["EEEE1?", "XEEE2?", "EEEE3?", "EEEE4?"], 2, "EEEE")
    assert [one.text for one in answers] == ["ok"] * 4
    # <bos> and three of the start, once; three more tokens of each prompt that goes on from it.
    assert session.total == 4 + 7 + 3 * 3
    assert [one.reused_tokens for one in answers] == [0, 0, 4, 4]


def test_seconds_are_shared_out(monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr("benchmarks.accuracy.writing.time.perf_counter", lambda: float(next(ticks)))
    answers = ask(Pass(SCRIPT), ["c", "c", "c"], 3)
    # One second for each prompt, and one for each of four passes.
    assert [one.first_token_s for one in answers] == [1, 1, 1]
    assert sum(one.seconds for one in answers) == pytest.approx(3 + 4)


def test_conversations_that_cannot_step_together_say_so():
    with pytest.raises(FoxEdgeError, match="cannot step together; ask one by one"):
        ask(Scripted(SCRIPT), ["a", "b"], 2)


def worked_examples(tmp_path):
    lines = [
        {"question": f"What is {n} and {n}?", "answer": f"It is {n}+{n}={2 * n}.\n#### {2 * n}"}
        for n in range(16)
    ]
    for name, some in (("test", lines[8:]), ("train", lines[:5])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in some))
    return make_task(
        "gsm8k", TaskOptions(limit=6, data=tmp_path / "test.jsonl", train=tmp_path / "train.jsonl")
    )


def test_a_real_model_says_what_it_says_alone_and_runs_the_examples_once(nano_gguf, tmp_path, monkeypatch):
    task = worked_examples(tmp_path)
    subject = open_subject(str(nano_gguf.path))
    tokenizer = subject.tokenizer()
    ran = []
    decode = LlamaCppSession._decode
    monkeypatch.setattr(
        LlamaCppSession,
        "_decode",
        lambda self, context, tokens, wanted: ran.append(len(tokens))
        or decode(self, context, tokens, wanted),
    )

    def answers(at_once):
        ran.clear()
        options = SessionOptions(context=512, threads=1, conversations=at_once)
        session = subject.open_session(options)
        found = answer_all(
            session, tokenizer, task.prompts, 8, task.stop_texts, shared=task.shared, at_once=at_once
        )
        session.close()
        return [one.text for one in found], [count for count in ran if count > 1]

    (alone, parts), (together, parts_together) = answers(1), answers(3)
    assert together == alone
    examples = len(tokenizer.encode(task.shared, bos=True)) - 1
    assert parts[0] == examples and sorted(parts_together) == sorted(parts)


def job(nano_gguf, tmp_path, **more):
    task = worked_examples(tmp_path)
    log = tmp_path / "answers.jsonl"
    log.touch()
    return {
        "subject": str(nano_gguf.path),
        "threads": 1,
        "prompts": task.prompts,
        "ids": task.ids,
        "expected": task.expected,
        "shared": task.shared,
        "max_tokens": 6,
        "stop_texts": task.stop_texts,
        "log": str(log),
        **more,
    }, log


def test_a_run_keeps_every_answer_and_is_gone_on_with(nano_gguf, tmp_path):
    asked, log = job(nano_gguf, tmp_path, skip=[1, 4], at_once=3)
    told = []
    result = answer.run_job(asked, lambda done, total: told.append((done, total)))
    assert told == [(3, 6), (4, 6), (5, 6), (6, 6)]
    lines = {line["question"]: line for line in map(json.loads, log.read_text().splitlines())}
    assert sorted(lines) == ["0", "2", "3", "5"]
    for place, one in zip((0, 2, 3, 5), result["answers"], strict=True):
        line = lines[str(place)]
        assert line["prompt_sha256"] == prompt_digest(asked["prompts"][place])
        assert line["text"] == one["text"]
    assert result["answers"] == [
        {**one, "seconds": other["seconds"], "first_token_s": other["first_token_s"]}
        for one, other in zip(
            answer.run_job(job(nano_gguf, tmp_path, skip=[1, 4])[0], lambda *_: None)["answers"],
            result["answers"],
            strict=True,
        )
    ]


def test_who_is_asked_several_at_once(nano_gguf, monkeypatch, capsys):
    gguf, torch = open_subject(str(nano_gguf.path)), open_subject("torch:nano")
    assert [evaluate._at_once(gguf, batch) for batch in (None, 1, 8)] == [1, 1, 8]
    assert [evaluate._at_once(torch, batch) for batch in (None, 1, 8)] == [1, 1, 1]
    task = make_task("word-problems", TaskOptions(limit=3))
    alone, several = (evaluate.identity(gguf, task, {}, at_once) for at_once in (1, 8))
    assert several == {**alone, "at_once": 8} and "at_once" not in alone
    jobs = []
    monkeypatch.setattr(evaluate, "run_worker", lambda job, told: jobs.append(job) or fake(job))
    command = ["eval", str(nano_gguf.path), "torch:nano", "--task", "word-problems", "--limit", "3"]
    assert main([*command, "--batch", "8"]) == 0
    assert [asked["at_once"] for asked in jobs] == [8, 1]
    assert "at once" in capsys.readouterr().out
    assert main(["eval", "torch:nano", "--task", "fidelity", "--checkpoint", "nano", "--batch", "2"]) == 2
    assert "--batch 2 is for questions" in capsys.readouterr().err


def fake(asked):
    one = {"text": "#### 1", "cut": False, "prompt_tokens": 1, "reused_tokens": 0, "seconds": 0.0}
    return {"answers": [one] * len(asked["prompts"]), "seconds": 0.0}
