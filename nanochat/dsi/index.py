"""The index: a model, its documents' ids, and the search for the likeliest ones.

index = SearchIndex.new(documents, tokenizer, model="t5", scheme="semantic")
index.search(["when was the bridge built?"], top_k=10)  # [[("doc_17", -0.2), ...]]
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_file
from torch import Tensor

from nanochat.common import UserError, atomic_write_text
from nanochat.dsi.docids import DocIds, TermVectors
from nanochat.dsi.model import MODELS, LMIndex, QueryTokens, T5Index, log_probs
from nanochat.dsi.trie import Trie, beam_search, sample
from nanochat.retrieval.document import Document
from nanochat.tokenizer import Tokenizer

FORMAT = 1
WIDTH = 32  # beginnings of ids followed in a search, at first
QUERIES = 64  # searched for together

Embed = Callable[[Sequence[Document]], np.ndarray]


class SearchIndex:
    """ids: of all documents that were trained in. embed: documents to vectors, for new semantic ids."""

    def __init__(self, model: T5Index | LMIndex, text: QueryTokens, ids: DocIds, embed: Embed | None = None):
        self.model, self.text, self.ids, self.embed = model, text, ids, embed
        self._tries: dict[frozenset[str] | None, tuple[Trie, list[str]]] = {}

    @classmethod
    def new(
        cls,
        documents: Sequence[Document],
        tokenizer: Any,
        model: T5Index | LMIndex,
        scheme: str = "semantic",
        branches: int = 10,
        seed: int = 0,
    ) -> SearchIndex:
        """With ids for these documents, and room for them in the model's vocabulary."""
        text = QueryTokens(tokenizer, model.kind)
        ids = DocIds(scheme, max(text.size, model.size), text.end, branches=branches)
        embed = TermVectors.fit(documents) if scheme == "semantic" else None
        ids.add(documents, text.encode, embed, seed)
        model.resize(ids.size)
        return cls(model, text, ids, embed)

    def __len__(self) -> int:
        return len(self.ids.sequences)

    def add(self, documents: Sequence[Document]) -> list[str]:
        """Ids for new documents, which are not found before they are learned; returns those that are new."""
        before = set(self.ids.sequences)
        self.ids.add(documents, self.text.encode, self.embed)
        self.model.resize(self.ids.size)
        self._tries.clear()
        return [id for id in self.ids.sequences if id not in before]

    def trie(self, among: frozenset[str] | None = None) -> tuple[Trie, list[str]]:
        """Of all documents or of those that are among these, and which they are."""
        if among not in self._tries:
            names = [id for id in self.ids.sequences if among is None or id in among]
            self._tries[among] = Trie([self.ids.sequences[id] for id in names]), names
        return self._tries[among]

    # --- probabilities

    def log_probs(
        self, queries: Sequence[str], documents: Sequence[str], among: frozenset[str] | None = None
    ) -> Tensor:
        """log p(document | query) of each pair (B,), with a gradient; those of all documents, or of all among these,
        sum to 1."""
        trie, names = self.trie(among)
        number = {id: row for row, id in enumerate(names)}
        rows = [number[id] for id in documents]
        targets = [trie.sequences[row] for row in rows]
        logits = self.model.target_logits([self.text(query) for query in queries], targets)
        longest = max(map(len, targets))
        places = [node for row in rows for node in _padded(trie.nodes(row), longest)]
        mask = trie.allowed(places, logits.shape[-1]).view(len(rows), longest, -1).to(logits.device)
        return log_probs(logits, targets, mask)

    @torch.no_grad()
    def search(
        self, queries: Sequence[str], top_k: int, among: frozenset[str] | None = None, exact: bool = False
    ) -> list[list[tuple[str, float]]]:
        """The likeliest documents of each query with their log-probabilities, the best first. exact: follow more
        beginnings of ids until none that was dropped could be likelier."""
        trie, names = self.trie(among)
        found: list[list[tuple[str, float]]] = [[] for _ in queries]
        if not len(trie):
            return found
        self.model.eval()
        waiting, width = list(range(len(queries))), max(WIDTH, top_k)
        while waiting:
            again = []
            for start in range(0, len(waiting), QUERIES):
                chosen = waiting[start : start + QUERIES]
                read = [self.text(queries[at]) for at in chosen]
                ranked = beam_search(lambda: self.model.begin(read), len(read), trie, top_k, width)  # noqa: B023
                for at, one in zip(chosen, ranked, strict=True):
                    found[at] = [(names[d], s) for d, s in zip(one.documents, one.scores, strict=True)]
                    if exact and not one.exact:
                        again.append(at)
            waiting, width = again, 2 * width
        return found

    @torch.no_grad()
    def sample(self, queries: Sequence[str], draws: int) -> list[list[str]]:
        """draws documents of each query, by their probabilities; one may come twice."""
        trie, names = self.trie()
        rows = [self.text(query) for query in queries for _ in range(draws)]
        found = [names[document] for document in sample(self.model.begin(rows), trie, len(rows))]
        return [found[at : at + draws] for at in range(0, len(rows), draws)]

    # --- on disk

    def save(self, directory: Path) -> None:
        """Into an existing folder."""
        # T5 has one table under several names; the first is kept (save_model takes any, and no two files are the same)
        tensors: dict[str, Tensor] = {}
        places = set()
        for name, tensor in self.model.state_dict().items():
            if tensor.data_ptr() not in places:
                places.add(tensor.data_ptr())
                tensors[name] = tensor.contiguous()
        save_file(tensors, directory / "index.safetensors")
        ids = self.ids
        if self.text.own:
            self.text.tokenizer.save(directory / "tokenizer")
        else:
            self.text.tokenizer.save_pretrained(directory / "tokenizer")
        arrays = {f"centroids/{path}": of for path, of in ids.centroids.items()}
        if isinstance(self.embed, TermVectors):
            arrays["idf"] = self.embed.idf
        np.savez(directory / "ids.npz", **arrays)
        about = {"scheme": ids.scheme, "first": ids.first, "end": ids.end, "branches": ids.branches}
        about |= {"symbols": ids.symbols, "sequences": ids.sequences}
        about |= {"format": FORMAT, "model": self.model.kind, "config": self.model.config, "own": self.text.own}
        about["max_tokens"] = self.text.max_tokens
        atomic_write_text(directory / "index.json", json.dumps(about, ensure_ascii=False))

    @classmethod
    def load(cls, directory: Path, device: torch.device | str = "cpu") -> SearchIndex:
        """UserError if there is none."""
        try:
            about = json.loads((directory / "index.json").read_text(encoding="utf-8"))
            with np.load(directory / "ids.npz", allow_pickle=False) as file:
                arrays = dict(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{directory} has no search index that can be read: {error}") from None
        if about.get("format") != FORMAT:
            raise UserError(f"{directory}: the index has format {about.get('format')}, this program reads {FORMAT}")
        ids = DocIds(**{name: about[name] for name in ("scheme", "first", "end", "symbols", "sequences", "branches")})
        ids.centroids = {name[len("centroids/") :]: of for name, of in arrays.items() if name != "idf"}
        embed = TermVectors(arrays["idf"]) if "idf" in arrays else None
        if about["own"]:
            tokenizer: Any = Tokenizer.load(directory / "tokenizer")
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer")
        model = MODELS[about["model"]].of_config(about["config"])
        try:
            load_model(model, str(directory / "index.safetensors"))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{directory}: the index's weights cannot be read: {error}") from None
        return cls(model.to(device).eval(), QueryTokens(tokenizer, about["model"], about["max_tokens"]), ids, embed)


def _padded(nodes: list[int], length: int) -> list[int]:
    return nodes + [-1] * (length - len(nodes))
