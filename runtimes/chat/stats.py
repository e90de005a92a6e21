"""What a chat took, in words and in one JSON document. Knows replies; draws nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtimes.chat.chat import Chat, Reply
from runtimes.sampling import Sampling


def resident_bytes() -> int | None:
    """Memory that this process holds now; None where the system does not tell (macOS)."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def sampling_words(sampling: Sampling) -> str:
    """How tokens are chosen, without what is at its default."""
    parts = [f"temperature {sampling.temperature:g}"]
    for name, off in (("top_p", 1), ("top_k", 0), ("min_p", 0), ("repeat_penalty", 1)):
        if (value := getattr(sampling, name)) != off:
            parts.append(f"{name} {value:g}")
    if sampling.temperature == 0:
        return ", ".join(["greedy", *[part for part in parts if part.startswith("repeat_penalty")]])
    return ", ".join(parts if sampling.seed is None else [*parts, f"seed {sampling.seed}"])


def memory_words() -> str:
    """The resident memory, as the end of a sentence."""
    resident = resident_bytes()
    return "" if resident is None else f"; {resident / 1e6:,.0f} MB of memory"


def stats_lines(chat: Chat) -> list[str]:
    """The newest answer, and the conversation."""
    lines = [] if chat.reply is None else [_reply_line(chat.reply)]
    turns = f"{len(chat.turns)} turn{'s' if len(chat.turns) != 1 else ''}"
    if chat.left_out:
        turns += f" ({chat.left_out} of them left out of the context)"
    held = chat.session.length if chat.reply is not None else 0
    lines.append(
        f"conversation: {turns}; {held:,} of {chat.session.context:,} tokens in the context; "
        f"of all prompts {chat.run_tokens:,} tokens run, {chat.reused_tokens:,} reused"
    )
    lines.append(f"sampling: {sampling_words(chat.sampling)}{memory_words()}")
    return lines


def _reply_line(reply: Reply) -> str:
    words = (
        f"last answer: prompt of {reply.prompt_tokens:,} tokens, {reply.reused_tokens:,} reused, "
        f"{reply.run_tokens:,} run"
    )
    if reply.first_s is not None:
        words += f", first text after {reply.first_s:.2f} s"
    words += f"; {reply.tokens:,} tokens said"
    rate = reply.decode_tokens_per_s
    return words if rate is None else f"{words}, {rate:.1f} tokens/s"


def reply_json(reply: Reply) -> dict[str, Any]:
    """The newest answer's counts and times, units in the keys."""
    return {
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.prompt_tokens,
        "answer_tokens": reply.tokens,
        "time_to_first_token_s": reply.first_s,
        "total_s": reply.total_s,
        "prompt_tokens_per_s": reply.prompt_tokens_per_s,
        "decode_tokens_per_s": reply.decode_tokens_per_s,
        "rss_bytes": resident_bytes(),
    }
