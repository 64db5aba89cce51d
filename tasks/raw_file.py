"""Read the JSON and JSONL files of public data sets, plain or gzipped, with one clear line for a bad one."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from nanochat.common import UserError

GZIP_MAGIC = b"\x1f\x8b"


def read_json(path: str | Path) -> Any:
    """The value of a .json or .json.gz file."""
    return _parse(_read_text(path), str(path))


def read_json_records(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """(place, object) for the objects of a JSON array or of a JSONL file; the place is for error messages."""
    text = _read_text(path)
    if text.lstrip().startswith("["):
        records = [(f"{path}: entry {number}", record) for number, record in enumerate(_parse(text, str(path)), 1)]
    else:  # lines end at "\n" only: other Unicode line breaks occur inside texts
        lines = enumerate(text.split("\n"), 1)
        records = [(f"{path}:{number}", _parse(line, f"{path}:{number}")) for number, line in lines if line.strip()]
    for place, record in records:
        if not isinstance(record, dict):
            raise UserError(f"{place}: not a JSON object; is this the right file?")
    if not records:
        raise UserError(f"{path}: nothing in it")
    return records


def _read_text(path: str | Path) -> str:
    try:
        data = Path(path).read_bytes()
        if data.startswith(GZIP_MAGIC):
            data = gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file ({error}); download it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); is this the right file?") from None


def _parse(text: str, place: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{place}:{error.lineno}" if "\n" in text else place
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno}); is the file whole?") from None
    except (RecursionError, ValueError):
        what = "nested too deeply, or with a number of thousands of digits"
        raise UserError(f"{place}: not usable JSON ({what}); is this the right file?") from None
    if "\\u" in text:  # escapes can spell half a surrogate pair, which no UTF-8 file can hold
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"{place}: half a surrogate pair (\\ud800 to \\udfff) in the text; remove it") from None
    return value
