"""The documents of a segment in blocks of 65,536, so that a posting names its document in 16 bits.

The postings of one term in one block are a run: rows within the block, ascending. A run needs the number of its block
and how many postings it has (less one, as none is empty), 16 bits each. A segment of a single block has no table of
runs: all postings of a term are its run. With more blocks, a term that stands in few documents pays four bytes for
about each of them, and one that stands in many next to nothing.

    N documents, V terms, Z postings, R runs
"""

from __future__ import annotations

import numpy as np

BLOCK = 1 << 16  # documents. Part of the format on disk


def divide(rows: np.ndarray, starts: np.ndarray, N: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """rows (Z,) of each term's documents, ascending; term t has starts[t] : starts[t + 1] of them, at least one.

    Returns docs (Z,) uint16, the rows within their blocks; run_starts (V + 1,) int64, the runs of each term; runs
    (R, 2) uint16, block and postings less one. If N documents are one block: a single 0, and none."""
    if N <= BLOCK:
        return rows.astype(np.uint16), np.zeros(1, dtype=np.int64), np.zeros((0, 2), dtype=np.uint16)
    block, docs = np.divmod(rows, BLOCK)
    begins = np.diff(block, prepend=-1) != 0
    begins[starts[:-1]] = True
    first = np.flatnonzero(begins)
    runs = np.stack([block[first], np.diff(first, append=len(rows)) - 1], axis=1)
    return docs.astype(np.uint16), np.searchsorted(first, starts), runs.astype(np.uint16)


def first_rows(runs: np.ndarray) -> np.ndarray:
    """For each posting of these runs, given as wider integers, the first row of its block."""
    return np.repeat(runs[:, 0] * BLOCK, runs[:, 1] + 1)
