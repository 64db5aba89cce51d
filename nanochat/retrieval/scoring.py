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

_SHORT = 16_384  # postings
BLOCK = 32_768  # documents that the compiled loop takes at a time
SLACK = 1 + 1e-6  # bounds are compared after roundings


@dataclass
class Segment:
    """What scoring needs of a segment: arrays of its postings, and of its N documents."""

    docs: np.ndarray  # (Z,) int32
    codes: np.ndarray  # (Z,)
    table: np.ndarray  # (C,) float64
    norms: np.ndarray  # (N,) float64, or (0,): none
    id_rank: np.ndarray  # (N,) int32: the order among equal scores
    allowed: np.ndarray  # (N,) bool, or (0,): all

    def weights(self, codes: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Of postings with these codes in these documents."""
        found = self.table.take(codes)
        return found * self.norms[rows] if len(self.norms) else found


class Room:
    """One thread's room for sums, zero between queries."""

    def __init__(self, N: int, compiled: bool = False):
        size = min(N, BLOCK) if compiled else N
        self.sums = np.zeros(size)
        self.touched = np.empty(size if compiled else 0, dtype=np.int32)


def best(
    segment: Segment,
    room: Room,
    starts: np.ndarray,
    ends: np.ndarray,
    weights: np.ndarray,
    bounds: np.ndarray,
    k: int,
    compiled: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """(rows, scores) of the k best, best first, equal scores in the order of id_rank; none that scores zero.

    starts, ends (T,): each term's postings; weights (T,) positive; bounds (T,): the most that a term can add, weight
    included (infinite: not known)."""
    if compiled:
        from nanochat.retrieval.scoring_numba import best_compiled

        rows, scores = np.empty(k, dtype=np.int64), np.empty(k)
        arrays = (segment.docs, segment.codes, segment.table, segment.norms, segment.id_rank, segment.allowed)
        n = best_compiled(*arrays, room.sums, room.touched, starts, ends, weights, bounds, rows, scores)
        return rows[:n], scores[:n]
    return _best_numpy(segment, room.sums, starts, ends, weights, bounds, k)


def best_rows(rows: np.ndarray, scores: np.ndarray, k: int, id_rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The k best, best first, equal scores by id_rank (of all rows, indexed by row)."""
    if len(scores) > k:
        good = scores >= _kth_largest(scores, k)
        rows, scores = rows[good], scores[good]
    order = np.lexsort((id_rank[rows], -scores))[:k]
    return rows[order], scores[order]


def _best_numpy(segment, sums, starts, ends, weights, bounds, k) -> tuple[np.ndarray, np.ndarray]:
    docs, codes, allowed = segment.docs, segment.codes, segment.allowed
    spans = list(zip(starts.tolist(), ends.tolist(), strict=True))
    sizes = ends - starts
    # short postings, all terms at once: each call of NumPy costs as much as a thousand numbers
    head = int(np.searchsorted(sizes.cumsum(), _SHORT, side="right"))
    rows = np.zeros(0, dtype=np.intp)  # indexing with other integers takes twice as long
    if head:
        rows = np.concatenate([docs[s:e] for s, e in spans[:head]], dtype=np.intp)
        of_posting = np.concatenate([codes[s:e] for s, e in spans[:head]])
        added = np.repeat(weights[:head], sizes[:head]) * segment.weights(of_posting, rows)
        np.add.at(sums, rows, added)  # term after term, as they stand in rows
    if head == len(spans):
        # a document stands in rows once for each term it has; the k-th best of one term is a bar for all
        large = int((sizes >= k).argmax()) if head else 0
        some = rows[(at := int(sizes[:large].sum())) : at + int(sizes[large])] if head else rows
        return _take(rows, sums, segment, k, _kth(some, sums[some], k, allowed), repeated=head > 1)
    rows = np.unique(rows)
    touched, size, chosen = [rows], len(rows), False
    to_come = np.append(np.cumsum(bounds[::-1])[::-1], 0.0) * SLACK
    for t, (s, e) in enumerate(spans[head:], head):
        if not chosen and size >= k and e - s > size:
            rows = np.concatenate(touched)
            worst = _kth(rows, sums[rows], k, allowed)
            chosen = to_come[t] < worst  # from here on only these are in question
        if not chosen:
            of_term = docs[s:e].astype(np.intp)
            before = sums[of_term]
            touched.append(of_term[before == 0.0])
            size += len(touched[-1])
            sums[of_term] = before + weights[t] * segment.weights(codes[s:e], of_term)
            continue
        hopeful = sums[rows] + to_come[t] >= worst
        sums[rows[~hopeful]] = 0.0
        rows = rows[hopeful]
        of_term = docs[s:e]
        place = np.searchsorted(of_term, rows.astype(docs.dtype))
        found = of_term[np.minimum(place, e - s - 1)] == rows
        had, place = rows[found], s + place[found]
        sums[had] += weights[t] * segment.weights(codes[place], had)
    return _take(rows if chosen else np.concatenate(touched), sums, segment, k)


def _take(
    rows: np.ndarray, sums: np.ndarray, segment: Segment, k: int, bar: float = -np.inf, repeated: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The best of the rows, which may be repeated; none of them scores below the bar. Their sums become zero again."""
    scores = sums[rows]
    sums[rows] = 0.0
    good = scores >= bar
    if len(segment.allowed):
        good &= segment.allowed[rows]
    rows, scores = rows[good], scores[good]
    if repeated:
        rows, first = np.unique(rows, return_index=True)
        scores = scores[first]
    rows, scores = best_rows(rows, scores, k, segment.id_rank)
    return rows.astype(np.int64), scores


def _kth_largest(scores: np.ndarray, k: int) -> float:
    return np.partition(scores, len(scores) - k)[len(scores) - k]


def _kth(rows: np.ndarray, scores: np.ndarray, k: int, allowed: np.ndarray) -> float:
    if len(allowed):
        scores = scores[allowed[rows]]
    return _kth_largest(scores, k) if len(scores) >= k else -np.inf
