"""Knowledge bases whose writers are killed: nothing that was done is lost, and nothing half-written is ever read.

    python -m bench.faults_kb --kills 200 --json

A writer builds and changes a base and says through a pipe what it begins and what is done. It is killed with SIGKILL at
a random moment, again and again, while another process reads all the time. After each kill the base has to open, to
have its checksums, to find what a fresh retriever finds, and to hold what a dictionary says: the last change that was
done, or the one that was under way. Then every kind of change is killed at its first call that changes the disk, its
second, and so on until one gets through, and in the middle of every file it writes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import print_figures
from nanochat.common import UserError, run_main
from nanochat.config import load_config
from nanochat.retrieval import Document, RetrievalManager, collection
from nanochat.retrieval.knowledge_base import (
    KnowledgeBase,
    add_documents,
    add_embeddings,
    build_knowledge_base,
    delete_documents,
    live_version,
    newest,
    open_knowledge_base,
    rollback,
)

TYPES = ("simple", "bm25", "dense", "hybrid")
KINDS = ("first build", "build", "add", "merge", "delete", "rollback", "embed")
KILLS_EACH = 10  # of one base; then another one is begun
WORDS = [f"{first}{second}un" for first in "bdfgklm" for second in "aeiou"]
TOUCHES = {"open", "os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir"}  # Python's audit events

State = dict[str, str]  # id -> content


@dataclass
class Config:
    """Kill the writers of knowledge bases."""

    kills: int = 200
    """At random moments."""
    points: list[str] = field(default_factory=lambda: list(KINDS))
    """The changes that are killed at every call: first build, build, add, merge, delete, rollback, embed."""
    every: int = 1
    """Of those calls only each second, third, ...; those at a rename, where versions become live, always."""
    seed: int = 0
    """Of the changes and the moments."""
    directory: Path | None = None
    """Where the bases lie: in memory if not given, where that can be (a disk takes most of the time to flush)."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


class HashEncoder:
    """Hashed bags of words, in place of a model."""

    name, fingerprint = "hashed words", "hashed-words-1"

    def encode(self, texts: list[str]) -> np.ndarray:
        vectors = np.full((len(texts), 32), 0.01)
        for vector, text in zip(vectors, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                vector[zlib.crc32(word.encode()) % 32] += 1
        return vectors


# --- changes, and what a dictionary makes of them


def choose(rng: random.Random, now: State | None, before: State | None) -> dict[str, Any]:
    """The next change."""
    if now is None:
        return {"what": "build", "new": some_texts(rng, 12)}
    kinds = ["add"] * 4 + ["build", "embed"] + ["delete"] * 3 * (len(now) > 4) + ["rollback"] * 2 * (before is not None)
    what = rng.choice(kinds)
    if what == "delete":
        return {"what": what, "gone": rng.sample(sorted(now), rng.randint(1, len(now) // 2))}
    return (
        {"what": what, "new": some_texts(rng, 12 if what == "build" else 5)}
        if what in ("add", "build")
        else {"what": what}
    )


def some_texts(rng: random.Random, most: int) -> State:
    ids = rng.sample(range(30), rng.randint(1, most))  # so few that many are there already, and are replaced
    return {f"d{id}": " ".join(["common", *rng.choices(WORDS, k=rng.randint(1, 8))]) for id in ids}


def after(change: dict[str, Any], now: State | None, before: State | None) -> tuple[State | None, State | None]:
    """The state that a change makes, and the one before it."""
    if change["what"] == "rollback":
        return before, now
    if change["what"] == "build":
        return change["new"], now
    gone = change.get("gone", ())
    return {id: text for id, text in now.items() if id not in gone} | change.get("new", {}), now


def apply(change: dict[str, Any], path: Path, retriever_type: str) -> None:
    what, new = change["what"], [Document(id, "", text) for id, text in change.get("new", {}).items()]
    if what == "build":
        build_knowledge_base(new, path, retriever_type, **encoder_of(retriever_type))
    elif what == "embed":
        add_embeddings(path, "hybrid", encoder=HashEncoder())
    elif what == "rollback":
        rollback(path)
    elif what == "delete":
        delete_documents(path, change["gone"])
    else:
        add_documents(path, new, **encoder_of(open_knowledge_base(path).retriever_type))


def encoder_of(retriever_type: str) -> dict[str, Any]:
    return {"encoder": HashEncoder()} if retriever_type in ("dense", "hybrid") else {}


# --- what a base holds


def holdings(knowledge_base: KnowledgeBase) -> State:
    """Every document, after every checksum. ValueError if a search over all does not find just these."""
    knowledge_base.verify()
    retriever = knowledge_base.retriever(**encoder_of(knowledge_base.retriever_type))
    there = {document.id: document.content for document in knowledge_base.documents}
    found = {document.id: document.content for document in retriever.search(["common"], 1000)[0]}
    if found != there or len(knowledge_base) != len(there):
        raise ValueError(f"{knowledge_base.directory}: a search finds {len(found)} of {len(there)} documents")
    return there


def finds_as_a_fresh_one(path: Path, state: State) -> bool:
    manager = RetrievalManager(knowledge_base_path=path, **encoder_of(open_knowledge_base(path).retriever_type))
    documents = [Document(id, "", text) for id, text in state.items()]
    encoder = encoder_of(manager.retriever_type)
    fresh = RetrievalManager(manager.retriever_type, documents=documents, **encoder)
    queries = [f"{WORDS[3]} common", " ".join(WORDS[:12]), "common"]
    hits = [[[(d.id, round(d.score, 9)) for d in found] for found in m.search(queries, 50)] for m in (manager, fresh)]
    return hits[0] == hits[1]


def fingerprint(state: State) -> str:
    return hashlib.sha256(json.dumps(sorted(state.items())).encode()).hexdigest()[:16]


def phase(path: Path, live_before: str | None) -> str:
    """How far a killed change had come, by what it left. live_before: the version that it began with."""
    names = os.listdir(path) if path.exists() else []
    live = live_version(path)
    versions = [name for name in names if re.fullmatch(r"v\d+", name)]
    if live != live_before:
        return "clearing" if len(versions) > 2 else "committed"
    if any(name.startswith(".CURRENT.") for name in names):
        return "naming"
    if any(live is None or int(name[1:]) > int(live[1:]) for name in versions):
        return "renamed"
    if list(path.glob(".building-*/manifest.json")):
        return "flushing"
    if any(name.startswith(".encoded-") for name in names):
        return "encoding"
    return "writing" if any(name.startswith(".building-") for name in names) else "opening"


# --- processes


def fork(run: Callable[[Callable[[dict[str, Any]], None]], None]) -> tuple[int, int]:
    """(process, pipe) of run(tell), where tell sends one JSON line. Imports are done by now, so it starts at once."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    try:
        os.close(reading)
        run(lambda message: os.write(writing, json.dumps(message).encode() + b"\n"))
        os._exit(0)
    except BaseException as error:
        os.write(writing, json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode() + b"\n")
    finally:
        os._exit(1)


class Messages:
    """The lines of a pipe, as they come. Half a line, of a writer that was killed, is none."""

    def __init__(self, pipe: int):
        self.pipe, self.rest, self.ended = pipe, b"", False

    def read(self, seconds: float = 0) -> list[dict[str, Any]]:
        """What is there, or comes within so many seconds."""
        found: list[bytes] = []
        while not self.ended and select.select([self.pipe], [], [], 0 if found else seconds)[0]:
            data = os.read(self.pipe, 1 << 16)
            self.ended = not data
            *lines, self.rest = (self.rest + data).split(b"\n")
            found += lines
        messages = [json.loads(line) for line in found]
        for message in messages:
            if "failed" in message:
                raise RuntimeError(message["failed"])
        return messages

    def close(self) -> None:
        os.close(self.pipe)


def end(process: int) -> int:
    """Kill it; its status."""
    os.kill(process, signal.SIGKILL)
    return os.waitpid(process, 0)[1]


def write_on(path: Path, retriever_type: str, now: State | None, before: State | None, seed: int) -> Callable:
    def run(tell: Callable[[dict[str, Any]], None]) -> None:
        nonlocal now, before
        rng = random.Random(seed)
        collection.TIER = 3  # so that a short life has merges
        while True:
            change = choose(rng, now, before)
            tell({"begin": change, "live": live_version(path)})
            began = time.perf_counter()
            apply(change, path, retriever_type)
            tell({"done": time.perf_counter() - began})
            now, before = after(change, now, before)

    return run


def read_on(path: Path) -> Callable:
    """Open, verify, search, and search the version before once more, whose files may be gone by now."""

    def run(tell: Callable[[dict[str, Any]], None]) -> None:
        older: tuple[RetrievalManager, list[Document]] | None = None
        parent = os.getppid()
        while os.getppid() == parent:
            try:
                state = newest(path, holdings)
                if older is not None and older[0].search(["common"], 1000)[0] != older[1]:
                    tell({"error": "an open version changed"})
                kept = newest(path, lambda found: found.retriever(**encoder_of(found.retriever_type)))
                older = (kept, kept.search(["common"], 1000)[0])
                tell({"state": fingerprint(state)})
            except UserError as error:
                if older is not None:  # before that it may not be there yet
                    tell({"error": str(error)})
                time.sleep(0.01)

    return run


# --- random moments


def kills(count: int, directory: Path, seed: int = 0) -> dict[str, float]:
    """Kill writers of bases in this directory so many times; figures."""
    rng = random.Random(seed)
    figures: Counter[str] = Counter(dict.fromkeys(("lost", "damaged", "wrong_searches", "torn_reads", "reads"), 0))
    typical: dict[str, float] = {}  # seconds of each kind of change
    for number in range(0, count, KILLS_EACH):
        path = directory / f"kb{number}"
        lives(path, TYPES[number // KILLS_EACH % len(TYPES)], min(KILLS_EACH, count - number), rng, typical, figures)
        shutil.rmtree(path, ignore_errors=True)
    return {"kills": count, **figures}


def lives(
    path: Path, retriever_type: str, count: int, rng: random.Random, typical: dict[str, float], figures: Counter[str]
) -> None:
    """One base, killed so many times."""
    now: State | None = None
    before: State | None = None
    begun: set[str] = set()  # fingerprints of all that a reader may see
    reader, pipe = fork(read_on(path))
    readings = Messages(pipe)
    try:
        for _ in range(count):
            writer, pipe = fork(write_on(path, retriever_type, now, before, rng.randrange(1 << 30)))
            told = Messages(pipe)
            try:
                messages = wait_and_kill(writer, told, rng, typical)
            finally:
                told.close()
            pending: dict[str, Any] | None = None
            for message in messages:
                if "begin" in message:
                    pending = message
                    begun.add(fingerprint(after(pending["begin"], now, before)[0]))
                else:
                    typical[pending["begin"]["what"]] = message["done"]
                    now, before = after(pending["begin"], now, before)
                    pending = None
                    figures["changes"] += 1
            figures[f"killed_{phase(path, pending['live']) if pending else 'between'}"] += 1
            now, before = settle(path, pending, now, before, figures)
        time.sleep(0.1)  # the reader looks once more
    finally:
        end(reader)
    for message in readings.read():
        figures["reads"] += 1
        if message.get("state") not in begun:
            figures["torn_reads"] += 1
            print(f"{path}: torn: {message}", flush=True)
    readings.close()


def wait_and_kill(writer: int, told: Messages, rng: random.Random, typical: dict[str, float]) -> list[dict[str, Any]]:
    """All it told. Killed a random while after the first to third change began, mostly while that was under way."""
    messages: list[dict[str, Any]] = []
    try:
        changes = rng.randint(1, 3)
        while sum("begin" in message for message in messages) < changes:
            messages += (came := told.read(60))
            if not came:
                raise RuntimeError("the writer says nothing")
        last = next(message["begin"]["what"] for message in reversed(messages) if "begin" in message)
        time.sleep(1.1 * rng.random() * typical.get(last, 0.05))
    finally:
        end(writer)
    while not told.ended:
        messages += told.read(60)
    return messages


def settle(
    path: Path, pending: dict[str, Any] | None, now: State | None, before: State | None, figures: Counter[str]
) -> tuple[State | None, State | None]:
    """Hold the base to the dictionary after a kill; the state to go on with, and the one before it."""
    if pending is not None and live_version(path) != pending["live"]:
        now, before = after(pending["begin"], now, before)
        figures["done_but_not_told"] += 1
    try:
        found = holdings(open_knowledge_base(path))
        figures["wrong_searches"] += not finds_as_a_fresh_one(path, found)
    except (UserError, ValueError) as error:
        if now is not None or not re.search("no knowledge base at|was not finished", str(error)):
            figures["damaged"] += 1
            print(f"{path}: {error}", flush=True)
        return now, before
    if found != now:
        figures["lost"] += 1
        print(f"{path}: {found} after {pending}, not {now}", flush=True)
    return found, before


# --- every moment


def points(directory: Path, kind: str, every: int = 1) -> dict[str, float]:
    """Kill a change at each call that changes the disk, and in the middle of each file; how often, and how often the
    base was not as it was before or after, or the same change could not be made then."""
    now, before = prepare(directory / "prepared", kind)
    change = {
        "first build": {"what": "build", "new": {"d1": "common baun", "d2": "common"}},
        "build": {"what": "build", "new": {"d1": "common baun", "d2": "common"}},
        "add": {"what": "add", "new": {"d1": "common baun", "n1": "common new"}},
        "merge": {"what": "add", "new": {"d1": "common baun", "n1": "common new"}},
        "delete": {"what": "delete", "gone": ["d0", "d3"]},
        "rollback": {"what": "rollback"},
        "embed": {"what": "embed"},
    }[kind]
    killed = broken = 0
    path = directory / "kb"
    log = directory / "calls"
    dies(path, directory / "prepared", change, kind, lambda: die_at_call(0, log))
    sizes = {file.stat().st_size for file in path.rglob("*") if file.is_file()}
    calls = log.read_text().split("\n")
    for number, (last, call) in enumerate(itertools.pairwise(["", *calls]), 1):
        if number % every == 0 or "os.rename" in (last, call):
            killed += dies(path, directory / "prepared", change, kind, lambda at=number: die_at_call(at))
            broken += not stands(path, change, kind, now, before)
    for most in sorted({n for size in sizes for n in (size // 2, size - 1) if n > 0})[::every]:
        if dies(path, directory / "prepared", change, kind, lambda most=most: die_over_size(most)):
            killed += 1
            broken += not stands(path, change, kind, now, before)
    return {"points": killed, "points_broken": broken}


def prepare(path: Path, kind: str) -> tuple[State | None, State | None]:
    """A base with two versions, but for a first build; what it holds, and held before."""
    shutil.rmtree(path, ignore_errors=True)
    now: State | None = None
    before: State | None = None
    if kind == "first build":
        return now, before
    new = {f"d{n}": f"common {WORDS[n]}" for n in range(8)}
    for change in ({"what": "build", "new": new}, {"what": "add", "new": {"e0": "common"}}):
        apply(change, path, "bm25")
        now, before = after(change, now, before)
    return now, before


def dies(path: Path, prepared: Path, change: dict[str, Any], kind: str, arm: Callable[[], None]) -> bool:
    """Whether a change of a copy of the prepared base is killed."""
    shutil.rmtree(path, ignore_errors=True)
    if prepared.exists():
        shutil.copytree(prepared, path)

    def run(tell: Callable[[dict[str, Any]], None]) -> None:
        collection.TIER = 2 if kind == "merge" else 8
        arm()
        apply(change, path, "bm25")

    process, pipe = fork(run)
    messages = Messages(pipe)
    messages.read(60)
    messages.close()
    status = os.waitpid(process, 0)[1]
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"the change failed with status {os.WEXITSTATUS(status)}")
    return os.WIFSIGNALED(status)


def die_at_call(number: int, log: Path | None = None) -> None:
    """Before the number-th call that changes the disk, or flushes it. log: a file for the names of all calls."""
    calls = itertools.count(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if log else None

    def call(name: str) -> None:
        if descriptor is not None:
            os.write(descriptor, f"{name}\n".encode())
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in TOUCHES and (event != "open" or writes(*arguments[1:])):
            call(event)

    def flush(file: int, original: Callable[[int], None] = os.fsync) -> None:
        call("fsync")
        original(file)

    os.fsync = flush
    sys.addaudithook(hook)


def writes(mode: str | None, flags: int) -> bool:
    return any(letter in mode for letter in "wax+") if mode else bool(flags & (os.O_WRONLY | os.O_RDWR))


def die_over_size(most: int) -> None:
    """In the middle of the first write that makes a file longer."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def stands(path: Path, change: dict[str, Any], kind: str, now: State | None, before: State | None) -> bool:
    """Whether the base is as before the change, or as after it, and takes the same change now."""
    ended, _ = after(change, now, before)
    try:
        try:
            found = holdings(open_knowledge_base(path))
        except UserError as error:
            if now is not None or not re.search("no knowledge base at|was not finished", str(error)):
                raise
            found = None
        if found not in (now, ended):
            raise ValueError(f"holds {found}")
        if found == now:
            apply(change, path, "bm25")
        left = [name for name in os.listdir(path) if not re.fullmatch(r"v\d+|CURRENT|\.lock", name)]
        if (holdings(open_knowledge_base(path)), left if found == now else []) != (ended, []):
            raise ValueError(f"holds {found} after the change was made again, and {left}")
    except (UserError, ValueError, OSError) as error:
        print(f"{path}: {kind}: {error}", flush=True)
        return False
    return True


def main() -> None:
    config = load_config(Config)
    if unknown := [kind for kind in config.points if kind not in KINDS]:
        raise UserError(f"--points {unknown[0]}: there are {', '.join(KINDS)}")
    figures: Counter[str] = Counter()
    in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=config.directory or in_memory) as directory:
        for kind in config.points:
            figures.update(points(Path(directory), kind, config.every))
        if config.kills:
            began = time.perf_counter()
            figures.update(kills(config.kills, Path(directory), config.seed))
            figures["kills_s"] = time.perf_counter() - began
    print_figures(figures, config.json)


if __name__ == "__main__":
    run_main(main)
