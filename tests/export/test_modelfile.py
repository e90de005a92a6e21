"""Modelfiles: a strict parser of Ollama's published grammar, and a small reading of Go's templates."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from export.gguf import export_gguf
from export.modelfile import ChatFormat, chat_format, go_template, modelfile
from fox_edge.chat_template import FOX_TEMPLATE
from fox_edge.checkpoint import Checkpoint
from fox_edge.quant import GGUF, find_recipe
from fox_edge.tokenizer import Tokenizer
from tests.helpers import CHAT_TEMPLATE, make_checkpoint

PARAMETERS = {"num_ctx": int, "stop": str, "temperature": float, "top_k": int, "top_p": float, "min_p": float}
PARAMETERS |= {"repeat_penalty": float}
INSTRUCTIONS = ("FROM", "PARAMETER", "TEMPLATE", "LICENSE")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set s = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set s = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m['role'] == 'user' %}"
    "{{ bos_token }}[INST] {{ s if loop.first }}{{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
SECOND_TURN_DIFFERS = (
    "{% for m in messages %}{{ '<first>' if loop.index0 == 2 else '<turn>' }}"
    "{{ m['content'] }}</turn>{% endfor %}"
)
UPPER = "{% for m in messages %}[{{ m['content'] | upper }}]{% endfor %}"
BRACES = "{% for m in messages %}{{ '{{' }}{{ m['role'] }}{{ '}}' }}{{ m['content'] }}\n{% endfor %}"
KNOWN = {"fox": None, "helpers": CHAT_TEMPLATE, "chatml": CHATML, "no system": NO_SYSTEM, "llama-2": LLAMA_2}


def tokenizer(folder: Path, template: str | None) -> Tokenizer:
    """The tiny Gemma-like tokenizer with this template; None: none, so that Fox's own is used."""
    settings_path = make_checkpoint(folder) / "tokenizer_config.json"
    settings = json.loads(settings_path.read_text()) | {"chat_template": template}
    settings_path.write_text(json.dumps(settings))
    return Tokenizer.from_folder(folder)


def parse(text: str) -> list[tuple[str, str]]:
    """(instruction, value) of a Modelfile: lines, comments, values bare, quoted, or in three quotes."""
    found, at = [], 0
    while at < len(text):
        if text[at] in "#\n":
            at = text.index("\n", at) + 1
            continue
        name = re.compile(r"[A-Z]+ ").match(text, at)
        assert name is not None and name[0].strip() in INSTRUCTIONS, text[at : at + 40]
        at = name.end()
        if text.startswith('"""', at):
            end = text.index('"""', at + 3)
            value, at = text[at + 3 : end], end + 3
        else:
            end = text.index("\n", at)
            value, at = text[at:end], end
        assert text[at] == "\n"
        found.append((name[0].strip(), value))
    return found


def go(template: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template makes of the actions that our templates use."""
    parts = re.split(r"(\{\{ .*? \}\})", template)
    variables: dict[str, bool] = {}

    def run(tokens: Iterator[str], message: dict[str, str], live: bool) -> tuple[str, str]:
        """Text up to the end of this block, and the action that ended it."""
        out = ""
        for token in tokens:
            if not token.startswith("{{"):
                out += token if live else ""
                continue
            action = token[3:-3]
            if action == "end" or action.startswith("else if"):
                return out, action
            if action == ".Content":
                out += message["content"] if live else ""
            elif found := re.fullmatch(r"(\$\w+) :?= (true|false)", action):
                if live:
                    variables[found[1]] = found[2] == "true"
            elif action == "range .Messages":
                block = take_block(tokens)
                for each in messages if live else ():
                    out += run(iter(block), each, True)[0]
            else:
                out += branches(action, tokens, message, live)
        return out, ""

    def branches(action: str, tokens: Iterator[str], message: dict[str, str], live: bool) -> str:
        out, done = "", False
        while action != "end":
            true = live and not done and holds(action.removeprefix("else "), message)
            text, action = run(tokens, message, true)
            out, done = out + text, done or true
        return out

    def holds(action: str, message: dict[str, str]) -> bool:
        if found := re.fullmatch(r'if eq \.Role "(\w+)"', action):
            return message["role"] == found[1]
        found = re.fullmatch(r"if not (\$\w+)", action)
        assert found is not None, action
        return not variables[found[1]]

    def take_block(tokens: Iterator[str]) -> list[str]:
        block, depth = [], 1
        for token in tokens:
            depth += token.startswith(("{{ if", "{{ range")) - (token == "{{ end }}")
            if not depth:
                break
            block.append(token)
        return block

    return run(iter(parts), {}, True)[0]


CONVERSATIONS = [
    [("user", "Hi")],
    [("user", "Two\n\nlines"), ("assistant", "So <what> {x}?"), ("user", "1 + 1")],
    [("system", "Be brief."), ("user", "Hi")],
    [
        ("system", "Be brief."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
        ("user", "e"),
    ],
]


@pytest.mark.parametrize("name", KNOWN)
def test_the_go_template_says_what_the_jinja_template_says(name: str, tmp_path: Path) -> None:
    found = tokenizer(tmp_path, KNOWN[name])
    assert found.chat_template == (KNOWN[name] or FOX_TEMPLATE)
    format = chat_format(found)
    assert format is not None
    assert (format.system is None) == (name == "no system")
    template = go_template(format, found)
    assert template is not None
    for conversation in CONVERSATIONS:
        if conversation[0][0] == "system" and format.system is None:
            continue
        messages = [{"role": role, "content": content} for role, content in conversation]
        # Ollama puts <bos> before the prompt itself, as the GGUF tells it to.
        assert go(template, messages) == found.render_chat(messages).removeprefix("<bos>")


def test_nanos_format(nano: Checkpoint) -> None:
    assert chat_format(nano.tokenizer()) == ChatFormat(
        start="<bos>",
        user=("<start_of_turn>user\n", "<end_of_turn>\n"),
        assistant=("<start_of_turn>model\n", "<end_of_turn>\n"),
        system=("<start_of_turn>user\n", "\n\n"),
        answer="<start_of_turn>model\n",
    )
    template = dict(parse(modelfile(nano, "nano-int4.gguf")))["TEMPLATE"]
    for conversation in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in conversation]
        assert "<bos>" + go(template, messages) == nano.tokenizer().render_chat(messages)


@pytest.mark.parametrize(
    "template", [SECOND_TURN_DIFFERS, UPPER, "no messages", "{{ messages[7]['content'] }}"]
)
def test_a_template_that_does_more_than_frame_messages_is_left_out(template: str, tmp_path: Path) -> None:
    found = tokenizer(tmp_path, template)
    assert chat_format(found) is None
    text = modelfile(Checkpoint.open(tmp_path), "x.gguf")
    assert "TEMPLATE" not in dict(parse(text)) and "# The chat template frames messages in a way" in text


def test_text_that_a_modelfile_cannot_hold_is_left_out(tmp_path: Path) -> None:
    found = tokenizer(tmp_path, BRACES)
    format = chat_format(found)
    assert format is not None and go_template(format, found) is None
    assert "TEMPLATE" not in dict(parse(modelfile(Checkpoint.open(tmp_path), "x.gguf")))


def test_the_whole_file(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "Fox-1-1.6B-Instruct-v0.1")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    sampling = {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1, "min_p": "much"}
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, **sampling}))
    artifact = export_gguf(Checkpoint.open(folder), tmp_path / "out", find_recipe(GGUF, "int8"))
    found = parse((artifact.path / "Modelfile").read_text())
    assert found[0] == ("FROM", "./Fox-1-1.6B-Instruct-v0.1-int8.gguf")
    assert (artifact.path / found[0][1]).is_file()
    assert [name for name, _ in found] == ["FROM", "TEMPLATE", *["PARAMETER"] * 7, "LICENSE"]
    told = [value.split(" ", 1) for name, value in found if name == "PARAMETER"]
    assert {key: PARAMETERS[key](value) for key, value in told if key != "stop"} == {
        "num_ctx": 256,
        "temperature": 0.7,
        "top_k": 40,
        "top_p": 0.95,
        "repeat_penalty": 1.1,
    }
    assert [value for key, value in told if key == "stop"] == ['"<eos>"', '"<end_of_turn>"']
    assert found[-1] == ("LICENSE", "apache-2.0")
    assert "Modelfile" in artifact.manifest.files


def test_greedy_checkpoints_ask_for_no_sampling(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.7}))
    assert "temperature" not in modelfile(Checkpoint.open(folder), "x.gguf")
