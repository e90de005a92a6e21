"""A conversation in a file: JSON that a person can read, edit and load again.

Knows files. Does not know sessions; what it reads was perhaps edited by hand, or written by a stranger.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fox_edge.errors import ConversationError, FoxEdgeError
from fox_edge.partial import write_whole
from runtimes.chat.chat import Turn
from runtimes.sampling import Sampling

FORMAT, VERSION = "fox-edge conversation", 1
MAX_BYTES = 16 << 20
_FIELDS = ("format", "version", "model", "sampling", "messages")


@dataclass(frozen=True)
class Conversation:
    """What a file holds: the words, and what they were said with. Turns are complete pairs."""

    model: str
    system: str | None
    turns: tuple[Turn, ...]
    sampling: Sampling


def save(conversation: Conversation, path: Path) -> Path:
    """Write a conversation, whole or not at all, and return the file's own path.

    Raises ConversationError when something else than a conversation has this name already.
    """
    path = path.expanduser().resolve()
    if path.exists():
        try:
            _check_format(_read_json(path), path)
        except ConversationError:
            raise ConversationError(
                f"{path} exists and is no conversation of version {VERSION}; it is not overwritten"
            ) from None
    text = json.dumps(_to_json(conversation), ensure_ascii=False, indent=1) + "\n"
    try:
        # A lone surrogate, pasted from somewhere, is no text that a file could hold.
        write_whole(path, text.encode(errors="replace").decode())
    except OSError as error:
        raise ConversationError(f"{path}: cannot be written ({error.strerror})") from None
    return path


def load(path: Path) -> Conversation:
    """Read and check a conversation; raises ConversationError that says what is wrong where."""
    path = path.expanduser()
    fields = _read_json(path)
    _check_format(fields, path)
    unknown = [key for key in fields if key not in _FIELDS]
    if unknown:
        raise ConversationError(f"{path}: unknown field '{unknown[0][:40]}'; known: {', '.join(_FIELDS)}")
    model = fields.get("model", "")
    if not isinstance(model, str):
        raise ConversationError(f"{path}: model is {_kind(model)}, but text is due")
    messages = _messages(fields.get("messages"), path)
    system = messages.pop(0)[1] if messages and messages[0][0] == "system" else None
    turns = tuple(
        Turn(question, answer)
        for (_, question), (_, answer) in zip(messages[::2], messages[1::2], strict=True)
    )
    return Conversation(model, system, turns, _sampling(fields.get("sampling", {}), path))


def _to_json(conversation: Conversation) -> dict[str, Any]:
    said = [("system", conversation.system)] if conversation.system else []
    for turn in conversation.turns:
        said += [("user", turn.question), ("assistant", turn.answer)]
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": conversation.model,
        "sampling": asdict(conversation.sampling),
        "messages": [{"role": role, "content": content} for role, content in said],
    }


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a bearable size."""
    if not path.is_file():
        raise ConversationError(f"{path}: {'is not a file' if path.exists() else 'no such file'}")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConversationError(
                f"{path}: {path.stat().st_size} bytes, but a conversation has at most {MAX_BYTES}"
            )
        fields = json.loads(data.decode("utf-8-sig"))
    except OSError as error:
        raise ConversationError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConversationError(f"{path}: not UTF-8 text (byte {error.start} is no part of any)") from None
    except json.JSONDecodeError as error:
        raise ConversationError(
            f"{path}: not JSON at line {error.lineno}, column {error.colno} ({error.msg})"
        ) from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets without end
        raise ConversationError(f"{path}: not readable as JSON ({str(error)[:80]})") from None
    if not isinstance(fields, dict):
        raise ConversationError(f"{path}: holds {_kind(fields)}, but a conversation is an object")
    return fields


def _check_format(fields: dict[str, Any], path: Path) -> None:
    if fields.get("format") != FORMAT:
        raise ConversationError(f"{path}: is no conversation (it has no format '{FORMAT}')")
    if type(fields.get("version")) is not int or fields["version"] != VERSION:
        given = _quoted(fields["version"]) if "version" in fields else "missing"
        raise ConversationError(f"{path}: version is {given}, but {VERSION} is read here")


def _messages(value: Any, path: Path) -> list[tuple[str, str]]:
    """Role and content of each message: perhaps a system message, then user and assistant in turn."""
    if not isinstance(value, list):
        raise ConversationError(f"{path}: messages is {_kind(value)}, but a list is due")
    out: list[tuple[str, str]] = []
    for n, message in enumerate(value, 1):
        where = f"{path}: message {n}"
        if not isinstance(message, dict) or sorted(message) != ["content", "role"]:
            raise ConversationError(f"{where} is not an object with role and content, and nothing else")
        role, content = message["role"], message["content"]
        due = _due_roles([role for role, _ in out])
        if role not in due:
            raise ConversationError(f"{where} has the role {_quoted(role)}, but {' or '.join(due)} is due")
        if not isinstance(content, str):
            raise ConversationError(f"{where} has {_kind(content)} as content, but text is due")
        if any("\ud800" <= char <= "\udfff" for char in content):
            raise ConversationError(f"{where} has half of a surrogate pair, which is no character")
        out.append((role, content))
    if out and out[-1][0] == "user":
        raise ConversationError(f"{path}: message {len(out)} is a question without an answer")
    return out


def _due_roles(before: Sequence[str]) -> list[str]:
    if not before:
        return ["system", "user"]
    return ["assistant"] if before[-1] == "user" else ["user"]


def _sampling(value: Any, path: Path) -> Sampling:
    """Sampling from its fields; those that are missing have their defaults."""
    if not isinstance(value, dict):
        raise ConversationError(f"{path}: sampling is {_kind(value)}, but an object is due")
    defaults = asdict(Sampling())
    fields: dict[str, Any] = {}
    for name, given in value.items():
        if name not in defaults:
            raise ConversationError(f"{path}: sampling has an unknown field '{name[:40]}'")
        whole = name == "seed" or isinstance(defaults[name], int)
        number = type(given) is int or (type(given) is float and not whole)
        if not number and not (name == "seed" and given is None):
            due = "a whole number" if whole else "a number"
            raise ConversationError(f"{path}: sampling's {name} is {_quoted(given)}, but {due} is due")
        fields[name] = given if whole else float(str(given))
    try:
        return Sampling(**fields)
    except FoxEdgeError as error:
        raise ConversationError(f"{path}: sampling: {error}") from None


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    names = {type(None): "nothing", bool: "a truth value", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def _quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True)[:40]
