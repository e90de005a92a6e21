"""Answers by a scripted model, token by token, and by real ones with and without reuse of a prompt."""

import pytest

from benchmarks.accuracy.answer import answer_all
from benchmarks.accuracy.tasks import TaskOptions, make_task
from benchmarks.common.subject import open_subject
from fox_edge.errors import ContextOverflowError
from runtimes.base import SessionOptions
from runtimes.generate import generate
from runtimes.torch import TorchSession
from tests.benchmarks.accuracy.scripted import Scripted, Speller
from tests.benchmarks.harness_data import gsm8k_row, rows, write_jsonl


def test_answers_end_at_a_stop_text_a_final_line_a_stop_token_or_the_limit():
    session = Scripted({"a": "x\n#### 3\nQuestion: more", "b": "x Question: y", "c": "done", "d": "z" * 50})
    answers = answer_all(session, Speller(), ["a", "b", "c", "d"], 30, ["Question:"])
    assert [a.text for a in answers] == ["x\n#### 3\n", "x ", "done", "z" * 30]
    assert [a.cut for a in answers] == [False, False, False, True]


def test_shared_examples_are_run_once():
    session = Scripted({"?": "ok"})
    shared = "E" * 60
    prompts = [f"{shared}{n}?" for n in range(5)]
    answers = answer_all(session, Speller(), prompts, 10, shared=shared)
    assert [a.text for a in answers] == ["ok"] * 5
    # <bos> and the examples but for their last token, which a question may change; then what is left of each.
    assert session.ran == 60 + 5 * 3
    assert [a.reused_tokens for a in answers] == [0, 60, 60, 60, 60]
    assert [a.prompt_tokens for a in answers] == [63] * 5


def test_a_prompt_that_begins_otherwise_is_run_whole_and_costs_the_shared_part_once_more():
    session = Scripted({"?": "ok"})
    answers = answer_all(session, Speller(), ["EEEE1?", "XEEE2?", "EEEE3?"], 10, shared="EEEE")
    assert [a.reused_tokens for a in answers] == [0, 0, 0]
    assert [a.text for a in answers] == ["ok"] * 3
    assert session.ran == 3 * 7


def test_a_prompt_too_long_is_told_before_any_is_run():
    session = Scripted({"?": "ok"}, context=20)
    with pytest.raises(ContextOverflowError, match="longest prompt has 32 tokens"):
        answer_all(session, Speller(), ["a?", "b" * 30 + "?"], 10)
    assert session.ran == 0


def test_reusing_the_prefix_changes_no_answer_of_a_real_model(nano):
    tokenizer = nano.tokenizer()
    shared = "Question: A fox has 3 dens with 2 cubs each. How many cubs?\nAnswer: 3*2=6 cubs.\n#### 6\n\n"
    prompts = [f"{shared}Question: Tom has {n} pens and buys 2. How many?\nAnswer:" for n in (5, 7, 5)]
    session = TorchSession(nano, SessionOptions(context=256))
    answers = answer_all(session, tokenizer, prompts, 12, shared=shared)
    for prompt, answer in zip(prompts, answers, strict=True):
        fresh = TorchSession(nano, SessionOptions(context=256))
        tokens = generate(
            fresh, tokenizer.encode(prompt, bos=True), stop_ids=tokenizer.stop_ids, max_tokens=12
        )
        assert tokenizer.decode(list(tokens)).startswith(answer.text) and answer.text
    assert answers[0].text == answers[2].text
    assert [a.reused_tokens for a in answers] == [0] + [len(tokenizer.encode(shared, bos=True)) - 1] * 2


class Counted:
    """A session that counts the tokens it runs, and in how many runs of more than one."""

    def __init__(self, session):
        self.below, self.context, self.vocab_size = session, session.context, session.vocab_size
        self.prompts, self.steps = [], 0

    def __getattr__(self, name):
        return getattr(self.below, name)

    def prefill(self, tokens):
        self.prompts.append(len(tokens))
        return self.below.prefill(tokens)

    def step(self, token):
        self.steps += 1
        return self.below.step(token)


@pytest.mark.parametrize("runtime", ["torch", "llama.cpp", "onnxruntime"])
def test_worked_examples_are_run_exactly_once_for_all_questions(
    runtime, nano, nano_gguf, nano_onnx, tmp_path
):
    data = write_jsonl(tmp_path / "test.jsonl", rows(gsm8k_row, 10, 4))
    train = write_jsonl(tmp_path / "train.jsonl", rows(gsm8k_row, 0, 5))
    task = make_task("gsm8k", TaskOptions(limit=4, data=data, train=train))
    spec = {"torch": "torch:nano", "llama.cpp": str(nano_gguf.path), "onnxruntime": str(nano_onnx.path)}[
        runtime
    ]
    subject = open_subject(spec)
    assert subject.runtime == runtime
    tokenizer = subject.tokenizer()
    session = Counted(subject.open_session(SessionOptions(context=512, threads=1)))
    answers = answer_all(session, tokenizer, task.prompts, 6, task.stop_texts, shared=task.shared)
    examples = len(tokenizer.encode(task.shared, bos=True)) - 1
    lengths = [len(tokenizer.encode(prompt, bos=True)) for prompt in task.prompts]
    assert session.prompts == [examples, *(length - examples for length in lengths)]
    assert sum(session.prompts) < sum(lengths) / 2
    assert [a.reused_tokens for a in answers] == [0] + [examples] * 3
    # The same words as without any reuse, where the prompt is run in the same two parts.
    for prompt, answer in zip(task.prompts, answers, strict=True):
        tokens = tokenizer.encode(prompt, bos=True)
        session.reset()
        session.prefill(tokens[:examples])
        fresh = generate(session, tokens[examples:], stop_ids=tokenizer.stop_ids, max_tokens=6)
        assert tokenizer.decode(list(fresh)).startswith(answer.text)
    session.close()
