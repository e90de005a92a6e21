"""Chat messages to text, through a checkpoint's own Jinja template in a sandbox.

Knows nothing of token ids. Templates come with checkpoints, so they are treated as hostile: no attribute
that reaches Python's insides, no huge products, bounded output.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from fox_edge.config import read_json_object
from fox_edge.errors import CheckpointError, TokenizerError

MAX_TEMPLATE_BYTES = 1 << 18
MAX_RENDERED_CHARS = 1 << 24
_MAX_FACTOR = 100_000

# Fox's own format, from the base model's published tokenizer settings. The markers are ordinary text.
FOX_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def find_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The chat template of a checkpoint folder: chat_template.jinja, else tokenizer_config.json's; or None.

    Raises TokenizerError for one that is too long or not text.
    """
    path = folder / "chat_template.jinja"
    where = f"{folder / 'tokenizer_config.json'}: chat_template"
    found: Any = tokenizer_config.get("chat_template")
    if path.is_file():
        where = str(path)
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise TokenizerError(
                f"{where}: {path.stat().st_size} bytes, but at most {MAX_TEMPLATE_BYTES} are read"
            )
        try:
            found = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{where}: not readable as text ({error})") from None
    elif found is None and (folder / "chat_template.json").is_file():
        where = str(folder / "chat_template.json")
        try:
            found = read_json_object(folder / "chat_template.json").get("chat_template")
        except CheckpointError as error:
            raise TokenizerError(str(error)) from None
    if isinstance(found, list):  # several named templates; chat is the one named "default"
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    if found is None:
        return None
    if not isinstance(found, str):
        raise TokenizerError(f"{where} is a {type(found).__name__}, but text is due")
    if len(found) > MAX_TEMPLATE_BYTES:
        raise TokenizerError(
            f"{where} has {len(found)} characters, but at most {MAX_TEMPLATE_BYTES} are read"
        )
    return found


class ChatTemplate:
    """A compiled template. Raises TokenizerError when it is no Jinja."""

    def __init__(self, source: str) -> None:
        self.source = source
        env = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        env.filters["tojson"] = _tojson
        env.globals["raise_exception"] = _raise_exception
        env.globals["strftime_now"] = _strftime_now
        try:
            self._template = env.from_string(source)
        except (jinja2.TemplateError, RecursionError, MemoryError) as error:
            raise TokenizerError(f"the chat template is not valid Jinja ({error})") from None

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool, **names: str) -> str:
        """The text of a conversation; `names` are the special tokens' texts (bos_token, eos_token, ...).

        Raises TokenizerError when the template refuses the messages or misbehaves.
        """
        parts: list[str] = []
        room = MAX_RENDERED_CHARS
        try:
            for part in self._template.generate(
                messages=[dict(m) for m in messages], add_generation_prompt=add_generation_prompt, **names
            ):
                parts.append(part)
                room -= len(part)
                if room < 0:
                    raise TokenizerError(f"the chat template wrote more than {MAX_RENDERED_CHARS} characters")
        except TokenizerError:
            raise
        # A template is foreign code: whatever it trips over (a missing key, a wrong type) is its error.
        except Exception as error:
            raise TokenizerError(f"the chat template cannot render these messages ({error})") from None
        return "".join(parts)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also refuses products that could fill the memory."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "%" and not numbers:
            raise SecurityError("text formatting with % is not allowed")
        if operator == "**" and not (numbers and abs(left) <= _MAX_FACTOR and abs(right) <= 64):
            raise SecurityError("a power too large")
        if operator == "*" and not numbers:
            count = left if isinstance(left, int) else right
            if not isinstance(count, int) or count > _MAX_FACTOR:
                raise SecurityError("a repetition too long")
        return super().call_binop(context, operator, left, right)


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    """JSON without HTML escapes, as chat templates expect."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
