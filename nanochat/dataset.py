"""Raw text for tokenizer and base training, from .txt and .jsonl files (each also as .gz).

A .jsonl record is flattened to one text: the fields it is known to carry text in, in the order in which they read. So
the same code takes articles ({"title", "text"}), documents ({"title", "content"}), instructions ({"instruction",
"context", "response"}), questions ({"query", "answers"}) and conversations ({"messages"}).
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import itertools
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nanochat.common import UserError, get_base_dir, save_array

if TYPE_CHECKING:
    from nanochat.tokenizer import Tokenizer

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
TEXT_FIELDS = ("title", "text", "content", "instruction", "context", "passage", "response", "prompt", "completion")
TEXT_FIELDS += ("query", "question", "answer", "answers")
MAX_LINE_BYTES = 10_000_000  # of a .jsonl file: more is not one text but a file without line ends
MAX_TEXT_BYTES = 1_000_000  # a longer .txt file comes as several texts, cut at line ends, so memory stays bounded


def list_text_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """Files as given, directories as the sorted text files in them (all levels)."""
    files: list[Path] = []
    for path in map(Path, [paths] if isinstance(paths, (str, Path)) else paths):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
            if not found:
                raise UserError(f"no text files in {path}: looked for {', '.join(SUFFIXES)}")
            files += found
        elif not path.exists():
            raise UserError(f"{path} does not exist")
        elif not path.name.endswith(SUFFIXES):
            raise UserError(f"{path} is not a kind of text file this reads: {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    if not files:
        raise UserError("no text files given")
    return files


def iter_texts(paths: str | Path | Sequence[str | Path]) -> Iterator[str]:
    """The texts of files and directories, in a fixed order, without empty ones."""
    for path in list_text_files(paths):
        is_jsonl = path.name.removesuffix(".gz").endswith(".jsonl")
        for text in _jsonl_texts(path) if is_jsonl else _plain_texts(path):
            if text.strip():
                yield text


def record_text(record: dict[str, Any]) -> str | None:
    """The text of one record, parts set apart by blank lines; None if it has no field known to hold text."""
    if isinstance(record.get("messages"), list):
        return "\n\n".join(_strings(record["messages"]))
    known = [record[field] for field in TEXT_FIELDS if isinstance(record.get(field), (str, list))]
    return "\n\n".join(_strings(known)) if known else None


def _strings(value: Any) -> Iterator[str]:
    """The strings in a value of a text field: itself, the items of a list, the text fields of an object in it."""
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for name in ("hops", "documents", *TEXT_FIELDS):
            yield from _strings(value.get(name))


def iter_records(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", record) for each line of a .jsonl or .jsonl.gz file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    for number, line in _lines(path, MAX_LINE_BYTES + 4):  # 4: a piece may hold back 3 bytes of a cut character
        if not line.strip():
            continue
        where = f"{path}:{number}"
        if len(line.encode()) > MAX_LINE_BYTES:
            raise UserError(f"{where}: the line is over {MAX_LINE_BYTES // 1_000_000} MB; split this text")
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or str(error)
            raise UserError(f"{where}: not a line of JSON ({reason}); mend or remove it") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: a line holds one JSON object, not a {type(record).__name__}")
        yield where, record


def _jsonl_texts(path: Path) -> Iterator[str]:
    for where, record in iter_records(path):
        text = record_text(record)
        if text is None:
            raise UserError(f"{where}: no text field; expected one of {', '.join(TEXT_FIELDS)} or messages")
        yield text


def _plain_texts(path: Path) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    for _, line in _lines(path, MAX_TEXT_BYTES):
        if size + len(line) > MAX_TEXT_BYTES and lines:
            yield "".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    yield "".join(lines)


def _lines(path: Path, longest: int) -> Iterator[tuple[int, str]]:
    """(line number, line) of a file, split at b"\\n" only: other Unicode line breaks occur inside JSON strings.

    longest: a longer line comes in several pieces of that many bytes.
    """
    number = 1
    decoder = codecs.getincrementaldecoder("utf-8")()  # a piece may end inside a character
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            while raw := file.readline(longest):
                if b"\0" in raw:
                    raise UserError(f"{path}:{number}: a NUL byte; this is not a text file")
                ended = raw.endswith(b"\n")
                line = decoder.decode(raw)
                yield number, line.removeprefix("\ufeff") if number == 1 else line
                number += ended
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 ({error.reason}); convert the file first") from error
    except (OSError, EOFError, zlib.error) as error:  # a cut or foreign .gz raises any of the three
        raise UserError(f"{path}:{number}: cannot be read ({error})") from error


VAL_EVERY = 50  # one text in fifty is held out


def tokenize_texts(
    paths: Sequence[str | Path], tokenizer: Tokenizer, max_chars: int = -1
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{"train", "val"} -> (ids int32, where each document starts in them int64), every document beginning with <|bos|>.

    Tokenized once and kept under $NANOCHAT_BASE_DIR/tokenized, by tokenizer, files, sizes and times; mapped, not read.
    """
    files = list_text_files(paths)
    described = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(json.dumps([tokenizer.fingerprint, max_chars, described]).encode()).hexdigest()[:16]
    folder = get_base_dir() / "tokenized" / key
    if not folder.exists():
        _tokenize_to(folder, files, tokenizer, max_chars)
    return {
        split: tuple(np.load(folder / f"{split}_{part}.npy", mmap_mode="r") for part in ("ids", "starts"))
        for split in ("train", "val")
    }


def _tokenize_to(folder: Path, files: list[Path], tokenizer: Tokenizer, max_chars: int) -> None:
    bos = tokenizer.special_id("<|bos|>")
    ids: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    starts: dict[str, list[int]] = {"train": [], "val": []}
    lengths = {"train": 0, "val": 0}
    chars = number = 0
    texts = iter_texts(files)
    while batch := list(itertools.islice(texts, 256)):
        for encoded in tokenizer.encode_batch(batch):
            # the very first text is held out too, so that a corpus of any size has both
            split = "val" if number % VAL_EVERY == 0 and number < 1000 * VAL_EVERY else "train"
            starts[split].append(lengths[split])
            ids[split].append(np.asarray([bos, *encoded], np.int32))
            lengths[split] += 1 + len(encoded)
            number += 1
        chars += sum(map(len, batch))
        if 0 < max_chars <= chars:
            break
    if number < 2:
        raise UserError(f"{files[0]} and what follows hold {number} text(s); training needs at least two")
    # several ranks may do this at once: each writes its own folder, the first to finish wins
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".tokenizing-", dir=folder.parent))
    try:
        for split in ids:
            save_array(temporary / f"{split}_ids.npy", np.concatenate(ids[split]))
            save_array(temporary / f"{split}_starts.npy", np.asarray(starts[split], np.int64))
    except OSError as error:
        shutil.rmtree(temporary)
        raise UserError(f"cannot write {folder} ({error.strerror}); make room, or set NANOCHAT_BASE_DIR") from error
    try:
        temporary.rename(folder)
    except OSError:
        shutil.rmtree(temporary)
