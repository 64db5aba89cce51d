"""What bench.fuzz feeds: valid files, damaged ones, records with some values changed, and noise."""

from __future__ import annotations

import copy
import gzip
import io
import itertools
import json
import random
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import hypothesis.strategies as st

from nanochat.tokenizer import SPECIAL_TOKENS

words = st.text(max_size=12) | st.sampled_from(
    [*SPECIAL_TOKENS, "\0", "\ud800", "\udc00a", "\u2028", "\x85", "a\nb", "<|", "|", "\t", "%00", "1" * 5000, " "]
)
# characters of all planes, halves of surrogate pairs among them
any_text = st.lists(words | st.text(st.characters(exclude_categories=()), max_size=8), max_size=4).map("".join)
numbers = st.integers() | st.floats() | st.sampled_from([10**400, 2**63, 1e308, -0.0])
json_values = st.recursive(
    st.none() | st.booleans() | numbers | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=6,
)
SNIPPETS = [
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\n",
    b"\r",
    b'"',
    b"{",
    b"}",
    b"[" * 2000,
    b"]",
    b"\\",
    b"\\ud800",
    b"\\u0000",
]
SNIPPETS += [b"1e999", b"NaN", b"-" * 2000, b"9" * 5000, b"null", b"|", b"\t", b"\xe2\x80\xa8", b"\x1f\x8b\x08"]
SNIPPETS += [b"<a>" * 500, b"\\UFFFFFFFF", b"\\uDC00"]


@st.composite
def changed(draw: Any, value: Any) -> Any:
    """The value, with up to two of the things in it left out or replaced."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        places = list(places_in(value))
        if not places:
            return draw(json_values)
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        if draw(st.booleans()):
            holder[key] = draw(any_text if isinstance(holder[key], str) else json_values)
        elif draw(st.booleans()):
            holder[key] = draw(json_values)
        else:
            del holder[key]
    return value


def places_in(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        yield value, key
        yield from places_in(inner)


def dumped(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def escaped(value: Any) -> bytes:
    return json.dumps(value).encode()


edits = st.lists(
    st.tuples(
        st.sampled_from(["insert", "replace", "remove", "cut", "repeat"]),
        st.floats(0, 1),
        st.integers(1, 40),
        st.binary(max_size=6) | st.sampled_from(SNIPPETS),
    ),
    max_size=4,
)


def random_edits(rng: random.Random) -> list[tuple[str, float, int, bytes]]:
    """One or two, as hypothesis draws them, in a hundredth of the time."""
    kinds, new = ["insert", "replace", "remove", "cut", "repeat"], [*SNIPPETS, b"0", b"\x01", b" ", b"a"]
    return [(rng.choice(kinds), rng.random(), rng.randint(1, 40), rng.choice(new)) for _ in range(rng.randint(1, 2))]


def edited(valid: bytes, changes: list[tuple[str, float, int, bytes]]) -> bytes:
    for what, place, length, new in changes:
        at = int(place * len(valid))
        before, piece, rest = valid[:at], valid[at : at + length], valid[at + length :]
        after = {
            "insert": new + piece + rest,
            "replace": new + rest,
            "remove": rest,
            "cut": b"",
            "repeat": piece * 4 + rest,
        }
        valid = before + after[what]
    return valid


def damaged(*valid: bytes) -> st.SearchStrategy[bytes]:
    """These with up to four changes, and noise."""
    return st.builds(edited, st.sampled_from(valid), edits) | st.binary(max_size=60)


def mostly(often: st.SearchStrategy[bytes], seldom: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.integers(0, 3).flatmap(lambda number: often if number else seldom)


def json_lines(*valid: Any) -> st.SearchStrategy[bytes]:
    records = st.tuples(*map(changed, valid))
    whole = st.builds(lambda records, dump: b"\n".join(map(dump, records)), records, dumps)
    return mostly(whole, damaged(b"\n".join(map(dumped, valid)), b"\n".join(map(escaped, valid))))


def json_file(valid: Any) -> st.SearchStrategy[bytes]:
    whole = st.builds(lambda value, dump: dump(value), changed(valid), dumps)
    return mostly(whole, damaged(dumped(valid), gzip.compress(dumped(valid), mtime=0)))


dumps = st.sampled_from([dumped, escaped])

# --- what is valid

DOCUMENTS = [
    {"id": "a", "title": "T", "content": "text é", "source": "s", "metadata": {"lang": "en", "year": [1, 2.5, True]}},
    {"id": "b", "title": "", "content": "two\nlines", "score": 0.5, "extra": None},
]
QUERIES = [
    {"id": "q", "query": "who?", "answers": ["x"], "doc_ids": ["a"], "hops": [{"query": "h", "doc_ids": ["a"]}]},
    {"id": "r", "query": "what?", "answers": [], "doc_ids": []},
]
FOUND = {"id": "a", "title": "T", "content": "text", "score": 1.0}
CONVERSATIONS = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "retrieval", "documents": [FOUND], "hop": 1, "query": "x"},
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": "Ann [1]."},
            {"role": "retrieval", "multi_hop": True, "hops": [{"hop": 1, "query": "x", "documents": [FOUND]}]},
            {"role": "user", "content": "And?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "search", "query": "y"},
                    {"type": "documents", "documents": [FOUND]},
                    {"type": "text", "text": "Bo"},
                ],
            },
        ],
        "metadata": {"n": 1},
    },
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
]
FACTS = [
    b"Film|directed_by|Ann\nFilm|starred|Bo\n# comment\n\nOther|directed_by|Ann\n",
    b"Film\tdirected_by\tAnn\nFilm\tstarred\tBo\n",
    b'<http://a/x> <http://a/p> "caf\\u00e9"@fr .\n<http://rdf.freebase.com/ns/m.1> <http://a/q> _:b .\n',
]
PACKED = gzip.compress(b"".join(FACTS), mtime=0)
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Beyonc%C3%A9",
            "paragraphs": [
                {
                    "context": "Born in 1981.",
                    "qas": [
                        {"id": "1", "question": "When?", "answers": [{"text": "1981", "answer_start": 8}]},
                        {"id": 2, "question": "Why?", "is_impossible": True, "answers": []},
                    ],
                }
            ],
        }
    ],
}
HOTPOT = [
    {
        "_id": "h",
        "question": "Where was the director of Film born?",
        "answer": "Marrow",
        "type": "bridge",
        "supporting_facts": [["Film", 0], ["Ann", 0]],
        "context": [["Film", ["Its director was Ann."]], ["Ann", ["Born in Marrow.", " "]]],
    }
]
PAGE = (
    "# Title\n\nText *with* [a link](http://x) and `code`.\n\n## Part\n\n- one\n- two\n\n| a | b |\n|---|---|\n"
    "| 1 | 2 |\n\n```\nx = 1\n```\n\n<table><tr><td>3</td></tr></table>\n"
)
HTML = (
    "<!doctype html><html><head><meta charset='utf-8'><title>T</title><style>p{}</style></head><body><nav>menu</nav>"
    "<main><h1>Title</h1><p>Text <b>bold</b><br>line</p><ul><li>one<li>two</ul><pre>code</pre><table><tr><td>1</td>"
    "<td>2</td></tr></table><!-- no --><script>no()</script></main></body></html>"
)


def pdf_file() -> bytes:
    from fpdf import FPDF

    pdf = FPDF()
    pdf.set_creation_date(datetime(2020, 1, 1, tzinfo=timezone.utc))  # the same file every time
    pdf.set_compression(False)  # so that what is changed is not only the packing
    pdf.add_page()
    pdf.set_font("Helvetica", size=12)
    pdf.multi_cell(0, 6, "A title\nSome text of a page that is long enough to be two lines of it or more.")
    return bytes(pdf.output())


def docx_file() -> bytes:
    from docx import Document

    document, file = Document(), io.BytesIO()
    document.add_heading("Title", 1)
    document.add_paragraph("Some text.")
    document.add_table(1, 2).rows[0].cells[0].text = "cell"
    document.save(file)
    return file.getvalue()


def mangled_docx() -> st.SearchStrategy[bytes]:
    """The file with its bytes changed, which mostly breaks the archive; or the parts in it, which reach the reader."""
    whole = docx_file()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}

    def with_part(name: str, changes: Any) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for part, content in parts.items():
                archive.writestr(part, edited(content, changes) if part == name else content)
        return file.getvalue()

    some = sorted(name for name in parts if name.endswith((".xml", ".rels")))
    return damaged(whole) | st.builds(with_part, st.sampled_from(["word/document.xml", *some]), edits)


@dataclass
class Everything:
    """A config with every type that settings have."""

    count: int = 1
    rate: float | None = None
    name: str = ""
    flag: bool = False
    maybe: bool | None = None
    kind: Literal["one", "two"] = "one"
    path: Path | None = None
    names: list[str] = field(default_factory=list)
    numbers: tuple[int, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    anything: Any = None


NAMES = [f.name for f in Everything.__dataclass_fields__.values()]
texts = any_text | st.sampled_from(["1", "1e6", "-1", "0x10", "nan", "inf", "1_000", "true", "None", "a,b", ",", "one"])
GOOD = {"count": "5", "rate": "1e-3", "name": "x", "flag": "yes", "maybe": "None", "kind": "two", "path": "~/x"}
GOOD |= {"names": "a,b", "numbers": "1,2,3", "pair": "3,0.5", "anything": "z"}
flag = st.sampled_from(sorted(GOOD)).flatmap(
    lambda name: (
        st.sampled_from([[f"--{name}", GOOD[name]], [f"--{name}={GOOD[name]}"], [f"--{name}"]])
        | texts.map(lambda text: [f"--{name}", text])
        | texts.map(lambda text: [f"--{name.replace('_', '-')}={text}"])
    )
)
flags = st.lists(flag | texts.map(lambda text: [text]) | st.just(["--nmae", "x"]), max_size=3).map(
    lambda some: list(itertools.chain(*some))
)
literals = json_values | st.sampled_from(["one", ("a", 1), {1, 2}, b"b", 1j, ..., range(3), print])
lines_of_python = (
    st.builds(lambda name, value: f"{name} = {value!r}", st.sampled_from(NAMES), literals)
    | st.sampled_from(
        ["import os", "def f(): pass", "_x = 1", "x = 1", "count = 1 / 0", "raise SystemExit(3)", "(" * 300]
    )
    | st.sampled_from(
        ["count = 10 ** 5000", "count = " + "-" * 9000 + "1", "raise ValueError('a\\nb')", "count = " + "9" * 5000]
    )
    | st.sampled_from(["assert False", "class A: pass", "if True:", "name = '\\ud800'", "\0", "a b"])
    | any_text.map("# {}".format)
)


def python_file(lines: list[str], changes: list[tuple[str, float, int, bytes]]) -> bytes:
    return edited("\n".join(lines).encode("utf-8", "surrogatepass"), changes)


# values and lines are changed, not operators: what is edited is run
bad_bytes = st.tuples(
    st.just("insert"), st.floats(0, 1), st.just(1), st.sampled_from([b"\0", b"\xff", b'"', b"(", b"\n "])
)
config_files = st.builds(
    python_file, st.lists(lines_of_python, max_size=4), st.just([]) | st.lists(bad_bytes, max_size=1)
)
