"""The grammar of sweep.toml: what a good file means, and one sentence for every mistake."""

from pathlib import Path

import pytest

from benchmarks.accuracy.lm_eval_tasks import HARNESS_TASKS
from benchmarks.accuracy.tasks import TASKS
from benchmarks.sweep.file import Export, Run, read_sweep, task_keys
from fox_edge.errors import FoxEdgeError
from tests.helpers import make_checkpoint

EXAMPLE = Path(__file__).parents[3] / "docs" / "sweep.toml"


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "sweep.toml"
        path.write_text(text)
        return path

    return write


def test_a_file_is_multiplied_out(write, tmp_path):
    make_checkpoint(tmp_path / "fox")
    (tmp_path / "mine.toml").write_text('default = "q6_k"\n')
    (tmp_path / "text.txt").write_text("a text")
    asked = read_sweep(
        write(
            """
            checkpoints = ["nano", "fox", "owner/name"]
            reference = false
            [[exports]]
            format = "gguf"
            quant = ["int8", "mine.toml"]
            rounding = ["nearest", "search"]
            calibrate = "text.txt"
            max_mean_kl = 1
            [[exports]]
            format = ["gguf", "onnx"]
            quant = "int4"
            [tasks.bench]
            workload = "short"
            users = [1, 2]
            [tasks.word-problems]
            limit = 20
            seed = 0
            [run]
            threads = 2
            memory = "1.5 GiB"
            questions_per_step = 7
            """
        )
    )
    text, mine = tmp_path / "text.txt", str(tmp_path / "mine.toml")
    assert asked.checkpoints == ("nano", str(tmp_path / "fox"), "owner/name")
    assert asked.exports == (
        Export("gguf", "int8", "nearest", text, None, 1.0),
        Export("gguf", "int8", "search", text, None, 1.0),
        Export("gguf", mine, "nearest", text, None, 1.0),
        Export("gguf", mine, "search", text, None, 1.0),
        Export("gguf", "int4"),
        Export("onnx", "int4"),
    )
    assert asked.tasks == {
        "bench": {"workload": "short", "users": (1, 2)},
        "word-problems": {"limit": 20, "seed": 0},
    }
    assert asked.run == Run(2, 3 << 29, 7) and not asked.reference


def test_what_is_not_said_has_its_default(write):
    asked = read_sweep(write('checkpoints = "nano"'))
    assert (asked.checkpoints, asked.reference, asked.exports, asked.tasks) == (("nano",), True, (), {})
    assert asked.run == Run(None, None, 25)


def test_the_documented_example_is_read():
    assert read_sweep(EXAMPLE).exports


def test_every_task_that_eval_has_can_be_asked_for(tmp_path):
    assert set(task_keys(tmp_path)) == {"bench", "fidelity", *TASKS, *HARNESS_TASKS}


GGUF = '[[exports]]\nformat = "gguf"\nquant = "int8"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("checkpoints = nano", "not readable as TOML .*line 1"),
        ("checkpoint = 'nano'", "unknown key 'checkpoint'; known: checkpoints, reference, exports"),
        ("reference = true", "'checkpoints' is missing"),
        ("checkpoints = 3", "checkpoints is 3, but must be a text or a list of texts"),
        ("checkpoints = []", r"checkpoints is \[\], but must be a text or a list"),
        ("checkpoints = ['nano', 'nano']", "different texts .'nano' is there twice"),
        ("checkpoints = 'nano'\nreference = 1", "reference is 1, but must be true or false"),
        ("checkpoints = 'nano'\nreference = false", "nothing to do"),
        ("checkpoints = 'nano'\nexports = 1", "exports is 1, but must be tables, written"),
        ("checkpoints = 'nano'\n[[exports]]\nformat = 'gguf'", r"\[\[exports\]\] 1: 'quant' is missing"),
        ("checkpoints = 'nano'\n[[exports]]\nquant = 'int8'", r"\[\[exports\]\] 1: 'format' is missing"),
        (f"checkpoints = 'nano'\n{GGUF}quants = 'x'", "unknown key 'quants'; known: format, quant, rounding"),
        (f"checkpoints = 'nano'\n{GGUF}rounding = 'near'", "rounding is 'near', but must be of nearest, sea"),
        (
            f"checkpoints = 'nano'\n{GGUF}calibrate = 'no.txt'",
            "calibrate is 'no.txt', but must be a file, and",
        ),
        (f"checkpoints = 'nano'\n{GGUF}max_mean_kl = 0", "max_mean_kl is 0, but must be a number above 0"),
        (f"checkpoints = 'nano'\n{GGUF}{GGUF}", "ask for gguf int8 twice"),
        (
            "checkpoints = 'nano'\n[[exports]]\nformat = 'ggml'\nquant = 'int8'",
            "format is 'ggml', but must be of gguf, onnx",
        ),
        (
            f"checkpoints = 'nano'\n{GGUF}[[exports]]\nformat = 'onnx'\nquant = 'q4_k'",
            r"\[\[exports\]\] 2: unknown onnx quantization 'q4_k'; known: int8",
        ),
        (
            "checkpoints = 'nano'\n[[exports]]\nformat = 'gguf'\nquant = 'no.toml'",
            r"\[\[exports\]\] 1: .*no.toml: no such recipe file",
        ),
        ("checkpoints = 'nano'\n[tasks.gsm9k]", "unknown task 'gsm9k'; known: bench, fidelity, gsm8k"),
        ("checkpoints = 'nano'\n[tasks]\nbench = 3", r"task 'bench' must be a table: \[tasks.bench\]"),
        ("checkpoints = 'nano'\ntasks = 3", "tasks is 3, but must be a table"),
        (
            "checkpoints = 'nano'\n[tasks.gsm8k]\nlimt = 3",
            r"\[tasks.gsm8k\] unknown key 'limt'; known: limit, seed, shots, data, train",
        ),
        (
            "checkpoints = 'nano'\n[tasks.gsm8k]\nlimit = '3'",
            "limit is '3', but must be a whole number from 1",
        ),
        ("checkpoints = 'nano'\n[tasks.gsm8k]\nlimit = true", "limit is True, but must be a whole number"),
        ("checkpoints = 'nano'\n[tasks.gsm8k]\nshots = -1", "shots is -1, but must be a whole number from 0"),
        ("checkpoints = 'nano'\n[tasks.bench]\nworkload = 'x'", "workload is 'x', but must be one of custom"),
        (
            "checkpoints = 'nano'\n[tasks.bench]\nusers = [1, 1]",
            "users is .*, but must be a whole number from 1",
        ),
        ("checkpoints = 'nano'\n[run]\nthread = 1", r"\[run\] unknown key 'thread'; known: threads, memory"),
        ("checkpoints = 'nano'\n[run]\nmemory = '6GB'", "memory is '6GB', but must be a number and a unit"),
        ("checkpoints = 'nano'\n[run]\nmemory = 'nan GB'", "memory is 'nan GB', but must be a number"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_file(write, text, message):
    path = write(text)
    with pytest.raises(FoxEdgeError, match=message) as told:
        read_sweep(path)
    assert str(told.value).startswith(f"{path}: ") and "\n" not in str(told.value)
    assert len(str(told.value)) < 700


def test_a_file_too_large_is_not_read(write):
    with pytest.raises(FoxEdgeError, match="2000000 bytes, but a sweep file has at most 1048576"):
        read_sweep(write("#" * 2_000_000))


def test_no_file(tmp_path):
    with pytest.raises(FoxEdgeError, match=r"none\.toml: no such sweep file"):
        read_sweep(tmp_path / "none.toml")
