"""nanochat.retrieval.scoring in one compiled loop. Compiled once for each kind of arrays, and kept on disk.

Documents are taken in blocks whose sums stay in a core's cache, and each block begins with the bar that the blocks
before have set: where the frequent terms alone cannot reach it, their postings are only looked up from then on.
"""

from __future__ import annotations

import functools

import numba
import numpy as np

from nanochat.retrieval.scoring import BLOCK, SLACK

njit = functools.partial(numba.njit, cache=True, nogil=True)


@njit
def _worse(score, rank, other_score, other_rank):
    return score < other_score or (score == other_score and rank > other_rank)


@njit
def _sift_down(scores, rows, id_rank, at, size):
    """Heap with the worst on top: position `at` may be too good for its place."""
    while True:
        child = 2 * at + 1
        if child >= size:
            return
        if child + 1 < size and _worse(
            scores[child + 1], id_rank[rows[child + 1]], scores[child], id_rank[rows[child]]
        ):
            child += 1
        if not _worse(scores[child], id_rank[rows[child]], scores[at], id_rank[rows[at]]):
            return
        scores[at], scores[child] = scores[child], scores[at]
        rows[at], rows[child] = rows[child], rows[at]
        at = child


@njit
def _lower_bound(docs, s, e, d):
    """The first place in docs[s:e], ascending, that is not below d."""
    while s < e:
        middle = (s + e) >> 1
        if docs[middle] < d:
            s = middle + 1
        else:
            e = middle
    return s


@njit
def _first_from(docs, s, e, d):
    """The same, found near s sooner than far from it."""
    step = 1
    while s + step < e and docs[s + step] < d:
        s += step
        step <<= 1
    return _lower_bound(docs, s, min(e, s + step), d)


@njit
def best_compiled(
    docs, codes, table, norms, id_rank, allowed, sums, touched, starts, ends, weights, bounds, rows, scores
):
    """Fill rows and scores, best first; returns how many there are."""
    T, k, N, simple = len(starts), len(rows), len(id_rank), len(norms) > 0
    to_come = np.zeros(T + 1)
    for t in range(T - 1, -1, -1):
        to_come[t] = to_come[t + 1] + bounds[t]
    at = starts.copy()
    n, bar, needed = 0, -np.inf, T  # terms from `needed` on cannot reach the bar by themselves
    for first in range(0, N, BLOCK):
        last, size = min(first + BLOCK, N), 0
        for t in range(needed):
            p, e, weight = at[t], ends[t], weights[t]
            while p < e and docs[p] < last:
                d, w = docs[p], table[codes[p]]
                if simple:
                    w *= norms[d]
                before = sums[d - first]
                if before == 0.0:
                    touched[size] = d
                    size += 1
                sums[d - first] = before + weight * w
                p += 1
            at[t] = p
        for t in range(needed, T):
            left = 0
            for i in range(size):
                d = touched[i]
                if sums[d - first] + to_come[t] * SLACK >= bar:
                    touched[left] = d
                    left += 1
                else:
                    sums[d - first] = 0.0
            size = left
            if size == 0:
                break
            weight, p = weights[t], _first_from(docs, at[t], ends[t], first)
            e = _first_from(docs, p, ends[t], last)
            at[t] = e
            if e - p < 8 * size:
                for place in range(p, e):
                    d = docs[place]
                    if sums[d - first] > 0.0:
                        w = table[codes[place]]
                        if simple:
                            w *= norms[d]
                        sums[d - first] += weight * w
            else:
                for i in range(size):
                    d = touched[i]
                    place = _lower_bound(docs, p, e, d)
                    if place < e and docs[place] == d:
                        w = table[codes[place]]
                        if simple:
                            w *= norms[d]
                        sums[d - first] += weight * w
        for i in range(size):
            d = touched[i]
            score = sums[d - first]
            sums[d - first] = 0.0
            if score < bar or (len(allowed) and not allowed[d]):
                continue
            if n < k:
                rows[n], scores[n] = d, score
                n += 1
                if n == k:
                    for parent in range(k // 2 - 1, -1, -1):
                        _sift_down(scores, rows, id_rank, parent, k)
                    bar = scores[0]
            elif _worse(scores[0], id_rank[rows[0]], score, id_rank[d]):
                rows[0], scores[0] = d, score
                _sift_down(scores, rows, id_rank, 0, k)
                bar = scores[0]
        while needed > 0 and to_come[needed - 1] * SLACK < bar:
            needed -= 1
    if n < k:
        for parent in range(n // 2 - 1, -1, -1):
            _sift_down(scores, rows, id_rank, parent, n)
    for last in range(n - 1, 0, -1):  # take the worst off the heap's top, to the end
        scores[0], scores[last] = scores[last], scores[0]
        rows[0], rows[last] = rows[last], rows[0]
        _sift_down(scores, rows, id_rank, 0, last)
    return n
