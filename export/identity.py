"""What a checkpoint says of itself, for the headers that other programs show: names, languages, sampling.

Knows its card's front matter, its name and generation_config.json; not how any format writes them down.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from fox_edge.checkpoint import Checkpoint
from fox_edge.errors import MissingPackageError

try:
    import gguf
except ImportError:
    raise MissingPackageError("gguf", "gguf") from None

CARD = "README.md"
_MAX_CARD_BYTES = 1 << 20
_MAX_ENTRIES = 64
# generation_config.json's key -> (ours, lowest, highest) of the numbers that sampling starts from.
_SAMPLING: dict[str, tuple[str, float, float]] = {
    "temperature": ("temperature", 0.0, 100.0),
    "top_k": ("top_k", 1, 1 << 20),
    "top_p": ("top_p", 0.0, 1.0),
    "min_p": ("min_p", 0.0, 1.0),
    "repetition_penalty": ("repeat_penalty", 0.01, 100.0),
}


@dataclass(frozen=True)
class Identity:
    """Names as 'Fox-1-1.6B-Instruct-v0.1' has them; None or empty where nothing is said."""

    name: str
    basename: str | None = None  # Fox-1
    size_label: str = ""  # 1.6B
    finetune: str | None = None  # Instruct
    version: str | None = None  # v0.1
    tags: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    sampling: dict[str, float | int] = field(default_factory=dict)


def identify(checkpoint: Checkpoint) -> Identity:
    """Read a checkpoint's name, card and generation configuration; nothing can be wrong, only missing."""
    name = checkpoint.name.rstrip("/").rsplit("/", 1)[-1]
    parameters = checkpoint.config.num_parameters()
    _, _, basename, finetune, version, size = gguf.Metadata.get_model_id_components(name, parameters)
    front = _front_matter(checkpoint)
    tags = [*_entries(front, "tags"), *_entries(front, "pipeline_tag")]
    return Identity(
        name=name,
        basename=basename,
        size_label=size or gguf.size_label(parameters, 0, 0, 0),
        finetune=finetune,
        version=version,
        tags=tuple(dict.fromkeys(tags)),
        languages=tuple(dict.fromkeys(_entries(front, "language"))),
        sampling=sampling_of(checkpoint.generation_config()),
    )


def sampling_of(generation: dict[str, Any]) -> dict[str, float | int]:
    """The sampling that generation_config.json asks for; one that says do_sample false asks for none."""
    found: dict[str, float | int] = {}
    for key, (ours, lowest, highest) in _SAMPLING.items():
        value: Any = generation.get(key)
        kinds = (int,) if ours == "top_k" else (int, float)
        if type(value) in kinds and lowest <= value <= highest:  # what is not a number is in no range
            found[ours] = value if ours == "top_k" else float(value)
    if generation.get("do_sample") is False:
        found = {key: value for key, value in found.items() if key == "repeat_penalty"}
    return found


def _front_matter(checkpoint: Checkpoint) -> str:
    path = checkpoint.path / CARD
    if not path.is_file() or path.stat().st_size > _MAX_CARD_BYTES:
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    found = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    return found[1] if found else ""


def _entries(front: str, key: str) -> list[str]:
    """The words under a key: `key: a`, `key: [a, b]`, or a list of `- a` lines; no other YAML is read."""
    found = re.search(rf"^{key}:[ \t]*(.*)((?:\r?\n[ \t]*-[ \t].*)*)", front, re.MULTILINE)
    if found is None:
        return []
    listed = (
        re.findall(r"-[ \t]+(.*)", found[2]) if not found[1].strip() else found[1].strip(" []").split(",")
    )
    words = [word.split(" #")[0].strip(" \t\r'\"") for word in listed]
    return [word for word in words if re.fullmatch(r"[\w.:+ -]{1,64}", word)][:_MAX_ENTRIES]
