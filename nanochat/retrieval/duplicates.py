"""Texts that say again what another says, found without comparing all with all.

The Jaccard similarity of two texts is the share of their word 5-grams that both have. Its estimate is the share of
equal numbers in two MinHash signatures (Broder, "On the resemblance and containment of documents", 1997); texts whose
signatures agree in a whole band of four numbers are compared exactly.
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

WORDS = 5  # of a shingle
BANDS, ROWS = 16, 4  # a pair of similarity s is compared with probability 1 - (1 - s^4)^16: .9998 at .8, .64 at .5
_PRIME = np.uint64(2**31 - 1)


def near_duplicates(texts: Sequence[str], similarity: float = 0.8) -> dict[int, int]:
    """Each text that is at least so similar to one before it, and the first such one that is kept itself."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(1, int(_PRIME), (2, BANDS * ROWS), dtype=np.uint64)
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    repeats: dict[int, int] = {}
    for number, text in enumerate(texts):
        shingles = _shingles(text)
        signature = ((shingles[:, None] * a + b) % _PRIME).min(0)
        keys = [(band, signature[band * ROWS : (band + 1) * ROWS].tobytes()) for band in range(BANDS)]
        near = sorted({other for key in keys for other in buckets.get(key, ())})
        same = next((other for other in near if _jaccard(shingles, _shingles(texts[other])) >= similarity), None)
        if same is not None:
            repeats[number] = same
            continue
        for key in keys:
            buckets[key].append(number)
    return repeats


def _shingles(text: str) -> np.ndarray:
    """Hashes below 2**31 of the text's 5-grams of words; of all its words where they are fewer."""
    words = re.findall(r"\w+", text.lower())
    grams = {" ".join(words[at : at + WORDS]) for at in range(max(1, len(words) - WORDS + 1))}
    return np.array(sorted({zlib.crc32(gram.encode()) >> 1 for gram in grams}), dtype=np.uint64)


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)
