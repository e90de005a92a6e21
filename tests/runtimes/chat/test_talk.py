"""The real command line on a pseudo-terminal and through pipes: whole transcripts, and exit statuses."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from export.gguf import export_gguf
from export.onnx import export_onnx
from fox_edge import cli
from fox_edge.artifact import Artifact
from fox_edge.chat_template import FOX_TEMPLATE
from fox_edge.checkpoint import Checkpoint
from fox_edge.quant import GGUF, ONNX, find_recipe
from runtimes.base import SessionOptions, open_session
from runtimes.generate import generate
from tests.runtimes.chat.pseudo_terminal import PseudoTerminal

# Unquantized, and questions that nano is sure about: running a prompt whole or in parts rounds differently.
EXACT = {GGUF: "f32", ONNX: "float32"}
FOX = "Ivy buys 4 crates of 12 apples. She gives 9 apples to Julia. How many does she have left?"
SUM = "Tom has 15 eggs. He buys 7 more. How many eggs does he have?"
# readline sends no escape sequences to a dumb terminal; a second thread is slower when a machine is busy.
ENV = {**os.environ, "TERM": "dumb", "INPUTRC": "/dev/null", "OMP_NUM_THREADS": "1"}
CHAT = [sys.executable, "-m", "fox_edge.cli", "chat"]
HINT = '/help lists the commands, """ holds several lines, Ctrl-C stops an answer, Ctrl-D leaves\n'
# The command line with a model that takes a rest, once, after so many tokens.
RESTING = """
import signal, sys, time
from runtimes.generate import Generation
from fox_edge import cli
ordinary, rests = Generation.__next__, [int(sys.argv.pop(1))]
def resting(self):
    if rests and len(self.tokens) == rests[0]:
        rests.clear()
        print("[resting]", end="", flush=True)
        time.sleep(600)
    return ordinary(self)
Generation.__next__ = resting
signal.signal(signal.SIGUSR1, lambda *_: None)
status = cli.main(sys.argv[1:])
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
sys.exit(status)
"""


@pytest.fixture(scope="module", params=[GGUF, ONNX])
def artifact(
    request: pytest.FixtureRequest, nano: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    export = export_gguf if request.param == GGUF else export_onnx
    out = tmp_path_factory.mktemp("talk") / f"nano-{request.param}"
    return export(nano, out, find_recipe(request.param, EXACT[request.param]))


@pytest.fixture(scope="module")
def gguf(nano: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_gguf(nano, tmp_path_factory.mktemp("talk") / "nano", find_recipe(GGUF, EXACT[GGUF]))


class Oracle:
    """What the model answers, from a session of its own and the whole conversation encoded anew."""

    def __init__(self, artifact: Artifact, system: str | None = None) -> None:
        self.tokenizer = Checkpoint.open("nano").tokenizer()
        self._session = open_session(artifact, SessionOptions(threads=1))
        self.messages = [{"role": "system", "content": system}] if system else []

    def tokens(self, question: str, most: int = 512) -> list[int]:
        self.messages.append({"role": "user", "content": question})
        self._session.reset()
        prompt = self.tokenizer.encode_chat(self.messages)
        return list(generate(self._session, prompt, stop_ids=self.tokenizer.stop_ids, max_tokens=most))

    def ask(self, question: str, most: int = 512) -> str:
        answer = self.tokenizer.decode(self.tokens(question, most))
        self.messages.append({"role": "assistant", "content": answer})
        return answer


def terminal(artifact: Artifact, *arguments: str) -> PseudoTerminal:
    return PseudoTerminal([*CHAT, str(artifact.path), "--threads", "1", *arguments], ENV)


def resting(artifact: Artifact, after: int, *arguments: str) -> PseudoTerminal:
    command = [sys.executable, "-c", RESTING, str(after), "chat", str(artifact.path), "--threads", "1"]
    return PseudoTerminal([*command, *arguments], ENV)


def steady(transcript: str) -> str:
    """A transcript without what differs from run to run: megabytes, seconds, rates."""
    text = re.sub(r"; [\d,.]+ MB of memory", "", transcript)  # macOS does not tell
    text = re.sub(r"[\d,.]+ MB", "? MB", text)
    return re.sub(r"\d+\.\d+ s\b", "? s", re.sub(r"[\d.]+ tokens/s", "? tokens/s", text))


def opening(artifact: Artifact, context: str = "1,024") -> str:
    manifest = artifact.manifest
    runtime = {GGUF: "llama.cpp", ONNX: "onnxruntime"}[manifest.format]
    return (
        "note: this artifact was never verified\n"
        f"nano, {manifest.format} {manifest.quant}, ? MB, on {runtime}; context of {context} tokens; greedy\n"
        f"{HINT}"
    )


def test_a_whole_conversation(artifact: Artifact, tmp_path: Path) -> None:
    oracle, file = Oracle(artifact), tmp_path / "c.json"
    first, second = oracle.ask(FOX), oracle.ask(SUM)
    lengths = [len(oracle.tokenizer.encode_chat(oracle.messages[:n])) for n in (1, 3)]
    said = len(oracle.tokenizer.encode(second))
    # The second turn's own: the end of the answer before it, the question, and the template around it.
    own = f"<end_of_turn>\n<start_of_turn>user\n{SUM}<end_of_turn>\n<start_of_turn>model\n"
    turn = len(oracle.tokenizer.encode(own, special=True))
    screen = terminal(artifact)
    screen.answer("> ", FOX)
    screen.answer("\n> ", SUM)
    screen.answer("\n> ", "/stats")
    screen.answer("\n> ", f"/save {file}")
    screen.answer("\n> ", "/undo")
    screen.answer("\n> ", "/retry")
    screen.answer("\n> ", f"/load {file}")
    screen.answer("\n> ", "/more")
    screen.answer("\n> ", "/udno")
    screen.answer("\n> ", "/quit")
    assert screen.finish() == 0
    held = lengths[1] + said
    assert steady(screen.transcript) == opening(artifact) + (
        f"> {FOX}\n{first}\n"
        f"> {SUM}\n{second}\n"
        "> /stats\n"
        f"last answer: prompt of {lengths[1]} tokens, {lengths[1] - turn} reused, {turn} run, "
        f"first text after ? s; {said} tokens said, ? tokens/s\n"
        f"conversation: 2 turns; {held} of 1,024 tokens in the context; of all prompts {lengths[0] + turn} "
        f"tokens run, {lengths[1] - turn} reused\n"
        "sampling: greedy\n"
        f"> /save {file}\n(saved 2 turns in {file})\n"
        f"> /undo\n(took back: {SUM})\n"
        f"> /retry\n{first}\n"
        f"> /load {file}\n(loaded 2 turns; sampling: greedy)\n"
        "> /more\n(there is no answer that was cut)\n"
        "> /udno\n(no command /udno; did you mean /undo?)\n"
        "> /quit\n"
    )
    assert [m["content"] for m in json.loads(file.read_text())["messages"]] == [FOX, first, SUM, second]


def test_ctrl_c_stops_the_answer_and_twice_leaves(gguf: Artifact) -> None:
    oracle = Oracle(gguf)
    tokens = oracle.tokens(FOX)
    begun, whole = oracle.tokenizer.decode(tokens[:5]), oracle.tokenizer.decode(tokens)
    screen = resting(gguf, 5)
    screen.answer("> ", FOX)
    screen.expect("[resting]")
    screen.interrupt("goes on)")
    screen.answer("\n> ", "/more")
    screen.expect("\n> ")
    screen.interrupt("quit do)")
    screen.answer("\n> ", "/undo")
    screen.expect("\n> ")
    screen.interrupt("quit do)")
    screen.expect("\n> ")
    screen.interrupt("\n")
    assert screen.finish() == 0
    dropped = "> \n(Ctrl-C again leaves, as Ctrl-D and /quit do)\n"
    assert steady(screen.transcript).replace("^C", "") == opening(gguf) + (
        f"> {FOX}\n{begun}[resting]\n(stopped; /more goes on)\n"
        f"> /more\n{whole.removeprefix(begun)}\n"
        f"{dropped}> /undo\n(took back: {FOX[:57]}...)\n{dropped}> \n"
    )


def test_ctrl_c_before_the_answer_keeps_no_turn(gguf: Artifact) -> None:
    answer = Oracle(gguf).ask(FOX)
    screen = resting(gguf, 0)
    screen.answer("> ", SUM)
    screen.expect("[resting]")
    screen.interrupt("not kept)")
    screen.answer("\n> ", FOX)
    screen.expect("\n> ")
    screen.send("\x04")
    assert screen.finish() == 0
    assert steady(screen.transcript).replace("^C", "").replace("^D", "") == opening(gguf) + (
        f"> {SUM}\n[resting]\n(stopped before the answer began; it is not kept)\n> {FOX}\n{answer}\n> \n"
    )


def test_several_lines_limits_and_a_full_context(gguf: Artifact) -> None:
    oracle = Oracle(gguf, "Be brief.")
    first = oracle.ask("What is\n8 + 3?", 4)
    del oracle.messages[1:]
    second = oracle.ask(FOX, 4)
    screen = terminal(gguf, "--context", "48", "--max-tokens", "4", "--system", "Be brief.")
    screen.answer("> ", '"""What is')
    screen.answer("\n... ", '8 + 3?"""')
    screen.answer("\n> ", FOX)
    screen.answer("\n> ", "Foxes and dens and cubs. " * 5)
    screen.answer("\n> ", "/system")
    screen.expect("\n> ")
    screen.send("\x04")
    assert screen.finish() == 0
    cut = "(cut after 4 tokens; /more goes on)\n"
    text = re.sub(r"takes \d+ tokens", "takes ? tokens", steady(screen.transcript).replace("^D", ""))
    assert text == opening(gguf, "48") + (
        f'> """What is\n... 8 + 3?"""\n{first}\n{cut}'
        f"> {FOX}\n(the context of 48 tokens is full: the oldest turn is left out of it)\n{second}\n{cut}"
        f"> {'Foxes and dens and cubs. ' * 5}\n"
        "(the question alone takes ? tokens, template and system message included, but the context holds 48, "
        "and the answer needs room too)\n"
        "> /system\n(system message: Be brief.)\n> \n"
    )


def test_answers_go_to_a_file_and_all_else_to_the_terminal(gguf: Artifact, tmp_path: Path) -> None:
    """`fox-edge chat A > answers`: the prompt and the remarks are still seen."""
    answers, oracle = tmp_path / "answers", Oracle(gguf)
    expected = oracle.ask(SUM) + "\n"
    words = " ".join([*CHAT, str(gguf.path), "--threads", "1"])
    screen = PseudoTerminal(["/bin/sh", "-c", f"exec {words} > {answers}"], ENV)
    screen.answer("> ", SUM)
    screen.answer("> ", "/undo")
    screen.expect("> ")
    screen.send("\x04")
    assert screen.finish() == 0
    assert answers.read_text() == expected
    assert steady(screen.transcript).replace("^D", "") == opening(gguf) + (
        f"> {SUM}\n> /undo\n(took back: {SUM})\n> \n"
    )


# --- scripts ---------------------------------------------------------------------------------------------


def script(artifact: Artifact, *arguments: str, stdin: bytes | None = None) -> tuple[int, str, str]:
    done = subprocess.run(
        [*CHAT, str(artifact.path), "--threads", "1", *arguments],
        stdin=subprocess.DEVNULL if stdin is None else None,
        input=stdin,
        capture_output=True,
        env={**ENV, "TERM": "xterm-256color"},
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


NEVER = "note: this artifact was never verified\n"


def test_every_way_to_ask_one_question(gguf: Artifact) -> None:
    """Exactly the answer on stdout, the same one each time, without a color."""
    answer = Oracle(gguf).ask(FOX) + "\n"
    start, end = FOX[:31], FOX[31:]
    pieces = Oracle(gguf).ask(f"{start}\n{end}") + "\n"
    assert script(gguf, FOX) == (0, answer, NEVER)
    assert script(gguf, "--prompt", FOX) == (0, answer, NEVER)
    assert script(gguf, stdin=FOX.encode() + b"\n") == (0, answer, NEVER)
    assert script(gguf, "--prompt", start, stdin=end.encode()) == (0, pieces, NEVER)


def test_one_json_document(gguf: Artifact) -> None:
    oracle = Oracle(gguf)
    status, out, err = script(gguf, FOX, "--json", "--max-tokens", "5")
    result = json.loads(out)
    assert (status, err) == (0, NEVER + "(cut after 5 tokens; --max-tokens allows more)\n")
    assert result["answer"] == oracle.ask(FOX, 5)
    assert (result["finish_reason"], result["answer_tokens"]) == ("length", 5)
    assert result["prompt_tokens"] == len(oracle.tokenizer.encode_chat(oracle.messages[:1]))
    assert {"model", "runtime", "load_s", "time_to_first_token_s", "decode_tokens_per_s", "rss_bytes"} <= set(
        result
    )


def test_sampling_and_stops_reach_the_model(gguf: Artifact) -> None:
    hot = ("--temperature", "5", "--top-k", "50", "--top-p", "0.99", "--min-p", "0.001")
    first, again, other = (script(gguf, FOX, *hot, "--seed", seed)[1] for seed in ("1", "1", "2"))
    assert first == again != other
    whole = Oracle(gguf).ask(FOX)
    stop = whole[10:13]
    assert script(gguf, FOX, "--stop", "never said", "--stop", stop)[1] == whole[: whole.index(stop)] + "\n"
    assert "--seed does nothing at temperature 0" in script(gguf, FOX, "--seed", "1", "--max-tokens", "1")[2]


def test_an_interrupted_script_says_so_by_its_status(gguf: Artifact) -> None:
    command = [sys.executable, "-c", RESTING, "3", "chat", str(gguf.path), FOX, "--threads", "1"]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENV,
        # Where the tests run in the background, it may be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        seen = b""
        while not seen.endswith(b"[resting]"):
            byte = process.stdout.read(1)
            assert byte, process.stderr.read()
            seen += byte
        process.send_signal(signal.SIGINT)
        while process.poll() is None:  # see PseudoTerminal.interrupt
            process.send_signal(signal.SIGUSR1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
        assert process.returncode == 130
        assert process.stderr.read().decode() == NEVER + "interrupted\n"


class Stdin:
    """Bytes that were piped in, or a terminal at which nobody types."""

    def __init__(self, data: bytes, tty: bool = False) -> None:
        self.buffer, self._tty = io.BytesIO(data), tty

    def isatty(self) -> bool:
        return self._tty

    def fileno(self) -> int:
        raise OSError


def test_mistakes_of_scripts(
    gguf: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistake(*arguments: str, stdin: bytes = b"", tty: bool = False, folder: Path = gguf.path) -> str:
        monkeypatch.setattr(sys, "stdin", Stdin(stdin, tty))
        assert cli.main(["chat", str(folder), "--threads", "1", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        return err.splitlines()[-1]

    assert mistake() == "fox-edge chat: there is no question: give one with --prompt, or on stdin"
    assert "there is no question" in mistake("", stdin=b" \n")
    assert "stdin is not UTF-8 text (byte 2 is" in mistake("--prompt", "x", stdin=b"ab\xff")
    assert "a question and --prompt are two questions" in mistake("x", "--prompt", "y")
    assert "--json is for one question" in mistake("--json", tty=True)
    assert "temperature is -1.0" in mistake("x", "--temperature", "-1")
    assert "a stop string is empty" in mistake("x", "--stop", "")
    line = mistake("--context", "64", stdin=b"fox " * 100)
    assert re.search(r"the question alone takes \d+ tokens, .* but the context holds 64", line)
    strict = altered(gguf, tmp_path / "strict")
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    (strict / "chat_template.jinja").write_text(refusal + "{{ messages[-1]['content'] }}")
    assert "no system role" in mistake("--system", "be brief", tty=True, folder=strict)
    assert "nano: no such artifact" in mistake("x", folder=Path("nano"))


def altered(gguf: Artifact, folder: Path, **files: dict[str, object]) -> Path:
    """A copy of an artifact with fields of its JSON files changed; None removes one."""
    shutil.copytree(gguf.path, folder)
    for name, changes in files.items():
        path = folder / f"{name}.json"
        fields = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    return folder


def ask_json(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    arguments = ("chat", str(folder), FOX, "--json", "--max-tokens", "3", "--threads", "1", *arguments)
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_a_model_without_a_template_is_told_of(
    gguf: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = altered(gguf, tmp_path / "bare")
    (bare / "chat_template.jinja").write_text(FOX_TEMPLATE)  # as an export of such a checkpoint has it
    result, err = ask_json(capsys, bare)
    assert "note: the checkpoint came without a chat template; Fox's own format is used\n" in err
    assert "chat template" not in ask_json(capsys, gguf.path)[1]
    prompt = f"<|user|>\n{FOX}<eos>\n<|assistant|>\n"
    assert result["prompt_tokens"] == 1 + len(Oracle(gguf).tokenizer.encode(prompt, special=True))


def test_a_model_s_own_wish_for_sampling(
    gguf: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wish = {"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}
    wishing = altered(gguf, tmp_path / "wishing", generation_config=wish)
    result, _ = ask_json(capsys, wishing, "--seed", "7", "--top-p", "0.5")
    words = "temperature 0.6, top_p 0.5, top_k 20, repeat_penalty 1.1, seed 7"
    assert result["sampling"] == words
    # Without a seed one is drawn, and told so that the answer can be had again.
    first, _ = ask_json(capsys, wishing)
    again, _ = ask_json(capsys, wishing, "--seed", first["sampling"].rpartition(" ")[2])
    assert first["answer"] == again["answer"]
    assert ask_json(capsys, wishing, "--temperature", "0")[0]["sampling"] == "greedy, repeat_penalty 1.1"
    only_numbers = altered(gguf, tmp_path / "numbers", generation_config={"temperature": 0.6})
    assert ask_json(capsys, only_numbers)[0]["sampling"] == "greedy"
    for value in ("hot", -1, 10**400, True):
        odd = altered(gguf, tmp_path / str(value)[:9], generation_config={**wish, "temperature": value})
        result, err = ask_json(capsys, odd)
        assert result["sampling"] == "greedy"
        assert "note: generation_config.json asks for sampling, but " in err and "Traceback" not in err


def test_a_checkpoint_s_own_model_in_pytorch(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "torch:nano", FOX, "--max-tokens", "30", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert len(out) > 20 and err == "(cut after 30 tokens; --max-tokens allows more)\n"
