"""Text to token ids and back, special ids, and the chat format of a checkpoint.

Reads tokenizer.model (SentencePiece) or else tokenizer.json, and the small JSON files beside it. Knows
nothing of weights. The ids of config.json are not consulted: a published Fox has bos and eos swapped there.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fox_edge.chat_template import FOX_TEMPLATE, ChatTemplate, find_template
from fox_edge.config import read_json_object
from fox_edge.errors import CheckpointError, TokenizerError
from fox_edge.tokenizer_backends import Backend, JsonBackend, SentencePieceBackend, splitter
from fox_edge.vocabulary import Piece

__all__ = ["Piece", "StreamDecoder", "Tokenizer"]

# Everything that a tokenizer may read, in the order in which an artifact carries it along.
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_MAX_SETTINGS_BYTES = 16 << 20
# Pieces that end a turn in the chat formats in use; where a vocabulary has them, they stop generation.
_TURN_ENDS = ("<end_of_turn>", "<|im_end|>", "<|eot_id|>")
# What a template is shown as an answer, to see what it writes after one.
_SAMPLE_ANSWER = "@@answer@@"
# Texts that no tokenizer merges with what follows; one of them must do.
_ANCHORS = ("\n", ".", "0")
_WELL_KNOWN = {
    "bos": ("<bos>", "<s>", "<|begin_of_text|>"),
    "eos": ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>"),
    "pad": ("<pad>",),
    "unk": ("<unk>",),
}
_ROLES = ("bos", "eos", "pad", "unk")


class Tokenizer:
    """One checkpoint's tokenizer. Safe to share between threads once it is built."""

    def __init__(self, backend: Backend, folder: Path, settings: Mapping[str, Any]) -> None:
        self._backend, self._folder = backend, folder
        self.notes: list[str] = list(backend.notes)
        self._pieces = backend.pieces
        ids = {role: self._special_id(role, settings) for role in _ROLES}
        self.bos_id, self.eos_id = ids["bos"], ids["eos"]
        self.pad_id, self.unk_id = ids["pad"], ids["unk"]
        add_bos = settings.get("add_bos_token")
        self.add_bos = self.bos_id is not None and bool(backend.adds_bos if add_bos is None else add_bos)
        self.special_ids = frozenset(
            {*self._pieces.of_kinds(("control", "unknown")), *(id for id in ids.values() if id is not None)}
        )
        # Of pieces of the same text, the one with the lowest id.
        self._special = {self._pieces.text(id): id for id in sorted(self.special_ids, reverse=True)}
        self._splitter = splitter(self._special)
        template = find_template(folder, settings)
        if template is None:
            self.notes.append(f"{folder.name} has no chat template; Fox's own format is used")
        self._template = ChatTemplate(FOX_TEMPLATE if template is None else template)
        self.stop_ids = self._find_stop_ids()

    @classmethod
    def from_folder(cls, path: Path) -> Tokenizer:
        """Read the tokenizer of a checkpoint or artifact folder.

        Raises TokenizerError naming the file when there is none, or it is damaged or contradicts itself.
        """
        settings = _read_settings(path)
        added = _added_tokens(path, settings)
        if (path / "tokenizer.model").is_file():
            backend: Backend = SentencePieceBackend(path / "tokenizer.model", added)
        elif (path / "tokenizer.json").is_file():
            backend = JsonBackend(path / "tokenizer.json", added)
        else:
            raise TokenizerError(f"{path}: has no tokenizer.model and no tokenizer.json")
        return cls(backend, path, settings)

    @property
    def vocab_size(self) -> int:
        """Pieces in the tokenizer; a model may have more rows."""
        return len(self._pieces)

    @property
    def add_space_prefix(self) -> bool:
        """Whether text is encoded as if a space stood before it (Llama: yes, Gemma: no)."""
        return self._backend.add_space_prefix

    @property
    def algorithm(self) -> str:
        """'bpe' and 'unigram' (SentencePiece's), or 'byte-level-bpe' (GPT-2's)."""
        return self._backend.algorithm

    @property
    def chat_template(self) -> str:
        """The Jinja text: the checkpoint's own, else Fox's."""
        return self._template.source

    def pieces(self) -> list[Piece]:
        """Every piece; the index is the id. Merging prefers the higher score."""
        return list(self._pieces)

    def id_of(self, text: str) -> int | None:
        """The id of a piece, by its exact text."""
        return self._pieces.find(text)

    def encode(self, text: str, bos: bool = False, special: bool = False) -> list[int]:
        """Token ids of a text; `bos` puts <bos> before them.

        With `special`, control tokens written in the text become their ids, and each stretch between them
        is encoded as a text of its own (as llama.cpp does: the space prefix comes again after each).
        Without, they are ordinary characters.
        """
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        if not special or self._splitter is None:
            return ids + (self._backend.encode(text) if text else [])
        for part in self._splitter.split(text):
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                ids += self._backend.encode(part)
        return ids

    def encode_on(self, text: str) -> list[int]:
        """Token ids of a text that goes on where another ended: no space prefix before its first stretch.

        Control tokens written in it become their ids.
        """
        parts = [text] if self._splitter is None else self._splitter.split(text)
        return self._without_prefix(parts[0]) + self.encode("".join(parts[1:]), special=True)

    def _without_prefix(self, text: str) -> list[int]:
        """Ids of plain text, less the space that some tokenizers put before it."""
        for anchor in _ANCHORS if self.add_space_prefix and text else ():
            before, both = self.encode(anchor), self.encode(anchor + text)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self.encode(text)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of a sequence; bytes that are no UTF-8 become U+FFFD.

        Raises TokenizerError for an id that the vocabulary does not have.
        """
        stream = self.stream(skip_special)
        return "".join([stream.push(id) for id in ids]) + stream.flush()

    def stream(self, skip_special: bool = True) -> StreamDecoder:
        """A decoder for tokens that arrive one at a time."""
        return StreamDecoder(self, skip_special)

    def piece_bytes(self, id: int) -> bytes:
        """What a token adds to the text, in UTF-8: perhaps a part of a character.

        Raises TokenizerError for an id outside the vocabulary.
        """
        if not 0 <= id < self.vocab_size:
            raise TokenizerError(f"token id {id} is outside the vocabulary of {self.vocab_size} pieces")
        return self._backend.piece_bytes(id)

    def render_chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text; messages have 'role' and 'content'. Raises TokenizerError."""
        for n, message in enumerate(messages):
            for key in ("role", "content"):
                if not isinstance(message.get(key), str):
                    raise TokenizerError(f"chat message {n} has no text under '{key}'")
        names = {f"{role}_token": self._text_of(getattr(self, f"{role}_id")) for role in _ROLES}
        return self._template.render(messages, add_generation_prompt, **names)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation that asks for an answer; exactly one <bos>, where the model has one."""
        return self.encode_rendered(self.render_chat(messages))

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of what `render_chat` wrote; exactly one <bos>, where the model has one."""
        ids = self.encode(text, special=True)
        if self.bos_id is None:
            return ids
        start = 0
        while start < len(ids) and ids[start] == self.bos_id:
            start += 1
        return [self.bos_id, *ids[start:]] if start or self.add_bos else ids

    def _text_of(self, id: int | None) -> str:
        return "" if id is None else self._pieces.text(id)

    def _special_id(self, role: str, settings: Mapping[str, Any]) -> int | None:
        """The tokenizer settings' choice, else tokenizer.model's own, else a piece of a well-known name."""
        text = _token_text(settings.get(f"{role}_token"))
        if text is not None:
            if (named := self._pieces.find(text)) is not None:
                return named
            complaint = (
                f"{self._folder / 'tokenizer_config.json'}: {role}_token '{text}' is none of the "
                f"{self.vocab_size} pieces"
            )
            if role in ("bos", "eos"):
                raise TokenizerError(complaint)
            self.notes.append(f"{complaint}; it is left out")
        own = self._backend.special_ids.get(role)
        if own is not None:
            return own
        found = (id for name in _WELL_KNOWN[role] if (id := self._pieces.find(name)) is not None)
        return next((id for id in found if self._pieces.kind(id) != "normal"), None)

    def _find_stop_ids(self) -> frozenset[int]:
        """eos, pieces that end turns, the template's own, generation_config.json's where it can be right."""
        stops = {self.eos_id, *map(self._pieces.find, _TURN_ENDS)}
        # A published Fox lists <bos> as its end there: only a special token of no other role is believed.
        others = {self.bos_id, self.pad_id, self.unk_id}
        if (end := self._turn_end()) not in others:
            stops.add(end)
        stops |= {
            id
            for id in _generation_eos(self._folder)
            if id in self.special_ids and id not in others and self._pieces.kind(id) == "control"
        }
        return frozenset(id for id in stops if id is not None)

    def _turn_end(self) -> int | None:
        """The special token that the chat template puts right after an answer; None where it puts none."""
        words = [("user", "?"), ("assistant", _SAMPLE_ANSWER), ("user", "?")]
        try:
            text = self.render_chat([{"role": role, "content": content} for role, content in words])
        except TokenizerError:
            return None  # whoever chats will be told
        after = text.partition(_SAMPLE_ANSWER)[2].lstrip()
        found = self._splitter.match(after) if self._splitter is not None else None
        return self._special[found[0]] if found else None


class StreamDecoder:
    """Turns tokens into text as they come; holds back bytes until they are whole characters.

    The texts of all pushes and the flush, joined, are `Tokenizer.decode` of the whole.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # The prefix that encoding put before the text is taken off again.
        self._strip = tokenizer.add_space_prefix

    def push(self, id: int) -> str:
        """The text that this token completes, perhaps none; raises TokenizerError for an unknown id."""
        data = self._tokenizer.piece_bytes(id)
        if id in self._tokenizer.special_ids:
            return "" if self._skip_special else self._decoder.decode(data)
        if self._strip:
            data = data.removeprefix(b" ")
            self._strip = False
        return self._decoder.decode(data)

    @property
    def whole(self) -> bool:
        """Whether no part of a character is held back."""
        return not self._decoder.getstate()[0]

    def flush(self) -> str:
        """What remains at the end: U+FFFD for a character that never became whole."""
        return self._decoder.decode(b"", final=True)


def _read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, completed from special_tokens_map.json."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            try:
                fields = read_json_object(folder / name, _MAX_SETTINGS_BYTES)
            except CheckpointError as error:
                raise TokenizerError(str(error)) from None
            settings |= {key: value for key, value in fields.items() if value is not None}
    return settings


def _token_text(value: Any) -> str | None:
    """A token in the settings: its text, or an object that has it under 'content'."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _added_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, tuple[int | None, bool]]:
    """Text -> (id if the files give one, whether it is special) of the tokens that the settings declare."""
    added: dict[str, tuple[int | None, bool]] = {}
    if (folder / "added_tokens.json").is_file():
        try:
            fields = read_json_object(folder / "added_tokens.json", _MAX_SETTINGS_BYTES)
        except CheckpointError as error:
            raise TokenizerError(str(error)) from None
        added |= {text: (id, False) for text, id in fields.items() if type(id) is int}
    decoder = settings.get("added_tokens_decoder")
    for key, entry in decoder.items() if isinstance(decoder, dict) else ():
        text = _token_text(entry)
        if text is not None and str(key).isdecimal():
            added[text] = (int(key), isinstance(entry, dict) and bool(entry.get("special")))
    extra = settings.get("additional_special_tokens")
    names = [_token_text(settings.get(f"{role}_token")) for role in ("bos", "eos", "pad")]
    for text in names + [_token_text(t) for t in (extra if isinstance(extra, list) else [])]:
        if text is not None:
            added[text] = (added.get(text, (None, True))[0], True)
    return added


def _generation_eos(folder: Path) -> list[int]:
    """The end tokens of generation_config.json; none where the file is missing or odd."""
    try:
        value = read_json_object(folder / "generation_config.json").get("eos_token_id")
    except CheckpointError:
        return []  # the checkpoint complains about a damaged file
    return [id for id in (value if isinstance(value, list) else [value]) if type(id) is int]
