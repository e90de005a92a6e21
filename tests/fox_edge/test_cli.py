"""The user's words: the real command line, its exit statuses, its JSON."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fox_edge import cli
from runtimes.base import SessionOptions
from tests.helpers import TINY_256, make_checkpoint

EXPORT_KEYS = {
    "artifact",
    "format",
    "quant",
    "bytes",
    "bits_per_weight",
    "tied_copies",
    "seconds",
    "peak_rss_bytes",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("cli") / "fox", TINY_256)


@pytest.fixture(scope="module")
def artifact(checkpoint: Path) -> Path:
    out = checkpoint.parent / "artifact"
    # A random model has no confident next token, so its greedy text says nothing about rounding.
    arguments = ["--format", "gguf", "--quant", "int8", "--greedy-tokens", "0"]
    assert cli.main(["export", str(checkpoint), str(out), *arguments]) == 0
    return out


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        status = cli.main([str(a) for a in arguments])
    except SystemExit as error:
        status = int(error.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def mistake(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs, expects exit status 2, nothing on stdout and one sentence on stderr (after notes); returns it."""
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    *notes, sentence = err.splitlines()
    assert all(note.startswith("note: ") for note in notes), err
    return sentence


def test_export_json(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--format", "onnx", "--quant", "int8", "--greedy-tokens", "0", "--json")
    status, out, _ = run(capsys, "export", checkpoint, tmp_path / "a", *arguments)
    result = json.loads(out)
    assert status == 0
    assert set(result) >= EXPORT_KEYS
    assert result["tied_copies"] == 1
    assert result["bytes"] == sum(p.stat().st_size for p in (tmp_path / "a").iterdir())


def test_export_says_which_tensors_got_another_type(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(TINY_256, intermediate_size=272)
    uneven = make_checkpoint(tmp_path / "uneven", config)
    arguments = ("--format", "onnx", "--quant", "int8", "--greedy-tokens", "0")
    status, out, _ = run(capsys, "export", uneven, tmp_path / "out", *arguments)
    assert status == 0
    assert (
        "note: model.layers.0.mlp.down_proj.weight and 1 more stored as q8s16: 272 columns are no whole "
        "number of q8s128 blocks of 128"
    ) in out


def test_verify_says_yes_and_no(
    checkpoint: Path, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb = ("verify", artifact, "--greedy-tokens", "0", "--json", "--checkpoint")
    status, out, _ = run(capsys, *verb, checkpoint)
    result = json.loads(out)
    assert status == 0 and result["passed"]
    assert {"mean_kl_nats", "top1_agreement_percent", "checks"} <= set(result)
    status, out, _ = run(capsys, *verb, make_checkpoint(tmp_path / "other", TINY_256, seed=1))
    assert status == 2 and not json.loads(out)["passed"]


def test_inspect_json(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "inspect", artifact, "--context", "64", "--json")
    result = json.loads(out)
    assert status == 0
    assert {"parameters", "bytes", "tied", "tensors", "memory"} <= set(result)


def test_chat_answers_one_question(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "chat", artifact, "hello world", "--max-tokens", "4")
    assert status == 0 and out.endswith("\n")
    again = run(capsys, "chat", artifact, "hello world", "--max-tokens", "4")
    assert again[1] == out


def test_the_question_may_come_last(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(capsys, "chat", artifact, "hello world", "--max-tokens", "4")
    last = run(capsys, "chat", artifact, "--max-tokens", "4", "hello world")
    assert last[:2] == first[:2] and first[0] == 0
    for words in (("hello", "world"), ("--nonsense",)):
        with pytest.raises(SystemExit) as exit:
            cli.main(["chat", str(artifact), "--max-tokens", "4", *words])
        assert exit.value.code == 2
        assert f"unrecognized arguments: {' '.join(words)}" in capsys.readouterr().err


def test_prompt_longer_than_the_context(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = mistake(capsys, "chat", artifact, "fox " * 200, "--context", "64")
    assert "the question alone takes" in line and "the context holds 64" in line


def test_new_then_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "new", tmp_path / "fox", "--shape", "nano", "--seed", "3", "--json")
    assert status == 0 and json.loads(out)["parameters"] == 6_557_952
    assert "unknown shape" in mistake(capsys, "new", tmp_path / "b", "--shape", "nonsense")


def test_mistakes_about_rounding(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, empty, short = tmp_path / "out", tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("")
    short.write_text("fox")
    onnx = ("export", checkpoint, out, "--format", "onnx")
    gguf = ("export", checkpoint, out, "--format", "gguf")
    line = mistake(capsys, *gguf, "--compat", "optimum")
    assert "--compat is for --format onnx, not gguf" in line
    line = mistake(capsys, *gguf, "--quant", "iq2_xxs", "--rounding", "nearest")
    assert "iq2_xxs is rounded by what its columns are worth" in line
    line = mistake(capsys, *gguf, "--imatrix", short, "--calibrate", empty)
    assert "empty.txt: calibration text, but" in line and "short.txt says already" in line
    line = mistake(capsys, *gguf, "--imatrix", short, "--rounding", "compensated")
    assert "an importance matrix is for search rounding, not for compensated" in line
    assert "short.txt" in mistake(capsys, *gguf, "--imatrix", short)
    assert "empty.txt: 0 tokens of calibration text" in mistake(capsys, *onnx, "--calibrate", empty)
    assert "but a window takes" in mistake(capsys, *onnx, "--calibrate", short)
    assert "none.txt: not readable" in mistake(capsys, *onnx, "--calibrate", tmp_path / "none.txt")
    line = mistake(capsys, *onnx, "--calibrate", short, "--quant", "int8")
    assert "calibration text, but nothing of this export is rounded by it" in line
    assert not out.exists()


def test_mistakes_of_the_user(
    checkpoint: Path, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = ("--format", "gguf")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no such folder" in mistake(capsys, "export", tmp_path / "nowhere", tmp_path / "o", *export)
    assert "empty" in mistake(capsys, "export", empty, tmp_path / "o", *export)
    line = mistake(capsys, "export", checkpoint, tmp_path / "o", *export, "--quant", "int5")
    assert "int8, laptop, int4, phone, tiny, f32" in line and "q4_k" in line
    assert "exists already" in mistake(capsys, "export", checkpoint, artifact, *export)
    gguf = next(artifact.glob("*.gguf"))
    assert "GGUF" in mistake(capsys, "export", gguf, tmp_path / "o", *export)
    assert "not an exported model" in mistake(capsys, "chat", empty)
    assert "no such recipe file" in mistake(
        capsys, "export", checkpoint, tmp_path / "o", *export, "--quant", "x.toml"
    )
    assert "not readable" in mistake(
        capsys, "export", checkpoint, tmp_path / "o", *export, "--text", tmp_path / "none.txt"
    )
    assert not (tmp_path / "o").exists()


def test_mistakes_in_the_grammar(capsys: pytest.CaptureFixture[str]) -> None:
    assert "invalid choice: 'exprot'" in mistake(capsys, "exprot")
    assert "--format" in mistake(capsys, "export", "nano", "out")
    assert "not a whole number from 1" in mistake(capsys, "inspect", "nano", "--context", "0")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(target: str) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("fox_edge.inspection.inspect", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["inspect", "nano"])


def test_missing_package_names_the_extra(checkpoint: Path, tmp_path: Path) -> None:
    """As on a machine without onnx: the import fails, the user gets one sentence and status 2."""
    program = (
        "import sys; sys.modules['onnx'] = None; sys.modules['onnxruntime'] = None\n"
        "from fox_edge import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    arguments = ["export", str(checkpoint), str(tmp_path / "o"), "--format", "onnx"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "fox-edge[onnx]" in done.stderr and "Traceback" not in done.stderr


def test_help_imports_nothing_heavy() -> None:
    """What makes --help instant; asserted on the cause, since seconds belong in benchmarks."""
    program = (
        "import sys\nfrom fox_edge import cli\n"
        "try:\n    cli.main(['export', '--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'llama_cpp', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--format" in done.stdout


def test_sigkill_in_mid_export_leaves_no_artifact(checkpoint: Path, tmp_path: Path) -> None:
    program = (
        "import sys, os, signal\nfrom fox_edge.artifact import ArtifactWriter\n"
        "ArtifactWriter.commit = lambda self, manifest: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from fox_edge import cli; cli.main(sys.argv[1:])"
    )
    arguments = ["export", str(checkpoint), str(tmp_path / "out"), "--format", "gguf", "--greedy-tokens", "0"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--max-mean-kl", "1"], capture_output=True
    )
    assert done.returncode == -9
    assert not (tmp_path / "out").exists()
    # What is left is hidden, named .partial, and no artifact: it has no manifest.
    left = list(tmp_path.iterdir())
    assert [p.name.endswith(".partial") for p in left] == [True]
    assert not (left[0] / "manifest.json").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_stdout_on_a_full_disk_is_one_sentence() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fox_edge.cli", "doctor", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr == "fox-edge doctor: cannot be written (No space left on device)\n"


@pytest.mark.parametrize("verb", [["chat", "x"], ["bench", "x"], ["eval", "x"]])
def test_session_choices_reach_the_session(verb: list[str]) -> None:
    args = cli.parse([*verb, "--kv", "int8", "--accuracy-level", "1", "--no-cache"])
    options = SessionOptions(**cli._session(args))
    assert (options.kv, options.accuracy_level, options.cache) == ("int8", 1, False)
    words = ["--repack", "off", "--flash-attention", "on", "--mmap", "off", "--prompt-threads", "3"]
    options = SessionOptions(**cli._session(cli.parse([*verb, *words])))
    assert (options.repack, options.flash_attention, options.mmap) == (False, True, False)
    assert options.prompt_threads == 3
    # Only a chat guesses ahead unless it is told not to.
    default = SessionOptions(speculate="auto" if verb[0] == "chat" else None)
    assert SessionOptions(**cli._session(cli.parse(verb))) == default
