"""The knowledge base: a directory with documents and their index, which changes whole or not at all.

    data/my_kb/
      CURRENT              the name of the live version; replaced atomically, last of all
      v0002/               a version, never changed once it is there
        manifest.json      format, retriever and settings, embedding model, counts, size and checksum of every file
        s0001/  s0002/     segments (nanochat.retrieval.segment), each with
          documents.jsonl offsets.npy ...     its documents
          postings/                           their words, for simple and bm25
          embeddings.npy index.faiss          their vectors, for dense and hybrid
          dead.npy dead_terms.npy             which of them are deleted
        graph/  fact_retriever/               of all documents, for kg
      v0001/               the version before, for readers that still have it open

A change is built in a directory beside, flushed to disk, renamed to the next version, and then CURRENT is replaced: a
reader sees the old base or the new one, and a build killed at any moment leaves the old one as it was. Segments that
did not change are shared between versions by hard link. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

from nanochat.common import UserError, atomic_write_text, flush, sha256_of
from nanochat.retrieval import ann
from nanochat.retrieval.collection import Collection, NewDirectory
from nanochat.retrieval.create import RETRIEVER_TYPES, TEXT_SETTINGS, create_retriever, setting_names
from nanochat.retrieval.document import Document
from nanochat.retrieval.encoding import EncodedOnce
from nanochat.retrieval.retriever import Retriever

FORMAT_VERSION = 3
KEPT_VERSIONS = 2
_VERSION_NAME = re.compile(r"v\d{4,}")
_BUILDING = ".building-"
_ENCODED = ".encoded-"


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
    def documents(self) -> Collection:
        with self.reading():
            documents = Collection.load(self.directory)
            # a writer may be removing this version: what is gone already must not look like what was never there
            found = {s.directory.name: (s.living, len(s.dead)) for s in documents.segments}
            if found != {name: (s["documents"], s["deleted"]) for name, s in self.manifest["segments"].items()}:
                raise ValueError("its segments are not those of its manifest")
            if self.manifest["embedding"] and any(s.embeddings is None for s in documents.segments):
                raise ValueError("it has embeddings for some of its segments only")
            return documents

    def retriever(self, retriever_type: str | None = None, embeds: bool = True, **settings: Any) -> Retriever:
        """The retriever that was built, or another that the base can give: simple and bm25 always, dense and hybrid if
        it has embeddings. Settings given here override those saved. embeds: False if it will not embed anything, so
        that its model need not be there."""
        wanted = retriever_type or self.retriever_type
        saved = {name: value for name, value in self.manifest["settings"].items() if name in setting_names(wanted)}
        retriever = create_retriever(wanted, **{**saved, **settings})
        for name in TEXT_SETTINGS:
            if name in settings and name in saved and settings[name] != saved[name]:
                raise UserError(
                    f"{self.path} was built with {name}={saved[name]}, and {name}={settings[name]} is asked for; "
                    f"leave it out, or build again: {self.rebuild_command(wanted)}"
                )
        if wanted in ("dense", "hybrid") and embeds:
            self._check_embedding_model(retriever)
        retriever.use(self.documents)
        with self.reading():
            retriever.load_beside(self.directory)
        return retriever

    def _check_embedding_model(self, retriever: Retriever) -> None:
        built = self.manifest.get("embedding")
        dense = getattr(retriever, "dense", retriever)
        command = f"python -m nanochat.retrieval index --knowledge_base {self.path} --type {retriever.type}"
        if not built:
            raise UserError(
                f"{self.path} was built for {self.retriever_type!r} and has no embeddings, which {retriever.type!r} "
                f"needs; use {self.retriever_type!r}, or make them: {command}"
            )
        if len(self) and dense.encoder_hash != built["hash"]:
            raise UserError(
                f"{self.path} was built with another embedding model, {built['model']!r} ({built['hash'][:12]}), than "
                f"{dense.model!r} ({dense.encoder_hash[:12]}), and their vectors do not compare; use that one, or "
                f"make them anew: {command} --model {dense.model}"
            )

    def rebuild_command(self, retriever_type: str | None = None, model: str | None = None) -> str:
        model = model or self.manifest.get("settings", {}).get("model")
        return _build_command(self.path, retriever_type or self.retriever_type, model)

    def verify(self) -> None:
        """Read every file and compare its checksum."""
        with self.reading():
            for name, entry in self.manifest["files"].items():
                if sha256_of(self.directory / name) != entry["sha256"]:
                    reason = f"{name} does not have its checksum"
                    raise UserError(_damaged(self.path, self.version, reason, self.manifest))

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, EOFError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(_damaged(self.path, self.version, reason, self.manifest)) from error


# --- reading


def open_knowledge_base(path: str | Path, verify: bool = False) -> KnowledgeBase:
    """The live version. Sizes are checked always, checksums (which reads everything) with verify."""

    def checked(knowledge_base: KnowledgeBase) -> KnowledgeBase:
        if verify:
            knowledge_base.verify()
        return knowledge_base

    return newest(path, checked)


def newest(path: str | Path, use: Callable[[KnowledgeBase], Any]) -> Any:
    """use(the live version). A slow reader may find the files of its version removed, two changes later: it begins
    again, with the version that is live by then."""
    path = Path(path)
    while True:
        found = live_version(path)
        try:
            return use(_open(path))
        except UserError:
            if live_version(path) in (None, found):
                raise


def _open(path: Path) -> KnowledgeBase:
    if not path.exists():
        raise UserError(f"no knowledge base at {path}; build it: {_build_command(path)}")
    try:
        version = (path / "CURRENT").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        if _VERSION_NAME.fullmatch(path.resolve().name) and (path.resolve().parent / "CURRENT").exists():
            parent = path.resolve().parent
            raise UserError(f"{path} is one version of a knowledge base; give the base itself: {parent}") from None
        if path.is_dir() and not os.listdir(path):
            raise UserError(f"no knowledge base at {path}, which is empty; build it: {_build_command(path)}") from None
        if path.is_dir() and _is_half_built(path):
            raise UserError(f"the build of {path} was not finished; run it again: {_build_command(path)}") from None
        raise UserError(
            f"{path} is not a knowledge base (no CURRENT in it); build one elsewhere: {_build_command('NEW_DIRECTORY')}"
        ) from None
    if not _VERSION_NAME.fullmatch(version) or not (path / version).is_dir():
        raise UserError(_damaged(path, "CURRENT", f"it names {version!r}", {}))
    manifest = _read_manifest(path, version)
    if (reason := _missing_file(path / version, manifest)) is not None:
        raise UserError(_damaged(path, version, reason, manifest))
    return KnowledgeBase(path, version, manifest)


def _read_manifest(path: Path, version: str) -> dict[str, Any]:
    try:
        manifest = json.loads((path / version / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(_damaged(path, version, f"manifest.json cannot be read: {error}", {})) from None
    found = manifest.get("format_version") if isinstance(manifest, dict) else None
    if found != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {found}, this program reads {FORMAT_VERSION}; build it again: "
            + _build_command(path, manifest.get("retriever") if isinstance(manifest, dict) else None)
        )
    wanted = {"retriever": str, "settings": dict, "counts": dict, "segments": dict, "files": dict}
    for name, kind in wanted.items():
        if not isinstance(manifest.get(name), kind):
            raise UserError(_damaged(path, version, f"manifest.json has no {name}", {}))
    return manifest


def _is_half_built(path: Path) -> bool:
    return any(
        _VERSION_NAME.fullmatch(name) or name.startswith((_BUILDING, _ENCODED)) or name == ".lock"
        for name in os.listdir(path)
    )


def _damaged(path: Path, version: str, reason: str, manifest: dict[str, Any]) -> str:
    model = manifest.get("settings", {}).get("model")
    before = [name for name in _versions(path) if name != version and _whole(path, name)]
    command = _build_command(path, manifest.get("retriever"), model)
    back = (
        f"go back to {before[-1]}: python -m nanochat.retrieval rollback --knowledge_base {path}, or " if before else ""
    )
    return f"{path} is damaged ({version}: {reason}); {back}build it again: {command}"


def _build_command(path: str | Path, retriever_type: str | None = None, model: str | None = None) -> str:
    retriever_type = retriever_type if retriever_type in RETRIEVER_TYPES else "bm25"
    given = "--triples FACTS.txt" if retriever_type == "kg" else "--documents DOCUMENTS.jsonl"
    command = f"python -m nanochat.retrieval {given} --output {path} --type {retriever_type}"
    return command + (f" --model {model}" if model and retriever_type in ("dense", "hybrid") else "")


def _versions(path: Path) -> list[str]:
    """Oldest first."""
    found = [name for name in os.listdir(path) if _VERSION_NAME.fullmatch(name)] if path.is_dir() else []
    return sorted(found, key=lambda name: int(name[1:]))


def _whole(path: Path, version: str) -> bool:
    """Whether all files of a version have their sizes."""
    try:
        manifest = json.loads((path / version / "manifest.json").read_text(encoding="utf-8"))
        return manifest["format_version"] == FORMAT_VERSION and _missing_file(path / version, manifest) is None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _missing_file(directory: Path, manifest: dict[str, Any]) -> str | None:
    for name, entry in manifest["files"].items():
        try:  # at once: a writer may remove it between two looks
            size = (directory / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != entry["size"]:
            return f"{name} has {size} bytes, not {entry['size']}"
    return None


# --- writing


def build_knowledge_base(
    documents: Iterable[Document], output: str | Path, retriever_type: str = "simple", **settings: Any
) -> KnowledgeBase:
    """Index the documents and make them the live version of the base at output, whether there was one before or not.
    They are taken one by one; where one is refused, nothing is changed."""
    return _fresh(Path(output), documents, create_retriever(retriever_type, **settings))


def add_documents(path: str | Path, documents: Iterable[Document], **settings: Any) -> KnowledgeBase:
    """A new version with these documents too; one whose id is there already is replaced."""
    return _change(path, settings, lambda retriever, new_directory: retriever.add(documents, new_directory))


def delete_documents(path: str | Path, ids: Iterable[str], **settings: Any) -> KnowledgeBase:
    """A new version without these documents. The version before still has them, until the next change."""
    return _change(path, settings, lambda retriever, new_directory: retriever.delete(ids, new_directory), embeds=False)


def _change(
    path: str | Path,
    settings: dict[str, Any],
    change: Callable[[Retriever, NewDirectory], None],
    embeds: bool = True,
) -> KnowledgeBase:
    open_knowledge_base(path)  # a missing or damaged base is told before a lock is made in it
    with _writer(Path(path)) as write:
        knowledge_base = open_knowledge_base(path)
        retriever = knowledge_base.retriever(embeds=embeds, **settings)
        known = None if embeds else knowledge_base.manifest["embedding"]
        return write(retriever, lambda new_directory: change(retriever, new_directory), known)


def add_embeddings(path: str | Path, retriever_type: str = "hybrid", **settings: Any) -> KnowledgeBase:
    """A new version with the embeddings of the documents that are there, for dense or hybrid search."""
    knowledge_base = open_knowledge_base(path)
    saved = {
        name: v for name, v in knowledge_base.manifest["settings"].items() if name in setting_names(retriever_type)
    }
    retriever = create_retriever(retriever_type, **{**saved, **settings})
    if retriever.encoding() is None:
        raise UserError(f"{retriever_type!r} has no embeddings; give --type dense or --type hybrid")
    return _fresh(Path(path), knowledge_base.documents, retriever)


def _fresh(path: Path, documents: Iterable[Document], retriever: Retriever) -> KnowledgeBase:
    """A version from nothing but these documents; vectors that an older one or an unfinished build has are kept."""
    with _writer(path) as write:
        encode = None
        if retriever.encoding() is not None:
            hashed = retriever.embedding_info()["hash"]
            encode = EncodedOnce(retriever.encoding(), path / (_ENCODED + hashed[:16]), _same_model(path, hashed))
        made = write(retriever, lambda new_directory: retriever.add(documents, new_directory, encode))
        _remove_encoded(path)
        return made


def _same_model(path: Path, hashed: str) -> Collection | None:
    """The live version's documents, if their embeddings are of this model."""
    try:
        knowledge_base = open_knowledge_base(path)
        built = knowledge_base.manifest["embedding"]
        return knowledge_base.documents if built and built["hash"] == hashed else None
    except UserError:
        return None


def rollback(path: str | Path) -> KnowledgeBase:
    """The version before the live one becomes live again, as a new version."""
    path = Path(path)
    if not (path / "CURRENT").exists():  # says what is wrong, before what looks unfinished is removed
        open_knowledge_base(path)
    with _writer(path):
        live = live_version(path)
        before = [name for name in _versions(path) if live is None or int(name[1:]) < int(live[1:])]
        if not before or not _whole(path, before[-1]):
            raise UserError(f"{path} has no whole version before {live}; nothing was done")
        building = _new_building(path)
        try:
            shutil.copytree(path / before[-1], building, copy_function=_link, dirs_exist_ok=True)
            return _make_live(path, building)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[Callable[..., KnowledgeBase]]:
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
                yield functools.partial(_write_version, path)
            except BaseException as error:
                if _no_room(error):  # what was encoded so far would keep the disk full
                    _remove_encoded(path)
                if not existed and not list(path.glob(_ENCODED + "*")):
                    shutil.rmtree(path, ignore_errors=True)  # nothing was there, nothing stays
                raise
    except OSError as error:
        reason = error.strerror or str(error)
        todo = "make room there" if _no_room(error) else "see to that"
        raise UserError(
            f"cannot write the knowledge base {path} ({reason}); what was there is unchanged: {todo}, and run it again"
        ) from error


def _no_room(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _remove_encoded(path: Path) -> None:
    for folder in path.glob(_ENCODED + "*"):
        shutil.rmtree(folder, ignore_errors=True)


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
    """Unfinished builds, and versions that were finished but never became live. Where CURRENT is there and cannot be
    read, any of them may have been live."""
    live = live_version(path)
    unknown = live is None and (path / "CURRENT").exists()
    for name in os.listdir(path):
        orphan = _VERSION_NAME.fullmatch(name) and (live is None or int(name[1:]) > int(live[1:])) and not unknown
        if name.startswith(_BUILDING) or orphan:
            shutil.rmtree(path / name, ignore_errors=True)
        elif name.startswith(".CURRENT."):
            (path / name).unlink(missing_ok=True)


def live_version(path: Path) -> str | None:
    try:
        version = (path / "CURRENT").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return version if _VERSION_NAME.fullmatch(version) else None


def _write_version(
    path: Path,
    retriever: Retriever,
    change: Callable[[NewDirectory], None],
    embedding: dict[str, Any] | None = None,
) -> KnowledgeBase:
    """The retriever's documents after the change, as the live version. embedding: what is known of its model."""
    building = _new_building(path)
    old_files, old_segments = {}, {}
    live = live_version(path)
    if live and retriever.documents.segments:  # a change of what is there: its segments are shared
        old = _read_manifest(path, live)
        old_files, old_segments = old["files"], old["segments"]
    numbers = itertools.count(1 + max((int(name[1:]) for name in old_segments), default=0))
    try:
        change(lambda: building / f"s{next(numbers):04d}")
        dense = getattr(retriever, "dense", retriever)
        info = embedding or (retriever.embedding_info() if hasattr(retriever, "embedding_info") else None)
        kept, counts = set(), {}
        for segment in retriever.documents.segments:
            directory = building / segment.directory.name
            kept.add(directory.name)
            if segment.directory != directory:
                _share(segment.directory, directory)
            elif info and dense.index_of(segment) is not None:
                ann.write(dense.index_of(segment), directory / "index.faiss")
            segment.save_dead(directory)
            counts[directory.name] = {"documents": segment.living, "deleted": len(segment.dead)}
            if info:
                known = old_segments.get(directory.name, {}).get("recall_at_10")
                found = known or ann.recall(dense.index_of(segment), segment.embeddings)
                counts[directory.name]["recall_at_10"] = found
        for name in os.listdir(building):  # what was merged into another segment on the way
            if name not in kept:
                shutil.rmtree(building / name)
        if info:
            (building / "embedding_model.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        retriever.save_beside(building)
        manifest = {
            "format_version": FORMAT_VERSION,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "retriever": retriever.type,
            "settings": retriever.settings(),
            "embedding": info,
            "counts": {"documents": len(retriever)},
            "segments": counts,
            "files": _entries(building, path / live if live else None, old_files),
        }
        (building / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        return _make_live(path, building)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _new_building(path: Path) -> Path:
    building = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=path))
    building.chmod(0o777 & ~_umask())  # mkdtemp makes it private; others may read a knowledge base
    return building


def _make_live(path: Path, building: Path) -> KnowledgeBase:
    last = live_version(path) or max(_versions(path), key=lambda name: int(name[1:]), default="v0000")
    version = f"v{int(last[1:]) + 1:04d}"
    for directory, _, files in os.walk(building):
        for name in files:
            file = Path(directory) / name
            if file.stat().st_nlink == 1:  # a shared one was flushed when it was written
                flush(file)
        flush(Path(directory))
    os.rename(building, path / version)
    try:
        flush(path)
        atomic_write_text(path / "CURRENT", version + "\n")
    except BaseException:
        if live_version(path) != version:
            shutil.rmtree(path / version, ignore_errors=True)
        raise
    for old in _versions(path)[:-KEPT_VERSIONS]:
        shutil.rmtree(path / old, ignore_errors=True)
    return KnowledgeBase(path, version, _read_manifest(path, version))


def _share(source: Path, target: Path) -> None:
    """The same files by hard link, but for the deletions, which every version has its own of."""
    for directory, _, files in os.walk(source):
        into = target / Path(directory).relative_to(source)
        into.mkdir()
        for name in files:
            if name not in ("dead.npy", "dead_terms.npy"):
                _link(Path(directory) / name, into / name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _entries(building: Path, live: Path | None, old_files: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Size and checksum of every file; a shared one keeps the checksum that it was written with."""
    entries = {}
    for file in sorted(file for file in building.rglob("*") if file.is_file()):
        name = file.relative_to(building).as_posix()
        shared = live is not None and name in old_files and (live / name).is_file() and file.samefile(live / name)
        entries[name] = old_files[name] if shared else {"size": file.stat().st_size, "sha256": sha256_of(file)}
    return entries


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
