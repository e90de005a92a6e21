"""Chat formats: whose template wins, and what a hostile one may not do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fox_edge.chat_template import FOX_TEMPLATE
from fox_edge.errors import TokenizerError
from fox_edge.tokenizer import Tokenizer
from tests.helpers import write_tokenizer

MESSAGES = [
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "Three."},
    {"role": "user", "content": "And now?"},
]


def settings(folder: Path, **changes: Any) -> Path:
    """Change tokenizer_config.json; None removes a key."""
    path = folder / "tokenizer_config.json"
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    return folder


@pytest.fixture
def gemma(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


def test_exactly_one_bos(gemma: Path) -> None:
    t = Tokenizer.from_folder(gemma)
    ids = t.encode_chat(MESSAGES)
    assert ids[0] == 2 and ids.count(2) == 1
    without = Tokenizer.from_folder(settings(gemma, chat_template="{{ messages[0]['content'] }}"))
    assert without.encode_chat(MESSAGES)[:1] == [2] and without.encode_chat(MESSAGES).count(2) == 1


def test_fallback_is_foxs_format(gemma: Path) -> None:
    t = Tokenizer.from_folder(settings(gemma, chat_template=None))
    assert t.chat_template == FOX_TEMPLATE
    assert any("no chat template" in note for note in t.notes)
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert t.render_chat(system) == "<|system|>\nBe brief.<eos>\n<|user|>\nHi<eos>\n<|assistant|>\n"
    assert t.encode_chat(system).count(1) == 2


def test_own_template_needs_no_note(gemma: Path) -> None:
    assert Tokenizer.from_folder(gemma).notes == []


def test_where_templates_are_found(gemma: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "list"}]
    assert Tokenizer.from_folder(settings(gemma, chat_template=named)).chat_template == "list"
    settings(gemma, chat_template=None)
    (gemma / "chat_template.json").write_text('{"chat_template": "json"}')
    assert Tokenizer.from_folder(gemma).chat_template == "json"
    settings(gemma, chat_template="settings")
    assert Tokenizer.from_folder(gemma).chat_template == "settings"
    (gemma / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_folder(gemma).chat_template == "file"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot render"),
        ("{{ messages.__init__.__globals__ }}", "cannot render"),
        (
            "{% for m in messages %}{{ m.append }}{{ cycler.__init__.__globals__.os }}{% endfor %}",
            "cannot render",
        ),
        ("{{ 'x' * 999999999999 }}", "repetition too long"),
        ("{{ [0] * 999999999999 }}", "repetition too long"),
        ("{{ 9 ** 9 ** 9 ** 9 }}", "power too large"),
        ("{{ '%999999999d' % 1 }}", "not allowed"),
        ("{% for i in range(99999999) %}x{% endfor %}", "cannot render"),
        (
            "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
            "more than 16777216",
        ),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[9]['content'] + 'x' }}", "cannot render"),
        ("{{ nothing() }}", "nothing"),
        ("{% include '/etc/passwd' %}", "cannot render"),
    ],
)
def test_hostile_or_failing_template(gemma: Path, template: str, words: str) -> None:
    t = Tokenizer.from_folder(settings(gemma, chat_template=template))
    with pytest.raises(TokenizerError, match=words):
        t.render_chat(MESSAGES)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% if %}", "not valid Jinja"),
        (7, "int"),
        ("x" * (1 << 19), "524288 characters"),
        ("{{ x", "not valid"),
    ],
)
def test_template_that_is_none(gemma: Path, template: Any, words: str) -> None:
    with pytest.raises(TokenizerError, match=words):
        Tokenizer.from_folder(settings(gemma, chat_template=template))


@pytest.mark.parametrize(
    "messages", [[{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": None}]]
)
def test_messages_without_text(gemma: Path, messages: Any) -> None:
    with pytest.raises(TokenizerError, match="chat message 0 has no text under"):
        Tokenizer.from_folder(gemma).render_chat(messages)


def test_template_helpers(gemma: Path) -> None:
    source = "{{ messages | tojson }}{{ strftime_now('%Y') | length }}"
    t = Tokenizer.from_folder(settings(gemma, chat_template=source))
    assert t.render_chat([{"role": "user", "content": "<é>"}]) == '[{"role": "user", "content": "<é>"}]4'
