"""Chat in the terminal with a model that answers from a knowledge base.

    python -m scripts.rag_chat --knowledge_base data/my_kb
    python -m scripts.rag_chat --knowledge_base data/my_kb --prompt "What is the return policy?"
    python -m scripts.rag_chat --knowledge_base data/my_kb < questions.txt

Each question is searched for, and the documents found stay in the talk with the answer; when the talk outgrows the
length the model was trained on, the oldest documents go first. Where the output is not a terminal it is plain text.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, compute_cleanup, compute_init, get_base_dir, run_main
from nanochat.config import load_config
from nanochat.conversation import answer_ids, count_documents, render_prompt
from nanochat.engine import Engine
from nanochat.kg.documents import fact_of
from nanochat.kg.drawing import ARROWS, PLAIN, draw
from nanochat.retrieval import Document, RetrievalManager
from nanochat.sampling import Sampling
from nanochat.searching import Request, Searching


@dataclass
class Config:
    """Chat with a model that answers from a knowledge base."""

    knowledge_base: Path
    """Directory of the knowledge base; python -m nanochat.retrieval builds one."""
    source: Literal["base", "mid", "rag", "refrag", "refrag_rl", "agent_sft", "agent"] = "rag"
    """Stage of training the model comes from: rag, mid or base; the others search by themselves, refrag and refrag_rl
    for every question, agent_sft and agent where they have to."""
    model_tag: str = ""
    """Which model of that stage; empty: the one trained last."""
    retriever_type: str | None = None
    """simple, bm25, dense, hybrid or kg; if not given, what the knowledge base was built for."""
    top_k: int | None = None
    """Documents to find for each question (5), or for each search of a model that searches by itself (as in its
    training)."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; higher is more varied."""
    max_tokens: int = 256
    """Longest answer, in tokens."""
    max_doc_length: int = 500
    """Longest document, in tokens; the rest of it is cut off."""
    system: str = ""
    """A system message, at the head of the talk."""
    prompt: str | None = None
    """Answer this one question and exit."""
    seed: int = 0
    """Seeds sampling (temperature above 0)."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


@dataclass
class Source:
    """A document that was found for a question."""

    number: int
    """The [n] under which the model sees it."""
    document: Document
    read: bool = True
    """False: it did not fit the model's length, so the model has not seen it."""


class ChatSession:
    """One talk: what was said, what was found, and the settings that may change on the way. Prints nothing."""

    def __init__(
        self,
        engine: Engine,
        manager: RetrievalManager,
        top_k: int = 5,
        temperature: float = 0.0,
        max_tokens: int = 256,
        max_doc_tokens: int = 500,
        max_seq_len: int = 2048,
        system: str = "",
        seed: int = 0,
        max_hops: int = 0,
    ):
        """max_hops: searches that the model may write into an answer; 0: one search, for the question itself."""
        self.max_hops = max_hops
        self.engine, self.manager = engine, manager
        self.top_k, self.temperature, self.max_tokens = top_k, temperature, max_tokens
        self.max_doc_tokens, self.max_seq_len, self.seed = max_doc_tokens, max_seq_len, seed
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.sources: list[Source] = []
        self.searches: list[str] = []  # that the model wrote for the last answer
        self.reset()

    def reset(self) -> None:
        """Forget the talk."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.sources, self.searches = [], []

    def ask(self, question: str) -> Iterator[str]:
        """Find documents, then stream the answer's text. The talk keeps what was streamed, also of an answer that is
        closed before its end; a question that got no text at all and was stopped, or failed, leaves no trace."""
        if not question.strip():
            raise UserError("the question is empty")
        if self.max_hops:
            yield from self._ask_searching(question)
            return
        documents = self.manager.retrieve(question, self.top_k)
        messages = [
            *self.messages,
            {"role": "retrieval", "documents": [document.to_dict() for document in documents]},
            {"role": "user", "content": question},
        ]
        # Room is held for the answer, but a long --max_tokens must not push out the documents of a short model.
        held = min(self.max_tokens, self.max_seq_len // 4)
        tokenizer = self.engine.tokenizer
        prompt = render_prompt({"messages": messages}, tokenizer, self.max_seq_len - held, self.max_doc_tokens)
        # This question's documents are the last to go, so what is left of all is theirs first.
        left = prompt.count(tokenizer.special_id("<|doc_start|>"))
        first = count_documents({"messages": self.messages}) + 1
        sources = [Source(first + i, document, i < left) for i, document in enumerate(documents)]

        ids = self.engine.generate(
            prompt,
            max_tokens=min(self.max_tokens, self.max_seq_len - len(prompt)),
            temperature=self.temperature,
            seed=self.seed + len(self.messages),  # the same question asked again may get another answer
        )
        streamed, complete = "", False
        try:
            for new in self._text(ids):
                streamed += new
                yield new
            complete = True
        finally:
            if complete or streamed:
                self.messages = [*messages, {"role": "assistant", "content": streamed}]
                self.sources = sources

    def _ask_searching(self, question: str) -> Iterator[str]:
        """The same where the model searches for itself while it answers."""
        messages = [*self.messages, {"role": "user", "content": question}]
        conversation, tokenizer = {"messages": messages}, self.engine.tokenizer
        prompt = render_prompt(conversation, tokenizer, self.max_seq_len // 2, self.max_doc_tokens)
        searching = Searching(
            self.manager.search,
            self.top_k,
            self.max_hops,
            max_doc_tokens=self.max_doc_tokens,
            max_context=self.max_seq_len - min(self.max_tokens, self.max_seq_len // 4),
        )
        sampling = Sampling(
            max_tokens=min(self.max_tokens, self.max_seq_len - len(prompt)),
            temperature=self.temperature,
            seed=self.seed + len(self.messages),
        )
        request = Request.of_conversation(conversation, prompt, sampling, tokenizer, searching)
        streamed, complete = "", False
        try:
            for new in self._text(self.engine.stream(request)):
                streamed += new
                yield new
            complete = True
        finally:
            if complete or streamed:
                first = count_documents({"messages": self.messages}) + 1
                found = [document for hop in request.hops for document in hop.documents]
                self.messages = [*messages, request.message()]
                self.sources = [Source(first + i, document) for i, document in enumerate(found)]
                self.searches = [hop.query for hop in request.hops]

    def _text(self, ids: Iterator[int]) -> Iterator[str]:
        """The answer's text as it comes. White space at the end waits: it is not part of the answer unless something
        follows."""
        answer, streamed = "", ""
        for text in self.engine.stream_text(answer_ids(ids, self.engine.tokenizer)):
            answer += text
            new, streamed = answer.strip()[len(streamed) :], answer.strip()
            if new:
                yield new


def open_manager(retriever_type: str | None, path: str | Path) -> RetrievalManager:
    with contextlib.redirect_stdout(sys.stderr):  # notes about the base are not part of the talk
        return RetrievalManager(retriever_type, Path(path).expanduser())


# --- what is shown

# ESC [ ... letter; ESC ] ... BEL or ESC \\ (and its kin); ESC and a letter
_ESCAPE_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])")
# C0, DEL and C1 but for tab and newline, and the marks that reverse the order of what is read
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text from documents or the model, without what a terminal would obey: escape sequences, control characters."""
    return _CONTROL.sub("", _ESCAPE_SEQUENCE.sub("", text))


def format_source(source: Source, full: bool = False) -> str:
    document = source.document
    label = " ".join(printable(document.title).split()) or printable(document.id)
    line = _source_line(source, label)
    if not full:
        return line
    origin = f"{document.id}, {document.source}" if document.source else document.id
    return f"{line}\n{' '.join(printable(origin).split())}\n{printable(document.content)}"


def _source_line(source: Source, label: str) -> str:
    unread = "" if source.read else "  (did not fit, not read)"
    return f"[{source.number}] {source.document.score:.3f}  {label}{unread}"


def format_sources(sources: Sequence[Source], encoding: str | None = "utf-8") -> list[str]:
    """A line for each; facts of a graph are drawn as one, with arrows that the encoding has."""
    facts = [fact_of(source.document) for source in sources]
    if None in facts:
        return [format_source(source) for source in sources]
    try:
        ARROWS.encode(encoding or "ascii")
        arrows = ARROWS
    except (UnicodeEncodeError, LookupError):
        arrows = PLAIN
    shown = [tuple(" ".join(printable(part).split()) for part in fact) for fact in facts]
    return [_source_line(sources[at], line) for at, line in draw(shown, arrows)]


class Screen:
    """Standard output: with prompt and dimmed sources on a terminal, plain elsewhere."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        styled = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self.dim, self.normal = ("\x1b[2m", "\x1b[0m") if styled else ("", "")

    def write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def answer(self, session: ChatSession, question: str) -> None:
        """Stream one answer and list its sources. On a terminal Ctrl-C stops the answer and keeps what came."""
        before, stopped = session.sources, False
        pieces = session.ask(question)
        try:
            with collected_interrupts(self.interactive) as pressed:
                self.write(printable(next(pieces, "(the model gave no answer)")))
                for piece in pieces:
                    self.write(printable(piece))
                    if pressed:
                        raise KeyboardInterrupt
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            stopped = True
        finally:
            pieces.close()
        self.write(" (stopped)\n" if stopped else "\n")
        if session.sources is not before:  # not stopped before its first word
            shown = format_sources(session.sources, sys.stdout.encoding)
            lines = [f"  {line}" for line in shown] or ["  none found"]
            searches = [f"searched: {' '.join(printable(query).split())}" for query in session.searches]
            self.write(self.dim + "\n".join([*searches, "sources:", *lines]) + self.normal + "\n")


# --- commands

HELP = """\
/kb PATH    answer from another knowledge base (alone: which one is in use)
/topk N     documents to find for each question
/sources    the full text of the last sources
/reset      forget the talk
/help       this
/quit       leave (also Ctrl-D); Ctrl-C stops an answer"""


def run_command(session: ChatSession, line: str, retriever_type: str | None = None) -> str | None:
    """Do one line that begins with a slash. Returns what to show, or None to leave."""
    name, _, argument = line.strip().partition(" ")
    argument = argument.strip()
    if name == "/quit":
        return None
    if name == "/help":
        return HELP
    if name == "/reset":
        session.reset()
        return "the talk is forgotten"
    if name == "/sources":
        return "\n\n".join(format_source(source, full=True) for source in session.sources) or "no sources yet"
    if name == "/topk":
        if argument:
            if not argument.isdecimal() or int(argument) < 1:
                raise UserError(f"/topk takes a number of documents, at least 1, not {argument!r}")
            session.top_k = int(argument)
        return f"{session.top_k} documents for each question"
    if name == "/kb":
        if argument:
            session.manager = open_manager(retriever_type, argument)
        return describe(session.manager)
    raise UserError(f"unknown command {name}; /help lists them")


def describe(manager: RetrievalManager) -> str:
    return f"knowledge base: {manager.place}, {len(manager):,} documents, {manager.retriever_type}"


# --- the loop


def read_lines(screen: Screen) -> Iterator[str]:
    """Lines of standard input, after a prompt where a person is at both ends."""
    if not screen.interactive:
        yield from sys.stdin
        return
    with line_history():
        while True:
            try:
                yield input("> ")
            except EOFError:
                screen.write("\n")
                return
            except KeyboardInterrupt:
                screen.write("\n(Ctrl-D or /quit to leave)\n")


@contextlib.contextmanager
def collected_interrupts(active: bool) -> Iterator[list[int]]:
    """The first Ctrl-C is only noted, to be seen between two tokens: an exception out of the middle of a step can get
    lost in compiled code, or leave a state half changed. The second one interrupts wherever it comes."""
    pressed: list[int] = []

    def press(number: int, frame: object) -> None:
        pressed.append(number)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    if not active or threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def line_history() -> Iterator[None]:
    """Line editing, and the questions of earlier talks under arrow-up, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    path = get_base_dir() / "rag_chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)


def chat(session: ChatSession, screen: Screen, retriever_type: str | None = None) -> None:
    """Answer line after line until the input ends. A line that cannot be answered costs one line on stderr."""
    for line in read_lines(screen):
        line = line.strip()
        if not line:
            continue
        try:
            if line.startswith("/"):
                shown = run_command(session, line, retriever_type)
                if shown is None:
                    return
                screen.write(shown + "\n\n")
            else:
                screen.answer(session, line)
                screen.write("\n")
        except UserError as error:
            print("error: " + " ".join(printable(str(error)).split()), file=sys.stderr, flush=True)
        except KeyboardInterrupt:  # meant for an answer that had just ended
            if not screen.interactive:
                raise
            screen.write("\n")


def main() -> None:
    config = load_config(Config)
    for name in ("top_k", "max_tokens", "max_doc_length"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)} must be at least 1")
    if not config.temperature >= 0:
        raise UserError(f"--temperature {config.temperature} must be 0 (greedy) or more")
    for stream in (sys.stdin, sys.stdout):  # an odd byte in a question, or a narrow terminal, must not end the talk
        stream.reconfigure(errors="replace")
    manager = open_manager(config.retriever_type, config.knowledge_base)
    compute = compute_init(config.device, config.seed)
    model, tokenizer, meta = load_model(config.source, compute.device, model_tag=config.model_tag)
    session = ChatSession(
        Engine(model, tokenizer, prefix_bytes=1 << 29),
        manager,
        config.top_k or meta.get("top_k_per_hop", 5),
        config.temperature,
        config.max_tokens,
        config.max_doc_length,
        meta.get("training_config", {}).get("max_seq_len", 2048),
        config.system,
        config.seed,
        meta.get("max_hops", 0),
    )
    screen = Screen()
    try:
        if config.prompt is not None:
            screen.answer(session, config.prompt)
        else:
            if screen.interactive:
                screen.write(f"{describe(manager)}\n/help lists the commands\n")
            chat(session, screen, config.retriever_type)
    except BrokenPipeError:  # whoever read the output has gone; nothing may be flushed to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
