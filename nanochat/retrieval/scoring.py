"""The best documents of one segment for one query: sums over its terms' postings, term by term.

Rare terms come first. Once k documents have a sum above all that the terms still to come can add, no document that has
none of the terms so far can be among the best: the long postings of the frequent terms are then looked up for the few
documents still in question instead of being read. (Turtle and Flood 1995, "Query evaluation: strategies and
optimizations", max-score; the bounds are of a term's own postings, see Postings.shortest.)

The same steps twice, here in NumPy and in scoring_numba.py in one compiled loop; both add the same numbers in the same
order, so they agree to the last bit. A posting with code c in document d weighs table[c], or for `simple`, whose
weights depend on the other words of the document, table[c] * norm[d].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nanochat.retrieval import blocks

_SHORT = 16_384  # postings
SLACK = 1 + 1e-6  # bounds are compared after roundings


@dataclass
class Segment:
    """What scoring needs of a segment: arrays of its postings, and of its N documents."""

    docs: np.ndarray  # (Z,) uint16, rows within blocks
    runs: np.ndarray  # (R, 2) uint16, (0, 2) if there is one block
    codes: np.ndarray  # (Z,)
    table: np.ndarray  # (C,) float64
    norms: np.ndarray  # (N,) float64, or (0,): none
    id_rank: np.ndarray  # (N,) int32: the order among equal scores
    allowed: np.ndarray  # (N,) bool, or (0,): all

    def weights(self, codes: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Of postings with these codes in these documents."""
        found = self.table.take(codes)
        return found * self.norms[rows] if len(self.norms) else found

    def rows(self, spans: np.ndarray) -> np.ndarray:
        """intp rows of the documents of these terms' postings, term after term; indexing with other integers takes
        twice as long. spans (T, 4): first and last posting, first and last run."""
        spans = spans.tolist()
        rows = np.concatenate([self.docs[start:end] for start, end, _, _ in spans], dtype=np.intp)
        if len(self.runs):
            runs = [self.runs[run:last] for _, _, run, last in spans]
            rows += blocks.first_rows(np.concatenate(runs, dtype=np.intp))
        return rows

    def find(self, span: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of the rows, ascending, have the term of this span, and where the postings of those stand."""
        start, end, run, last_run = span.tolist()
        if start == end:
            return np.zeros(len(rows), dtype=bool), np.zeros(0, dtype=np.intp)
        runs = self.runs[run:last_run].astype(np.intp) if len(self.runs) else np.array([[0, end - start - 1]])
        first_rows, lasts = runs[:, 0] * blocks.BLOCK, start + np.cumsum(runs[:, 1] + 1) - 1
        of_run = zip(
            (lasts - runs[:, 1]).tolist(),
            lasts.tolist(),
            np.searchsorted(rows, first_rows).tolist(),
            np.searchsorted(rows, first_rows + blocks.BLOCK).tolist(),
            strict=True,
        )
        within = (rows % blocks.BLOCK).astype(np.uint16)
        place = np.full(len(rows), -1)
        for first, last, low, high in of_run:
            if low < high:  # what comes after all but the last posting can only be the last
                place[low:high] = first + self.docs[first:last].searchsorted(within[low:high])
        found = (place >= 0) & (self.docs[place] == within)
        return found, place[found]


class Room:
    """One thread's room for sums, zero between queries."""

    def __init__(self, N: int, compiled: bool = False):
        size = min(N, blocks.BLOCK) if compiled else N
        self.compiled = compiled
        self.sums = np.zeros(size)
        self.touched = np.empty(size if compiled else 0, dtype=np.uint16)


def best(
    segment: Segment,
    room: Room,
    spans: np.ndarray,
    weights: np.ndarray,
    bounds: np.ndarray,
    k: int,
    compiled: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """(rows, scores) of the k best, best first, equal scores in the order of id_rank; none that scores zero.

    spans (T, 4): each term's first and last posting, first and last run; weights (T,) positive; bounds (T,): the most
    that a term can add, weight included (infinite: not known)."""
    if compiled:
        from nanochat.retrieval.scoring_numba import best_compiled

        rows, scores = np.empty(k, dtype=np.int64), np.empty(k)
        arrays = (segment.docs, segment.runs, segment.codes, segment.table, segment.norms)
        documents = (segment.id_rank, segment.allowed)
        n = best_compiled(*arrays, *documents, room.sums, room.touched, spans, weights, bounds, rows, scores)
        return rows[:n], scores[:n]
    return _best_numpy(segment, room.sums, spans, weights, bounds, k)


def best_rows(rows: np.ndarray, scores: np.ndarray, k: int, id_rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The k best, best first, equal scores by id_rank (of all rows, indexed by row)."""
    if len(scores) > 4 * k:  # fewer are sorted as soon
        good = scores >= _kth_largest(scores, k)
        rows, scores = rows[good], scores[good]
    order = np.lexsort((id_rank[rows], -scores))[:k]
    return rows[order], scores[order]


def _best_numpy(segment, sums, spans, weights, bounds, k) -> tuple[np.ndarray, np.ndarray]:
    codes, allowed = segment.codes, segment.allowed
    sizes = spans[:, 1] - spans[:, 0]
    # short postings, all terms at once: each call of NumPy costs as much as a thousand numbers
    until = sizes.cumsum()
    head = int(until.searchsorted(_SHORT, side="right"))
    rows = np.zeros(0, dtype=np.intp)
    if head:
        rows = segment.rows(spans[:head])
        of_posting = np.concatenate([codes[s:e] for s, e, _, _ in spans[:head].tolist()])
        added = np.repeat(weights[:head], sizes[:head]) * segment.weights(of_posting, rows)
        np.add.at(sums, rows, added)  # term after term, as they stand in rows
    if head == len(spans):
        # a document stands in rows once for each term it has; the k-th best of one term is a bar for all
        large = int((sizes >= k).argmax()) if head else 0
        some = rows[until[large] - sizes[large] : until[large]] if head else rows
        return _take(rows, sums, segment, k, _kth(some, sums[some], k, allowed), repeated=head > 1)
    rows = _different(rows)
    touched, size, chosen = [rows], len(rows), False
    to_come = np.append(np.cumsum(bounds[::-1])[::-1], 0.0) * SLACK
    for t in range(head, len(spans)):
        if not chosen and size >= k and sizes[t] > size:
            rows = np.concatenate(touched)
            worst = _kth(rows, sums[rows], k, allowed)
            chosen = to_come[t] < worst  # from here on only these are in question
        if not chosen:
            of_term, (s, e) = segment.rows(spans[t : t + 1]), spans[t, :2]
            before = sums[of_term]
            touched.append(of_term[before == 0.0])
            size += len(touched[-1])
            sums[of_term] = before + weights[t] * segment.weights(codes[s:e], of_term)
            continue
        hopeful = sums[rows] + to_come[t] >= worst
        sums[rows[~hopeful]] = 0.0
        rows = np.sort(rows[hopeful])
        found, place = segment.find(spans[t], rows)
        had = rows[found]
        sums[had] += weights[t] * segment.weights(codes[place], had)
    return _take(rows if chosen else np.concatenate(touched), sums, segment, k)


def _take(
    rows: np.ndarray, sums: np.ndarray, segment: Segment, k: int, bar: float = -np.inf, repeated: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The best of the rows, which may be repeated; none of them scores below the bar. Their sums become zero again."""
    good = sums[rows] >= bar
    if len(segment.allowed):
        good &= segment.allowed[rows]
    some = _different(rows[good]) if repeated else rows[good]
    scores = sums[some]
    sums[rows] = 0.0
    rows, scores = best_rows(some, scores, k, segment.id_rank)
    return rows.astype(np.int64), scores


def _different(rows: np.ndarray) -> np.ndarray:
    """np.unique, which takes sixteen times as long: it puts them into a hash table."""
    rows = np.sort(rows)
    new = np.ones(len(rows), dtype=bool)
    np.not_equal(rows[1:], rows[:-1], out=new[1:])
    return rows[new]


def _kth_largest(scores: np.ndarray, k: int) -> float:
    return np.partition(scores, len(scores) - k)[len(scores) - k]


def _kth(rows: np.ndarray, scores: np.ndarray, k: int, allowed: np.ndarray) -> float:
    if len(allowed):
        scores = scores[allowed[rows]]
    return _kth_largest(scores, k) if len(scores) >= k else -np.inf
