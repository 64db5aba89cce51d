"""The inverted index of one segment: for each term, the documents that have it and how often.

Compressed sparse rows in NumPy arrays, term by term, mapped from disk when loaded. Only counts are kept, never weights:
a weight depends on the whole collection (how many documents, how long, how rare the term), so it is computed when a
query asks, and stays right after every add and delete.

A term is known by 64 bits of its BLAKE2b hash: vocabularies of any size are then sorted arrays, looked up without being
loaded and merged without touching a string. Two of two million different terms share a hash with probability 1e-7.

What a posting weighs follows from how often the term stands in the document and how long that is. Such pairs are few,
so a posting holds the number of its pair: a search reads weights from a small table, made for the statistics of the
day, and never asks for the length of a document, which would be a cache miss for each posting. A posting is four bytes,
mostly: two for that number, two for the row of the document within its block (nanochat.retrieval.blocks).

    N documents, V different terms, Z postings (pairs of a term and a document that has it), C pairs (count, length),
    R runs (a term's postings in one block of documents)
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

from nanochat.common import save_array
from nanochat.retrieval import blocks
from nanochat.retrieval.analysis import Analyzer

TEXT_AT_ONCE = 16_000_000  # characters that are held until they become postings
MOST_WORDS = 2_000_000  # that are remembered
MERGED_AT_ONCE = 1 << 22  # postings
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
        term_of_pair, rows = np.divmod(pairs[first], N)
        starts = np.searchsorted(term_of_pair, np.arange(len(order) + 1))
        return Postings.of(self.hashes[order], starts, rows.astype(np.int32), counts, lengths.astype(np.int32))


@lru_cache(1 << 16)
def hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass
class Postings:
    hashes: np.ndarray  # (V,) uint64, ascending
    starts: np.ndarray  # (V + 1,) int64: the postings of term t are starts[t] : starts[t + 1]
    docs: np.ndarray  # (Z,) uint16: the row of the document within its block, ascending within a run
    run_starts: np.ndarray  # (V + 1,) int64: the runs of term t; (1,) if there is one block
    runs: np.ndarray  # (R, 2) uint16: block, and postings less one; (0, 2) if there is one block
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
        built: list[Any] = []  # postings, or the promise of them
        try:
            for number, some in enumerate(_in_blocks(texts)):
                if number == 1 and directory is not None and (os.cpu_count() or 1) > 1:
                    from nanochat.retrieval.helper import Helper

                    helper = Helper(analyzer, directory)
                built.append(helper.build(some) if helper and helper.is_free() else builder.build(some))
            return cls.merge([block if isinstance(block, Postings) else block.result() for block in built])
        finally:
            if helper is not None:
                helper.close()

    @classmethod
    def of(cls, hashes, starts, rows, counts, lengths) -> Postings:
        """rows: of the postings' documents. `shortest` and `most` bound what a posting of a term can weigh, whatever
        the mean length and the settings."""
        codes, pairs = _encode(counts, lengths[rows])
        shortest = np.full((len(hashes), 3), _NONE, dtype=np.int32)
        most = np.zeros(len(hashes), dtype=np.int32)
        if len(hashes):
            of_posting, first = lengths[rows], starts[:-1]
            for column, such in enumerate((counts == 1, counts == 2, counts > 2)):
                shortest[:, column] = np.minimum.reduceat(np.where(such, of_posting, _NONE), first)
            most[:] = np.maximum.reduceat(counts, first)
        in_blocks = blocks.divide(rows, starts, len(lengths))
        return cls(hashes, starts.astype(np.int64), *in_blocks, codes, pairs, lengths, shortest, most)

    def rows(self, terms: slice | None = None) -> np.ndarray:
        """int32 rows of the documents of these terms' postings, of all if no terms are given."""
        first, last = (terms.start, terms.stop) if terms else (0, len(self.hashes))
        docs = self.docs[self.starts[first] : self.starts[last]]
        if not len(self.runs):
            return docs.astype(np.int32)
        runs = self.runs[self.run_starts[first] : self.run_starts[last]]
        return docs + blocks.first_rows(runs.astype(np.int32))

    def span(self, term: int) -> tuple[int, int, int, int]:
        """First and last of its postings, first and last of its runs; the last ones excluded."""
        run, last_run = self.run_starts[term : term + 2].tolist() if len(self.runs) else (0, 0)
        return int(self.starts[term]), int(self.starts[term + 1]), run, last_run

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
        docs = np.empty(starts[-1], dtype=np.uint16)
        codes = np.empty(starts[-1], dtype=np.min_scalar_type(max(len(pairs) - 1, 0)))
        lengths = np.concatenate([part.lengths for part in parts])
        first_rows = np.cumsum([0, *(len(part.lengths) for part in parts)], dtype=np.int32)
        recoded = [_rows_in(part.pairs, pairs).astype(codes.dtype) for part in parts]
        run_counts, runs = [], [np.zeros((0, 2), dtype=np.uint16)]
        for few in _few_terms(starts):
            s, e = starts[few.start], starts[few.stop]
            rows, of_few = np.empty(e - s, dtype=np.int32), codes[s:e]
            next_free = starts[few] - s
            for part, place, first_row, new_codes in zip(parts, places, first_rows, recoded, strict=False):
                own = slice(*np.searchsorted(place, (few.start, few.stop)).tolist())
                span, at = slice(part.starts[own.start], part.starts[own.stop]), place[own] - few.start
                sizes = np.diff(part.starts[own.start : own.stop + 1])
                target = np.repeat(next_free[at] - part.starts[own], sizes) + np.arange(span.start, span.stop)
                rows[target] = part.rows(own) + first_row
                of_few[target] = new_codes[part.codes[span]]
                next_free[at] += sizes
            docs[s:e], few_starts, few_runs = blocks.divide(rows, starts[few.start : few.stop + 1] - s, len(lengths))
            run_counts.append(np.diff(few_starts))
            runs.append(few_runs)
        run_starts = np.cumsum(np.concatenate([[0], *run_counts]), dtype=np.int64)
        return cls(hashes, starts, docs, run_starts, np.concatenate(runs), codes, pairs, lengths, shortest, most)

    def keep(self, mask: np.ndarray) -> Postings:
        """Only the documents where mask is true, rows renumbered, terms that none of them has left out."""
        new_row = np.cumsum(mask, dtype=np.int32) - 1
        rows = self.rows()
        kept = mask[rows]
        kept_before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(kept)])
        sizes = np.diff(kept_before[self.starts])
        used = sizes > 0
        starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes[used])])
        counts = self.counts(kept)
        return self.of(self.hashes[used], starts, new_row[rows[kept]], counts, self.lengths[mask])

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """Term numbers, -1 for those that no document has."""
        if not len(self.hashes):
            return np.full(len(hashes), -1)
        place = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        return np.where(self.hashes[place] == hashes, place, -1)

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for field in fields(self):
            save_array(directory / f"{field.name}.npy", getattr(self, field.name))

    @classmethod
    def load(cls, directory: Path) -> Postings:
        loaded = cls(*(load_array(directory / f"{field.name}.npy") for field in fields(cls)))
        V, terms_in_runs = len(loaded.hashes), len(loaded.hashes) if len(loaded.lengths) > blocks.BLOCK else 0
        fit = len(loaded.starts) == V + 1 and loaded.starts[-1] == len(loaded.docs) == len(loaded.codes)
        fit = fit and len(loaded.run_starts) == terms_in_runs + 1 and loaded.run_starts[-1] == len(loaded.runs)
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
        if size >= TEXT_AT_ONCE:
            yield some
            some, size = [], 0
    yield some


def _few_terms(starts: np.ndarray) -> Iterator[slice]:
    """Terms with so many postings together, or one that has more: so that work on them takes bounded memory."""
    at, V = 0, len(starts) - 1
    while at < V:
        end = max(at + 1, int(np.searchsorted(starts, starts[at] + MERGED_AT_ONCE, side="right")) - 1)
        yield slice(at, end)
        at = end


def load_array(path: Path) -> np.ndarray:
    """A saved array, mapped: read from disk as it is used. Plain ndarray, since np.memmap is slow to slice."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    except ValueError:
        array = np.load(path, allow_pickle=False)  # an array without elements cannot be mapped
        array.flags.writeable = False  # as mapped ones are: compiled code is for one kind or the other
        return array
