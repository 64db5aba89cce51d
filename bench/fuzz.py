"""Random and damaged input to everything that reads what people give: a result, or one clear line, and nothing else.

    python -m bench.fuzz --count 10000 --json

Inputs come from hypothesis: valid files with some of their bytes changed, records with some of their values changed,
and plain noise. A crash is any other exception than UserError, a UserError of several lines or without the name of the
file (and the number of the line, where lines are read one by one), and a call that takes longer than 10 seconds.
"""

from __future__ import annotations

import functools
import random
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from bench import fuzz_inputs as inputs
from bench.common import print_figures
from nanochat.common import UserError, run_main
from nanochat.config import format_config, load_config, save_config
from nanochat.conversation import render
from nanochat.dataset import iter_texts
from nanochat.kg.documents import fact_documents
from nanochat.kg.graph import Graph
from nanochat.kg.triples import read_facts
from nanochat.retrieval.document import read_documents, read_queries, write_jsonl
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from tasks.common import load_conversations
from tasks.hotpotqa import read_hotpotqa
from tasks.own_files import read_files
from tasks.squad import read_squad

SECONDS = 10  # for one input
SHOWN = 5  # crashes of a parser


@dataclass
class Config:
    """Feed every parser so many inputs."""

    count: int = 10_000
    """Inputs for each parser."""
    further: int = 9
    """Of each file that hypothesis makes, which takes most of the time, so many more are made by damaging its bytes."""
    parsers: list[str] = field(default_factory=list)
    """Only these; all if not given."""
    seed: int = 0
    """Of the inputs."""
    json: bool = False
    """Print the figures as one JSON object in the last line."""


# --- what is done with an input; a path is of a file that holds it


def documents(path: Path) -> None:
    """What is read can be written, and is the same when it is read again."""
    found = read_documents(path)
    again = path.with_name("again.jsonl")
    write_jsonl(again, found)
    assert repr(read_documents(again)) == repr(found), "not the same when written and read again"


def conversations(path: Path) -> None:
    for conversation in load_conversations(path):
        render(conversation, tokenizer())


def facts(path: Path) -> None:
    found = read_facts([path])
    assert found.report and len(found.heads) <= found.lines
    assert Graph.build(found).num_facts == len(found.heads)
    assert all(document.to_line() for document in fact_documents(found))


def squad(path: Path) -> None:
    for article in read_squad(path):
        for record in (*article.documents, *article.queries):
            write_jsonl(path.with_name("again.jsonl"), [record])


def hotpotqa(path: Path) -> None:
    found, queries, _ = read_hotpotqa(path)
    write_jsonl(path.with_name("again.jsonl"), [*found, *queries])


def own_file(path: Path) -> None:
    found, unread = read_files([path])
    assert all("\n" not in f"{one.path} {one.reason}" for one in unread), "a reason of several lines"
    assert all(text.content.strip() and isinstance(text.title, str) for text in found)


def config_file(path: Path) -> None:
    config = load_config(inputs.Everything, [str(path)])
    format_config(config)


def config_flags(given_flags: list[str]) -> None:
    config = load_config(inputs.Everything, given_flags)
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        save_config(config, Path(folder) / "config.json")


def round_trip(text: str) -> None:
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a pair is no character
    for ids in (tokenizer().encode(text), *tokenizer().encode_batch([text, text], num_threads=1)):
        assert tokenizer().decode(ids) == whole, "not the same text again"
        assert all(id < len(tokenizer().token_bytes) for id in ids), "a special token"


@functools.cache
def tokenizer() -> Tokenizer:
    words = [f"{name} the Brücke 東京 1987\n\n" for name in SPECIAL_TOKENS] * 3
    return Tokenizer.train(words, 256 + 60 + len(SPECIAL_TOKENS))


ONE_FILE = "nothing in it|no question|damaged gzip|not usable JSON|is the file whole"

# --- the parsers: what is done, with what, the name of the file (none if it is no file), and which errors have no line

Parser = tuple[Callable[[Any], None], Callable[[], st.SearchStrategy[Any]], str, str]

PARSERS: dict[str, Parser] = {
    "documents": (documents, lambda: inputs.json_lines(*inputs.DOCUMENTS), "in.jsonl", "no documents in it"),
    "queries": (read_queries, lambda: inputs.json_lines(*inputs.QUERIES), "in.jsonl", "no queries in it"),
    "conversations": (conversations, lambda: inputs.json_lines(*inputs.CONVERSATIONS), "in.jsonl", "no conversations"),
    "texts": (lambda p: list(iter_texts(p)), lambda: inputs.json_lines(*inputs.DOCUMENTS), "in.jsonl", "^$"),
    "texts_gz": (lambda p: list(iter_texts(p)), lambda: inputs.damaged(inputs.PACKED), "in.txt.gz", "^$"),
    "triples": (facts, lambda: inputs.damaged(*inputs.FACTS), "in.txt", "."),
    "triples_gz": (facts, lambda: inputs.damaged(inputs.PACKED), "in.txt.gz", "."),
    "squad": (squad, lambda: inputs.json_file(inputs.SQUAD), "in.json", "."),
    "hotpotqa": (hotpotqa, lambda: inputs.json_file(inputs.HOTPOT), "in.json", "."),
    "hotpotqa_lines": (hotpotqa, lambda: inputs.json_lines(*inputs.HOTPOT), "in.jsonl", ONE_FILE),
    "config_file": (config_file, lambda: inputs.config_files, "in.py", "not a Python text file|null bytes|too deeply"),
    "config_flags": (config_flags, lambda: inputs.flags, "", "."),
    "tokenizer": (round_trip, lambda: inputs.any_text, "", "."),
    "own_txt": (own_file, lambda: inputs.damaged(inputs.PAGE.encode(), inputs.PAGE.encode("utf-16")), "in.txt", "."),
    "own_md": (own_file, lambda: inputs.damaged(inputs.PAGE.encode()), "in.md", "."),
    "own_html": (own_file, lambda: inputs.damaged(inputs.HTML.encode()), "in.html", "."),
    "own_pdf": (own_file, lambda: inputs.damaged(inputs.pdf_file()), "in.pdf", "."),
    "own_docx": (own_file, lambda: inputs.mangled_docx(), "in.docx", "."),
    "own_jsonl": (own_file, lambda: inputs.json_lines(*inputs.DOCUMENTS), "in.jsonl", "."),
}


def fuzz(name: str, count: int, seed: int = 0, further: int = 0) -> dict[str, Any]:
    """{"inputs": how many, "refused": of them, "crashes": [what and with which input], "slowest_s": seconds}"""
    run, strategy, file_name, without_line = PARSERS[name]
    found: dict[str, Any] = {"inputs": 0, "refused": 0, "crashes": [], "slowest_s": 0.0}
    rng = random.Random(seed)
    further = 0 if name.startswith("config") or not file_name else further  # a damaged config may be any program
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        path = Path(folder) / file_name

        @seeded(seed)
        @settings(
            max_examples=-(-count // (1 + further)),
            phases=[Phase.generate],
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy())
        def feed(given_input: Any) -> None:
            one(given_input)
            for _ in range(further):
                one(inputs.edited(given_input, inputs.random_edits(rng)))

        def one(given_input: Any) -> None:
            if isinstance(given_input, bytes):
                path.write_bytes(given_input)
            found["inputs"] += 1
            began, wrong = time.perf_counter(), None
            try:
                with at_most(SECONDS):
                    run(path if file_name else given_input)
            except UserError as error:
                found["refused"] += 1
                wrong = complaint(str(error), path if file_name else None, without_line)
            except (Exception, SystemExit, TooSlow) as error:
                wrong = f"{type(error).__name__}: {error}"
            found["slowest_s"] = max(found["slowest_s"], time.perf_counter() - began)
            if wrong is not None:
                found["crashes"].append(f"{wrong[:300]!r} with {given_input!r:.1500}")

        feed()
    return found


def complaint(message: str, path: Path | None, without_line: str) -> str | None:
    """What is wrong with the message of a UserError."""
    if "\n" in message or not message.strip():
        return f"not one line: {message}"
    if path is not None and path.name not in message:
        return f"without the file's name: {message}"
    if path is not None and not re.search(rf"{re.escape(path.name)}:\d+: |{without_line}", message):
        return f"without the line's number: {message}"
    return None


class TooSlow(BaseException):
    """Not an Exception: a parser may catch those."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise TooSlow(f"over {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def main() -> None:
    config = load_config(Config)
    if unknown := [name for name in config.parsers if name not in PARSERS]:
        raise UserError(f"--parsers {unknown[0]}: there are {', '.join(PARSERS)}")
    figures: dict[str, float] = {"inputs": 0, "crashes": 0, "slowest_s": 0.0}
    for name in config.parsers or PARSERS:
        began = time.perf_counter()
        found = fuzz(name, config.count, config.seed, config.further)
        figures["inputs"] += found["inputs"]
        figures["crashes"] += len(found["crashes"])
        figures["slowest_s"] = max(figures["slowest_s"], found["slowest_s"])
        said = f"{found['inputs']:,} inputs, {found['refused']:,} refused, {len(found['crashes'])} crashes"
        print(f"{name}: {said}, slowest {found['slowest_s']:.3f} s, {time.perf_counter() - began:.0f} s", flush=True)
        for crash in found["crashes"][:SHOWN]:
            print(f"    {crash}", flush=True)
    print_figures(figures, config.json)


if __name__ == "__main__":
    run_main(main)
