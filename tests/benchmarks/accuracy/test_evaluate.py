"""Questions, answers and their grading: hand-made data, a scripted model, and real worker processes."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import errors

from benchmarks.accuracy import gsm8k
from benchmarks.accuracy.answer import answer_all
from benchmarks.accuracy.answers_log import AnswersLog
from benchmarks.accuracy.evaluate import evaluate, evaluate_text, grade, pair
from benchmarks.accuracy.gsm8k import Question, final_number, judge, last_number, read_split
from benchmarks.accuracy.proportions import mcnemar_p, wilson_percent
from benchmarks.accuracy.tasks import TaskOptions, make_task, subset
from benchmarks.common.subject import open_subject
from benchmarks.common.table import WIDTH
from benchmarks.processes import launch
from fox_edge.cli import main
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


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", "18"),
        ("so it is 18.", "18"),
        ("She pays $1,800.50.", "1800.50"),
        ("5 and then -3", "-3"),
        ("first 7\n#### 8\nthen 9", "9"),
        ("no number, but a point.", None),
        ("one . and ..", "."),  # what the harness's expression finds
        ("", None),
    ],
)
def test_the_looser_extraction_is_the_harness_s_own(text, number):
    from lm_eval.filters.extraction import RegexFilter

    assert last_number(text) == number
    theirs = RegexFilter(regex_pattern=r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)
    [[found]] = theirs.apply([[text]], [{}])
    assert ("[invalid]" if number is None else number) == found.replace(",", "").replace(
        "$", ""
    ).removesuffix(".")


def test_strict_and_flexible_are_judged_apart():
    assert judge("It is 18 hats.", "18") == {
        "extracted": None,
        "right": False,
        "flexible": "18",
        "flexible_right": True,
    }
    both = judge("#### 18", "18")
    assert both["right"] and both["flexible_right"]
    assert judge("#### 18 or 19", "18")["right"] and not judge("#### 18 or 19", "18")["flexible_right"]


def test_grading_compares_strings():
    texts = ["#### 18", "#### 18.", "18", "#### 1,800"]
    answers = [{"text": t, "cut": False, "prompt_tokens": 9, "reused_tokens": 4} for t in texts]
    graded = grade(answers, ["18", "18", "18", "1800"])
    assert [a["right"] for a in graded["answers"]] == [True, False, False, True]
    assert (graded["correct"], graded["n"], graded["accuracy_percent"]) == (2, 4, 50.0)
    assert (graded["strict_correct"], graded["flexible_correct"], graded["flexible_percent"]) == (2, 4, 100.0)
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


def test_a_seed_draws_a_subset_that_is_told_and_grows(tmp_path):
    data = write_lines(tmp_path / "test.jsonl", *map(row, range(40)))

    def drawn(limit, seed):
        task = make_task("gsm8k", TaskOptions(limit, 0, data, None, seed))
        assert task.expected == [str(2 * int(id)) for id in task.ids]  # row n asks for n and n
        assert all(
            f"What is {id} and {id}?" in prompt for id, prompt in zip(task.ids, task.prompts, strict=True)
        )
        return task.ids

    assert drawn(5, None) == ["0", "1", "2", "3", "4"]
    assert drawn(5, 7) == drawn(5, 7) != drawn(5, 8)
    assert set(drawn(5, 7)) < set(drawn(12, 7)) and drawn(12, 7) == sorted(drawn(12, 7), key=int)
    assert len(drawn(99, 7)) == 40
    problems = make_task("word-problems", TaskOptions(limit=6, seed=3))
    everything = make_task("word-problems", TaskOptions(limit=200))
    assert problems.prompts == [everything.prompts[int(id)] for id in problems.ids]
    # Whatever the versions of libraries: SHA-256 decides.
    assert subset([str(n) for n in range(1319)], 4, 0) == [61, 793, 798, 988]


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
    for task in ("gsm8k", "word-problems"):
        with pytest.raises(FoxEdgeError, match="-1 worked examples"):
            make_task(task, TaskOptions(shots=-1))
    with pytest.raises(FoxEdgeError, match="word problems have no worked examples; 5 were asked for"):
        make_task("word-problems", TaskOptions(shots=5))


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
    data = write_lines(tmp_path / "test.jsonl", *map(row, range(10, 14)))
    train = write_lines(tmp_path / "train.jsonl", *map(row, range(5)))
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
    from tests.benchmarks.latency.test_bench import write_artifact

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
    assert reference["paired_p"] is None and reference["paired"] is None
    assert (same["paired_with"], same["paired_p"]) == (spec, 1.0)
    assert same["paired"]["with"] == spec and same["paired"]["verdict"] == "not told apart"
    assert same["paired"]["questions_to_settle"] is None
    assert (result["question_ids"], result["seed"], result["shots"]) == (["0", "1"], None, 1)
    assert [a["text"] for a in same["answers"]] == [a["text"] for a in reference["answers"]]
    assert reference["reused_prompt_tokens"] > 10
    text = evaluate_text(result)
    assert failed["error"] in text
    assert "strict" in text and "flexible" in text and "not told apart" in text
    assert "as many right as" in text
    assert max(map(len, text.splitlines()[1:5])) <= WIDTH


def table(won: int, lost: int, both: int, neither: int):
    """Two rows as `evaluate` makes them: the reference first, the other right alone `won` times."""
    pairs = [(0, 1)] * won + [(1, 0)] * lost + [(1, 1)] * both + [(0, 0)] * neither

    def answered(name, format, right):
        texts = ["#### 18" if ok else "#### 19" for ok in right]
        said = [{"text": t, "cut": False, "prompt_tokens": 9, "reused_tokens": 4} for t in texts]
        fields = {"artifact": name, "format": format, "runtime": "x", "quant": "y", "seconds": 1.0}
        return {**fields, **grade(said, ["18"] * len(said))}

    first, second = zip(*pairs, strict=True)
    rows = [answered("other", "gguf", second), answered("reference", "torch", first)]
    pair(rows)
    return {"n": len(pairs), "seed": 3, "description": "made up", "results": rows}


def test_a_table_says_better_only_where_the_answers_do():
    clear = table(won=14, lost=2, both=20, neither=14)
    assert clear["results"][0]["paired"]["verdict"] == "better"
    text = evaluate_text(clear)
    assert " better" in text and "more questions" not in text and "+24.0 (+" in text
    assert text.startswith("50 questions, drawn by seed 3: made up")
    close = table(won=6, lost=3, both=21, neither=20)
    text = evaluate_text(close)
    more = close["results"][0]["paired"]["questions_to_settle"]
    assert " better" not in text and "not told apart" in text
    assert f"other: about {more:,} more questions would settle a difference of +6.0 points" in text


def keeping(tmp_path, count=4):
    """Options of an evaluation of nano on made-up questions that keeps its answers."""
    tmp_path.mkdir(exist_ok=True)
    data = write_lines(tmp_path / "test.jsonl", *map(row, range(3, 3 + count)))
    path = tmp_path / "answers.jsonl"
    return {"limit": count, "shots": 1, "data": data, "train": data, "threads": 1, "answers": path}


def test_a_run_that_was_killed_goes_on_and_ends_as_if_it_had_not(tmp_path, monkeypatch, nano):
    """The worker is killed after its second answer; its row says so, and the next run asks the rest."""
    monkeypatch.setattr(gsm8k, "MAX_TOKENS", 8)
    options = keeping(tmp_path)
    monkeypatch.setattr("benchmarks.accuracy.evaluate.run_worker", killed_after(2))
    killed, straight = evaluate(["torch:nano", f"torch:{nano.path}"], **options)["results"]
    assert "killed by SIGKILL" in killed["error"] and "(after 2 of 4 questions)" in killed["error"]
    assert (straight["n"], straight["taken_over"]) == (4, 0)  # the others go on
    monkeypatch.undo()
    monkeypatch.setattr(gsm8k, "MAX_TOKENS", 8)
    kept = options["answers"].read_bytes()
    options["answers"].write_bytes(kept + b'{"artifact": "torch:nano", "ques')  # a kill in mid-line
    [resumed] = evaluate(["torch:nano"], **options)["results"]
    assert 2 <= resumed["taken_over"] < 4 and resumed["n"] == 4
    assert options["answers"].read_bytes().startswith(kept)
    assert resumed["answers"] == straight["answers"]  # the same model under another name
    monkeypatch.setattr("benchmarks.accuracy.evaluate.run_worker", None)  # nothing is left to ask
    [read] = evaluate(["torch:nano"], **options)["results"]
    assert (read["answers"], read["taken_over"]) == (straight["answers"], 4)
    lines = [json.loads(line) for line in options["answers"].read_text().splitlines()]
    answers = [line for line in lines if line["artifact"] == "torch:nano" and "question" in line]
    assert sorted(line["question"] for line in answers) == ["0", "1", "2", "3"]
    wanted = {"prompt_sha256", "text", "extracted", "right", "flexible", "answer_tokens", "seconds"}
    assert all(wanted <= set(line) for line in answers)


def killed_after(answers: int):
    """`run_worker`, whose first worker is killed once it has told of so many answers."""
    done = []

    def run(job, progress):
        def told(count, total):
            progress(count, total)
            if count == answers and not done:
                done.append(True)
                os.kill(process.pid, signal.SIGKILL)

        made = []
        real = launch.subprocess.Popen

        def start(*args, **kwargs):
            made.append(real(*args, **kwargs))
            return made[-1]

        class Held:
            @property
            def pid(self):
                return made[-1].pid

        process = Held()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch.subprocess, "Popen", start)
            return launch.run_worker(job, told)

    return run


def test_other_questions_in_the_file_are_told_before_anything_is_run(tmp_path, monkeypatch):
    options = keeping(tmp_path)
    monkeypatch.setattr("benchmarks.accuracy.evaluate.run_worker", lambda job, told: fake_answers(job))
    evaluate(["torch:nano"], **options)
    with pytest.raises(
        FoxEdgeError, match="given under seed null, but this run has seed 1; name another file"
    ):
        evaluate(["torch:nano"], **options, seed=1)
    with pytest.raises(FoxEdgeError, match=r"shots 1.*shots 0"):
        evaluate(["torch:nano"], **{**options, "shots": 0})
    with pytest.raises(FoxEdgeError, match="options"):
        evaluate(["torch:nano"], **options, session={"kv": "float32"})
    assert evaluate(["torch:nano"], **{**options, "limit": 2})["n"] == 2  # fewer or more are the same run


def fake_answers(job):
    said = {"text": "#### 1", "cut": False, "prompt_tokens": 1, "reused_tokens": 0, "seconds": 0.0}
    return {"answers": [said] * (len(job["prompts"]) - len(job["skip"])), "seconds": 0.0}


def test_no_room_for_the_answers_and_two_runs_at_once_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.accuracy.evaluate.run_worker", lambda job, told: fake_answers(job))
    options = keeping(tmp_path)
    with pytest.raises(FoxEdgeError, match=r"^/dev/full: cannot be written \(No space left on device\)$"):
        evaluate(["torch:nano"], **{**options, "answers": Path("/dev/full")})
    with (
        AnswersLog(options["answers"]),
        pytest.raises(FoxEdgeError, match="another run is writing its answers there"),
    ):
        evaluate(["torch:nano"], **options)


def test_the_verb_takes_seed_shots_and_answers(tmp_path, monkeypatch, capsys):
    asked = {}
    monkeypatch.setattr(
        "benchmarks.accuracy.evaluate.evaluate",
        lambda artifacts, **options: asked.update(options) or {"results": []},
    )
    assert main(["eval", "torch:nano", "--seed", "3", "--answers", "a.jsonl", "--json"]) == 0
    assert (asked["seed"], asked["shots"], asked["answers"]) == (3, None, Path("a.jsonl"))
    monkeypatch.undo()
    data = write_lines(tmp_path / "test.jsonl", row(1), "broken")
    assert main(["eval", "torch:nano", "--data", str(data), "--train", str(data), "--seed", "0"]) == 2
    said = capsys.readouterr().err
    assert f"{data}, line 2: not JSON" in said and "Traceback" not in said
