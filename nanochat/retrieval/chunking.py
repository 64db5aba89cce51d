"""Long texts cut into passages, on the borders of sentences and sections, each of a few hundred tokens.

    for start, end in chunk(text, 200, overlap=20, sections=[0, 1840], count=token_counts):
        text[start:end]

A passage is whole sentences, as many as fit; only a sentence that does not fit by itself is cut, between words. A new
section begins a new passage, unless the one before it is still short: a heading with one line under it is not worth a
passage of its own. With an overlap a passage begins with the last sentences of the one before it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

SHORT = 0.25  # of the size: a passage smaller than this goes on into the next section

# what ends with a point and is no sentence: titles, initials, "e.g."
_ABBREVIATION = re.compile(
    r"(?:\b(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|Rev|Hon|Gen|Col|Capt|Lt|Sgt|Sen|Rep|Gov|Pres|St|Mt|Ft|Jr|Sr|No|Nos|Vol|Fig|Figs|Eq|Sec"
    r"|Ch|pp|p|ed|eds|cf|vs|ca|c|approx|dept|est|Inc|Ltd|Co|Corp|Bros|e\.g|i\.e|a\.k\.a|et al|[A-Z](?:\.[A-Z])+"
    r"|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sep|Sept|Oct|Nov|Dec))\.$"
)
_END = re.compile(
    r"""[.!?…]+["'”’)\]]*(?:\s*\[\d+\])*(?=\s+["'“‘(\[]*[^\Wa-z_])  # a point, then a capital or a digit
    |[.!?…]+["'”’)\]]*(?=\s*\n)                                       # at the end of a line
    |[。！？]+["”’」』）]*
    |\n[ \t]*\n                                                       # a paragraph
    |\n(?=[ \t]*(?:[-*•·]|\d+[.)])[ \t])                               # an item of a list
    """,
    re.VERBOSE,
)


def sentences(text: str, begin: int = 0, end: int | None = None) -> list[tuple[int, int]]:
    """(start, end) of each sentence of text[begin:end], without the space around it."""
    end = len(text) if end is None else end
    borders, last = [], begin
    for match in _END.finditer(text, begin, end):
        said = text[max(begin, match.start() - 12) : match.start() + 1]
        if text[match.start()] == "." and match.end() - match.start() == 1 and _ABBREVIATION.search(said):
            continue
        borders.append((last, match.end()))
        last = match.end()
    return [trimmed for a, b in [*borders, (last, end)] if (trimmed := _trim(text, a, b))]


def _trim(text: str, start: int, end: int) -> tuple[int, int] | None:
    piece = text[start:end]
    start += len(piece) - len(piece.lstrip())
    end -= len(piece) - len(piece.rstrip())
    return (start, end) if start < end else None


def count_words(texts: Sequence[str]) -> list[int]:
    """Words and signs of each text: what a large vocabulary needs at least, where there is no tokenizer."""
    return [len(re.findall(r"\w+|[^\w\s]", text)) for text in texts]


def chunk(
    text: str,
    size: int,
    overlap: int = 0,
    sections: Sequence[int] = (),
    count: Callable[[Sequence[str]], list[int]] = count_words,
) -> list[tuple[int, int]]:
    """(start, end) of each passage, of at most `size` tokens. sections: where they begin. count: tokens of each text;
    of a text and of its parts it may differ by a token at each cut, and passages stay below `size` all the same.

    Raises ValueError where overlap is not below size."""
    if not 0 <= overlap < size:
        raise ValueError(f"an overlap of {overlap} tokens does not go with passages of {size}")
    starts = sorted({0, *(at for at in sections if 0 < at < len(text))})
    pieces: list[tuple[int, int, bool]] = []  # sentences, and whether a section begins with it
    for begin, end in zip(starts, [*starts[1:], len(text)], strict=True):
        found = sentences(text, begin, end)
        pieces += [(a, b, at == 0) for at, (a, b) in enumerate(found)]
    sizes = [1 + tokens for tokens in count([text[a:b] for a, b, _ in pieces])]  # 1: the space before it
    pieces, sizes = _cut_long(text, pieces, sizes, size, count)
    passages: list[tuple[int, int]] = []
    first, held = 0, 0
    for at, (_, _, begins) in enumerate(pieces):
        if at > first and (held + sizes[at] > size or (begins and held >= SHORT * size)):
            passages.append((pieces[first][0], pieces[at - 1][1]))
            first, held = (at, 0) if begins else _step_back(pieces, sizes, first, at, min(overlap, size - sizes[at]))
        held += sizes[at]
    if pieces:
        passages.append((pieces[first][0], pieces[-1][1]))
    return passages


def _step_back(
    pieces: list[tuple[int, int, bool]], sizes: list[int], first: int, at: int, overlap: int
) -> tuple[int, int]:
    """The first of the sentences before `at` that fit into the overlap, and how many tokens they are."""
    held, start = 0, at
    while start - 1 > first and held + sizes[start - 1] <= overlap:
        start -= 1
        held += sizes[start]
        if pieces[start][2]:  # not beyond the section
            break
    return start, held


def _cut_long(
    text: str,
    pieces: list[tuple[int, int, bool]],
    sizes: list[int],
    size: int,
    count: Callable[[Sequence[str]], list[int]],
) -> tuple[list[tuple[int, int, bool]], list[int]]:
    """Sentences of more than `size` tokens, in parts that are not; words of more, too."""
    if max(sizes, default=0) <= size:
        return pieces, sizes
    cut: list[tuple[int, int, bool]] = []
    lengths: list[int] = []
    for (start, end, begins), length in zip(pieces, sizes, strict=True):
        if length <= size:
            cut.append((start, end, begins))
            lengths.append(length)
            continue
        words = [(start + m.start(), start + m.end()) for m in re.finditer(r"\S+", text[start:end])]
        weights = [1 + tokens for tokens in count([text[a:b] for a, b in words])]
        if max(weights) > size:  # no word at all; a character is at most four tokens
            step = max(1, size // 5)
            words = [
                (at, min(at + length, b))
                for (a, b), weight in zip(words, weights, strict=True)
                for length in [step if weight > size else b - a]
                for at in range(a, b, length)
            ]
            weights = [1 + tokens for tokens in count([text[a:b] for a, b in words])]
        first, held = 0, 0
        for at in range(len(words) + 1):
            if at == len(words) or (at > first and held + weights[at] > size):
                cut.append((words[first][0], words[at - 1][1], begins))
                lengths.append(held)
                first, held, begins = at, 0, False
            if at < len(words):
                held += weights[at]
    return cut, lengths
