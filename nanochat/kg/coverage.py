"""Questions held against a graph: which entities they start from and end at, and which of those are not there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.kg.linking import Linker
from nanochat.kg.questions import Question


@dataclass
class Grounded:
    """A question whose names are entities. missing: names of the data that are none."""

    question: Question
    topics: list[int]
    answers: list[int]
    missing_topics: list[str]
    missing_answers: list[str]


def ground(question: Question, linker: Linker) -> Grounded:
    """The topics are those that the data gives, else those that the question names. An answer that many entities are
    called is all of them."""
    missing_topics: list[str] = []
    if question.topics:
        topics = _entities(question.topics, linker, missing_topics)
    else:
        topics = [entity for mention in linker.link(question.text) for entity in mention.entities]
    missing_answers: list[str] = []
    answers = _entities(question.answers, linker, missing_answers)
    return Grounded(question, list(dict.fromkeys(topics)), answers, missing_topics, missing_answers)


def _entities(names: Sequence[str], linker: Linker, missing: list[str]) -> list[int]:
    found: dict[int, None] = {}
    for name in names:
        entities = linker.entities(name)
        found.update(dict.fromkeys(entities))
        if not entities:
            missing.append(name)
    return list(found)


def coverage(grounded: Sequence[Grounded]) -> dict[str, float]:
    """What is in the graph: shares of the questions with a topic, with all answers, with any, and of all answers."""
    answers = sum(len(one.question.answers) for one in grounded)
    missing = sum(len(one.missing_answers) for one in grounded)
    count = len(grounded)
    return {
        "with_topic": sum(bool(one.topics) for one in grounded) / count,
        "with_all_answers": sum(bool(one.answers) and not one.missing_answers for one in grounded) / count,
        "with_any_answer": sum(bool(one.answers) for one in grounded) / count,
        "answers": 1 - missing / answers if answers else 0.0,
    }


def most_missed(grounded: Sequence[Grounded], count: int = 10) -> list[tuple[str, int]]:
    """Names that most questions miss."""
    return Counter(name for one in grounded for name in (*one.missing_topics, *one.missing_answers)).most_common(count)
