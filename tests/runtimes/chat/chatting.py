"""What the tests of chatting share: templates, tokenizers, and sessions that keep a record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fox_edge.tokenizer import Tokenizer
from runtimes.base import Logits, Session
from tests.helpers import write_tokenizer

_GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# None: Fox's own. Each tells the past as it was, which is what makes a cache worth keeping.
FAITHFUL: dict[str, str | None] = {
    "fox": None,
    "gemma": _GEMMA,
    "no special tokens": (
        "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}"
    ),
    "blanks around": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
        "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
}
TRIMMED = _GEMMA.replace("m['content']", "m['content'] | trim")
THINKING = _GEMMA.replace("m['content']", "m['content'].split('</think>')[-1]")


def tokenizer_with(folder: Path, template: str | None, gemma: bool = True) -> Tokenizer:
    """The tests' tokenizer with another chat template; None: with none."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, gemma)
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text()) | {"chat_template": template}
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    return Tokenizer.from_folder(folder)


class Recorder:
    """A session that knows which tokens are in its cache, and how many were ever run."""

    def __init__(self, session: Session) -> None:
        self.inner, self.context, self.vocab_size = session, session.context, session.vocab_size
        self.tokens: list[int] = []
        self.ran = 0

    @property
    def length(self) -> int:
        assert self.inner.length == len(self.tokens)
        return self.inner.length

    def prefill(self, tokens: Sequence[int]) -> Logits:
        logits = self.inner.prefill(tokens)
        self.tokens += tokens
        self.ran += len(tokens)
        return logits

    def step(self, token: int) -> Logits:
        logits = self.inner.step(token)
        self.tokens.append(token)
        self.ran += 1
        return logits

    def score(self, tokens, start=0):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    def truncate(self, length: int) -> None:
        self.inner.truncate(length)
        del self.tokens[length:]

    def reset(self) -> None:
        self.truncate(0)

    def close(self) -> None:
        self.inner.close()


class Parrot:
    """A model that says a script of tokens, one answer after the other, whatever it is asked."""

    vocab_size = 512

    def __init__(self, *answers: Sequence[int], context: int = 4096) -> None:
        self.context, self.length = context, 0
        self.script = [token for answer in answers for token in answer]

    def prefill(self, tokens: Sequence[int]) -> Logits:
        import numpy as np

        self.length += len(tokens)
        assert self.length <= self.context
        logits = np.zeros(self.vocab_size, np.float32)
        logits[self.script.pop(0)] = 1
        return logits

    def step(self, token: int) -> Logits:
        return self.prefill([token])

    def score(self, tokens, start=0):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    def truncate(self, length: int) -> None:
        self.length = min(length, self.length)

    def reset(self) -> None:
        self.length = 0

    def close(self) -> None:
        pass
