"""Questions about a graph, from the files that data sets come in: this project's queries, MetaQA's text, RoG's WebQSP
and CWQ, WebQSP's own JSON, WebQuestions. Each also as .gz."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat.common import UserError

FORMATS = """\
{"id": "1", "query": "...", "answers": ["..."]} a line, with "topics": ["..."] where they are known
{"id": "1", "question": "...", "answer": ["..."], "q_entity": ["..."], "a_entity": ["..."]} a line (RoG)
{"url": "http://www.freebase.com/view/en/some_name", "question": "...", "answers": ["..."]} a line (WebQuestions)
{"Questions": [{"QuestionId", "RawQuestion", "Parses": [...]}, ...]} (WebQSP)
who acted in [Some Film]<tab>First Answer|Second Answer (MetaQA)"""


@dataclass(frozen=True)
class Question:
    """answers, topics: names of entities. topics is empty where the data does not say: they are linked."""

    id: str
    text: str
    answers: list[str]
    topics: list[str] = field(default_factory=list)
    where: str = ""
    """File and line."""


def read_questions(path: str | Path) -> list[Question]:
    """UserError with file and line if one is not as it should be."""
    path = Path(path)
    questions: list[Question] = []
    seen: dict[str, str] = {}
    for where, question in _read(path):
        if question is None:
            raise UserError(f"{where}: no question and answers; a file may have\n{FORMATS}")
        if question.id in seen:
            raise UserError(f"{where}: id {question.id!r} was used in {seen[question.id]} already; make ids unique")
        seen[question.id] = where
        questions.append(question)
    if not questions:
        raise UserError(f"{path}: no questions in it; a file may have\n{FORMATS}")
    return questions


def _read(path: Path) -> Iterator[tuple[str, Question | None]]:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            if path.name.removesuffix(".gz").endswith(".json"):
                data = json.load(file)
                records = data["Questions"] if isinstance(data, dict) and "Questions" in data else data
                if not isinstance(records, list):
                    raise UserError(f"{path}: not a list of questions; a file may have\n{FORMATS}")
                for number, record in enumerate(records, 1):
                    where = f"{path}: question {number}"
                    yield where, from_record(record, number, where)
                return
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                if not line.strip():
                    continue
                if line.lstrip().startswith("{"):
                    yield where, from_record(json.loads(line), number, where)
                else:
                    yield where, _from_text(line, number, where)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (EOFError, UnicodeDecodeError):
        raise UserError(f"{path}: cannot be read to its end as text; fetch it again") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: no JSON ({error})") from None


def _from_text(line: str, number: int, where: str) -> Question | None:
    text, _, answers = line.rstrip("\r\n").partition("\t")
    names = [answer.strip() for answer in answers.split("|") if answer.strip()]
    return Question(str(number), text.strip(), names, where=where) if text.strip() and names else None


def from_record(record: Any, number: int, where: str) -> Question | None:
    """A record of one of the FORMATS; number is the id of one that has none. None if it is no question."""
    if not isinstance(record, dict):
        return None
    for wanted, read in _RECORDS:
        if wanted <= record.keys():
            try:
                id, text, answers, topics = read(record)
            except (KeyError, TypeError, AttributeError):
                return None
            if not isinstance(text, str) or not text.strip() or not (_are_names(answers) and _are_names(topics)):
                return None
            return Question(str(id if id is not None else number), text, answers, topics, where)
    return None


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _webqsp(record: dict[str, Any]) -> tuple[Any, str, list[str], list[str]]:
    """Entities by their Freebase id, as in the graph; the answers of all parses that are whole."""
    answers: dict[str, None] = {}
    topics: dict[str, None] = {}
    for parse in record["Parses"]:
        if parse.get("TopicEntityMid"):
            topics[parse["TopicEntityMid"]] = None
        for answer in parse.get("Answers", []):
            answers[answer["AnswerArgument"]] = None
    return record["QuestionId"], record.get("ProcessedQuestion") or record["RawQuestion"], [*answers], [*topics]


def _web_questions(record: dict[str, Any]) -> tuple[Any, str, list[str], list[str]]:
    topic = record["url"].rstrip("/").rpartition("/")[2].replace("_", " ")
    return record.get("id"), record["question"], record["answers"], [topic]


_RECORDS: list[tuple[set[str], Callable[[dict[str, Any]], tuple[Any, str, list[str], list[str]]]]] = [
    ({"query", "answers"}, lambda r: (r.get("id"), r["query"], r["answers"], r.get("topics", []))),
    ({"question", "q_entity"}, lambda r: (r.get("id"), r["question"], r.get("a_entity") or r["answer"], r["q_entity"])),
    ({"question", "url"}, _web_questions),
    ({"QuestionId", "Parses"}, _webqsp),
]
