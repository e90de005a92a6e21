"""Lengths, prompts and fits of the named workloads, on nano's own tokenizer."""

import math
import statistics

import pytest

from benchmarks.fidelity.divergence import reference_text
from benchmarks.latency.workloads import WORKLOADS, find_workload, text, waves
from fox_edge.errors import FoxEdgeError


@pytest.fixture(scope="module")
def tokenizer(nano):
    return nano.tokenizer()


def test_the_paper_s_prompts_average_234_and_spread_as_chat_prompts_do():
    paper = WORKLOADS["paper"]
    lengths = sorted(n for (n,) in paper.conversations)
    assert lengths == [26, 63, 88, 100, 173, 239, 312, 871]  # as docs/benchmarks.md says
    assert (statistics.mean(lengths), paper.prompt_tokens, paper.decode_tokens) == (234, 234, 512)
    assert 1.5 < statistics.mean(lengths) / statistics.median(lengths) < 1.9  # a tail, not a bell
    assert 0.85 < statistics.stdev(map(math.log, lengths)) < 1.15


def test_a_plain_bench_asks_what_it_always_asked(tokenizer):
    work = find_workload("custom")
    assert (work.conversations, work.decode_tokens) == (((234,),), 64)
    expected = tokenizer.encode(reference_text(), bos=True)[:234]
    assert waves(work, tokenizer) == [[[expected]]]


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("users", [1, 3])
def test_every_user_gets_text_of_their_own_of_the_lengths_that_are_named(tokenizer, name, users):
    work = WORKLOADS[name]
    made = waves(work, tokenizer, users)
    assert {len(wave) for wave in made} == {users}
    conversations = [turns for wave in made for turns in wave]
    count = len(work.conversations)
    assert 0 <= len(conversations) - count < max(users, 2)
    for n, turns in enumerate(conversations):
        assert tuple(map(len, turns)) == work.conversations[n % count]
        assert [ids.count(tokenizer.bos_id) for ids in turns] == [1] + [0] * (len(turns) - 1)
        assert turns[0][0] == tokenizer.bos_id
    assert len({tuple(turns[0]) for turns in conversations}) == len(conversations)
    assert made == waves(work, tokenizer, users)


def test_prompts_are_running_text(tokenizer):
    stretches = [ids for wave in waves(WORKLOADS["paper"], tokenizer) for turns in wave for ids in turns]
    rejoined = tokenizer.decode([i for ids in stretches for i in ids if i != tokenizer.bos_id])
    assert text().startswith(rejoined[:2000].strip())
    assert len(tokenizer.encode(text(), bos=False)) > 16_000  # four users of 'long' without a repetition


def test_positions_are_counted_as_a_cache_holds_them():
    chat = WORKLOADS["chat"]
    assert chat.positions == 60 + 24 + 45 + 18 + 120 + 33 + 6 * 65
    held, middles = 0, []
    for n in (60, 24, 45, 18, 120, 33):
        middles.append(held + n + 32)
        held += n + 65
    assert chat.middle == round(statistics.mean(middles))
    assert find_workload("custom", 40, 4).middle == 42


def test_what_does_not_fit_is_told_with_the_numbers():
    with pytest.raises(
        FoxEdgeError, match=r"a prompt of 500 tokens and 65 more do not fit a context of 512$"
    ):
        find_workload("custom", 500).check("m", 512)
    paper = WORKLOADS["paper"]
    with pytest.raises(FoxEdgeError) as told:
        paper.check("m", 1024)
    assert str(told.value) == (
        "m: a prompt of 871 tokens and 513 more do not fit a context of 1024 "
        "(workload paper; --decode-tokens 152 would)"
    )
    find_workload("paper", decode_tokens=152).check("m", 1024)
    with pytest.raises(FoxEdgeError):
        find_workload("paper", decode_tokens=153).check("m", 1024)
    with pytest.raises(FoxEdgeError, match=r"4000 tokens and 65 more .*workload long; no answer is short"):
        WORKLOADS["long"].check("m", 1024)
    with pytest.raises(FoxEdgeError, match=r"6 turns of 300 tokens together and 65 after each .* 34 would"):
        WORKLOADS["chat"].check("m", 512)
    find_workload("chat", decode_tokens=34).check("m", 512)


def test_unknown_names_and_misplaced_lengths_are_told():
    with pytest.raises(FoxEdgeError, match="'papr'; there are custom, paper, short, long, chat"):
        find_workload("papr")
    with pytest.raises(
        FoxEdgeError, match=r"paper are fixed \(234 tokens on average\); --prompt-tokens 9 goes"
    ):
        find_workload("paper", 9)
