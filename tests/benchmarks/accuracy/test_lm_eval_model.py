"""The harness's requests answered by our sessions: beside transformers, beside plain scoring, counted."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance

from benchmarks.accuracy.likelihood import Likelihood, log_likelihood, order, shared_length
from benchmarks.accuracy.lm_eval_model import FoxEdgeLM, request_key
from fox_edge.errors import ContextOverflowError, FoxEdgeError
from runtimes.base import SessionOptions
from runtimes.generate import generate
from runtimes.torch import TorchSession

SHARED = "Question: A fox has 3 dens with 2 cubs each. How many cubs?\nAnswer: 3*2=6 cubs.\n#### 6\n\n"
PAIRS = [
    (f"{SHARED}Question: Tom has 5 pens and buys 2. How many?\nAnswer:", " Tom has 5+2=7 pens."),
    (f"{SHARED}Question: Tom has 5 pens and buys 2. How many?\nAnswer:", " 7"),
    (f"{SHARED}Question: Tom has 5 pens and buys 2. How many?\nAnswer:", " Tom has 5-2=3 pens."),
    (f"{SHARED}Question: Mary has 4 hats ", "and sells 2."),  # the space belongs to the continuation
    ("The boy", " sold apples because he was hungry."),
    ("", "Tom has 5 pens."),
]
GREEDY = [
    (
        f"{SHARED}Question: Tom has 5 pens and buys 2. How many pens?\nAnswer:",
        {"until": ["Question:"], "max_gen_toks": 24},
    ),
    (
        f"{SHARED}Question: Mary has 4 hats and buys 3. How many hats?\nAnswer:",
        {"until": "\n", "max_gen_toks": 24},
    ),
    ("Question: A boy", {"until": [], "max_gen_toks": 9, "do_sample": False, "temperature": 0.0}),
]


def requests(kind, arguments):
    return [Instance(kind, {}, args, n) for n, args in enumerate(arguments)]


@pytest.fixture
def model(nano, monkeypatch):
    """The embedded model in float32, so that two implementations must agree closely."""
    model = FoxEdgeLM("torch:nano", threads=1)

    def open_session(positions):
        model._session = TorchSession(nano, SessionOptions(context=positions), dtype=torch.float32)
        return model._session

    monkeypatch.setattr(model, "_open", open_session)
    yield model
    model.close()


@pytest.fixture(scope="module")
def transformers_model(nano):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(nano.path), dtype="float32", device="cpu", batch_size=1)


def test_loglikelihoods_are_transformers_own(model, transformers_model):
    ours = model.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    theirs = transformers_model.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert [total for total, _ in ours] == pytest.approx([total for total, _ in theirs], abs=2e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert len({round(total, 2) for total, _ in ours}) == len(PAIRS)


def test_greedy_texts_are_transformers_own(model, transformers_model):
    ours = model.generate_until(requests("generate_until", GREEDY))
    theirs = transformers_model.generate_until(requests("generate_until", GREEDY), disable_tqdm=True)
    assert ours == theirs
    assert all(ours) and "Question:" not in ours[0] and "\n" not in ours[1]


def test_loglikelihoods_are_those_of_plain_scoring(model, nano):
    tokenizer = nano.tokenizer()
    session = TorchSession(nano, SessionOptions(context=256), dtype=torch.float32)
    found = model.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    for (context, continuation), (total, greedy) in zip(PAIRS, found, strict=True):
        start = len(tokenizer.encode(context.rstrip(" "), bos=True))
        tokens = tokenizer.encode(context + continuation, bos=True)
        session.reset()
        rows = np.concatenate([*session.score(tokens[:-1], start - 1)]).astype(np.float64)
        wanted = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
        picked = [row[token] for row, token in zip(wanted, tokens[start:], strict=True)]
        assert total == pytest.approx(sum(picked), abs=1e-3)
        assert greedy == ([int(row.argmax()) for row in rows] == tokens[start:])


def test_greedy_texts_are_our_own(model, nano):
    tokenizer = nano.tokenizer()
    for (context, wishes), text in zip(
        GREEDY, model.generate_until(requests("generate_until", GREEDY)), strict=True
    ):
        session = TorchSession(nano, SessionOptions(context=512), dtype=torch.float32)
        prompt = tokenizer.encode(context, bos=True)
        most = wishes.get("max_gen_toks", 256)
        whole = tokenizer.decode(
            list(generate(session, prompt, stop_ids=tokenizer.stop_ids, max_tokens=most))
        )
        stops = [wishes["until"]] if isinstance(wishes["until"], str) else wishes["until"]
        cuts = [whole.index(stop) for stop in stops if stop in whole]
        assert text == whole[: min(cuts, default=len(whole))]


def test_what_requests_share_is_run_once(model, nano):
    """Counted from the texts alone: every token of the tree that the prompts make, once."""
    tokenizer = nano.tokenizer()
    asked = PAIRS[:4]
    sequences = []
    for context, continuation in asked:
        start = len(tokenizer.encode(context.rstrip(" "), bos=True))
        tokens = tokenizer.encode(context + continuation, bos=True)
        sequences.append((tuple(tokens[:start]), tuple(tokens[start:])))
    prefixes = {context[:n] for context, _ in sequences for n in range(1, len(context) + 1)}
    wanted = len(prefixes) + sum(len(continuation) - 1 for _, continuation in sequences)
    scattered = [asked[n] for n in (3, 0, 2, 1)]  # in whatever order they come
    model.loglikelihood(requests("loglikelihood", scattered), disable_tqdm=True)
    assert model.computed_tokens == wanted
    assert wanted < sum(len(a) + len(b) for a, b in sequences) / 2


def test_whole_texts_are_scored_in_windows_every_token_once(model, nano, monkeypatch):
    text = "Tom has 5 pens and buys 2 more. How many pens has Tom now? He has 7 pens."
    tokens = nano.tokenizer().encode(text)
    whole = model.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    session = TorchSession(nano, SessionOptions(context=256), dtype=torch.float32)
    rows = np.concatenate([*session.score([nano.tokenizer().bos_id, *tokens[:-1]])])
    assert whole == [pytest.approx(log_likelihood(rows, tokens)[0], abs=1e-3)]
    monkeypatch.setattr(type(model), "max_length", 8)
    windows = model._windows(text)
    assert [token for _, scored in windows for token in scored] == tokens
    assert all(len(context) + len(scored) - 1 <= 8 for context, scored in windows)
    [cut] = model.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    assert cut < whole[0]


def test_a_context_too_long_is_cut_from_the_left_and_counted(model, transformers_model, monkeypatch):
    long = (" ".join(f"Tom has {n} pens." for n in range(300)), " He has 7 pens.")
    ours = model.loglikelihood(requests("loglikelihood", [long]), disable_tqdm=True)
    theirs = transformers_model.loglikelihood(requests("loglikelihood", [long]), disable_tqdm=True)
    assert ours[0][0] == pytest.approx(theirs[0][0], abs=5e-3)
    assert (model.cut_requests, model.max_length) == (1, 1024)
    monkeypatch.setattr(type(model), "max_length", 4)
    with pytest.raises(FoxEdgeError, match=r"a continuation of \d+ tokens does not fit a context of 4"):
        model.loglikelihood(requests("loglikelihood", [("a", "b c d e f g h")]), disable_tqdm=True)


def test_results_that_are_there_are_not_computed_again(nano):
    kept = {}
    first = FoxEdgeLM("torch:nano", threads=1, keep=kept.__setitem__)
    wanted = first.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    texts = first.generate_until(requests("generate_until", GREEDY[2:]))
    first.close()
    done = json.loads(json.dumps(kept))
    told = []
    second = FoxEdgeLM("torch:nano", threads=1, done=done, told=lambda *counts: told.append(counts))
    assert second.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True) == wanted
    assert second.generate_until(requests("generate_until", GREEDY[2:])) == texts
    assert (second.computed_tokens, second._session, told) == (0, None, [])
    del done[request_key("loglikelihood", PAIRS[4])]
    third = FoxEdgeLM("torch:nano", threads=1, done=done, told=lambda *counts: told.append(counts))
    again = third.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    third.close()
    assert again[4][0] == pytest.approx(wanted[4][0], abs=0.05)  # bfloat16, cut elsewhere
    assert told == [(6, 6)]


def test_artifacts_are_models_too(nano_gguf):
    model = FoxEdgeLM(str(nano_gguf.path), threads=1)
    reference = FoxEdgeLM("torch:nano", threads=1)
    asked = requests("loglikelihood", PAIRS)
    ours, theirs = (m.loglikelihood(asked, disable_tqdm=True) for m in (model, reference))
    assert [a for a, _ in ours] == pytest.approx([a for a, _ in theirs], abs=0.5)
    assert model.computed_tokens == reference.computed_tokens
    model.close()
    reference.close()


def test_conversations_go_through_the_model_s_own_template(nano):
    model = FoxEdgeLM("torch:nano", threads=1)
    text = model.apply_chat_template([{"role": "user", "content": "Hi"}])
    tokenizer = nano.tokenizer()
    assert model.tok_encode(text) == tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert model.tok_encode("Hi", add_special_tokens=False) == tokenizer.encode("Hi")
    assert model.tok_encode("Hi") == [tokenizer.bos_id, *tokenizer.encode("Hi")]
    assert model.chat_template() == tokenizer.chat_template


def test_sampled_answers_are_refused():
    model = FoxEdgeLM("torch:nano", threads=1)
    for wishes in ({"do_sample": True}, {"temperature": 0.7}):
        with pytest.raises(FoxEdgeError, match="answers here are greedy"):
            model.generate_until(requests("generate_until", [("a", wishes)]))
    with pytest.raises(FoxEdgeError, match="answers of 2000 tokens leave no room in a context of 1024"):
        model.generate_until(requests("generate_until", [("a", {"max_gen_toks": 2000})]))


def test_the_harness_s_own_command_line_knows_the_model():
    command = [sys.executable, "-m", "benchmarks.accuracy.lm_eval_model", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "lm-eval" in shown or "lm_eval" in shown


# --- the arithmetic below the harness ------------------------------------------------------------------


class Ruler:
    """Logits that depend on how many tokens there are; counts what is run."""

    context, vocab_size = 64, 8

    def __init__(self):
        self.tokens, self.ran = [], 0

    def prefill(self, tokens):
        return [*self.score(tokens)][-1][-1]

    def score(self, tokens, start=0):
        if len(self.tokens) + len(tokens) > self.context:
            raise ContextOverflowError("too long")
        self.ran += len(tokens)
        for token in tokens:
            self.tokens.append(token)
            yield np.roll(np.arange(8, dtype=np.float32), sum(self.tokens))[None]

    def truncate(self, length):
        del self.tokens[length:]

    def reset(self):
        self.tokens.clear()


def expected(context, continuation):
    total, greedy, tokens = 0.0, True, list(context)
    for token in continuation:
        row = np.roll(np.arange(8.0), sum(tokens))
        total += row[token] - np.log(np.exp(row).sum())
        greedy &= int(row.argmax()) == token
        tokens.append(token)
    return pytest.approx(total), greedy


def test_every_order_of_requests_gives_the_same_scores():
    asked = [([1, 2, 3], [4]), ([1, 2, 3], [4, 5, 6]), ([1, 2], [7]), ([1, 2, 3, 4], [0, 1]), ([5], [5, 5])]
    for places in (range(5), reversed(range(5)), order(asked)):
        session = Ruler()
        likelihood = Likelihood(session)
        for n in places:
            assert likelihood.score(*asked[n]) == expected(*asked[n])
        assert likelihood.computed == session.ran
    assert session.ran == 5 + (0 + 2 + 0 + 1 + 1)  # in order: 1 2 3 4 5 of contexts, then continuations


def test_a_request_that_overflows_leaves_nothing_wrong_behind():
    likelihood = Likelihood(Ruler())
    likelihood.score([1, 2], [3])
    with pytest.raises(ContextOverflowError):
        likelihood.score([1, 2, *[3] * 99], [3])
    assert likelihood.score([1, 2, 4], [3]) == expected([1, 2, 4], [3])


def test_a_likelihood_by_hand():
    rows = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], np.float32)) + 7
    assert log_likelihood(rows, [0, 2]) == (pytest.approx(np.log(0.4), abs=1e-6), True)
    assert log_likelihood(rows, [1, 2]) == (pytest.approx(np.log(0.2), abs=1e-6), False)
    huge = np.array([[1e4, 0, -1e4]], np.float32)
    assert log_likelihood(huge, [1]) == (-1e4, False)
    assert (shared_length([1, 2], [1, 2, 3]), shared_length([], [1]), shared_length([1, 2], [1, 3])) == (
        2,
        0,
        1,
    )
