"""Text to search terms: lower case, accents folded, split into words, stop words out, Snowball stems.

Documents and queries go through the same function, so whatever it does to a word it does to both. The stemmer is
Porter2 as published at https://snowballstem.org (PyStemmer); without stemming nothing but the standard library is used.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from array import array
from collections.abc import Iterable

import numpy as np

from nanochat.common import UserError

# Chinese and Japanese are written without spaces: each character is a word of its own.
_NO_SPACES = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_NO_SPACES}]|[^\\W_{_NO_SPACES}]+")
_ASCII_SPACES = {code: " " for code in range(128) if not chr(code).isalnum()}
_ACCENT = re.compile("[\u0300-\u036f]")

# Function words: nearly every text has them, so they tell texts apart badly and make the longest postings.
_ENGLISH_STOP_WORDS = frozenset(
    re.findall(
        "[a-z]+",
        """
        a about am an and are as at be been being but by can did do does for from had has have he her hers him his how i
        if in into is it its me my no nor not of on or our ours s she so such t than that the their theirs them then
        there these they this those to too was we were what when where which while who whom why will with would you your
        yours
        """,
    )
)


class Analyzer:
    def __init__(self, language: str = "english", stem: bool = True, stop_words: bool = True):
        self.language, self.stem = language, stem
        self.stop_words = _ENGLISH_STOP_WORDS if stop_words and language == "english" else frozenset()
        self._stemmer = _load_stemmer(language) if stem else None
        self._lock = threading.Lock()  # a Snowball stemmer has state

    def words(self, text: str) -> list[str]:
        text = text.lower()
        if text.isascii():
            return text.translate(_ASCII_SPACES).split()
        text = unicodedata.normalize("NFKD", text)  # full-width letters, ligatures and decomposed accents become plain
        if self.language == "english":  # elsewhere an accent can be part of the letter
            text = _ACCENT.sub("", text)
        return _WORD.findall(unicodedata.normalize("NFC", text))

    def term(self, word: str) -> str | None:
        """Of one word; None for a stop word."""
        if word in self.stop_words:
            return None
        if self._stemmer is None:
            return word
        with self._lock:
            return self._stemmer.stemWord(word)

    def terms(self, text: str) -> list[str]:
        """The terms of a text, in order, with repeats."""
        words = [word for word in self.words(text) if word not in self.stop_words]
        if self._stemmer is None or not words:
            return words
        with self._lock:
            return self._stemmer.stemWords(words)

    def word_ids(self) -> WordIds:
        return WordIds(self)


class WordIds(dict):
    """word -> id of its term, or -1 for a stop word. A word is analysed when it is first met, and never again."""

    def __init__(self, analyzer: Analyzer):
        super().__init__()
        self.analyzer = analyzer
        self.terms: list[str] = []
        self._id_of_term: dict[str, int] = {}

    def __missing__(self, word: str) -> int:
        term = self.analyzer.term(word)
        id = -1
        if term is not None:
            id = self._id_of_term.setdefault(term, len(self.terms))
            if id == len(self.terms):
                self.terms.append(term)
        self[word] = id
        return id

    def of_texts(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts' terms one after the other, and how many of them each text has."""
        lookup, words = self.__getitem__, self.analyzer.words
        flat_ids = array("i")
        ends = array("q", [0])
        for text in texts:
            flat_ids.extend(map(lookup, words(text)))
            ends.append(len(flat_ids))
        ids = np.frombuffer(flat_ids, dtype=np.int32) if flat_ids else np.zeros(0, dtype=np.int32)
        kept = ids >= 0
        kept_before = np.concatenate([[0], np.cumsum(kept, dtype=np.int64)])
        return ids[kept], np.diff(kept_before[np.frombuffer(ends, dtype=np.int64)])


def _load_stemmer(language: str):
    try:
        import Stemmer
    except ImportError:
        raise UserError(
            "PyStemmer is missing, which cuts words to their stems; pip install PyStemmer "
            "(without it: --stem false, which finds fewer documents)"
        ) from None
    if language not in Stemmer.algorithms():
        raise UserError(f"no stemmer for the language {language!r}; use one of: {', '.join(Stemmer.algorithms())}")
    return Stemmer.Stemmer(language)
