"""An exported model: a folder with a manifest, written whole or not at all.

The only contract between export and runtimes. Knows the folder and its manifest, not what a model file
holds. `ArtifactWriter` works under a temporary name beside the target and renames at the end, so a killed
export leaves nothing that looks like a model.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from fox_edge.errors import ArtifactError
from fox_edge.partial import PartialFolder

MANIFEST = "manifest.json"
SCHEMA = 1
MAX_MANIFEST_BYTES = 16 << 20
_HASH_CHUNK = 1 << 20
# Above this share of greedy tokens that int8 activations change, the user is told.
_MANY_FLIPS_PERCENT = 1.0


@dataclass(frozen=True)
class TensorRecord:
    """What one tensor of the checkpoint became. `bytes` counts scales and zero points too."""

    name: str  # Hugging Face's
    stored_as: str  # the name inside the model file
    shape: tuple[int, ...]
    type: str
    bytes: int
    reason: str | None = None  # why the type is not the one the recipe asked for


@dataclass(frozen=True)
class Manifest:
    """Everything that is known of an artifact."""

    format: str
    quant: str
    model_file: str
    tied: bool
    parameters: int
    context: int
    checkpoint: str  # what was exported, as the user named it (a folder's last part, a hub id, 'nano')
    checkpoint_sha256: str
    tensors: tuple[TensorRecord, ...]
    recipe: dict[str, Any]
    versions: dict[str, str]
    notes: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)  # name -> sha256
    verification: dict[str, Any] | None = None
    pte: dict[str, Any] | None = None  # of an ExecuTorch program: its limits, and where its weights lie

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights; a tied matrix counts once."""
        return sum(t.bytes for t in self.tensors)

    @property
    def positions(self) -> int:
        """The longest context: an ExecuTorch program's cache has as many positions as it was exported for."""
        told = (self.pte or {}).get("context")
        return told if type(told) is int and 0 < told <= self.context else self.context

    @property
    def bits_per_weight(self) -> float:
        """Storage per parameter, over the whole model."""
        return 8 * self.weight_bytes / self.parameters

    def to_json(self) -> dict[str, Any]:
        """The manifest as manifest.json holds it."""
        fields = {"schema": SCHEMA, **asdict(self)}
        return fields if self.pte is not None else {k: v for k, v in fields.items() if k != "pte"}

    @classmethod
    def from_json(cls, fields: dict[str, Any], where: Path) -> Manifest:
        """Check and read what `to_json` wrote; raises ArtifactError naming the file and the field."""
        if fields.get("schema") != SCHEMA:
            raise ArtifactError(
                f"{where}: manifest schema {fields.get('schema')!r}, but this version reads {SCHEMA}"
            )
        values = {k: v for k, v in fields.items() if k != "schema"}
        for key, kind in _FIELDS.items():
            if not isinstance(values.get(key), kind):
                raise ArtifactError(f"{where}: field '{key}' is missing or not of the expected kind")
        for key in ("parameters", "context"):
            if isinstance(values[key], bool) or values[key] < 1:
                raise ArtifactError(f"{where}: field '{key}' is {values[key]}, but must be at least 1")
        for key in _OPTIONAL:
            if not isinstance(values.get(key), dict | None):
                raise ArtifactError(f"{where}: field '{key}' is not of the expected kind")
        unknown = sorted(set(values) - set(_FIELDS) - set(_OPTIONAL))
        if unknown:
            raise ArtifactError(f"{where}: unknown field '{unknown[0]}'")
        try:
            values["tensors"] = tuple(
                TensorRecord(**{**t, "shape": tuple(int(n) for n in t["shape"])}) for t in values["tensors"]
            )
            if not all(_is_plain(t) for t in values["tensors"]):
                raise TypeError
        except (KeyError, TypeError, ValueError):
            raise ArtifactError(f"{where}: field 'tensors' is not a list of tensor records") from None
        values["notes"] = tuple(str(n) for n in values["notes"])
        for name in (values["model_file"], *values["files"]):
            _check_name(name, where)
        return cls(**values)


_FIELDS: dict[str, type] = {
    "format": str,
    "quant": str,
    "model_file": str,
    "tied": bool,
    "parameters": int,
    "context": int,
    "checkpoint": str,
    "checkpoint_sha256": str,
    "tensors": list,
    "recipe": dict,
    "versions": dict,
    "notes": list,
    "files": dict,
}
_OPTIONAL = ("verification", "pte")


def _is_plain(record: TensorRecord) -> bool:
    """Whether a tensor's record has names for names and counts for counts."""
    texts = (record.name, record.stored_as, record.type)
    return (
        all(isinstance(text, str) for text in texts)
        and type(record.bytes) is int
        and record.bytes >= 0
        and len(record.shape) > 0
        and min(record.shape) > 0
    )


def _check_name(name: str, where: Path) -> None:
    """A manifest may only speak of files inside its own folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ArtifactError(f"{where}: '{name}' is not a plain file name inside the artifact's folder")


@dataclass(frozen=True)
class Artifact:
    """An opened artifact: its folder and manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> Artifact:
        """Read the manifest and check that every file it names is there; raises ArtifactError."""
        where = path / MANIFEST
        if not path.is_dir():
            raise ArtifactError(f"{path}: no such folder" if not path.exists() else f"{path}: not a folder")
        if not where.is_file():
            raise ArtifactError(f"{path}: not an exported model (no {MANIFEST})")
        if where.stat().st_size > MAX_MANIFEST_BYTES:
            raise ArtifactError(
                f"{where}: {where.stat().st_size} bytes, but at most {MAX_MANIFEST_BYTES} are read"
            )
        try:
            fields = json.loads(where.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ArtifactError(f"{where}: not readable as JSON ({error})") from None
        if not isinstance(fields, dict):
            raise ArtifactError(f"{where}: holds no JSON object")
        manifest = Manifest.from_json(fields, where)
        for name in (manifest.model_file, *manifest.files):
            if not (path / name).is_file():
                raise ArtifactError(f"{path / name}: named by the manifest, but missing")
        if manifest.model_file not in manifest.files:
            raise ArtifactError(f"{where}: has no sha256 for the model file '{manifest.model_file}'")
        return cls(path, manifest)

    @property
    def model_path(self) -> Path:
        """The file that the runtime opens."""
        return self.path / self.manifest.model_file

    def total_bytes(self) -> int:
        """Bytes of all files in the folder."""
        return sum(p.stat().st_size for p in self.path.iterdir() if p.is_file())

    def changed_files(self) -> Iterator[str]:
        """Names of the files whose sha256 is not the manifest's."""
        for name, digest in self.manifest.files.items():
            if sha256_file(self.path / name) != digest:
                yield name


def export_summary(
    artifact: Artifact, seconds: float, peak_rss_bytes: int, peak_anonymous_bytes: int
) -> dict[str, Any]:
    """What `export` prints. `seconds` and the peaks are the export's own, without verification."""
    manifest, verification = artifact.manifest, artifact.manifest.verification or {}
    return {
        "artifact": str(artifact.path),
        "format": manifest.format,
        "quant": manifest.quant,
        "bytes": artifact.total_bytes(),
        "bits_per_weight": manifest.bits_per_weight,
        "tied_copies": 1 if manifest.tied else None,
        "seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes,
        "peak_anonymous_bytes": peak_anonymous_bytes,
        "verify_seconds": verification.get("seconds"),
        "mean_kl_nats": verification.get("mean_kl_nats"),
        "p99_kl_nats": verification.get("p99_kl_nats"),
        "top1_agreement_percent": verification.get("top1_agreement_percent"),
        "flipped_percent": verification.get("flipped_percent"),
        "notes": list(manifest.notes),
        "other_types": _other_types(manifest),
    }


def _other_types(manifest: Manifest) -> list[str]:
    """One sentence for each reason why tensors have another type than the recipe asked for."""
    groups: dict[tuple[str, str], list[str]] = {}
    for record in manifest.tensors:
        if record.reason is not None:
            groups.setdefault((record.type, record.reason), []).append(record.name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} stored as {kind}: {reason}"
        for (kind, reason), names in groups.items()
    ]


def export_text(result: dict[str, Any]) -> str:
    """The summary as lines for a person; the notes were told when the checkpoint was opened."""
    tied = ", embedding and head one matrix" if result["tied_copies"] == 1 else ""
    lines = [
        f"{result['artifact']}: {result['format']} {result['quant']}, {result['bytes'] / 1e6:,.1f} MB, "
        f"{result['bits_per_weight']:.2f} bits per weight{tied}",
        f"written in {result['seconds']:.1f} s at a peak of {result['peak_rss_bytes'] / 1e6:,.0f} MB; "
        f"verified in {result['verify_seconds']:.1f} s: mean KL {result['mean_kl_nats']:.2g} nats, "
        f"top-1 agreement {result['top1_agreement_percent']:.1f} %",
        *(f"note: {sentence}" for sentence in result["other_types"]),
    ]
    flipped = result["flipped_percent"]
    if flipped is not None and flipped > _MANY_FLIPS_PERCENT:
        lines.append(
            f"note: activations rounded to int8 change {flipped:.1f} % of the likeliest tokens; "
            "--accuracy-level 1 does without, at less than half the speed"
        )
    return "\n".join(lines)


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class ArtifactWriter:
    """A context manager: files go into `folder`, `commit(manifest)` turns it into the target.

    Leaving the context without `commit` deletes the folder; the target is untouched.
    Raises ArtifactError when the target exists (unless `replace`), or cannot be written.
    """

    def __init__(self, target: Path, replace: bool = False) -> None:
        self.target, self.replace = target, replace
        if target.exists() and not replace:
            raise ArtifactError(f"{target}: exists already; choose another name or pass --replace")
        if target.exists() and not (target / MANIFEST).is_file():
            raise ArtifactError(f"{target}: exists and is not an exported model, so --replace does not apply")
        self._partial = PartialFolder(target)

    def __enter__(self) -> ArtifactWriter:
        try:
            self._partial.__enter__()
        except OSError as error:
            raise ArtifactError(f"{self.target}: cannot be written ({error.strerror})") from None
        self.folder = self._partial.path
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._partial.__exit__(kind, error, trace)
        if isinstance(error, OSError) and error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EROFS,
            errno.EACCES,
        ):
            raise ArtifactError(
                f"{self.target}: writing failed ({error.strerror}); nothing was kept"
            ) from error

    def need(self, size_bytes: int) -> None:
        """Refuse at once what the disk cannot hold."""
        free = shutil.disk_usage(self.folder).free
        if size_bytes > free:
            raise ArtifactError(f"{self.target}: needs {size_bytes} bytes, but that disk has {free} free")

    def commit(self, manifest: Manifest) -> Artifact:
        """Hash every file, write the manifest last, put the folder in its place."""
        files = {p.name: sha256_file(p) for p in sorted(self.folder.iterdir()) if p.is_file()}
        final = replace(manifest, files=files)
        text = json.dumps(final.to_json(), indent=1, ensure_ascii=False) + "\n"
        (self.folder / MANIFEST).write_text(text, encoding="utf-8")
        try:
            self._partial.put_in_place()
        except OSError as error:
            raise ArtifactError(f"{self.target}: cannot be renamed into place ({error.strerror})") from None
        return Artifact(self.target, final)
