"""What the files beside a model tell a runtime about tokens: tokenizer, special ids, chat template.

Knows the names of those files, ours and onnxruntime-genai's; nothing of the model.
"""

from __future__ import annotations

from pathlib import Path

from fox_edge.config import read_json_object
from fox_edge.tokenizer import Tokenizer

CONFIG, GENAI_CONFIG = "config.json", "genai_config.json"
_TEMPLATE, _SETTINGS = "chat_template.jinja", "tokenizer_config.json"
_MAX_SETTINGS_BYTES = 16 << 20


class SideFiles:
    """A folder's account of its tokens. Raises TokenizerError or CheckpointError for damaged files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokenizer = Tokenizer.from_folder(folder)

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Token ids by the folder's own tokenizer files, without <bos>."""
        return self._tokenizer.encode(text, bos=False, special=special)

    def special_ids(self) -> dict[str, int | None]:
        """What the configuration tells a runtime; <unk> is the tokenizer's own business.

        Of several ids that end a text the first counts.
        """
        if (self._folder / CONFIG).is_file():
            fields = read_json_object(self._folder / CONFIG)
        else:
            fields = read_json_object(self._folder / GENAI_CONFIG).get("model", {})
        ids = {role: _first(fields.get(f"{role}_token_id")) for role in ("bos", "eos", "pad")}
        return {**ids, "unk": self._tokenizer.unk_id}

    def chat_template(self) -> str | None:
        """The chat template beside the model, or among the tokenizer's settings."""
        path = self._folder / _TEMPLATE
        if path.is_file():
            return path.read_text(encoding="utf-8")
        if not (self._folder / _SETTINGS).is_file():
            return None
        template = read_json_object(self._folder / _SETTINGS, _MAX_SETTINGS_BYTES).get("chat_template")
        return template if isinstance(template, str) else None


def _first(value: object) -> int | None:
    found = value[0] if isinstance(value, list) and value else value
    return found if isinstance(found, int) else None
