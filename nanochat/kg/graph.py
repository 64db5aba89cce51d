"""A knowledge graph as integer arrays, mapped from disk.

    graph = Graph.build(read_facts([Path("kb.txt")]))
    graph.save(Path("kg"))
    graph = Graph.load(Path("kg"))
    graph.text(0)  # "Hidil Dipur|born_in|Nisel"

Every fact can be walked both ways: relation r + R is r read backwards. Without that most questions of two hops cannot
be walked at all: facts point from films to people and never back.

    N entities, E facts, R relations
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanochat.common import UserError, atomic_write_text, save_array
from nanochat.kg.names import hashes_of, key, sorted_keys
from nanochat.kg.triples import Facts

FORMAT = 2
FACT_ARRAYS = ("heads", "relations", "tails", "starts", "neighbours", "edges")
NAME_ARRAYS = ("name_bytes", "name_starts", "name_order", "key_hashes", "key_entities")
ARRAYS = (*FACT_ARRAYS, *NAME_ARRAYS)


@dataclass
class Graph:
    """heads, relations, tails (E,): the facts. The edges of entity v stand at starts[v] : starts[v + 1] (N + 1,) of
    neighbours and edges (2E,), by neighbour: the entity at the other end, and the fact f, or ~f where v is its tail."""

    heads: np.ndarray
    relations: np.ndarray
    tails: np.ndarray
    starts: np.ndarray
    neighbours: np.ndarray
    edges: np.ndarray
    name_bytes: np.ndarray  # all entities' names, one behind the other
    name_starts: np.ndarray  # (N + 1,)
    name_order: np.ndarray  # (N,) entities by name
    key_hashes: np.ndarray  # (N,) hashes of the names as they are compared, ascending
    key_entities: np.ndarray  # (N,) whose they are
    relation_names: list[str]
    longest_name: int
    """Words of the longest name."""

    @classmethod
    def build(cls, facts: Facts) -> Graph:
        N, E = len(facts.entities), len(facts.heads)
        ends = np.concatenate([facts.heads, facts.tails])
        others = np.concatenate([facts.tails, facts.heads])
        order = np.lexsort((others, ends))
        fact = np.arange(E, dtype=np.int32)
        names = [name.encode() for name in facts.entities]
        key_hashes, key_entities, longest_name = sorted_keys(facts.entities)
        return cls(
            facts.heads,
            facts.relations,
            facts.tails,
            np.searchsorted(ends[order], np.arange(N + 1)),
            others[order],
            np.concatenate([fact, ~fact])[order],
            np.frombuffer(b"".join(names), dtype=np.uint8),
            np.cumsum([0, *map(len, names)], dtype=np.int64),
            np.array(sorted(range(N), key=names.__getitem__), dtype=np.int32),
            key_hashes,
            key_entities,
            facts.relation_names,
            longest_name,
        )

    # --- what is in it

    def __len__(self) -> int:
        """Entities."""
        return len(self.name_starts) - 1

    @property
    def num_facts(self) -> int:
        return len(self.heads)

    @functools.cached_property
    def degrees(self) -> np.ndarray:
        """(N,) edges of each entity, in both directions."""
        return np.diff(self.starts)

    def name(self, entity: int) -> str:
        return bytes(self.name_bytes[self.name_starts[entity] : self.name_starts[entity + 1]]).decode()

    def find(self, name: str) -> int | None:
        """The entity of exactly this name."""
        wanted = name.encode()
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            at = self.name_order[middle]
            if bytes(self.name_bytes[self.name_starts[at] : self.name_starts[at + 1]]) < wanted:
                low = middle + 1
            else:
                high = middle
        found = int(self.name_order[low]) if low < len(self) else None
        return found if found is not None and self.name(found) == name else None

    def reading(self, keys: Sequence[str]) -> list[list[int]]:
        """For each key (nanochat.kg.names) the entities of names that read like it, ascending."""
        hashes = hashes_of(keys)
        begin = np.searchsorted(self.key_hashes, hashes)
        there = self.key_hashes[np.minimum(begin, len(self) - 1)] == hashes
        found: list[list[int]] = [[] for _ in keys]
        for at in np.flatnonzero(there).tolist():
            last = np.searchsorted(self.key_hashes, hashes[at], side="right")
            proposed = self.key_entities[begin[at] : last].tolist()
            found[at] = [entity for entity in proposed if key(self.name(entity)) == keys[at]]
        return found

    def triple(self, fact: int) -> tuple[str, str, str]:
        head, relation, tail = self.heads[fact], self.relations[fact], self.tails[fact]
        return self.name(head), self.relation_names[relation], self.name(tail)

    def text(self, fact: int) -> str:
        return "|".join(self.triple(fact))

    def spoken(self, fact: int) -> tuple[str, str, str]:
        """As a language model reads it: each part after a space, so that a name is the same tokens wherever it is."""
        head, relation, tail = self.triple(fact)
        return f" {head}", f" {relation.replace('_', ' ')}", f" {tail}"

    def edges_of(self, entities: np.ndarray) -> np.ndarray:
        """Places in neighbours and edges of all edges of these entities, in their order."""
        begin, count = self.starts[entities], self.degrees[entities]
        offset = np.repeat(begin - np.concatenate([[0], np.cumsum(count)[:-1]]), count)
        return offset + np.arange(len(offset))

    # --- on disk

    def save(self, directory: Path) -> None:
        """Write a folder that is there as a whole or not at all; one that was there is replaced."""
        directory = Path(directory)
        if directory.exists() and not (directory / "graph.json").exists():
            raise UserError(f"{directory} is there and is no graph; give another folder")
        new = directory.with_name(f".{directory.name}.{os.getpid()}.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        for name in ARRAYS:
            save_array(new / f"{name}.npy", getattr(self, name))
        about = {"format": FORMAT, "facts": self.num_facts, "entities": len(self), "longest_name": self.longest_name}
        about["relations"] = self.relation_names
        atomic_write_text(new / "graph.json", json.dumps(about, ensure_ascii=False, indent=1))
        old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
        if directory.exists():
            directory.rename(old)
        new.rename(directory)
        shutil.rmtree(old, ignore_errors=True)

    @classmethod
    def load(cls, directory: Path) -> Graph:
        """Mapped into memory: what is not looked at is not read. UserError if it is no graph."""
        directory = Path(directory)
        try:
            about = json.loads((directory / "graph.json").read_text(encoding="utf-8"))
            if about.get("format") != FORMAT:
                raise UserError(
                    f"{directory} has format {about.get('format')}, this program reads {FORMAT}; build it anew"
                )
            arrays = [np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS]
        except FileNotFoundError as error:
            raise UserError(
                f"{directory} is no graph: {error.filename} is missing; build it with scripts.kg_prepare"
            ) from None
        except (ValueError, OSError) as error:
            raise UserError(f"{directory} cannot be read: {error}") from None
        return cls(*arrays, about["relations"], about["longest_name"])
