"""Names as they are compared: word by word, without case, accents and punctuation.

A graph of millions of entities keeps its names' keys as sorted 64-bit hashes (12 bytes for each, mapped from disk), in
which those of a question's words are looked up. A hash only proposes an entity: its name is compared before it counts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from nanochat.retrieval.postings import hash64

_WORD = re.compile(r"[\w\u0300-\u036f]+")  # accents may stand apart from their letters


def words(text: str) -> list[tuple[int, int, str]]:
    """(start, end, word as it is compared) of each word. A text of punctuation alone is one word, itself."""
    found = [(m.start(), m.end(), _plain(m[0])) for m in _WORD.finditer(text)]
    return found or ([(0, len(text), text)] if text.strip() else [])


def key(name: str) -> str:
    """Two names with the same key read the same: its words, with a space between."""
    return " ".join(_WORD.findall(name.lower()) if name.isascii() else map(_plain, _WORD.findall(name))) or name


def _plain(word: str) -> str:
    if word.isascii():
        return word.lower()
    decomposed = unicodedata.normalize("NFKD", word)
    return "".join(letter for letter in decomposed if not unicodedata.combining(letter)).casefold()


def hashes_of(keys: Iterable[str], count: int = -1) -> np.ndarray:
    """(keys,) uint64."""
    return np.fromiter(map(hash64.__wrapped__, keys), np.uint64, count)  # each once: nothing to remember


def sorted_keys(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, int]:
    """hashes (N,) ascending; (N,) int32 whose each is, those of one hash ascending too; words of the longest name."""
    longest = 1

    def keys() -> Iterable[str]:
        nonlocal longest
        for name in names:
            found = key(name)
            longest = max(longest, found.count(" ") + 1)
            yield found

    hashes = hashes_of(keys(), len(names))
    order = np.argsort(hashes, kind="stable")
    return hashes[order], order.astype(np.int32), longest
