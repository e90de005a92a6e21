"""Ollama's Modelfile, written beside a GGUF: which file, which chat format, where to stop, how to sample.

Ollama renders chats with Go templates, not with Jinja. A checkpoint's template is not translated: it is
rendered on probe conversations, the text that it puts around the messages is read off, and only if that
explains every probe is it written down in Go's words. Knows Jinja only through the tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from export.common import license_of
from export.identity import identify
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import TokenizerError
from fox_edge.tokenizer import Tokenizer

MODELFILE = "Modelfile"
# Contents that no template writes itself, so that they can be found again in what it rendered.
_MARKS = ("\u27e60\u27e7", "\u27e61\u27e7", "\u27e62\u27e7", "\u27e63\u27e7", "\u27e64\u27e7")
_USER, _ASSISTANT, _SYSTEM = "user", "assistant", "system"
_PROBES = (
    (_USER,),
    (_USER, _ASSISTANT, _USER),
    (_USER, _ASSISTANT, _USER, _ASSISTANT, _USER),
    (_SYSTEM, _USER),
    (_SYSTEM, _USER, _ASSISTANT, _USER),
)
_MAX_STOPS = 16


@dataclass(frozen=True)
class ChatFormat:
    """The text around the messages of a conversation that asks for an answer.

    `system` is None for a template that takes no system message, else the texts before it and between it
    and the first user message's content.
    """

    start: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str] | None
    answer: str

    def render(self, roles: Sequence[str], contents: Sequence[str]) -> str:
        """What the format makes of a conversation; a system message comes first."""
        parts, opened = [self.start], False
        for role, content in zip(roles, contents, strict=True):
            if role == _SYSTEM:
                assert self.system is not None
                parts += [self.system[0], content, self.system[1]]
                opened = True
                continue
            before, after = self.user if role == _USER else self.assistant
            parts += ["" if opened else before, content, after]
            opened = False
        return "".join([*parts, self.answer])


def chat_format(tokenizer: Tokenizer) -> ChatFormat | None:
    """Read the format off the tokenizer's template; None for one that does more than frame messages."""
    start = tokenizer.render_chat([], add_generation_prompt=False) if _renders(tokenizer, ()) else None
    one, three = _pieces(tokenizer, (_USER,)), _pieces(tokenizer, (_USER, _ASSISTANT, _USER))
    unasked = _pieces(tokenizer, (_USER,), ask=False)
    if one is None or three is None or unasked is None or not one[1].startswith(unasked[1]):
        return None
    user_after, answer = unasked[1], one[1][len(unasked[1]) :]
    if not three[1].startswith(user_after):
        return None
    assistant_before = three[1][len(user_after) :]
    # Where a user's turn begins is only known behind a start that has no messages, or that is <bos> alone.
    bos = "" if tokenizer.bos_id is None else tokenizer.pieces()[tokenizer.bos_id].text
    if start is None or not one[0].startswith(start):
        start = bos if bos and one[0].startswith(bos) else ""
    user_before = one[0][len(start) :]
    if not three[2].endswith(user_before):
        return None
    assistant_after = three[2][: len(three[2]) - len(user_before)]
    opened = _pieces(tokenizer, (_SYSTEM, _USER))
    if opened is not None and not opened[0].startswith(start):
        return None
    system = None if opened is None else (opened[0][len(start) :], opened[1])
    found = ChatFormat(start, (user_before, user_after), (assistant_before, assistant_after), system, answer)
    return found if _explains(found, tokenizer) else None


def _explains(found: ChatFormat, tokenizer: Tokenizer) -> bool:
    """Whether every probe renders as the format says, with contents of several lines too."""
    for roles in _PROBES:
        if _SYSTEM in roles and found.system is None:
            continue
        for contents in (_MARKS, [f"{mark}\n\nand 1 + 1 = <2> {{x}}." for mark in _MARKS]):
            given = list(contents)[: len(roles)]
            if _render(tokenizer, roles, given) != found.render(roles, given):
                return False
    return True


def go_template(found: ChatFormat, tokenizer: Tokenizer) -> str | None:
    """The format in Go's template language; None when its text cannot be written in a Modelfile.

    Ollama puts <bos> before every prompt itself where the GGUF says so.
    """
    bos = "" if tokenizer.bos_id is None else tokenizer.pieces()[tokenizer.bos_id].text
    start = found.start.removeprefix(bos) if tokenizer.add_bos else found.start
    texts = (start, *found.user, *found.assistant, *(found.system or ()), found.answer)
    if any(mark in text for text in texts for mark in ("{{", "}}", '"""')):
        return None
    user_before, assistant_before = found.user[0], found.assistant[0]  # nothing here trims spaces off
    branches = [
        f'{{{{ if eq .Role "user" }}}}{user_before}{{{{ .Content }}}}{found.user[1]}',
        f'{{{{ else if eq .Role "assistant" }}}}{assistant_before}{{{{ .Content }}}}{found.assistant[1]}',
    ]
    opening = ""
    if found.system is not None:
        before, between = found.system
        # What comes between a system message and the user's takes the place of what begins a user's turn.
        opening = "{{ $opened := false }}"
        branches[0] = (
            f'{{{{ if eq .Role "user" }}}}{{{{ if not $opened }}}}{user_before}{{{{ end }}}}'
            f"{{{{ $opened = false }}}}{{{{ .Content }}}}{found.user[1]}"
        )
        branches.append(
            f'{{{{ else if eq .Role "system" }}}}{before}{{{{ .Content }}}}{between}{{{{ $opened = true }}}}'
        )
    body = "".join(branches)
    return f"{opening}{start}{{{{ range .Messages }}}}{body}{{{{ end }}}}{{{{ end }}}}{found.answer}"


def modelfile(checkpoint: Checkpoint, model_file: str) -> str:
    """The Modelfile of an artifact whose GGUF is `model_file`."""
    tokenizer = checkpoint.tokenizer()
    found = chat_format(tokenizer)
    template = None if found is None else go_template(found, tokenizer)
    lines = [
        f"# For Ollama: ollama create {_ollama_name(checkpoint)} -f {MODELFILE}",
        f"FROM ./{model_file}",
    ]
    if template is None:
        lines.append(
            "# The chat template frames messages in a way that was not recognised, so none is given here;"
        )
        lines.append("# it is in the GGUF file, in Jinja.")
    else:
        assert found is not None
        if found.system is None:
            lines.append("# The chat template takes no system message.")
        lines.append(f'TEMPLATE """{template}"""')
    lines.append(f"PARAMETER num_ctx {checkpoint.config.max_positions}")
    lines += [f"PARAMETER {key} {value:g}" for key, value in identify(checkpoint).sampling.items()]
    lines += [f'PARAMETER stop "{text}"' for text in _stops(tokenizer)]
    licence = license_of(checkpoint)
    if licence:
        lines.append(f"LICENSE {licence}")
    return "\n".join(lines) + "\n"


def _stops(tokenizer: Tokenizer) -> list[str]:
    """Texts of the tokens that end a turn, as far as a quoted line can hold them."""
    pieces = tokenizer.pieces()
    texts = [pieces[token].text for token in sorted(tokenizer.stop_ids)]
    return [text for text in texts if text.isprintable() and '"' not in text][:_MAX_STOPS]


def _ollama_name(checkpoint: Checkpoint) -> str:
    """A name that Ollama takes for the model that is to be made."""
    kept = [
        c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in identify(checkpoint).name.lower()
    ]
    return "".join(kept).strip("._-") or "fox"


def _renders(tokenizer: Tokenizer, roles: Sequence[str]) -> bool:
    return _render(tokenizer, roles, _MARKS[: len(roles)], ask=False) is not None


def _render(
    tokenizer: Tokenizer, roles: Sequence[str], contents: Sequence[str], ask: bool = True
) -> str | None:
    """The template's text of a conversation; None when it refuses it."""
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    try:
        return tokenizer.render_chat(messages, add_generation_prompt=ask)
    except TokenizerError:
        return None


def _pieces(tokenizer: Tokenizer, roles: Sequence[str], ask: bool = True) -> list[str] | None:
    """What stands before, between and behind the contents; None unless each appears once, in order."""
    text = _render(tokenizer, roles, _MARKS[: len(roles)], ask)
    if text is None:
        return None
    pieces = []
    for mark in _MARKS[: len(roles)]:
        before, found, text = text.partition(mark)
        if not found:
            return None
        pieces.append(before)
    return None if any(mark in text for mark in _MARKS) else [*pieces, text]
