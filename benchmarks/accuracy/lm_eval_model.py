"""Every artifact as a model of lm-evaluation-harness: log-likelihoods and greedy texts for its requests.

Knows the harness's interface; tasks, prompts and metrics are the harness's own. Needs the extra 'lm-eval'.
The harness's own command line, with this model known to it:

    python -m benchmarks.accuracy.lm_eval_model --model fox-edge --model_args artifact=out/int4 --tasks piqa
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from benchmarks.accuracy.likelihood import Likelihood, Scored, order
from benchmarks.common.subject import Subject, open_subject
from fox_edge.errors import FoxEdgeError
from runtimes.base import Session, SessionOptions
from runtimes.prefix import PrefixCache

MAX_ANSWER_TOKENS = 256  # the harness's own default

Keep = Callable[[str, Any], None]


def request_key(kind: str, arguments: Sequence[Any]) -> str:
    """SHA-256 of a request, as results in a file carry it."""
    return hashlib.sha256(json.dumps([kind, *arguments]).encode()).hexdigest()


@register_model("fox-edge")
class FoxEdgeLM(TemplateLM):
    """An artifact, another tool's ONNX folder, or torch:CHECKPOINT.

    Its session is opened when requests come, as long as the longest of them needs. `done` are results of an
    earlier run by request, `keep` is told every new one, `told` how many of how many are there.
    """

    def __init__(
        self,
        artifact: str,
        threads: int | None = None,
        done: Mapping[str, Any] | None = None,
        keep: Keep = lambda key, result: None,
        told: Callable[[int, int], None] = lambda count, total: None,
        batch_size: Any = None,  # the harness hands these to every model; batches are of one here
        max_batch_size: Any = None,
        device: Any = None,
        **session: Any,
    ) -> None:
        super().__init__()
        self.subject: Subject = open_subject(str(artifact))
        self.computed_tokens = self.cut_requests = 0
        self.tokenizer = None  # the harness would take it for one of Hugging Face's
        self._tokens = self.subject.tokenizer()
        self._options = {"threads": threads, **session}
        self._done, self._keep, self._told = dict(done or {}), keep, told
        self._session: Session | None = None
        self._count = self._total = 0

    # --- tokens --------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        ends = [self._tokens.eos_id, *sorted(self._tokens.stop_ids)]
        return next(id for id in ends if id is not None)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: <bos>, where there is one."""
        return self.eot_token_id if self._tokens.bos_id is None else self._tokens.bos_id

    @property
    def max_length(self) -> int:
        """Positions that the model has."""
        return self.subject.context

    @property
    def tokenizer_name(self) -> str:
        """What the harness files requests under that went through a chat template."""
        return self.subject.spec

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; <bos> first where the tokenizer's settings ask for it, and never twice."""
        bos = self._tokens.bos_id
        if bos is not None and add_special_tokens is None and string.startswith(self._text_of(bos)):
            return self._tokens.encode_rendered(string)
        wanted = self._tokens.add_bos if add_special_tokens is None else add_special_tokens
        return self._tokens.encode(string, bos=wanted)

    def _text_of(self, id: int) -> str:
        return self._tokens.decode([id], skip_special=False)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The Jinja text."""
        return self._tokens.chat_template

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text."""
        return self._tokens.render_chat(chat_history, add_generation_prompt)

    # --- requests ------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[Scored]:
        keys = [request_key("loglikelihood", texts) for texts, _, _ in requests]
        pairs = [self._fitted(context, continuation) for _, context, continuation in requests]
        return self._scored(keys, pairs)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts: windows of all the context there is, every token once."""
        texts = [request.args[0] for request in requests]
        windows = [self._windows(text) for text in texts]
        flat = [pair for pairs in windows for pair in pairs]
        keys = [
            request_key("rolling", (text, n))
            for text, pairs in zip(texts, windows, strict=True)
            for n in range(len(pairs))
        ]
        scores = iter(self._scored(keys, flat))
        return [sum(next(scores)[0] for _ in pairs) for pairs in windows]

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        tokens = self.tok_encode(text, add_special_tokens=False)
        rolled = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
        return [make_disjoint_window(window) for window in rolled]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy texts up to the first of the texts in `until`, which is not part of them.

        Raises FoxEdgeError for a request that wants sampling.
        """
        keys = [request_key("generate_until", request.args) for request in requests]
        asked = [_Asked.read(self, *request.args) for request in requests]
        results: list[Any] = [self._done.get(key) for key in keys]
        pending = self._pending(results)
        if pending:
            cache = PrefixCache(self._open(max(len(a.tokens) + a.most for a in asked)))
            for n in sorted(pending, key=lambda n: asked[n].tokens):
                results[n] = self._generated(cache, asked[n])
                self._note(keys[n], results[n])
        return [str(result) for result in results]

    def _generated(self, cache: PrefixCache, asked: _Asked) -> str:
        generation = cache.generate(asked.tokens, stop_ids=self._tokens.stop_ids, max_tokens=asked.most)
        stream, text = self._tokens.stream(), ""
        for token in generation:
            text += stream.push(token)
            if any(stop in text for stop in asked.until):
                break
        else:
            text += stream.flush()
        self.computed_tokens += cache.prompt_tokens - cache.reused_tokens + len(generation.tokens)
        return text[: min([text.find(stop) for stop in asked.until if stop in text], default=len(text))]

    # --- the session ---------------------------------------------------------------------------------

    def _scored(self, keys: Sequence[str], pairs: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
        results: list[Any] = [self._done.get(key) for key in keys]
        pending = self._pending(results)
        if pending:
            likelihood = Likelihood(self._open(max(len(a) + len(b) - 1 for a, b in pairs)))
            for n in (pending[place] for place in order([pairs[n] for n in pending])):
                results[n] = likelihood.score(*pairs[n])
                self._note(keys[n], results[n])
            self.computed_tokens += likelihood.computed
        return [(float(total), bool(greedy)) for total, greedy in results]

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """A pair that fits: the last token need not be run, and what is too much is cut from the left."""
        if not continuation:
            raise FoxEdgeError("a request has a continuation without a token")
        if len(continuation) > self.max_length:
            raise FoxEdgeError(
                f"a continuation of {len(continuation)} tokens does not fit a context of {self.max_length}"
            )
        excess = len(context) + len(continuation) - 1 - self.max_length
        self.cut_requests += excess > 0
        return context[max(0, excess) :], continuation

    def _open(self, positions: int) -> Session:
        """A session of at least so many positions, at most the model's."""
        wanted = min(positions, self.max_length)
        if self._session is not None and self._session.context < wanted:
            self.close()
        if self._session is None:
            self._session = self.subject.open_session(SessionOptions(context=wanted, **self._options))
        return self._session

    def close(self) -> None:
        """Free the model; the next request opens it anew."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def _pending(self, results: Sequence[Any]) -> list[int]:
        pending = [n for n, result in enumerate(results) if result is None]
        self._total, self._count = len(results), len(results) - len(pending)
        return pending

    def _note(self, key: str, result: Any) -> None:
        self._keep(key, result)
        self._count += 1
        self._told(self._count, self._total)


class _Asked:
    """A text to go on from: its tokens, the most tokens of the answer, and the texts that end it."""

    def __init__(self, tokens: list[int], most: int, until: list[str]) -> None:
        self.tokens, self.most, self.until = tokens, most, until

    @classmethod
    def read(cls, model: FoxEdgeLM, context: str, wishes: Mapping[str, Any]) -> _Asked:
        """From a request's arguments; a context too long is cut from the left."""
        if wishes.get("do_sample") or float(wishes.get("temperature") or 0) > 0:
            raise FoxEdgeError("a task asks for sampled answers; answers here are greedy")
        until = wishes.get("until") or []
        most = int(wishes.get("max_gen_toks") or MAX_ANSWER_TOKENS)
        tokens = model.tok_encode(context)
        room = model.max_length - most
        if room < 1:
            raise FoxEdgeError(f"answers of {most} tokens leave no room in a context of {model.max_length}")
        model.cut_requests += len(tokens) > room
        return cls(tokens[-room:], most, [until] if isinstance(until, str) else list(until))


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
