"""Which entities a question names: [brackets] where it has them, else the longest names that stand in it.

Names are compared word by word, without case, accents and punctuation, in a trie. Where two names share words, the one
of more words is meant, function words last; those alone ("It", "Who", both films) are no name.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from nanochat.kg.graph import Graph

_BRACKETS = re.compile(r"\[([^\[\]]+)\]")
_WORD = re.compile(r"[\w\u0300-\u036f]+")  # accents may stand apart from their letters
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a about after all also am an and any are as at be been before both but by can could did do does each for from
        had has have he her him his how i if in is it its many may me more most much my no not of on one or other our
        out over same she should so some such than that the their them then there these they this those through to
        under up us was we were what when where which while who whom whose why will with would year you your
        """,
    )
)


@dataclass(frozen=True)
class Mention:
    """text: the question's own words, from start to end. entities: all of that name."""

    start: int
    end: int
    text: str
    entities: tuple[int, ...]


class Linker:
    """aliases: other names of entities, as (alias, name) pairs; those of no entity are ignored."""

    def __init__(self, graph: Graph, aliases: Iterable[tuple[str, str]] = ()):
        self.graph = graph
        self._next: dict[tuple[int, str], int] = {}  # (node, word) -> node; the root is 0
        self._named: dict[int, tuple[int, ...]] = {}  # node -> entities whose name ends there
        self._aliases: dict[str, tuple[int, ...]] = {}
        self._nodes = 1
        for entity in range(len(graph)):
            self._add(graph.name(entity), entity)
        for alias, name in aliases:
            if (entity := graph.find(name)) is not None:
                self._aliases[alias] = (*self._aliases.get(alias, ()), entity)
                self._add(alias, entity)

    def _add(self, name: str, entity: int) -> None:
        node = 0
        for _, _, word in _words(name):
            node = self._next.setdefault((node, word), self._nodes)
            self._nodes = max(self._nodes, node + 1)
        if node and entity not in self._named.get(node, ()):
            self._named[node] = (*self._named.get(node, ()), entity)

    def entities(self, name: str) -> tuple[int, ...]:
        """Those of exactly this name; if there is none, of this alias; if there is none, of one that reads the same."""
        if (entity := self.graph.find(name)) is not None:
            return (entity,)
        if name in self._aliases:
            return self._aliases[name]
        node = 0
        for _, _, word in _words(name):
            node = self._next.get((node, word), -1)
        return self._named.get(node, ())

    def link(self, question: str) -> list[Mention]:
        """In the order of the text. With brackets, what stands in them and is an entity, and nothing else."""
        if found := list(_BRACKETS.finditer(question)):
            mentions = [Mention(m.start(1), m.end(1), m[1], self.entities(m[1].strip())) for m in found]
            return [mention for mention in mentions if mention.entities]
        words = _words(question)
        spans = []  # (words that are no function words, words, first word, entities)
        for first in range(len(words)):
            node = 0
            for at in range(first, len(words)):
                node = self._next.get((node, words[at][2]), -1)
                if node < 0:
                    break
                telling = sum(word not in _FUNCTION_WORDS for _, _, word in words[first : at + 1])
                if node in self._named and (telling or at > first):
                    spans.append((telling, at + 1 - first, first, self._named[node]))
        taken: set[int] = set()
        mentions = []
        for _, count, first, entities in sorted(spans, key=lambda span: (-span[0], -span[1], span[2])):
            places = range(first, first + count)
            if taken.isdisjoint(places):
                taken.update(places)
                start, end = words[first][0], words[first + count - 1][1]
                mentions.append(Mention(start, end, question[start:end], entities))
        return sorted(mentions, key=lambda mention: mention.start)


def _words(text: str) -> list[tuple[int, int, str]]:
    """(start, end, word as it is compared) of each word. A text of punctuation alone is one word, itself."""
    found = [(m.start(), m.end(), _plain(m[0])) for m in _WORD.finditer(text)]
    return found or ([(0, len(text), text)] if text.strip() else [])


def _plain(word: str) -> str:
    if word.isascii():
        return word.lower()
    decomposed = unicodedata.normalize("NFKD", word)
    return "".join(letter for letter in decomposed if not unicodedata.combining(letter)).casefold()
