"""The documents of a knowledge base, in segments, as one numbered whole.

A row counts through all segments, dead documents included, and means the same document as long as the collection is the
same: a change gives a new collection, so that a search under way keeps its rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import UserError
from nanochat.retrieval.analysis import Analyzer
from nanochat.retrieval.document import Document
from nanochat.retrieval.filters import matching_rows
from nanochat.retrieval.scoring import best_rows
from nanochat.retrieval.segment import Segment, merge_segments

TIER = 8
"""So many segments of a size (within a factor of as much) are merged into one."""
DEAD = 0.3
"""A segment with a larger share of dead documents is written anew."""

NewDirectory = Callable[[], Path]  # where the next segment is to be written
Masks = list[np.ndarray]  # for each segment: (N,) bool, the documents that may be found, or (0,), which means all

_ALL = np.zeros(0, dtype=bool)


class Collection:
    def __init__(self, segments: Sequence[Segment] = ()):
        self.segments = list(segments)
        self.first_rows = np.cumsum([0, *map(len, self.segments)])
        self._first_rows = self.first_rows.tolist()  # one row is found in a list ten times as fast

    def __len__(self) -> int:
        return sum(segment.living for segment in self.segments)

    def place(self, row: int) -> tuple[Segment, int]:
        """The segment of a row, and the row in it."""
        number = bisect_right(self._first_rows, row) - 1
        return self.segments[number], int(row) - self._first_rows[number]

    def __getitem__(self, row: int) -> Document:
        segment, within = self.place(row)
        return segment.documents[within]

    def __iter__(self) -> Iterator[Document]:
        return (segment.documents[row] for segment in self.segments for row in segment.live_rows().tolist())

    def row_of(self, id: str) -> int:
        """-1 if no living document has this id."""
        for number, segment in enumerate(self.segments):
            row = segment.documents.row_of(id)
            if row >= 0 and (segment.live is None or segment.live[row]):
                return int(self.first_rows[number]) + row
        return -1

    def __contains__(self, id: str) -> bool:
        return self.row_of(id) >= 0

    def rows(self, ids: Iterable[str]) -> np.ndarray:
        ids = list(ids)
        rows = [self.row_of(id) for id in ids]
        unknown = [id for id, row in zip(ids, rows, strict=True) if row < 0]
        if unknown:
            shown = ", ".join(map(repr, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
            raise UserError(
                f"{len(unknown)} of {len(ids)} ids are not in the knowledge base: {shown}; nothing was done"
            )
        return np.array(rows, dtype=np.int64)

    def split(self, rows: np.ndarray) -> list[np.ndarray]:
        """For each segment, the positions in `rows` of those that are its own."""
        numbers = np.searchsorted(self.first_rows, rows, side="right") - 1
        return [np.flatnonzero(numbers == number) for number in range(len(self.segments))]

    # --- changes: each gives a new collection

    def with_segment(self, segment: Segment, analyzer: Analyzer, title_weight: int) -> Collection:
        """These documents too; those whose ids they have are dead from now on."""
        replaced = [self.row_of(id) for id in segment.documents.ids_perhaps_in([s.documents for s in self.segments])]
        rows = np.array([row for row in replaced if row >= 0], dtype=np.int64)
        return Collection([*self.without(rows, analyzer, title_weight).segments, segment])

    def without(self, rows: np.ndarray, analyzer: Analyzer, title_weight: int) -> Collection:
        segments = []
        for segment, first, places in zip(self.segments, self.first_rows, self.split(rows), strict=False):
            if len(places):
                segment = segment.without(rows[places] - first, analyzer, title_weight)
            if segment.living:
                segments.append(segment)
        return Collection(segments)

    def merged(self, new_directory: NewDirectory | None = None) -> Collection:
        """With as few segments as the policy wants."""
        segments = self.segments
        while (some := to_merge(segments)) is not None:
            merged = merge_segments(some, new_directory() if new_directory else None)
            at = segments.index(some[0])
            segments = [s for s in [*segments[:at], merged, *segments[at:]] if s not in some]
        return Collection(segments)

    def save(self, directory: Path) -> None:
        for number, segment in enumerate(self.segments, 1):
            segment.save(directory / f"s{number:04d}")

    @classmethod
    def load(cls, directory: Path) -> Collection:
        paths = sorted(directory.glob("s[0-9]*"), key=lambda path: int(path.name[1:]))
        return cls([Segment.load(path) for path in paths])

    # --- who is best

    def best(self, rows: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best of these, best first, equal scores in the order of their ids."""
        parts = []
        for number, places in enumerate(self.split(rows)):
            first, id_rank = self.first_rows[number], self.segments[number].documents.id_rank
            within, of_part = best_rows(rows[places] - first, scores[places], k, id_rank)
            parts.append((within + first, of_part))
        return self.merge_best(parts, k)

    def merge_best(self, parts: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best of all segments from the k best of each."""
        parts = [part for part in parts if len(part[0])]
        if len(parts) <= 1:
            return parts[0] if parts else (np.zeros(0, dtype=np.int64), np.zeros(0))
        rows, scores = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = np.argsort(-scores, kind="stable")
        rows, scores = rows[order], scores[order]
        if (scores[1:] == scores[:-1]).any():  # only equal ones need their ids, which means reading the documents
            again = np.isin(scores, scores[1:][scores[1:] == scores[:-1]])
            id_of = {row: self[row].id for row in rows[again].tolist()}
            pairs = zip(rows.tolist(), scores.tolist(), strict=True)
            ordered = sorted(pairs, key=lambda pair: (-pair[1], id_of.get(pair[0], "")))
            rows = np.array([row for row, _ in ordered], dtype=np.int64)
        return rows[:k], scores[:k]

    # --- who may be found

    def masks(self, where: dict[str, Any] | None = None) -> Masks:
        """The living documents, and with `where` only those whose metadata say so (nanochat.retrieval.filters)."""
        masks = []
        for segment in self.segments:
            mask = _ALL if segment.live is None else segment.live
            if where:
                mask = np.zeros(len(segment), dtype=bool)
                mask[matching_rows(segment.documents, where)] = True
                if segment.live is not None:
                    mask &= segment.live
            masks.append(mask)
        return masks


def to_merge(segments: Sequence[Segment]) -> list[Segment] | None:
    """What should become one segment now, if anything: one with many dead, or TIER of about the same size."""
    for segment in segments:
        if len(segment.dead) > DEAD * len(segment):
            return [segment]
    of_tier: dict[int, list[Segment]] = {}
    for segment in segments:
        tier = 0
        while segment.living >= 1000 * TIER ** (tier + 1):
            tier += 1
        of_tier.setdefault(tier, []).append(segment)
    for _, same in sorted(of_tier.items()):
        if len(same) >= TIER:
            return same
    return None
