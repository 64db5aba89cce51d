"""The inverted index of one segment: for each term, the documents that have it and how often.

Compressed sparse rows in NumPy arrays, term by term, mapped from disk when loaded. Only counts are kept, never weights:
a weight depends on the whole collection (how many documents, how long, how rare the term), so it is computed when a
query asks, and stays right after every add and delete.

A term is known by 64 bits of its BLAKE2b hash: vocabularies of any size are then sorted arrays, looked up without being
loaded and merged without touching a string. Two of two million different terms share a hash with probability 1e-7.

What a posting weighs follows from how often the term stands in the document and how long that is. Such pairs are few,
so a posting holds the number of its pair: a search reads weights from a small table, made for the statistics of the
day, and never asks for the length of a document, which would be a cache miss for each posting.

    N documents, V different terms, Z postings (pairs of a term and a document that has it), C pairs (count, length)
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.retrieval.analysis import Analyzer

BLOCK = 16_000_000  # characters of text that are held until they become postings
MOST_WORDS = 2_000_000  # that are remembered
_NONE = np.iinfo(np.int32).max


class BlockBuilder:
    """Texts to postings. Keeps what it knows about words from one block to the next."""

    def __init__(self, analyzer: Analyzer):
        self.analyzer = analyzer
        self._forget()

    def _forget(self) -> None:
        self.word_ids = self.analyzer.word_ids()
        self.hashes = np.zeros(0, dtype=np.uint64)

    def build(self, texts: list[str]) -> Postings:
        if len(self.word_ids) > MOST_WORDS:
            self._forget()
        ids, lengths = self.word_ids.of_texts(texts)
        terms = self.word_ids.terms
        new = [hash64.__wrapped__(term) for term in terms[len(self.hashes) :]]
        self.hashes = np.concatenate([self.hashes, np.array(new, dtype=np.uint64)])
        there = np.flatnonzero(np.bincount(ids, minlength=len(terms)))
        order = there[np.argsort(self.hashes[there])]
        place = np.zeros(len(terms), dtype=np.int64)
        place[order] = np.arange(len(order))
        # one integer for (term, document): sorting it groups each pair's repeats, in the order the postings need
        N = max(len(lengths), 1)
        pairs = place[ids] * N
        pairs += np.repeat(np.arange(len(lengths)), lengths)
        pairs.sort()
        first = np.flatnonzero(np.diff(pairs, prepend=-1))
        counts = np.diff(first, append=len(pairs))
        term_of_pair, docs = np.divmod(pairs[first], N)
        starts = np.searchsorted(term_of_pair, np.arange(len(order) + 1))
        return Postings.of(self.hashes[order], starts, docs.astype(np.int32), counts, lengths.astype(np.int32))


@lru_cache(1 << 16)
def hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass
class Postings:
    hashes: np.ndarray  # (V,) uint64, ascending
    starts: np.ndarray  # (V + 1,) int64: the postings of term t are starts[t] : starts[t + 1]
    docs: np.ndarray  # (Z,) int32 rows, ascending within a term
    codes: np.ndarray  # (Z,) row of pairs: how often the term stands in that document, and how long that is
    pairs: np.ndarray  # (C, 2) int32, ascending
    lengths: np.ndarray  # (N,) int32: terms in each document, repeats counted
    shortest: np.ndarray  # (V, 3) int32: length of the shortest document that has the term once, twice, more often
    most: np.ndarray  # (V,) int32: the largest count

    @classmethod
    def build(cls, texts: Iterable[str], analyzer: Analyzer, directory: Path | None = None) -> Postings:
        """From texts in any number, block by block. With a directory for what is not merged yet, and more than one
        processor, a second process builds blocks too (nanochat.retrieval.helper)."""
        builder, helper = BlockBuilder(analyzer), None
        blocks: list[Any] = []  # postings, or the promise of them
        try:
            for number, some in enumerate(_in_blocks(texts)):
                if number == 1 and directory is not None and (os.cpu_count() or 1) > 1:
                    from nanochat.retrieval.helper import Helper

                    helper = Helper(analyzer, directory)
                blocks.append(helper.build(some) if helper and helper.is_free() else builder.build(some))
            return cls.merge([block if isinstance(block, Postings) else block.result() for block in blocks])
        finally:
            if helper is not None:
                helper.close()

    @classmethod
    def of(cls, hashes, starts, docs, counts, lengths) -> Postings:
        """`shortest` and `most` bound what a posting of a term can weigh, whatever the mean length and the settings."""
        codes, pairs = _encode(counts, lengths[docs])
        shortest = np.full((len(hashes), 3), _NONE, dtype=np.int32)
        most = np.zeros(len(hashes), dtype=np.int32)
        if len(hashes):
            of_posting, first = lengths[docs], starts[:-1]
            for column, such in enumerate((counts == 1, counts == 2, counts > 2)):
                shortest[:, column] = np.minimum.reduceat(np.where(such, of_posting, _NONE), first)
            most[:] = np.maximum.reduceat(counts, first)
        return cls(hashes, starts.astype(np.int64), docs, codes, pairs, lengths, shortest, most)

    def counts(self, span: slice = slice(None)) -> np.ndarray:
        """How often a term stands in a document, for these postings."""
        return self.pairs[:, 0][self.codes[span]]

    @classmethod
    def merge(cls, parts: Sequence[Postings]) -> Postings:
        """The parts' documents one after the other."""
        if len(parts) == 1:
            return parts[0]
        hashes = np.unique(np.concatenate([part.hashes for part in parts]))
        places = [np.searchsorted(hashes, part.hashes) for part in parts]
        sizes = np.zeros(len(hashes), dtype=np.int64)
        shortest = np.full((len(hashes), 3), _NONE, dtype=np.int32)
        most = np.zeros(len(hashes), dtype=np.int32)
        for part, place in zip(parts, places, strict=True):
            sizes[place] += np.diff(part.starts)
            shortest[place] = np.minimum(shortest[place], part.shortest)
            most[place] = np.maximum(most[place], part.most)
        starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
        pairs = np.unique(np.concatenate([part.pairs for part in parts]), axis=0)
        docs = np.empty(starts[-1], dtype=np.int32)
        codes = np.empty(starts[-1], dtype=np.min_scalar_type(max(len(pairs) - 1, 0)))
        next_free, first_row = starts[:-1].copy(), 0
        for part, place in zip(parts, places, strict=True):
            recoded = _rows_in(part.pairs, pairs).astype(codes.dtype)
            for few in _runs_of_terms(part.starts):
                s, e = part.starts[few.start], part.starts[few.stop]
                sizes = np.diff(part.starts[few.start : few.stop + 1])
                target = np.repeat(next_free[place[few]] - part.starts[few], sizes) + np.arange(s, e)
                docs[target] = part.docs[s:e] + np.int32(first_row)
                codes[target] = recoded[part.codes[s:e]]
            next_free[place] += np.diff(part.starts)
            first_row += len(part.lengths)
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(hashes, starts, docs, codes, pairs, lengths, shortest, most)

    def keep(self, mask: np.ndarray) -> Postings:
        """Only the documents where mask is true, rows renumbered, terms that none of them has left out."""
        new_row = np.cumsum(mask, dtype=np.int32) - 1
        kept = mask[self.docs]
        kept_before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(kept)])
        sizes = np.diff(kept_before[self.starts])
        used = sizes > 0
        starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes[used])])
        docs, counts = new_row[self.docs[kept]], self.counts(kept)
        return self.of(self.hashes[used], starts, docs, counts, self.lengths[mask])

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """Term numbers, -1 for those that no document has."""
        if not len(self.hashes):
            return np.full(len(hashes), -1)
        place = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        return np.where(self.hashes[place] == hashes, place, -1)

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for field in fields(self):
            np.save(directory / f"{field.name}.npy", getattr(self, field.name))

    @classmethod
    def load(cls, directory: Path) -> Postings:
        loaded = cls(*(load_array(directory / f"{field.name}.npy") for field in fields(cls)))
        V = len(loaded.hashes)
        fit = len(loaded.starts) == V + 1 and loaded.starts[-1] == len(loaded.docs) == len(loaded.codes)
        if not fit or loaded.shortest.shape != (V, 3) or loaded.most.shape != (V,):
            raise ValueError(f"{directory}: its files do not fit together")
        return loaded


def _encode(counts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes, pairs) of postings with these counts and document lengths."""
    if not len(counts):
        return np.zeros(0, dtype=np.uint8), np.zeros((0, 2), dtype=np.int32)
    # numbers for the counts and lengths that occur, then for the pairs of them that do: no sorting of postings
    (counts_there, count_number), (lengths_there, length_number) = _numbered(counts), _numbered(lengths)
    both = count_number[counts] * len(lengths_there) + length_number[lengths]
    pairs_there, pair_number = _numbered(both)
    codes = pair_number.astype(np.min_scalar_type(len(pairs_there) - 1))[both]
    count, length = np.divmod(pairs_there, len(lengths_there))
    return codes, np.stack([counts_there[count], lengths_there[length]], axis=1).astype(np.int32)


def _numbered(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different values, ascending, and for each value up to the largest its number among them."""
    there = np.zeros(int(values.max()) + 1, dtype=bool)
    there[values] = True
    return np.flatnonzero(there), np.cumsum(there, dtype=np.int32) - 1


def _rows_in(some: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Where the rows of `some` stand in `pairs`, which has them all."""
    keys, wanted = (rows[:, 0].astype(np.int64) << 32 | rows[:, 1] for rows in (pairs, some))
    return np.searchsorted(keys, wanted)


def _in_blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    """At least one, so that no text at all has postings too."""
    some, size = [], 0
    for text in texts:
        some.append(text)
        size += len(text)
        if size >= BLOCK:
            yield some
            some, size = [], 0
    yield some


def _runs_of_terms(starts: np.ndarray, postings: int = 1 << 22) -> Iterable[slice]:
    """Terms in runs of so many postings, or one term that has more: so that work on them takes bounded memory."""
    at, V = 0, len(starts) - 1
    while at < V:
        end = max(at + 1, int(np.searchsorted(starts, starts[at] + postings, side="right")) - 1)
        yield slice(at, end)
        at = end


def load_array(path: Path) -> np.ndarray:
    """A saved array, mapped: read from disk as it is used. Plain ndarray, since np.memmap is slow to slice."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    except ValueError:
        return np.load(path, allow_pickle=False)  # an array without elements cannot be mapped
