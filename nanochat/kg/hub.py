"""Question sets of the Hugging Face hub as this project's files: questions of each split, and the facts beside them.

RoG's WebQSP and CWQ (Luo et al., ICLR 2024) carry for each question the part of Freebase around its entities, by names;
the union of these parts is written once, as the file that a graph is built of. WebQuestions (Berant et al., EMNLP 2013)
has questions alone: its graph is all of Freebase.

Read through the datasets package, or from a folder of the same parquet or JSONL files.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from nanochat.common import UserError, print0
from nanochat.kg.questions import from_record

HUB = {"webqsp": "rmanluo/RoG-webqsp", "cwq": "rmanluo/RoG-cwq", "web_questions": "stanfordnlp/web_questions"}
WITH_FACTS = ("webqsp", "cwq")
_SPLIT = re.compile(r"(train|validation|valid|val|dev|test)(?![a-zA-Z]).*\.(parquet|jsonl|jsonl\.gz)")
_OURS = {"validation": "val", "valid": "val", "dev": "val"}

Rows = Iterator[tuple[str, Any]]  # (where it stands, record)


def download(dataset: str, output: Path, source: Path | None = None) -> None:
    """Write output/{train,val,test}.jsonl, those that there are, and output/facts.txt: all of them or none."""
    splits = _folder(dataset, source) if source is not None else _hub(dataset)
    output.mkdir(parents=True, exist_ok=True)
    facts = FactWriter(output / "facts.txt.part") if dataset in WITH_FACTS else None
    written = []
    try:
        for split, rows in splits.items():
            written.append(output / f"{split}.jsonl.part")
            count = _write_questions(written[-1], rows, facts)
            print0(f"{split}: {count:,} questions")
        if facts is not None:
            facts.file.close()
            written.append(facts.path)
            print0(facts.report)
        for path in written:
            os.replace(path, path.with_suffix(""))
    finally:
        if facts is not None:
            facts.file.close()
        for path in (*written, output / "facts.txt.part"):
            path.unlink(missing_ok=True)


def _write_questions(path: Path, rows: Rows, facts: FactWriter | None) -> int:
    number = 0
    with open(path, "w", encoding="utf-8") as file:
        for number, (where, record) in enumerate(rows, 1):
            question = from_record(record, number, where)
            if question is None:
                raise UserError(f"{where}: no question with answers; its columns are {_columns(record)}")
            if facts is not None:
                if not isinstance(record.get("graph"), list):
                    raise UserError(
                        f"{where}: no graph of facts beside the question; its columns are {_columns(record)}"
                    )
                for fact in record["graph"]:
                    facts.add(fact)
            named = {"answers": _names(question.answers), "topics": _names(question.topics)}
            file.write(json.dumps({"id": question.id, "query": question.text} | named, ensure_ascii=False) + "\n")
    return number


def _columns(record: Any) -> str:
    return ", ".join(record) if isinstance(record, dict) else "none"


def _names(names: list[str]) -> list[str]:
    return list(dict.fromkeys(cleaned for name in names if (cleaned := _cleaned(name))))


def _cleaned(name: str) -> str:
    """On one line and without tabs, which stand between the parts of a fact."""
    return " ".join(name.split())


class FactWriter:
    """Facts as subject<tab>relation<tab>object lines, each once."""

    def __init__(self, path: Path):
        self.path = path
        self.file = open(path, "w", encoding="utf-8")  # noqa: SIM115
        self._numbers: dict[str, int] = {}  # entities and relations
        self._seen: set[int] = set()
        self.read = self.no_facts = 0

    def add(self, fact: Any) -> None:
        self.read += 1
        good = isinstance(fact, list) and len(fact) == 3 and all(isinstance(part, str) for part in fact)
        parts = [_cleaned(part) for part in fact] if good else []
        if not parts or not all(parts):
            self.no_facts += 1
            return
        head, relation, tail = (self._numbers.setdefault(part, len(self._numbers)) for part in parts)
        packed = (head << 64) | (relation << 32) | tail
        if packed not in self._seen:
            self._seen.add(packed)
            line = "\t".join(parts)
            self.file.write(f" {line}\n" if line.startswith("#") else f"{line}\n")  # a # at the start is a comment

    @property
    def report(self) -> str:
        left_out = f", {self.no_facts:,} that are none left out" if self.no_facts else ""
        return f"facts: {len(self._seen):,} different ones among {self.read:,}{left_out}"


# --- where they come from


def _hub(dataset: str) -> dict[str, Rows]:
    name = HUB[dataset]
    by_hand = (
        f"fetch the files of https://huggingface.co/datasets/{name}/tree/main where there is a network, and give their "
        "folder: --source FOLDER"
    )
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f'the hub needs the datasets package: pip install "nanochat[hf]"; or {by_hand}') from None
    try:
        loaded = load_dataset(name)
    except Exception as error:  # whatever the hub client raises when there is no network
        raise UserError(f"{name} cannot be had from the hub ({type(error).__name__}): {by_hand}") from error
    return {_OURS.get(split, split): _numbered(f"{name} {split}: row", rows) for split, rows in loaded.items()}


def _numbered(where: str, rows: Iterable[Any]) -> Rows:
    for number, row in enumerate(rows, 1):
        yield f"{where} {number}", row


def _folder(dataset: str, folder: Path) -> dict[str, Rows]:
    """Files are told apart by the start of their names, as on the hub: train-00000-of-00002.parquet."""
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and (found := _SPLIT.fullmatch(path.name)):
            splits.setdefault(_OURS.get(found[1], found[1]), []).append(path)
    if not splits:
        raise UserError(
            f"{folder}: no file in it is named like train-00000-of-00001.parquet or test.jsonl; fetch those of "
            f"https://huggingface.co/datasets/{HUB[dataset]}/tree/main"
        )
    return {
        split: chain.from_iterable(_parquet(path) if path.suffix == ".parquet" else _jsonl(path) for path in paths)
        for split, paths in splits.items()
    }


def _parquet(path: Path) -> Rows:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f'{path}: reading parquet needs pyarrow: pip install "nanochat[hf]"; or give JSONL') from None
    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=64)  # a row may hold thousands of facts
        yield from _numbered(f"{path}: row", chain.from_iterable(batch.to_pylist() for batch in batches))
    except (OSError, ArrowException) as error:
        raise UserError(f"{path}: no parquet file that can be read ({error}); fetch it again") from None


def _jsonl(path: Path) -> Rows:
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: no JSON ({error})") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read to its end ({error}); fetch it again") from None
