"""Conversation files: what is written is read again; what is odd is told in one sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fox_edge.errors import ConversationError
from runtimes.chat.chat import Turn
from runtimes.chat.conversation import MAX_BYTES, Conversation, load, save
from runtimes.sampling import Sampling

TURNS = (Turn('Hi "you"\n', "狐 🦊\ttwo\nlines"), Turn("", ""))
WHOLE = Conversation("nano", "be brief", TURNS, Sampling(0.7, top_k=40, seed=3))


def file_with(path: Path, **changes: Any) -> Path:
    """A saved conversation with fields changed; None removes one."""
    save(WHOLE, path)
    fields = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}), encoding="utf-8")
    return path


def complaint(path: Path) -> str:
    with pytest.raises(ConversationError) as error:
        load(path)
    text = str(error.value)
    assert "\n" not in text and len(text) < 300 + len(str(path)) and text.startswith(str(path))
    return text


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = save(WHOLE, tmp_path / "c.json")
    assert load(path) == WHOLE
    assert path.parent == tmp_path and [p.name for p in tmp_path.iterdir()] == ["c.json"]
    # A person can read it.
    assert "狐 🦊" in path.read_text(encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8"))["messages"][0] == {
        "role": "system",
        "content": "be brief",
    }
    bare = Conversation("nano", None, (), Sampling())
    assert load(save(bare, path)) == bare


def test_a_minimal_file_by_hand_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(b'\xef\xbb\xbf{"format": "fox-edge conversation", "version": 1, "messages": []}')
    assert load(path) == Conversation("", None, (), Sampling())


def test_nothing_but_a_conversation_is_overwritten(tmp_path: Path) -> None:
    for name, data in (("a.txt", b"dear diary"), ("b.json", b'{"a": 1}'), ("c", b""), ("d", b"\xff\xfe")):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(
            ConversationError, match="exists and is no conversation of version 1; it is not overwritten"
        ):
            save(WHOLE, path)
        assert path.read_bytes() == data
    with pytest.raises(ConversationError, match="not overwritten"):
        save(WHOLE, tmp_path)
    newer = file_with(tmp_path / "newer.json", version=2)
    with pytest.raises(ConversationError, match="not overwritten"):
        save(WHOLE, newer)


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(WHOLE, tmp_path / "c.json")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConversationError, match=r"cannot be written \(No space left on device\)"):
        save(Conversation("other", None, (), Sampling()), path)
    assert load(path) == WHOLE and [p.name for p in tmp_path.iterdir()] == ["c.json"]
    with pytest.raises(ConversationError, match="cannot be written"):
        save(WHOLE, tmp_path / "no" / "such" / "folder.json")


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert save(WHOLE, tmp_path / "link") == tmp_path / "real"
    assert (tmp_path / "link").is_symlink() and load(tmp_path / "link") == WHOLE


def test_files_that_are_no_json(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    assert "no such file" in complaint(path)
    assert "is not a file" in complaint(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "is not a file" in complaint(tmp_path / "pipe")
    text = save(WHOLE, path).read_bytes()
    path.write_bytes(text[:-40])
    assert "not JSON at line " in complaint(path)
    path.write_bytes(text.replace("狐".encode(), b"\xe7\x8b"))
    assert "not UTF-8 text (byte " in complaint(path)
    path.write_bytes(b" " * (50 << 20))
    assert f"{50 << 20} bytes, but a conversation has at most {MAX_BYTES}" in complaint(path)
    path.write_bytes(b"[" * 100_000)
    assert "not readable as JSON" in complaint(path)
    path.write_bytes(b"9" * 10_000)
    assert "not readable as JSON" in complaint(path) or "a number" in complaint(path)
    path.write_bytes(b"[]")
    assert "holds a list, but a conversation is an object" in complaint(path)
    path.write_bytes(b"{}")
    assert "is no conversation" in complaint(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "other"}, "is no conversation"),
        ({"version": 2}, "version is 2, but 1 is read"),
        ({"version": None}, "version is missing, but"),
        ({"version": True}, "version is true, but"),
        ({"note": "mine"}, "unknown field 'note'; known: format, version"),
        ({"model": 3}, "model is a number, but text is due"),
        ({"messages": None}, "messages is nothing, but a list is due"),
        ({"messages": {"role": "user"}}, "messages is an object, but"),
        ({"sampling": []}, "sampling is a list, but an object is due"),
        ({"sampling": {"heat": 1}}, "sampling has an unknown field 'heat'"),
        ({"sampling": {"temperature": "hot"}}, 'sampling\'s temperature is "hot", but a number is due'),
        ({"sampling": {"temperature": -1}}, "temperature is -1"),
        ({"sampling": {"temperature": float("nan")}}, "temperature is nan"),
        ({"sampling": {"temperature": 10**400}}, "temperature is inf"),
        ({"sampling": {"top_k": 1.5}}, "top_k is 1.5, but a whole number is due"),
        ({"sampling": {"seed": True}}, "seed is true, but a whole number is due"),
        ({"sampling": {"top_p": None}}, "top_p is null"),
    ],
)
def test_fields_that_are_wrong(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    assert words in complaint(file_with(tmp_path / "c.json", **changes))


def said(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": "x"} for role in roles]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (said("assistant"), 'message 1 has the role "assistant", but system or user is due'),
        (said("user", "user"), 'message 2 has the role "user", but assistant is due'),
        (said("user", "assistant", "assistant"), 'message 3 has the role "assistant", but user is due'),
        (said("user", "assistant", "system"), 'message 3 has the role "system", but user is due'),
        (said("system", "system"), 'message 2 has the role "system", but user is due'),
        (said("user", "assistant", "user"), "message 3 is a question without an answer"),
        (said("User"), 'message 1 has the role "User"'),
        (["hi"], "message 1 is not an object with role and content"),
        ([{"role": "user"}], "message 1 is not an object with role and content"),
        ([{"role": "user", "content": "x", "name": "y"}], "message 1 is not an object with"),
        ([{"role": ["user"], "content": "x"}], 'message 1 has the role ["user"]'),
        ([{"role": "user", "content": None}], "message 1 has nothing as content, but text is due"),
        ([{"role": "user", "content": "\ud800"}], "message 1 has half of a surrogate pair"),
    ],
)
def test_messages_that_are_wrong(tmp_path: Path, messages: list[Any], words: str) -> None:
    assert words in complaint(file_with(tmp_path / "c.json", messages=messages))
