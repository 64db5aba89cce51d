"""Changes of a knowledge base on a disk without room: refused in one line, nothing changed, nothing left.

    python -m bench.faults_disk --json

A disk of 600 kB is mounted for this process alone (in memory; unshare and mount have to be there). It is filled to the
last page, to the last but one, and so on, until the change gets through; each time before that the old base has to
answer, and the disk to be no fuller. Then the same with the real commands, and again once there is room.
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench.common import on_small_disk, print_figures
from bench.faults_kb import HashEncoder, State, holdings
from nanochat.common import UserError, run_main
from nanochat.config import load_config
from nanochat.retrieval import Document
from nanochat.retrieval.knowledge_base import (
    add_documents,
    add_embeddings,
    build_knowledge_base,
    delete_documents,
    open_knowledge_base,
    rollback,
)

PAGE = 4096


@dataclass
class Config:
    """Fill the disk of a knowledge base."""

    disk: Path | None = None
    """A small file system with nothing on it; one is mounted if not given."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


CHANGES = {
    "first_build": lambda path: build_knowledge_base(documents(0, 8), path, "bm25"),
    # vectors of several pages: of a file that is mapped, the first and the last may be there and not those between
    "build": lambda path: build_knowledge_base(documents(4, 120), path, "hybrid", encoder=HashEncoder()),
    "add": lambda path: add_documents(path, documents(6, 4)),
    "delete": lambda path: delete_documents(path, ["d0", "d3"]),
    "embed": lambda path: add_embeddings(path, "hybrid", encoder=HashEncoder()),
    "rollback": lambda path: rollback(path),
}


def documents(first: int, count: int) -> list[Document]:
    return [Document(f"d{n}", "", f"common word{n} text", metadata={"n": n}) for n in range(first, first + count)]


def held(path: Path) -> State | None:
    """None if nothing is there."""
    return holdings(open_knowledge_base(path)) if path.exists() else None


def fill(disk: Path, pages: int) -> int:
    """Leave room for so many pages; the free blocks then."""
    with open(disk / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(PAGE))
        except OSError:
            file.truncate(file.tell() - file.tell() % PAGE - pages * PAGE)
    return free(disk)


def free(disk: Path) -> int:
    gc.collect()  # a removed file that a failed change had mapped takes room until then
    return os.statvfs(disk).f_bavail


def refusals(disk: Path, what: str) -> int:
    """How often a change is refused, with one page more each time, until it gets through."""
    path = disk / "kb"
    if what != "first_build":
        build_knowledge_base(documents(0, 8), path, "bm25")
        add_documents(path, documents(8, 1))
    before, pages = held(path), 0
    while True:
        room = fill(disk, pages)
        try:
            CHANGES[what](path)
            break
        except UserError as error:
            check(str(error), path)
        ensure(free(disk) == room, f"{what} with {pages} pages left {free(disk) - room} of its blocks")
        ensure(held(path) == before, f"{what} with {pages} pages changed the base")
        (disk / "filler").unlink()
        pages += 1
    ensure(what == "embed" or held(path) != before, f"{what} did nothing")
    shutil.rmtree(path)
    (disk / "filler").unlink()
    return pages


def commands(disk: Path) -> int:
    """The real commands: how many are refused on the full disk and work on the emptied one."""
    path = disk / "kb"
    with tempfile.TemporaryDirectory() as folder:
        for name, some in (("first", documents(0, 40)), ("more", documents(35, 40))):
            lines = b"".join(document.to_line() for document in some)
            (Path(folder) / f"{name}.jsonl").write_bytes(lines)
        given = [
            ["--documents", f"{folder}/first.jsonl", "--output", path, "--type", "bm25"],
            ["add", "--documents", f"{folder}/more.jsonl", "--knowledge_base", path],
            ["delete", "--ids", "d1,d2", "--knowledge_base", path],
        ]
        for arguments in given:
            before, room = held(path), fill(disk, 1)
            status, said = command(*arguments)
            ensure(status == 2, f"{arguments[0]} ends with {status}: {said}")
            check(said.removeprefix("error: ").removesuffix("\n"), path)
            ensure((free(disk), held(path)) == (room, before), f"{arguments[0]} left something")
            (disk / "filler").unlink()
            status, said = command(*arguments)
            ensure(status == 0, f"{arguments[0]} does not work with room: {said}")
    ensure(set(held(path)) == {f"d{n}" for n in range(75)} - {"d1", "d2"}, "the commands made something else")
    return len(given)


def command(*arguments: object) -> tuple[int, str]:
    """Exit status and what it says of errors."""
    call = [sys.executable, "-m", "nanochat.retrieval", *map(str, arguments)]
    done = subprocess.run(call, capture_output=True, text=True)
    return done.returncode, done.stderr


def check(message: str, path: Path) -> None:
    whole = all(part in message for part in (str(path), "No space left on device", "is unchanged", "make room"))
    ensure(whole and "\n" not in message, f"not a clear line: {message!r}")


def ensure(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise AssertionError(otherwise)


def main() -> None:
    config = load_config(Config)
    if config.disk is None:
        sys.exit(on_small_disk("600k", "bench.faults_disk", sys.argv[1:]))
    figures: dict[str, float] = {f"refused_{what}": refusals(config.disk, what) for what in CHANGES}
    figures["refused_commands"] = commands(config.disk)
    print_figures(figures, config.json)


if __name__ == "__main__":
    run_main(main)
