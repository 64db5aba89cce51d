"""Facts as a small graph in the terminal: those of one entity together, and which way each arrow goes.

Titanic        ─directed_by────→ James Cameron
               ─starred_actors─→ Kate Winslet
James Cameron  ─born_in────────→ Kapuskasing
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

from nanochat.kg.documents import Triple

ARROWS, PLAIN = "─→←", "-><"
WIDEST = 32  # longer names stand out of the column


def groups(facts: Sequence[Triple]) -> list[tuple[str, list[int]]]:
    """(entity, numbers of its facts), each fact once. The entity of most facts takes them first, so that a person's
    five films stand under the person; then in the order of the best fact of each."""
    left, found = list(range(len(facts))), []
    while left:
        # of a fact with itself one end counts; of equals the first to be named
        counts = Counter(name for at in left for name in dict.fromkeys((facts[at][0], facts[at][2])))
        entity = max(counts, key=counts.__getitem__)
        own = [at for at in left if entity in (facts[at][0], facts[at][2])]
        found.append((entity, own))
        left = [at for at in left if at not in own]
    return sorted(found, key=lambda group: group[1][0])


def draw(facts: Sequence[Triple], arrows: str = ARROWS) -> list[tuple[int, str]]:
    """(number of the fact, its line) in the order they are shown. arrows: or PLAIN, where these cannot be printed."""
    line, right, left = arrows
    grouped = groups(facts)
    entities = min(WIDEST, max((width(entity) for entity, _ in grouped), default=0))
    relations = min(WIDEST, max((width(relation) for _, relation, _ in facts), default=0))
    lines = []
    for entity, own in grouped:
        shown = entity + " " * (entities - width(entity))
        for at in own:
            head, relation, tail = facts[at]
            relation = line + relation + line * (relations - width(relation)) + line
            arrow = f"{relation}{right} {tail}" if head == entity else f"{left}{relation} {head}"
            lines.append((at, f"{shown}  {arrow}"))
            shown = " " * entities
    return lines


def width(text: str) -> int:
    """In columns of a terminal."""
    return sum(
        0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text
    )
