"""Texts to vectors, each text once: what a killed build has encoded is kept, what an older version has is taken over.

Encoding is nearly all of the time that a dense base takes to build. Vectors are appended to a file beside the base as
they come, under a hash of their text; when the build is through, the file goes.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nanochat.retrieval.collection import Collection
from nanochat.retrieval.segment import Encode, dense_text

_KEY = 16  # bytes of a text's hash


class EncodedOnce:
    def __init__(self, encode: Encode, folder: Path, earlier: Collection | None = None):
        """folder: for this model and no other. earlier: a collection whose embeddings are of the same model."""
        self.encode, self.folder = encode, folder
        self.place: dict[bytes, int] = {}  # in the file
        self.width = 0
        self.older: dict[bytes, tuple[np.ndarray, int]] = {}
        for segment in earlier.segments if earlier else ():
            for row in segment.live_rows().tolist():
                self.older[_key(dense_text(segment.documents[row]))] = (segment.embeddings, row)
        self._resume()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        keys = [_key(text) for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if not self._known(key)}
        if new:
            self._append(list(new), self.encode(list(new.values())))
        return np.stack([self._vector(key) for key in keys])

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _known(self, key: bytes) -> bool:
        return key in self.place or key in self.older

    def _vector(self, key: bytes) -> np.ndarray:
        if key in self.place:
            return self._vectors[self.place[key]]
        embeddings, row = self.older[key]
        return embeddings[row]

    def _append(self, keys: list[bytes], vectors: np.ndarray) -> None:
        self.folder.mkdir(exist_ok=True)
        self.width = vectors.shape[1]
        with open(self.folder / f"vectors_{self.width}.f32", "ab") as file:
            file.write(np.ascontiguousarray(vectors, dtype=np.float32).tobytes())
        with open(self.folder / "keys", "ab") as file:  # after the vectors: a key stands for one that is there
            file.write(b"".join(keys))
        for key in keys:
            self.place[key] = len(self.place)
        self._map()

    def _map(self) -> None:
        file = self.folder / f"vectors_{self.width}.f32"
        self._vectors = np.memmap(file, dtype=np.float32, mode="r").reshape(-1, self.width)

    def _resume(self) -> None:
        """Take up what an unfinished run has left, cut to the part that is whole."""
        files = list(self.folder.glob("vectors_*.f32"))
        if len(files) != 1 or not (self.folder / "keys").exists():
            self.remove()
            return
        self.width = int(files[0].stem.split("_")[1])
        keys = (self.folder / "keys").read_bytes()
        count = min(len(keys) // _KEY, files[0].stat().st_size // (4 * self.width))
        if not count:
            self.remove()
            return
        for path, size in ((files[0], 4 * self.width), (self.folder / "keys", _KEY)):
            with open(path, "r+b") as file:
                file.truncate(count * size)
        self.place = {keys[_KEY * i : _KEY * (i + 1)]: i for i in range(count)}
        self._map()


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=_KEY).digest()
