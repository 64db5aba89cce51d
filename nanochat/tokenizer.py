"""Byte-pair encoding: trained by rustbpe, run by tiktoken, kept as one JSON file.

Text is cut into pieces by a pattern in the style of GPT-4's, and each piece is merged byte pair by byte pair
(Sennrich et al. 2016, arXiv:1508.07909). Special tokens take the ids after the ordinary ones. No text ever becomes a
special token: `encode` only knows ordinary text, and control tokens enter by id, from `conversation.py`.

    python -m scripts.tok_train --input corpus.jsonl --vocab_size 4096
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tiktoken

from nanochat.common import UserError, atomic_write_text

# GPT-4 takes digits three at a time. With vocabularies of a few thousand, a thousand three-digit tokens would be a
# large part of the table, each of them seldom seen, so here they go two at a time.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

SPECIAL_TOKENS = [
    "<|bos|>",  # begins every sequence
    "<|system_start|>",
    "<|system_end|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|retrieval_start|>",  # a block of retrieved documents
    "<|retrieval_end|>",
    "<|doc_start|>",  # then the document's number and title
    "<|doc_body|>",  # then its content
    "<|doc_end|>",
    "<|search_start|>",  # a query, written by the model or shown with what it found
    "<|search_end|>",
]

FILE_NAME = "tokenizer.json"
FORMAT = "nanochat-bpe"
FORMAT_VERSION = 1

# The splitter backtracks over long runs of one kind of character and gives up (or takes quadratic time) on very long
# ones. Real text has no run of this length; input that has is cut there, which costs at most one merge a cut.
MAX_RUN_CHARS = 2000
_LONG_RUN = re.compile(rf"\s{{{MAX_RUN_CHARS},}}|\S{{{MAX_RUN_CHARS},}}")


class Tokenizer:
    """A trained vocabulary. Make one with `train` or `load`."""

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        pattern: str = SPLIT_PATTERN,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
    ):
        """token_bytes: the ordinary tokens in rank order; the rank is the id."""
        self.token_bytes = list(token_bytes)
        self.pattern = pattern
        self.special_tokens = list(special_tokens)
        self.vocab_size = len(self.token_bytes) + len(self.special_tokens)
        self._special_ids = {name: len(self.token_bytes) + i for i, name in enumerate(self.special_tokens)}
        self.fingerprint = _fingerprint(self.token_bytes, pattern, self.special_tokens)
        self._encoding = tiktoken.Encoding(
            name=f"nanochat-{self.fingerprint}",
            pat_str=pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(self.token_bytes)},
            special_tokens=self._special_ids,  # for decoding only: encode_ordinary never looks at them
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn the merges from texts. vocab_size counts the special tokens; a small corpus may give fewer."""
        import rustbpe

        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise UserError(
                f"vocab_size {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens "
                f"need at least {smallest}"
            )
        trainer = rustbpe.Tokenizer()
        pieces = (piece for text in texts for piece in _split_long_runs(_without_surrogates(text)))
        trainer.train_from_iterator(pieces, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        ranked = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
        return cls([bytes(token) for token, _ in ranked])

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read the tokenizer saved in a directory (or the file itself)."""
        path = Path(directory)
        path = path / FILE_NAME if path.suffix != ".json" else path
        train_hint = "train one with: python -m scripts.tok_train --input TEXT_FILES"
        if not path.is_file():
            raise UserError(f"no tokenizer at {path}; {train_hint}")
        try:
            data = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is not a readable tokenizer file ({error}); {train_hint}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise UserError(f"{path} is not a tokenizer of this project (no format {FORMAT!r}); {train_hint}")
        if data.get("version") != FORMAT_VERSION:
            raise UserError(
                f"{path} has tokenizer format version {data.get('version')!r}, this code reads {FORMAT_VERSION}; "
                f"{train_hint}"
            )
        try:
            token_bytes = [base64.b64decode(token, validate=True) for token in data["tokens"]]
            pattern, specials, stated = data["pattern"], data["special_tokens"], data["fingerprint"]
            intact = stated == _fingerprint(token_bytes, pattern, specials)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); {train_hint}") from error
        if not intact:
            raise UserError(f"{path} is damaged (its content does not match its fingerprint); {train_hint}")
        missing = [name for name in SPECIAL_TOKENS if name not in specials]
        if missing:
            raise UserError(f"{path} lacks the special tokens {', '.join(missing)}; {train_hint}")
        if {bytes([byte]) for byte in range(256)} - set(token_bytes) or len(set(token_bytes)) != len(token_bytes):
            raise UserError(f"{path} is damaged (a byte is missing or a token is there twice); {train_hint}")
        return cls(token_bytes, pattern, specials)

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer into a directory, atomically."""
        data = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "pattern": self.pattern,
            "special_tokens": self.special_tokens,
            "tokens": [base64.b64encode(token).decode("ascii") for token in self.token_bytes],
        }
        atomic_write_text(Path(directory) / FILE_NAME, json.dumps(data, indent=0) + "\n")

    def special_id(self, name: str) -> int:
        """The id of a special token, by its spelling."""
        return self._special_ids[name]

    def encode(self, text: str) -> list[int]:
        """The ids of ordinary text. Whatever the text spells, none of them is a special token's."""
        text = _without_surrogates(text)
        if len(text) < MAX_RUN_CHARS:  # the common case, and it cannot hold a long run
            return self._encoding.encode_ordinary(text)
        ids: list[int] = []
        for piece in _split_long_runs(text):
            ids.extend(self._encoding.encode_ordinary(piece))
        return ids

    def encode_batch(self, texts: Sequence[str], num_threads: int = 4) -> list[list[int]]:
        """encode, for many texts, on threads (tiktoken releases the interpreter lock while it works)."""
        if num_threads <= 1 or len(texts) < 2:
            return [self.encode(text) for text in texts]
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens show their spelling, broken UTF-8 shows U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of ids, for streaming: a character may be spread over several tokens."""
        out = []
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
            ordinary = i < len(self.token_bytes)
            out.append(self.token_bytes[i] if ordinary else self.special_tokens[i - len(self.token_bytes)].encode())
        return b"".join(out)


def _fingerprint(token_bytes: Sequence[bytes], pattern: str, special_tokens: Sequence[str]) -> str:
    """A short hash of all that decides which ids a text gets. Lengths are hashed too, so nothing can run together."""
    digest = hashlib.sha256()
    parts = [pattern.encode(), *(name.encode() for name in special_tokens), b"", *token_bytes]
    for part in parts:
        digest.update(len(part).to_bytes(4, "little") + part)
    return digest.hexdigest()[:16]


def _without_surrogates(text: str) -> str:
    """Half of a surrogate pair is not a character: it becomes U+FFFD (and two fitting halves become what they mean)."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _split_long_runs(text: str) -> list[str]:
    """The text, cut inside runs of white space or of other characters that are too long for the splitter."""
    cuts = [0]
    for run in _LONG_RUN.finditer(text):
        cuts.extend(range(run.start() + MAX_RUN_CHARS, run.end(), MAX_RUN_CHARS))
    return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]
