"""GSM8K: the number that is compared, beside the harness's; the prompt; files and what is wrong with them."""

import sys

import pytest
from huggingface_hub import errors

from benchmarks.accuracy import gsm8k
from benchmarks.accuracy.gsm8k import Question, final_number, judge, last_number, read_split
from benchmarks.accuracy.tasks import TaskOptions, make_task
from fox_edge.errors import FoxEdgeError, MissingPackageError
from tests.benchmarks.harness_data import gsm8k_row, write_jsonl

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


# --- data -----------------------------------------------------------------------------------------


def test_a_prompt_is_worked_examples_and_a_question():
    text = gsm8k.prompt([Question("One?", "Yes.\n#### 1"), Question("Two?", "#### 2")], "Three?")
    assert text == (
        "Question: One?\nAnswer: Yes.\n#### 1\n\nQuestion: Two?\nAnswer: #### 2\n\nQuestion: Three?\nAnswer:"
    )


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
    path = write_jsonl(tmp_path / "test.jsonl", [gsm8k_row(1), "", line])
    with pytest.raises(FoxEdgeError, match=rf"test\.jsonl, {message}"):
        read_split("test", path, "--data")


def test_lines_after_the_last_one_wanted_are_not_read(tmp_path):
    path = write_jsonl(tmp_path / "test.jsonl", [gsm8k_row(1), "broken"])
    assert len(read_split("test", path, "--data", 1)) == 1


def test_files_that_hold_nothing_or_too_little_are_named(tmp_path):
    with pytest.raises(FoxEdgeError, match=r"none\.jsonl: cannot be read"):
        read_split("test", tmp_path / "none.jsonl", "--data")
    with pytest.raises(FoxEdgeError, match=r"empty\.jsonl: holds no questions"):
        read_split("test", write_jsonl(tmp_path / "empty.jsonl", [""]), "--data")
    train = write_jsonl(tmp_path / "train.jsonl", [gsm8k_row(1)])
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
            return [gsm8k_row(3), gsm8k_row(4)]

    class Parquet:
        @staticmethod
        def read_table(path, columns):
            assert (path, columns) == ("/cache/test.parquet", ["question", "answer"])
            return Table()

    module = type(sys)("pyarrow")
    module.parquet = Parquet
    monkeypatch.setitem(sys.modules, "pyarrow", module)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: "/cache/test.parquet")
    asked = [question.question for question in read_split("test", None, "--data")]
    assert asked == [gsm8k_row(n)["question"] for n in (3, 4)]
