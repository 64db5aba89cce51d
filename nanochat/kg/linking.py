"""Which entities a question names: [brackets] where it has them, else the longest names that stand in it.

Every run of a question's words is looked up among the graph's names (names.py says how they are compared). Where two
names share words, the one of more words is meant, function words last; those alone ("It", "Who", both films) are no
name.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nanochat.kg.graph import Graph
from nanochat.kg.names import key, words

_BRACKETS = re.compile(r"\[([^\[\]]+)\]")
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
        self._aliases: dict[str, tuple[int, ...]] = {}
        self._alias_keys: dict[str, tuple[int, ...]] = {}
        self._longest = graph.longest_name
        for alias, name in aliases:
            if (entity := graph.find(name)) is not None:
                read = key(alias)
                self._aliases[alias] = (*self._aliases.get(alias, ()), entity)
                self._alias_keys[read] = (*self._alias_keys.get(read, ()), entity)
                self._longest = max(self._longest, read.count(" ") + 1)

    def _reading(self, keys: Sequence[str]) -> list[tuple[int, ...]]:
        """For each key the entities that are called so, by name first, then by alias."""
        return [
            tuple(dict.fromkeys((*entities, *self._alias_keys.get(read, ()))))
            for read, entities in zip(keys, self.graph.reading(keys), strict=True)
        ]

    def entities(self, name: str) -> tuple[int, ...]:
        """Those of exactly this name; if there is none, of this alias; if there is none, of one that reads the same."""
        if (entity := self.graph.find(name)) is not None:
            return (entity,)
        if name in self._aliases:
            return self._aliases[name]
        return self._reading([key(name)])[0]

    def link(self, question: str) -> list[Mention]:
        """In the order of the text. With brackets, what stands in them and is an entity, and nothing else."""
        if found := list(_BRACKETS.finditer(question)):
            mentions = [Mention(m.start(1), m.end(1), m[1], self.entities(m[1].strip())) for m in found]
            return [mention for mention in mentions if mention.entities]
        places = words(question)
        plain = [word for _, _, word in places]
        telling = list(itertools.accumulate((word not in _FUNCTION_WORDS for word in plain), initial=0))
        spans = [  # (first word, the one after the last)
            (first, end)
            for first in range(len(plain))
            for end in range(first + 1, min(first + self._longest, len(plain)) + 1)
            if end - first > 1 or telling[end] > telling[first]
        ]
        named = self._reading([" ".join(plain[first:end]) for first, end in spans])
        candidates = [(*span, entities) for span, entities in zip(spans, named, strict=True) if entities]
        # most words that are no function words, most words, the first
        candidates.sort(key=lambda c: (telling[c[0]] - telling[c[1]], c[0] - c[1], c[0]))
        taken: set[int] = set()
        mentions = []
        for first, end, entities in candidates:
            if taken.isdisjoint(range(first, end)):
                taken.update(range(first, end))
                begin, stop = places[first][0], places[end - 1][1]
                mentions.append(Mention(begin, stop, question[begin:stop], entities))
        return sorted(mentions, key=lambda mention: mention.start)
