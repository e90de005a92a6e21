"""Tokens chosen on the device against the host's own way, over many random choices, ties included."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runtimes.cuda import choose
from runtimes.cuda.decoder import likeliest
from runtimes.sampling import Choice, Sampling
from runtimes.sampling import choose as choose_on_host


def chosen(logits: np.ndarray, choices: list[Choice], candidates: int | None = None) -> list[int]:
    """As a session does it."""
    on_device = torch.from_numpy(logits)
    tokens = choose.choose(on_device, choices).tolist()
    return choose.finish(tokens, on_device, choices)


def random_choice(rng: np.random.Generator, vocab: int) -> Choice:
    sampling = Sampling(
        temperature=float(rng.choice([0.0, 0.2, 0.7, 1.0, 3.0])),
        top_p=float(rng.choice([1.0, 0.99, 0.9, 0.5, 0.01])),
        top_k=int(rng.choice([0, 1, 2, 5, 40, vocab - 1, vocab, 2 * vocab])),
        min_p=float(rng.choice([0.0, 0.0, 0.05, 0.5, 1.0])),
        repeat_penalty=float(rng.choice([1.0, 1.3, 0.8])),
    )
    recent = tuple(int(t) for t in rng.integers(0, vocab, rng.choice([0, 1, 7, 20])))
    return Choice(sampling, float(rng.random()), recent)


@pytest.mark.parametrize("candidates", [2, 16, 1024])
@pytest.mark.parametrize("ties", [False, True])
def test_every_choice_is_the_host_s(candidates: int, ties: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "FIRST_CANDIDATES", candidates)
    rng = np.random.default_rng(candidates)
    vocab, tokens = 97, set()
    for _ in range(60):
        rows = int(rng.integers(1, 20))
        logits = rng.normal(0, 3, (rows, vocab)).astype(np.float32)
        if ties:
            logits = np.round(logits)
        choices = [random_choice(rng, vocab) for _ in range(rows)]
        want = [choose_on_host(row, choice) for row, choice in zip(logits, choices, strict=True)]
        assert chosen(logits, choices) == want
        tokens |= set(want)
    assert len(tokens) > vocab // 2


def test_few_candidates_are_found_out_and_all_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "FIRST_CANDIDATES", 4)
    logits = np.zeros((1, 50), np.float32)  # all alike: any four are as heavy as the rest
    choices = [Choice(Sampling(temperature=1.0, top_p=0.9), 0.99)]
    assert choose.choose(torch.from_numpy(logits), choices).tolist() == [-2]
    assert chosen(logits, choices) == [choose_on_host(logits[0], choices[0])] == [44]


def test_what_weighs_nothing_needs_no_second_look() -> None:
    logits = np.full((1, 5000), -1e4, np.float32)
    logits[0, [7, 4000]] = 0, 1
    choices = [Choice(Sampling(temperature=1.0, top_k=40), 0.999)]
    assert choose.choose(torch.from_numpy(logits), choices).tolist() == [7]


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))[None].repeat(1000, axis=0)
    choices = [Choice(Sampling(temperature=1.0), n / 1000) for n in range(1000)]
    counts = np.bincount(chosen(logits, choices))
    assert np.abs(counts - [500, 300, 200]).max() <= 1


@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(broken: float, temperature: float) -> None:
    logits = np.zeros((2, 9), np.float32)
    logits[1, 4] = broken
    choices = [Choice(Sampling(temperature=temperature), 0.5)] * 2
    tokens = chosen(logits, choices)
    assert tokens[0] >= 0 and tokens[1] == -1


def test_the_first_of_equals_is_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    assert likeliest(logits).tolist() == [1, 0]


def test_logits_stay_as_they_were() -> None:
    logits = torch.randn(3, 30)
    before = logits.clone()
    choose.choose(logits, [Choice(Sampling(repeat_penalty=1.5, temperature=1.0), 0.3, (1, 2, 2))] * 3)
    assert torch.equal(logits, before)


def test_greedy_needs_nothing_but_the_likeliest() -> None:
    assert choose.is_greedy(Choice())
    assert choose.is_greedy(Choice(Sampling(repeat_penalty=1.2)))  # nothing to penalize yet
    assert not choose.is_greedy(Choice(Sampling(repeat_penalty=1.2), 0.0, (3,)))
    assert not choose.is_greedy(Choice(Sampling(temperature=0.1)))
