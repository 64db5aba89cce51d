"""Facts from text: `subject|relation|object` lines, the same with tabs, N-Triples and Freebase's dump of them, each
also as .gz. What is not a fact is counted and shown, with its line, and left out.

    facts = read_facts([Path("kb.txt")])
    print(facts.report)
"""

from __future__ import annotations

import gzip
import re
import sys
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nanochat.common import UserError

FREEBASE = "http://rdf.freebase.com/ns/"
SHOWN = 3  # lines of each kind in the report
_NODE = r"<([^<>]*)>|(_:\S+)"
_N_TRIPLE = re.compile(
    rf'\s*(?:{_NODE})\s+<([^<>]*)>\s+(?:{_NODE}|"((?:[^"\\]|\\.)*)"(?:@[\w-]+|\^\^<[^<>]*>)?)\s*\.\s*'
)
_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))")
_LETTERS = {"t": "\t", "n": "\n", "r": "\r", "b": "\b", "f": "\f"}


@dataclass
class Facts:
    """heads, relations, tails (E,) int32: numbers into `entities` and `relation_names`, in the order they were read."""

    heads: np.ndarray
    relations: np.ndarray
    tails: np.ndarray
    entities: list[str]
    relation_names: list[str]
    lines: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """What kind of line was left out -> where the first of them stand."""
    counts: dict[str, int] = field(default_factory=dict)
    """How many of each kind."""

    def leave_out(self, kind: str, path: Path, line: int, text: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if len(places := self.left_out.setdefault(kind, [])) < SHOWN:
            places.append(f"{path.name}:{line}: {text[:80]!r}")

    @property
    def report(self) -> str:
        shown = [
            f"{len(self.heads):,} facts about {len(self.entities):,} entities, {len(self.relation_names):,} relations"
        ]
        for kind, count in self.counts.items():
            places = self.left_out[kind]
            shown.append(f"left out: {count:,} {kind} ({'; '.join(places)}{'; ...' * (count > len(places))})")
        return "\n".join(shown)


def read_facts(paths: Sequence[Path]) -> Facts:
    """Facts of all files. A fact that was there before, one of an entity with itself, and a line that is none are left
    out. UserError if a file cannot be read or there is no fact in any."""
    entities: dict[str, int] = {}
    relation_names: dict[str, int] = {}
    columns = [array("i") for _ in range(3)]  # heads, relations, tails
    places = [array("i"), array("q")]  # file and line of each
    facts = Facts(*(np.zeros(0, np.int32),) * 3, [], [])
    for at, path in enumerate(paths):
        for line, text, parts in _lines(path):
            facts.lines += 1
            if parts is None:
                facts.leave_out("lines that are no fact", path, line, text.strip())
                continue
            columns[0].append(entities.setdefault(parts[0], len(entities)))
            columns[1].append(relation_names.setdefault(parts[1], len(relation_names)))
            columns[2].append(entities.setdefault(parts[2], len(entities)))
            places[0].append(at)
            places[1].append(line)
    if not len(columns[0]):
        raise UserError(
            f"no fact in {', '.join(map(str, paths))}: a line is subject|relation|object, the same with tabs, or an "
            "N-Triple"
        )
    facts.entities, facts.relation_names = list(entities), list(relation_names)
    heads, relations, tails = (np.frombuffer(column, dtype=np.int32) for column in columns)
    order = np.lexsort((tails, relations, heads))  # stable: of equal facts the first comes first
    repeated = np.zeros(len(heads), dtype=bool)
    equal = [column[order[1:]] == column[order[:-1]] for column in (heads, relations, tails)]
    repeated[order[1:]] = equal[0] & equal[1] & equal[2]
    with_itself = heads == tails
    for kind, which in (
        ("facts of an entity with itself", with_itself),
        ("facts that were there before", repeated & ~with_itself),
    ):
        for row in np.flatnonzero(which)[:SHOWN].tolist():
            parts = facts.entities[heads[row]], facts.relation_names[relations[row]], facts.entities[tails[row]]
            facts.leave_out(kind, paths[places[0][row]], places[1][row], "|".join(parts))
        if which.any():
            facts.counts[kind] = int(which.sum())
    kept = ~(repeated | with_itself)
    facts.heads, facts.relations, facts.tails = heads[kept], relations[kept], tails[kept]
    return facts


def _lines(path: Path) -> Iterator[tuple[int, str, tuple[str, str, str] | None]]:
    """(number, text, fact or None) of each line that is not empty and no comment."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", errors="replace") as file:
            split = None
            for number, text in enumerate(file, 1):
                if text.isspace() or text[0] == "#":
                    continue
                split = split or _format(text)
                yield number, text, split(text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (EOFError, zlib.error):
        raise UserError(f"{path}: the file ends in the middle, or is damaged; fetch it again") from None


def _format(text: str):
    """How to take lines like this apart."""
    if _N_TRIPLE.fullmatch(text):
        return _n_triple
    return _by("\t" if text.count("\t") == 2 else "|")


def _by(separator: str):
    def split(text: str) -> tuple[str, str, str] | None:
        parts = text.split(separator)
        if len(parts) != 3:
            return None
        head, relation, tail = parts[0].strip(), parts[1].strip(), parts[2].strip()
        return (head, relation, tail) if head and relation and tail else None

    return split


def _n_triple(text: str) -> tuple[str, str, str] | None:
    found = _N_TRIPLE.fullmatch(text)
    if not found:
        return None
    subject, blank, relation, object, other_blank, literal = found.groups()
    if literal is not None:
        object = _ESCAPE.sub(_unescaped, literal)
    parts = tuple((part or "").removeprefix(FREEBASE) for part in (subject or blank, relation, object or other_blank))
    return parts if all(parts) else None


def _unescaped(found: re.Match) -> str:
    short, long, letter = found.groups()
    if letter is not None:
        return _LETTERS.get(letter, letter)
    code = int(short or long, 16)
    return "\ufffd" if code > sys.maxunicode or 0xD800 <= code <= 0xDFFF else chr(code)  # neither is a character
