"""The tokenizer file for phones: read by the C++ that ExecuTorch's runners read it with."""

import json
import random
import shutil
from pathlib import Path

import pytest

from benchmarks.fidelity.checks import TOKENIZER_SAMPLES
from export.pte_tokenizer import RUNNER_TOKENIZER, write_runner_tokenizer
from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import FoxEdgeError

pytorch_tokenizers = pytest.importorskip("pytorch_tokenizers")
# Runs of spaces and newlines shorter and longer than the vocabulary's, markup, digits, other scripts.
WORDS = (
    " ",
    "  ",
    "\n",
    "a",
    "the ",
    "é",
    "1",
    "12",
    ".",
    "\t",
    "狐",
    "🦊",
    "<b>",
    "<eos>",
    " " * 33,
    "\n" * 34,
)


def folder_of(nano: Checkpoint, target: Path) -> Path:
    target.mkdir()
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(nano.path / name, target)
    return target


def test_the_runners_read_the_same_ids(nano: Checkpoint, tmp_path: Path) -> None:
    folder, tokenizer = folder_of(nano, tmp_path / "nano"), nano.tokenizer()
    assert write_runner_tokenizer(folder) == RUNNER_TOKENIZER
    theirs = pytorch_tokenizers.CppHFTokenizer()
    theirs.load(str(folder / RUNNER_TOKENIZER))
    rng = random.Random(7)
    texts = ["".join(rng.choices(WORDS, k=rng.randrange(1, 12))) for _ in range(300)]
    chat = tokenizer.render_chat([{"role": "user", "content": "2 + 2 = ?\n  Say it."}])
    for text in (*TOKENIZER_SAMPLES, *texts, chat):
        assert list(theirs.encode(text, 0, 0)) == tokenizer.encode(text, bos=False, special=True), text


def test_only_added_tokens_change(nano: Checkpoint, tmp_path: Path) -> None:
    folder = folder_of(nano, tmp_path / "nano")
    write_runner_tokenizer(folder)
    before, after = (
        json.loads((folder / name).read_text("utf-8")) for name in ("tokenizer.json", RUNNER_TOKENIZER)
    )
    ours, theirs = before.pop("added_tokens"), after.pop("added_tokens")
    assert before == after
    assert [t["id"] for t in ours] == [t["id"] for t in theirs]
    assert {t["content"] for t in ours} - {t["content"] for t in theirs} == {"▁" * n for n in range(2, 32)}


def test_without_a_json_the_runners_get_the_sentencepiece_model(nano: Checkpoint, tmp_path: Path) -> None:
    folder = folder_of(nano, tmp_path / "nano")
    (folder / "tokenizer.json").unlink()
    assert write_runner_tokenizer(folder) == "tokenizer.model"
    assert not (folder / RUNNER_TOKENIZER).exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"added_tokens": [1]}', '{"added_tokens": {"a": 1}}'])
def test_what_is_no_tokenizer_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(FoxEdgeError, match=r"tokenizer\.json"):
        write_runner_tokenizer(tmp_path)
    assert not (tmp_path / RUNNER_TOKENIZER).exists()
