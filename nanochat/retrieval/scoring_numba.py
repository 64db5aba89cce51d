"""nanochat.retrieval.scoring in one compiled loop. Compiled once for each kind of arrays, and kept on disk.

Documents are taken block by block (nanochat.retrieval.blocks), whose sums stay in a core's cache. Each block begins
with the bar that the blocks before have set: where the frequent terms alone cannot reach it, their postings are only
looked up from then on.
"""

from __future__ import annotations

import functools

import numba
import numpy as np

from nanochat.retrieval.scoring import SLACK

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
def _of_block(spans, runs, t, block):
    """Term t's postings in this block, first and last. Blocks are asked for in ascending order: spans moves along."""
    p, run = spans[t, 0], spans[t, 2]
    if len(runs) == 0:
        return p, spans[t, 1]
    while run < spans[t, 3] and runs[run, 0] < block:
        p += runs[run, 1] + 1
        run += 1
    spans[t, 0], spans[t, 2] = p, run
    there = run < spans[t, 3] and runs[run, 0] == block
    return p, p + runs[run, 1] + 1 if there else p


@njit
def best_compiled(
    docs, runs, codes, table, norms, id_rank, allowed, sums, touched, spans, weights, bounds, rows, scores
):
    """Fill rows and scores, best first; returns how many there are. sums is as long as a block."""
    T, k, N, simple = len(spans), len(rows), len(id_rank), len(norms) > 0
    to_come = np.zeros(T + 1)
    for t in range(T - 1, -1, -1):
        to_come[t] = to_come[t + 1] + bounds[t]
    spans = spans.copy()
    n, bar, needed = 0, -np.inf, T  # terms from `needed` on cannot reach the bar by themselves
    for block, first in enumerate(range(0, N, len(sums))):
        size = 0
        for t in range(needed):
            weight = weights[t]
            start, end = _of_block(spans, runs, t, block)
            for p in range(start, end):
                d, w = docs[p], table[codes[p]]
                if simple:
                    w *= norms[first + d]
                before = sums[d]
                if before == 0.0:
                    touched[size] = d
                    size += 1
                sums[d] = before + weight * w
        for t in range(needed, T):
            left = 0
            for i in range(size):
                d = touched[i]
                if sums[d] + to_come[t] * SLACK >= bar:
                    touched[left] = d
                    left += 1
                else:
                    sums[d] = 0.0
            size = left
            if size == 0:
                break
            weight = weights[t]
            start, end = _of_block(spans, runs, t, block)
            if end - start < 8 * size:
                for p in range(start, end):
                    d = docs[p]
                    if sums[d] > 0.0:
                        w = table[codes[p]]
                        if simple:
                            w *= norms[first + d]
                        sums[d] += weight * w
            else:
                for i in range(size):
                    d = touched[i]
                    p = _lower_bound(docs, start, end, d)
                    if p < end and docs[p] == d:
                        w = table[codes[p]]
                        if simple:
                            w *= norms[first + d]
                        sums[d] += weight * w
        for i in range(size):
            d = touched[i]
            row, score = first + d, sums[d]
            sums[d] = 0.0
            if score < bar or (len(allowed) and not allowed[row]):
                continue
            if n < k:
                rows[n], scores[n] = row, score
                n += 1
                if n == k:
                    for parent in range(k // 2 - 1, -1, -1):
                        _sift_down(scores, rows, id_rank, parent, k)
                    bar = scores[0]
            elif _worse(scores[0], id_rank[rows[0]], score, id_rank[row]):
                rows[0], scores[0] = row, score
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
