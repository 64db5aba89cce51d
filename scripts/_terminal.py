"""A talk on a terminal: what is typed, with editing, history and several lines, and what is shown, as Markdown while it
comes, with sources. Where output is not a terminal it is plain text."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from nanochat.citations import Source, Span
from nanochat.common import get_base_dir
from nanochat.kg.documents import fact_of
from nanochat.kg.drawing import ARROWS, PLAIN, draw

# ESC [ ... letter; ESC ] ... BEL or ESC \\ (and its kin); ESC and a letter
_ESCAPE_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])")
# C0, DEL and C1 but for tab and newline, and the marks that reverse the order of what is read
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
Marks = tuple[str, str]
"""Put around the sentence of a source that the answer rests on."""


def printable(text: str) -> str:
    """Text from documents or the model, without what a terminal would obey: escape sequences, control characters."""
    return _CONTROL.sub("", _ESCAPE_SEQUENCE.sub("", text))


def one_line(text: str) -> str:
    return " ".join(printable(text).split())


def full_source(source: Source, passage: Span | None, marks: Marks) -> str:
    """A source's whole text, its passage between the marks."""
    document = source.document
    origin = f"{document.id}, {document.source}" if document.source else document.id
    start, end = passage or (0, 0)
    before, said, after = (printable(part) for part in _parts(document.content, start, end))
    marked = f"{before}{marks[0]}{said}{marks[1]}{after}" if said else before + after
    return f"{source_line(source)}\n{one_line(origin)}\n{marked}"


def _parts(text: str, start: int, end: int) -> tuple[str, str, str]:
    return text[:start], text[start:end], text[end:]


def source_line(source: Source, label: str = "") -> str:
    label = label or one_line(source.document.title) or one_line(source.document.id)
    unread = "" if source.read else "  (did not fit, not read)"
    return f"[{source.number}] {source.document.score:.3f}  {label}{unread}"


def format_sources(sources: Sequence[Source], encoding: str | None = "utf-8") -> list[str]:
    """A line for each; facts of a graph are drawn as one, with arrows that the encoding has."""
    facts = [fact_of(source.document) for source in sources]
    if None in facts:
        return [source_line(source) for source in sources]
    try:
        ARROWS.encode(encoding or "ascii")
        arrows = ARROWS
    except (UnicodeEncodeError, LookupError):
        arrows = PLAIN
    shown = [tuple(map(one_line, fact)) for fact in facts]
    return [source_line(sources[at], line) for at, line in draw(shown, arrows)]


class Screen:
    """Standard output."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.styled = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self.dim, self.normal = ("\x1b[2m", "\x1b[0m") if self.styled else ("", "")
        self.marks: Marks = ("\x1b[7m", "\x1b[0m") if self.styled else ("**", "**")

    def write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def answer(self, pieces: Iterator[str]) -> bool:
        """Show an answer as it comes. On a terminal Ctrl-C stops it and keeps what came: True."""
        text, stopped = "", False
        with contextlib.closing(pieces), self._growing() as show:
            try:
                with collected_interrupts(self.interactive) as pressed:
                    for piece in pieces:
                        text += piece
                        show(text)
                        if pressed:
                            raise KeyboardInterrupt
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                stopped = True
            if not text and not stopped:
                show("(the model gave no answer)")
        self.write(f"{self.dim}(stopped){self.normal}\n" if stopped else "")
        return stopped

    @contextlib.contextmanager
    def _growing(self) -> Iterator[Callable[[str], None]]:
        """What shows a text that grows: on a terminal as Markdown, after a spinner while there is none."""
        shown = ""
        if not self.styled:

            def write_rest(text: str) -> None:
                nonlocal shown
                self.write(printable(text[len(shown) :]))
                shown = text

            yield write_rest
            self.write("\n")
            return
        from rich.console import Console
        from rich.live import Live
        from rich.markdown import Markdown
        from rich.spinner import Spinner

        console = Console(highlight=False, emoji=False)
        with Live(Spinner("dots", " reading"), console=console, transient=True, refresh_per_second=12) as live:

            def show(text: str) -> None:
                nonlocal shown
                shown = printable(text)
                live.update(Markdown(shown, hyperlinks=False))

            yield show
        if shown:  # once more, whole: what is higher than the screen was cut while it grew
            console.print(Markdown(shown, hyperlinks=False))

    def sources(self, sources: Sequence[Source], searches: Sequence[str]) -> None:
        lines = [f"  {line}" for line in format_sources(sources, sys.stdout.encoding)] or ["  none found"]
        searched = [f"searched: {one_line(query)}" for query in searches]
        self.write(self.dim + "\n".join([*searched, "sources:", *lines]) + self.normal + "\n")

    def full_sources(self, sources: Sequence[Source], passages: Mapping[int, Span]) -> str:
        return "\n\n".join(full_source(source, passages.get(source.number), self.marks) for source in sources)


# --- what is typed

BLOCK = '"""'


def read_questions(screen: Screen) -> Iterator[str]:
    """Lines of standard input, after a prompt where a person is at both ends. A line that ends in a backslash goes on
    in the next one; what stands between two \"\"\" is one question."""
    lines: list[str] = []
    block = False
    for line in _lines(screen, lambda: bool(lines)):
        if line is None:  # given up
            lines.clear()
            block = False
            continue
        text = line.rstrip("\r\n")
        closing = block and text.rstrip().endswith(BLOCK)
        if not lines and text.lstrip().startswith(BLOCK):
            block, text = True, text.lstrip()[len(BLOCK) :]
            closing = text.rstrip().endswith(BLOCK)
        if block:
            lines.append(text.rstrip().removesuffix(BLOCK) if closing else text)
            if not closing:
                continue
        elif text.endswith("\\"):
            lines.append(text[:-1])
            continue
        else:
            lines.append(text)
        yield "\n".join(lines).strip()
        lines.clear()
        block = False
    if lines:  # the input has ended within one
        yield "\n".join(lines).strip()


def _lines(screen: Screen, continued: Callable[[], bool]) -> Iterator[str | None]:
    """None: Ctrl-C at the prompt."""
    if not screen.interactive:
        yield from sys.stdin
        return
    with line_history():
        while True:
            try:
                yield input("... " if continued() else "> ")
            except EOFError:
                screen.write("\n")
                return
            except KeyboardInterrupt:
                screen.write("\n(Ctrl-D or /quit to leave)\n")
                yield None


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
