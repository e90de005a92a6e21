"""OpenAI's own Python client talks to the server: answers, streams, usage, stops, seeds, schemas, errors."""

from __future__ import annotations

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from fox_edge.artifact import Artifact
from fox_edge.checkpoint import Checkpoint
from fox_edge.tokenizer import Tokenizer
from runtimes.base import SessionOptions, open_session
from runtimes.generate import generate, logprobs_of
from runtimes.server.slots import CHUNK
from tests.runtimes.server.conftest import Served, running, slow_down

QUESTION = "Tom has 12 apples and buys 7 more apples. How many apples does Tom have?"
ASKED: Any = [{"role": "user", "content": QUESTION}]


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none is needed", max_retries=0)


# Of several conversations attention is computed by plain products.
LONE = SessionOptions(threads=1, flash_attention=False)


@pytest.fixture(scope="module")
def tokenizer(artifact: Artifact) -> Tokenizer:
    return Tokenizer.from_folder(artifact.path)


def alone(artifact: Artifact, tokenizer: Tokenizer, prompt: list[int], most: int = 60) -> list[int]:
    """The greedy answer of a session that serves nobody else, fed in the same parts."""
    session = open_session(artifact, LONE)
    generation = generate(session, prompt, stop_ids=tokenizer.stop_ids, max_tokens=most)
    while generation.feed(CHUNK):
        pass
    answer = list(generation)
    session.close()
    return answer


@pytest.fixture(scope="module")
def expected(artifact: Artifact, tokenizer: Tokenizer) -> list[int]:
    answer = alone(artifact, tokenizer, tokenizer.encode_chat(ASKED))
    assert len(answer) > 15
    return answer


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "nano-int8" and client.models.retrieve("nano-int8").owned_by == "fox-edge"


def test_an_answer_is_that_of_a_plain_session(
    client: openai.OpenAI, tokenizer: Tokenizer, expected: list[int]
) -> None:
    answer = client.chat.completions.create(model="nano-int8", messages=ASKED, max_tokens=60)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "stop"
    assert choice.message.content == tokenizer.decode(expected)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokenizer.encode_chat(ASKED))
    assert answer.usage.completion_tokens == len(expected)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(expected)


def test_a_stream_is_the_same_answer_in_pieces(
    client: openai.OpenAI, tokenizer: Tokenizer, expected: list[int]
) -> None:
    chunks = list(
        client.chat.completions.create(
            model="nano-int8",
            messages=ASKED,
            max_completion_tokens=60,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *pieces, last = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in pieces]
    assert "".join(texts) == tokenizer.decode(expected) and len([t for t in texts if t]) > 10
    assert [chunk.choices[0].finish_reason for chunk in pieces][-2:] == [None, "stop"]
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens == len(expected)
    assert all(chunk.usage is None for chunk in pieces)
    assert {chunk.id for chunk in chunks} == {last.id}


def test_no_usage_where_nobody_asked(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="nano-int8", messages=ASKED, max_tokens=3, stream=True)
    assert all(chunk.choices and chunk.usage is None for chunk in stream)


def test_cached_tokens_are_told(served: Served, client: openai.OpenAI) -> None:
    system: Any = {"role": "system", "content": "You are a careful fox who counts. " * 20}
    seen = []
    for question in ("How many?", "And why?"):
        answer = client.chat.completions.create(
            model="nano-int8", messages=[system, {"role": "user", "content": question}], max_tokens=2
        )
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        seen.append((answer.usage.prompt_tokens_details.cached_tokens, answer.usage.prompt_tokens))
    assert seen[1][0] is not None and seen[1][0] % CHUNK == 0 and seen[1][1] - seen[1][0] < 2 * CHUNK


def test_plain_completions(client: openai.OpenAI, artifact: Artifact, tokenizer: Tokenizer) -> None:
    text = "Tom has 3 apples."
    prompt = tokenizer.encode(text, bos=tokenizer.add_bos)
    want = tokenizer.decode(alone(artifact, tokenizer, prompt, 12))
    for given in (text, prompt, [text]):
        answer = client.completions.create(model="nano-int8", prompt=given, max_tokens=12)  # type: ignore[arg-type]
        assert answer.object == "text_completion" and answer.choices[0].text == want
        assert answer.usage is not None and answer.usage.prompt_tokens == len(prompt)
    stream = client.completions.create(model="nano-int8", prompt=text, max_tokens=12, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == want


def test_stop_strings_end_the_text_before_them(
    client: openai.OpenAI, tokenizer: Tokenizer, expected: list[int]
) -> None:
    text = tokenizer.decode(expected)
    middle = len(text) // 2
    stop = text[middle : middle + 4]
    for given in (stop, ["never in there", stop]):
        answer = client.chat.completions.create(model="nano-int8", messages=ASKED, stop=given)
        assert answer.choices[0].message.content == text[: text.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None and answer.usage.completion_tokens < len(expected)
    stream = client.chat.completions.create(model="nano-int8", messages=ASKED, stop=stop, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == text[: text.index(stop)]


def test_length_is_a_reason(client: openai.OpenAI, tokenizer: Tokenizer, expected: list[int]) -> None:
    answer = client.chat.completions.create(model="nano-int8", messages=ASKED, max_tokens=5)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content == tokenizer.decode(expected[:5])


def test_a_seed_repeats_a_draw_and_extensions_are_heard(
    client: openai.OpenAI, tokenizer: Tokenizer, expected: list[int]
) -> None:
    def draw(seed: int | None, **extra: Any) -> str | None:
        answer = client.chat.completions.create(
            model="nano-int8", messages=ASKED, max_tokens=25, temperature=1.6, seed=seed, extra_body=extra
        )
        return answer.choices[0].message.content

    assert draw(1) == draw(1) and draw(-5) == draw(-5)
    assert len({draw(seed) for seed in range(4)}) > 1
    greedy = tokenizer.decode(expected[:25])
    assert draw(3, top_k=1) == draw(4, min_p=1.0) == greedy
    assert draw(3, top_k=1, repeat_penalty=3.0) != greedy


def test_logprobs_are_those_of_the_model(
    client: openai.OpenAI, artifact: Artifact, tokenizer: Tokenizer, expected: list[int]
) -> None:
    answer = client.chat.completions.create(
        model="nano-int8", messages=ASKED, max_tokens=6, logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.content is not None
    content = answer.choices[0].logprobs.content
    assert b"".join(bytes(e.bytes or []) for e in content).decode() == answer.choices[0].message.content
    session = open_session(artifact, LONE)
    logits = session.prefill(tokenizer.encode_chat(ASKED))
    for entry, token in zip(content, expected, strict=False):
        want = logprobs_of(logits, token, 3)
        assert entry.logprob == pytest.approx(want.logprob, abs=1e-6)
        assert [t.logprob for t in entry.top_logprobs] == pytest.approx([v for _, v in want.top], abs=1e-6)
        assert sum(math.exp(t.logprob) for t in entry.top_logprobs) <= 1
        logits = session.step(token)
    session.close()
    # The same entries come with a stream, none twice, and in the older shape with plain completions.
    stream = client.chat.completions.create(
        model="nano-int8", messages=ASKED, max_tokens=6, logprobs=True, stream=True
    )
    got = [e for c in stream for e in ((c.choices[0].logprobs and c.choices[0].logprobs.content) or [])]
    assert [e.token for e in got] == [e.token for e in content]
    plain = client.completions.create(model="nano-int8", prompt="Tom has", max_tokens=4, logprobs=2)
    older = plain.choices[0].logprobs
    assert older is not None and older.tokens is not None and older.text_offset is not None
    assert "".join(older.tokens) == plain.choices[0].text and older.text_offset[0] == 0
    assert len(older.tokens) == 4 and all(len(top) == 2 for top in older.top_logprobs or [])


def test_logprobs_end_where_the_text_does(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="nano-int8", messages=ASKED)
    text = whole.choices[0].message.content
    assert text is not None
    stop = text[len(text) // 2 :][:6]
    cut = client.chat.completions.create(model="nano-int8", messages=ASKED, stop=stop, logprobs=True)
    logprobs, before = cut.choices[0].logprobs, cut.choices[0].message.content
    assert logprobs is not None and logprobs.content is not None and before is not None
    tokens = "".join(e.token for e in logprobs.content)
    # The token that the stop string begins in may reach into it, no other does.
    assert tokens.startswith(before) and len(tokens) - len(logprobs.content[-1].token) < len(before)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Tom", "Ann"]},
        "apples": {"type": "integer", "minimum": 0, "maximum": 99},
        "sure": {"type": "boolean"},
    },
    "required": ["name", "apples", "sure"],
    "additionalProperties": False,
}


def check_schema(text: str | None) -> None:
    found = json.loads(text or "")
    assert set(found) == {"name", "apples", "sure"}
    assert found["name"] in ("Tom", "Ann") and 0 <= found["apples"] <= 99 and type(found["sure"]) is bool


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_answer_follows_a_schema(client: openai.OpenAI, temperature: float) -> None:
    for seed in range(3):
        answer = client.chat.completions.create(
            model="nano-int8",
            messages=ASKED,
            temperature=temperature,
            seed=seed,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        )
        assert answer.choices[0].finish_reason == "stop"
        check_schema(answer.choices[0].message.content)


def test_an_answer_is_some_json_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="nano-int8", messages=ASKED, max_tokens=100, response_format={"type": "json_object"}
    )
    text = answer.choices[0].message.content or ""
    assert text.startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("grammar", ['root ::= "yes" | "no"', 'start: "yes" | "no"'])
def test_an_answer_follows_a_grammar(client: openai.OpenAI, grammar: str) -> None:
    answer = client.chat.completions.create(
        model="nano-int8", messages=ASKED, extra_body={"grammar": grammar}
    )
    assert answer.choices[0].message.content in ("yes", "no")
    assert answer.choices[0].finish_reason == "stop"


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.chat.completions.create(model="gpt-9", messages=ASKED)
    with pytest.raises(openai.BadRequestError, match="max_tokens is -1") as error:
        client.chat.completions.create(model="nano-int8", messages=ASKED, max_tokens=-1)
    assert error.value.param == "max_tokens"


def test_a_wrong_key_is_the_clients_own_error(artifact: Artifact) -> None:
    with running(str(artifact.path), key="right", slots=1) as served:
        with pytest.raises(openai.AuthenticationError, match="a wrong API key"):
            openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0).models.list()
        assert openai.OpenAI(base_url=f"{served.url}/v1", api_key="right").models.list().data


def test_many_clients_at_once_get_what_each_gets_alone(client: openai.OpenAI, served: Served) -> None:
    """Two slots, six at once, each with its own question; with a system prompt that all share."""
    system: Any = {"role": "system", "content": "Answer the question about fruit, step by step. " * 8}

    def answer(n: int) -> str | None:
        question = f"Ann has {10 + n} pears and buys {3 * n + 2} more pears. How many pears has Ann?"
        messages = [system, {"role": "user", "content": question}]
        got = client.chat.completions.create(model="nano-int8", messages=messages, max_tokens=40)
        return got.choices[0].message.content

    single = [answer(n) for n in range(6)]
    assert len(set(single)) > 3
    for _ in range(2):
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(answer, range(6))) == single


def test_a_client_that_leaves_a_stream_frees_the_slot(artifact: Artifact) -> None:
    with running(str(artifact.path), slots=1) as served:
        slow_down(served)
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="-", max_retries=0)
        endless = {"grammar": "start: /a{900,}/"}
        stream = client.chat.completions.create(
            model="nano-int8", messages=ASKED, stream=True, extra_body=endless
        )
        next(iter(stream))
        assert served.service.engine.busy == 1
        stream.close()
        # Whoever hangs up before a whole answer has been written is noticed as well.
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.2).chat.completions.create(
                model="nano-int8", messages=ASKED, extra_body=endless
            )
        for _ in range(500):
            if not served.service.engine.busy:
                break
            time.sleep(0.01)
        assert served.service.engine.metrics.answers == {"cancelled": 2}


def test_what_goes_wrong_in_mid_stream_is_told_in_the_stream(artifact: Artifact) -> None:
    with running(str(artifact.path), slots=1, timeout_s=0.5) as served:
        slow_down(served)
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="-", max_retries=0)
        stream = client.chat.completions.create(
            model="nano-int8", messages=ASKED, stream=True, extra_body={"grammar": "start: /a{900,}/"}
        )
        pieces = []
        with pytest.raises(openai.APIError, match="longer than the server's time limit"):
            for chunk in stream:
                pieces.append(chunk.choices[0].delta.content or "")
        assert set("".join(pieces)) == {"a"}


@pytest.mark.parametrize("spec", ["onnx", "torch:nano"])
def test_every_runtime_serves(spec: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    if spec == "onnx":
        from export.onnx import export_onnx
        from fox_edge.quant import ONNX, find_recipe

        folder = tmp_path_factory.mktemp("every") / "nano"
        export_onnx(Checkpoint.open("nano"), folder, find_recipe(ONNX, "int8"))
        spec = str(folder)
    with running(spec, slots=2) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="-", max_retries=0)
        answer = client.chat.completions.create(
            model="nano",
            messages=ASKED,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        )
        check_schema(answer.choices[0].message.content)
        plain = client.chat.completions.create(model="nano", messages=ASKED)
        assert "19" in (plain.choices[0].message.content or "")
