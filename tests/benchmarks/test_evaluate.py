"""Questions, answers and their grading: hand-made data, a scripted model, and real worker processes."""

import json
import sys

import numpy as np
import pytest
from huggingface_hub import errors

from benchmarks import gsm8k
from benchmarks.answer import answer_all
from benchmarks.evaluate import evaluate, evaluate_text, grade
from benchmarks.gsm8k import Question, final_number, read_split
from benchmarks.proportions import mcnemar_p, wilson_percent
from benchmarks.table import WIDTH
from benchmarks.tasks import TaskOptions, make_task
from fox_edge.errors import ContextOverflowError, FoxEdgeError, MissingPackageError
from runtimes.base import SessionOptions
from runtimes.generate import generate
from runtimes.torch import TorchSession


def write_lines(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def row(n: int) -> dict[str, str]:
    return {
        "question": f"What is {n} and {n}?",
        "answer": f"It is {n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n}",
    }


# --- the number that is compared ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is\n#### 18", "18"),
        ("#### -3", "-3"),
        ("#### 1,234,567", "1234567"),
        ("#### 2.50", "2.50"),
        ("#### 18.", "18."),  # the authors compare strings: this is not 18
        ("#### 5\n#### 6", "5"),
        ("####5", None),
        ("#### $5", None),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_the_official_extraction(text, number):
    assert final_number(text) == number


def test_grading_compares_strings():
    texts = ["#### 18", "#### 18.", "18", "#### 1,800"]
    answers = [{"text": t, "cut": False, "prompt_tokens": 9, "reused_tokens": 4} for t in texts]
    graded = grade(answers, ["18", "18", "18", "1800"])
    assert [a["right"] for a in graded["answers"]] == [True, False, False, True]
    assert (graded["correct"], graded["n"], graded["accuracy_percent"]) == (2, 4, 50.0)
    assert (graded["prompt_tokens"], graded["reused_prompt_tokens"]) == (36, 16)


# --- data -----------------------------------------------------------------------------------------


def test_a_prompt_is_worked_examples_and_a_question():
    text = gsm8k.prompt([Question("One?", "Yes.\n#### 1"), Question("Two?", "#### 2")], "Three?")
    assert text == (
        "Question: One?\nAnswer: Yes.\n#### 1\n\nQuestion: Two?\nAnswer: #### 2\n\nQuestion: Three?\nAnswer:"
    )


def test_the_task_asks_the_first_questions_after_the_first_examples(tmp_path):
    data = write_lines(tmp_path / "test.jsonl", *map(row, range(10, 20)))
    train = write_lines(tmp_path / "train.jsonl", *map(row, range(7)))
    task = make_task("gsm8k", TaskOptions(limit=3, shots=5, data=data, train=train))
    assert task.expected == ["20", "22", "24"]
    assert all(prompt.count("Question:") == 6 for prompt in task.prompts)
    assert "What is 4 and 4?" in task.prompts[0] and "What is 5 and 5?" not in task.prompts[0]
    assert task.prompts[2].endswith("Question: What is 12 and 12?\nAnswer:")
    everything = make_task("gsm8k", TaskOptions(limit=1000, shots=0, data=data))
    assert len(everything.prompts) == 10


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "broken', "line 3: not JSON"),
        ("[1, 2]", "line 3: not an object with the texts"),
        ({"question": "no answer"}, "line 3: not an object with the texts"),
        ({"question": "x", "answer": "no number"}, "line 3: the answer does not end in"),
        ("x" * (2 << 20), "line 3: longer than 1048576 bytes"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    path = write_lines(tmp_path / "test.jsonl", row(1), "", line)
    with pytest.raises(FoxEdgeError, match=rf"test\.jsonl, {message}"):
        read_split("test", path, "--data")


def test_lines_after_the_last_one_wanted_are_not_read(tmp_path):
    path = write_lines(tmp_path / "test.jsonl", row(1), "broken")
    assert len(read_split("test", path, "--data", 1)) == 1


def test_files_that_hold_nothing_or_too_little_are_named(tmp_path):
    with pytest.raises(FoxEdgeError, match=r"none\.jsonl: cannot be read"):
        read_split("test", tmp_path / "none.jsonl", "--data")
    with pytest.raises(FoxEdgeError, match=r"empty\.jsonl: holds no questions"):
        read_split("test", write_lines(tmp_path / "empty.jsonl", ""), "--data")
    train = write_lines(tmp_path / "train.jsonl", row(1))
    with pytest.raises(FoxEdgeError, match="5 worked examples are needed, 1 are there"):
        make_task("gsm8k", TaskOptions(data=train, train=train))


def test_without_a_file_the_hub_is_asked_and_being_offline_is_one_sentence(monkeypatch):
    asked = []

    def download(repository, file, repo_type):
        asked.append((repository, file, repo_type))
        raise errors.LocalEntryNotFoundError("Cannot find the requested files in the disk cache\nmore")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setitem(sys.modules, "pyarrow", type(sys)("pyarrow"))
    monkeypatch.setattr(sys.modules["pyarrow"], "parquet", None, raising=False)
    with pytest.raises(
        FoxEdgeError, match=r"train split cannot be had .*give a local file with --train"
    ) as told:
        make_task("gsm8k", TaskOptions())
    assert "\n" not in str(told.value)
    assert asked == [("openai/gsm8k", "main/train-00000-of-00001.parquet", "dataset")]


def test_without_pyarrow_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPackageError, match=r"fox-edge\[eval\]"):
        read_split("test", None, "--data")


def test_rows_of_the_hub_s_file_are_questions(monkeypatch):
    class Table:
        def to_pylist(self):
            return [row(3), row(4)]

    class Parquet:
        @staticmethod
        def read_table(path, columns):
            assert (path, columns) == ("/cache/test.parquet", ["question", "answer"])
            return Table()

    module = type(sys)("pyarrow")
    module.parquet = Parquet
    monkeypatch.setitem(sys.modules, "pyarrow", module)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: "/cache/test.parquet")
    assert [q.question for q in read_split("test", None, "--data")] == [
        "What is 3 and 3?",
        "What is 4 and 4?",
    ]


def test_unknown_tasks_and_impossible_numbers_are_refused():
    with pytest.raises(FoxEdgeError, match="unknown task 'mmlu'; known: gsm8k, word-problems"):
        make_task("mmlu", TaskOptions())
    with pytest.raises(FoxEdgeError, match="201 word problems were asked for; there are 200"):
        make_task("word-problems", TaskOptions(limit=201))
    with pytest.raises(FoxEdgeError, match="-1 worked examples"):
        make_task("gsm8k", TaskOptions(shots=-1))


# --- answering ------------------------------------------------------------------------------------


class Speller:
    """A tokenizer of single characters; id 0 ends."""

    stop_ids = frozenset({0})

    def encode(self, text, bos=False, special=False):
        return [1] * bos + [ord(c) for c in text]

    def encode_chat(self, messages):
        return self.encode("".join(m["content"] for m in messages), bos=True)

    def stream(self):
        class Stream:
            def push(self, id):
                return chr(id)

            def flush(self):
                return ""

        return Stream()


class Scripted:
    """After a prompt, spells out what the script says for its last character; counts tokens run."""

    vocab_size = 128

    def __init__(self, script: dict[str, str], context: int = 200) -> None:
        self.script, self.context = script, context
        self.cache: list[int] = []
        self.ran = 0

    @property
    def length(self):
        return len(self.cache)

    def prefill(self, tokens):
        self.cache += tokens
        self.ran += len(tokens)
        said = self.script.get(chr(self.cache[-1]), "") + "\0"
        self.said = iter(said)
        return self._next()

    def step(self, token):
        self.cache.append(token)
        return self._next()

    def _next(self):
        logits = np.zeros(128, np.float32)
        logits[ord(next(self.said))] = 9
        return logits

    def truncate(self, length):
        del self.cache[length:]

    def reset(self):
        self.cache.clear()


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


# --- how sure one can be --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # 8 of 10 by hand: (0.8 + 0.19207 -+ 1.95996 sqrt(0.016 + 0.0096036)) / 1.384146 = 0.4902, 0.9433
    [(8, 10, 49.02, 94.33), (0, 10, 0.0, 27.75), (10, 10, 72.25, 100.0), (50, 100, 40.38, 59.62)],
)
def test_wilson_intervals(correct, n, low, high):
    assert wilson_percent(correct, n) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))


def test_mcnemar_by_hand():
    # 8 disagreements, 1 against 7: two-sided 2 (C(8,0) + C(8,1)) / 2^8 = 18 / 256
    first = [True] * 7 + [False] + [True] * 5 + [False] * 4
    second = [False] * 7 + [True] + [True] * 5 + [False] * 4
    assert mcnemar_p(first, second) == mcnemar_p(second, first) == 18 / 256
    assert mcnemar_p(first, first) == 1
    assert mcnemar_p([True, False], [False, True]) == 1


# --- the whole ------------------------------------------------------------------------------------


def test_evaluation_in_fresh_processes(checkpoint, tmp_path, monkeypatch):
    from .test_bench import write_artifact

    broken = write_artifact(tmp_path / "broken", checkpoint)
    spec = f"torch:{checkpoint.path}"
    data = write_lines(tmp_path / "test.jsonl", row(3), row(4), row(5))
    monkeypatch.setattr(gsm8k, "MAX_TOKENS", 8)  # random weights never stop by themselves
    result = evaluate(
        [broken.path, spec, spec], task="gsm8k", limit=2, shots=1, data=data, train=data, threads=1
    )
    result = json.loads(json.dumps(result))
    failed, reference, same = result["results"]
    assert "model.gguf" in failed["error"]
    assert (result["task"], result["n"], reference["n"]) == ("gsm8k", 2, 2)
    assert (
        0
        <= reference["ci95_percent"][0]
        <= reference["accuracy_percent"]
        <= reference["ci95_percent"][1]
        <= 100
    )
    assert reference["paired_p"] is None
    assert (same["paired_with"], same["paired_p"]) == (spec, 1.0)
    assert [a["text"] for a in same["answers"]] == [a["text"] for a in reference["answers"]]
    assert reference["reused_prompt_tokens"] > 10
    text = evaluate_text(result)
    assert failed["error"] in text
    assert max(map(len, text.splitlines()[1:5])) <= WIDTH
