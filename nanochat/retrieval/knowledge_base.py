"""The knowledge base: a directory with documents and their index, which changes whole or not at all.

    data/my_kb/
      CURRENT              the name of the live version; replaced atomically, last of all
      v0002/               a version, never changed once it is there
        manifest.json      format, retriever and settings, embedding model, counts, size and checksum of every file
        documents.jsonl  offsets.npy  id_rank.npy
        bm25/  simple/     inverted indexes
        embeddings.npy  embedding_model.json  index.faiss
      v0001/               the version before, for readers that still have it open

A change is built in a directory beside, flushed to disk, renamed to the next version, and then CURRENT is replaced: a
reader sees the old base or the new one, and a build killed at any moment leaves the old one as it was. Files that did
not change are shared between versions by hard link. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

from nanochat.common import UserError, atomic_write_text, print0
from nanochat.retrieval.create import RETRIEVER_TYPES, create_retriever, setting_names
from nanochat.retrieval.dense import DenseRetriever
from nanochat.retrieval.document import Document
from nanochat.retrieval.retriever import Retriever
from nanochat.retrieval.store import DocumentStore

FORMAT_VERSION = 1
KEPT_VERSIONS = 2
_VERSION_NAME = re.compile(r"v\d{4,}")
_BUILDING = ".building-"
# Settings that shaped the index: another value needs another build. The embedding model is checked by its hash instead.
_BUILT_IN = ("language", "stem", "stop_words")


@dataclass
class KnowledgeBase:
    """One version, open for reading."""

    path: Path
    version: str
    manifest: dict[str, Any]

    @property
    def directory(self) -> Path:
        return self.path / self.version

    @property
    def retriever_type(self) -> str:
        return self.manifest["retriever"]

    def __len__(self) -> int:
        return self.manifest["counts"]["documents"]

    @cached_property
    def documents(self) -> DocumentStore:
        with self._reading():
            return DocumentStore.load(self.directory)

    def retriever(self, retriever_type: str | None = None, **settings: Any) -> Retriever:
        """The retriever that was built, or another that the base can give; settings given here override those saved."""
        built = self.retriever_type
        wanted = retriever_type or built
        saved = {name: value for name, value in self.manifest["settings"].items() if name in setting_names(wanted)}
        retriever = create_retriever(wanted, **{**saved, **settings})
        if wanted == built or (built == "hybrid" and wanted in ("bm25", "dense")):
            for name in _BUILT_IN:
                if name in settings and name in saved and settings[name] != saved[name]:
                    raise UserError(
                        f"{self.path} was built with {name}={saved[name]}, and {name}={settings[name]} is asked for; "
                        f"leave it out, or build again: {self.rebuild_command(wanted)}"
                    )
            self._check_embedding_model(retriever)
            with self._reading():
                return retriever.load(self.directory)
        if wanted == "dense" or (wanted == "hybrid" and built != "dense"):
            raise UserError(
                f"{self.path} was built for {built!r} and has no embeddings, which {wanted!r} needs; use {built!r}, or "
                f"build it: {self.rebuild_command(wanted)}"
            )
        print0(f"note: {self.path} was built for {built!r}; building {wanted!r} in memory ({len(self):,} documents)")
        if wanted == "hybrid":  # over the embeddings of a dense base
            self._check_embedding_model(retriever)
        with self._reading():
            retriever.share_documents(self.documents)
            if wanted == "hybrid":
                retriever.dense.load_index(self.directory)
                retriever.bm25.index(self.documents)
            else:
                retriever.index(self.documents)
        return retriever

    def _check_embedding_model(self, retriever: Retriever) -> None:
        built = self.manifest.get("embedding")
        dense = getattr(retriever, "dense", retriever)
        applies = built and len(self) and isinstance(dense, DenseRetriever)
        if applies and dense.encoder_hash != built["hash"]:
            raise UserError(
                f"{self.path} was built with another embedding model, {built['model']!r} ({built['hash'][:12]}), than "
                f"{dense.model!r} ({dense.encoder_hash[:12]}), and their vectors do not compare; use that one, or "
                f"build again: {self.rebuild_command(retriever.type, dense.model)}"
            )

    def rebuild_command(self, retriever_type: str | None = None, model: str | None = None) -> str:
        model = model or self.manifest.get("settings", {}).get("model")
        return _build_command(self.path, self.directory, retriever_type or self.retriever_type, model)

    def verify(self) -> None:
        """Read every file and compare its checksum."""
        for name, entry in self.manifest["files"].items():
            if _sha256(self.directory / name) != entry["sha256"]:
                raise UserError(_damaged(self.path, self.version, f"{name} does not have its checksum", self.manifest))

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, EOFError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(_damaged(self.path, self.version, reason, self.manifest)) from error


# --- reading


def open_knowledge_base(path: str | Path, verify: bool = False) -> KnowledgeBase:
    """The live version. Sizes are checked always, checksums (which reads everything) with verify."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no knowledge base at {path}; build it: {_build_command(path)}")
    try:
        version = (path / "CURRENT").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        if _VERSION_NAME.fullmatch(path.resolve().name) and (path.resolve().parent / "CURRENT").exists():
            parent = path.resolve().parent
            raise UserError(f"{path} is one version of a knowledge base; give the base itself: {parent}") from None
        if path.is_dir() and _is_half_built(path):
            raise UserError(f"the build of {path} was not finished; run it again: {_build_command(path)}") from None
        raise UserError(
            f"{path} is not a knowledge base (no CURRENT in it); build one elsewhere: {_build_command('NEW_DIRECTORY')}"
        ) from None
    if not _VERSION_NAME.fullmatch(version) or not (path / version).is_dir():
        raise UserError(f"{path} is damaged (CURRENT names {version!r}); build it again: {_build_command(path)}")
    manifest = _read_manifest(path, version)
    for name, entry in manifest["files"].items():
        file = path / version / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry["size"]:
            reason = f"{name} is missing" if size is None else f"{name} has {size} bytes, not {entry['size']}"
            raise UserError(_damaged(path, version, reason, manifest))
    knowledge_base = KnowledgeBase(path, version, manifest)
    if verify:
        knowledge_base.verify()
    return knowledge_base


def _read_manifest(path: Path, version: str) -> dict[str, Any]:
    try:
        manifest = json.loads((path / version / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(_damaged(path, version, f"manifest.json cannot be read: {error}", {})) from None
    found = manifest.get("format_version") if isinstance(manifest, dict) else None
    if found != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {found}, this program reads {FORMAT_VERSION}; build it again: "
            + _build_command(path, path / version, manifest.get("retriever") if isinstance(manifest, dict) else None)
        )
    wanted = {"retriever": str, "settings": dict, "counts": dict, "files": dict}
    for name, kind in wanted.items():
        if not isinstance(manifest.get(name), kind):
            raise UserError(_damaged(path, version, f"manifest.json has no {name}", {}))
    return manifest


def _is_half_built(path: Path) -> bool:
    return any(
        _VERSION_NAME.fullmatch(name) or name.startswith(_BUILDING) or name == ".lock" for name in os.listdir(path)
    )


def _damaged(path: Path, version: str, reason: str, manifest: dict[str, Any]) -> str:
    # the documents in the base are offered as the source only while they are whole themselves
    entry = manifest.get("files", {}).get("documents.jsonl", {})
    documents = path / version / "documents.jsonl"
    whole = documents.is_file() and entry.get("sha256") == _sha256(documents)
    model = manifest.get("settings", {}).get("model")
    command = _build_command(path, path / version if whole else None, manifest.get("retriever"), model)
    return f"{path} is damaged ({version}: {reason}); build it again: {command}"


def _build_command(
    path: str | Path, version: Path | None = None, retriever_type: str | None = None, model: str | None = None
) -> str:
    has_documents = version is not None and (version / "documents.jsonl").is_file()
    documents = version / "documents.jsonl" if has_documents else "DOCUMENTS.jsonl"
    retriever_type = retriever_type if retriever_type in RETRIEVER_TYPES else "bm25"
    command = f"python -m nanochat.retrieval --documents {documents} --output {path} --type {retriever_type}"
    return command + (f" --model {model}" if model and retriever_type in ("dense", "hybrid") else "")


# --- writing


def build_knowledge_base(
    documents: Iterable[Document], output: str | Path, retriever_type: str = "simple", **settings: Any
) -> KnowledgeBase:
    """Index the documents and make them the live version of the base at output, whether there was one before or not."""
    output = Path(output)
    retriever = create_retriever(retriever_type, **settings)
    documents = list(documents)  # all of them are read and checked before anything is written
    with _writer(output):
        retriever.add(documents)
        return _write_version(output, retriever)


def add_documents(path: str | Path, documents: Iterable[Document], **settings: Any) -> KnowledgeBase:
    """A new version with these documents too; one whose id is there already is replaced."""
    documents = list(documents)
    return _change(Path(path), lambda retriever: retriever.add(documents), settings)


def delete_documents(path: str | Path, ids: Iterable[str], **settings: Any) -> KnowledgeBase:
    """A new version without these documents. The version before still has them, until the next change."""
    ids = list(ids)
    return _change(Path(path), lambda retriever: retriever.delete(ids), settings)


def _change(path: Path, change: Any, settings: dict[str, Any]) -> KnowledgeBase:
    open_knowledge_base(path)  # a missing or damaged base is told before a lock is made in it
    with _writer(path):
        retriever = open_knowledge_base(path).retriever(**settings)
        change(retriever)
        return _write_version(path, retriever)


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[None]:
    """Be the only one that writes this base; whatever killed builds have left is removed first."""
    existed = path.exists()
    if existed and not path.is_dir():
        raise UserError(f"{path} is a file; give a directory for the knowledge base")
    if existed and any(path.iterdir()) and not (path / "CURRENT").exists() and not _is_half_built(path):
        raise UserError(
            f"{path} has files in it and is not a knowledge base; give another directory, or empty this one"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        with open(path / ".lock", "ab") as lock:
            _lock(lock, path)
            _remove_leftovers(path)
            try:
                yield
            except BaseException:
                if not existed:
                    shutil.rmtree(path, ignore_errors=True)  # nothing was there, nothing stays
                raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write the knowledge base {path} ({reason}); what was there is unchanged") from error


def _lock(lock: Any, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: two writers at once are not guarded against there
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is writing {path}; wait for it to end, and try again") from None


def _remove_leftovers(path: Path) -> None:
    """Unfinished builds, and versions that were finished but never became live."""
    live = _live_version(path)
    for name in os.listdir(path):
        orphan = _VERSION_NAME.fullmatch(name) and (live is None or int(name[1:]) > int(live[1:]))
        if name.startswith(_BUILDING) or orphan:
            shutil.rmtree(path / name, ignore_errors=True)


def _live_version(path: Path) -> str | None:
    try:
        version = (path / "CURRENT").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return version if _VERSION_NAME.fullmatch(version) else None


def _write_version(path: Path, retriever: Retriever) -> KnowledgeBase:
    live = _live_version(path)
    version = f"v{int(live[1:]) + 1 if live else 1:04d}"
    building = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=path))
    try:
        building.chmod(0o777 & ~_umask())  # mkdtemp makes it private; others may read a knowledge base
        retriever.save(building)
        manifest = _make_manifest(building, retriever)
        if live:
            _link_unchanged(building, path / live, manifest)
        (building / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for directory, _, files in os.walk(building):
            for name in files:
                _flush(Path(directory) / name)
            _flush(Path(directory))
        os.rename(building, path / version)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    _flush(path)
    atomic_write_text(path / "CURRENT", version + "\n")
    versions = sorted(
        (name for name in os.listdir(path) if _VERSION_NAME.fullmatch(name)), key=lambda name: int(name[1:])
    )
    for old in versions[:-KEPT_VERSIONS]:
        shutil.rmtree(path / old, ignore_errors=True)
    return KnowledgeBase(path, version, manifest)


def _make_manifest(directory: Path, retriever: Retriever) -> dict[str, Any]:
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    info = getattr(retriever, "embedding_info", None)
    return {
        "format_version": FORMAT_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "retriever": retriever.type,
        "settings": retriever.settings(),
        "embedding": info() if info else None,
        "counts": {"documents": len(retriever)},
        "files": {
            file.relative_to(directory).as_posix(): {"size": file.stat().st_size, "sha256": _sha256(file)}
            for file in files
        },
    }


def _link_unchanged(building: Path, old: Path, manifest: dict[str, Any]) -> None:
    try:
        old_files = json.loads((old / "manifest.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # sharing saves space only; a damaged old version is no reason to fail
    for name, entry in manifest["files"].items():
        # what is shared is the file, not what the old manifest says of it: it may have been damaged since
        if old_files.get(name) == entry and (old / name).is_file() and _sha256(old / name) == entry["sha256"]:
            link = building / (name + ".link")
            try:
                os.link(old / name, link)
            except OSError:
                return  # a file system without hard links
            os.replace(link, building / name)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """To disk, now: a rename must not arrive there before what it names."""
    if path.is_dir() and os.name != "posix":
        return  # other systems cannot open a directory
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
