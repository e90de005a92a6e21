"""The tokenizer as ExecuTorch's runners on Android and iOS read it.

They read a tokenizer.json or a SentencePiece model. Of the latter they know no special tokens, so that a
chat's markup would be taken for text. Of the former they look for added tokens in the text as it was written,
before spaces become U+2581: a Gemma-like file has runs of spaces among those tokens with their U+2581, which
are never found, and a run of spaces comes out as so many single ones. So a copy is written beside the
checkpoint's own files in which those tokens have spaces. Text that holds U+2581 itself is still read
otherwise than by SentencePiece. Knows that file; `fox-edge verify` compares the ids.
"""

from __future__ import annotations

import json
from pathlib import Path

from fox_edge.config import read_json_object
from fox_edge.errors import TokenizerError

RUNNER_TOKENIZER = "executorch-tokenizer.json"
_SOURCE = "tokenizer.json"
_MAX_BYTES = 256 << 20
_SPACE = "▁"


def write_runner_tokenizer(folder: Path) -> str:
    """Write the copy into an artifact's folder; the name of the file that the runners are to be given.

    That is tokenizer.model where the folder has no tokenizer.json. Raises TokenizerError for a file that is
    no tokenizer.
    """
    source = folder / _SOURCE
    if not source.is_file():
        return "tokenizer.model"
    fields = read_json_object(source, _MAX_BYTES)
    added = fields.get("added_tokens")
    if not isinstance(added, list) or not all(isinstance(t, dict) and "content" in t for t in added):
        raise TokenizerError(f"{source}: has no list of added tokens")
    for token in added:
        token["content"] = str(token["content"]).replace(_SPACE, " ")
    (folder / RUNNER_TOKENIZER).write_text(
        json.dumps(fields, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8"
    )
    return RUNNER_TOKENIZER
