"""What an answer with searches is worth.

    reward = 0.6 answer + 0.3 evidence + 0.1 economy - price * searches - penalty if malformed

answer: F1 (or EM) with the references; where there are none, 1 for abstaining. evidence: share of the gold documents
found. economy: share of the documents that could have been shown and were not; it counts only as far as the answer is
right: saying nothing is no merit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat.common import UserError
from nanochat.engine import Generation
from nanochat.metrics import exact_match, f1, split_citations, stated_answer


@dataclass(frozen=True)
class Rewards:
    answer: float = 0.6
    evidence: float = 0.3
    """Where a query has no gold documents, its share goes to the answer."""
    economy: float = 0.1
    price: float = 0.0
    """Of one search."""
    malformed: float = 0.5
    """Taken off if the answer does not end, is empty, or searches for nothing."""
    metric: str = "f1"
    """f1 or em."""
    most_documents: int = 9
    """Documents that could be shown: max_hops * top_k_per_hop."""

    def __post_init__(self) -> None:
        if self.metric not in ("f1", "em"):
            raise UserError(f"the reward's metric is {self.metric!r}; it must be f1 or em")

    def __call__(self, query: dict[str, Any], text: str, info: Generation) -> dict[str, float]:
        """The parts, and "reward": their weighted sum."""
        said = split_citations(text)[0]
        answer = (f1 if self.metric == "f1" else exact_match)(stated_answer(text), query["answers"])
        gold = set(query["doc_ids"])
        shown = [document.id for hop in info.hops for document in hop.documents]
        evidence = len(gold.intersection(shown)) / len(gold) if gold else answer
        economy = answer * max(0.0, 1 - len(shown) / self.most_documents)
        valid = is_valid(said, info)
        weighted = self.answer * answer * valid + self.evidence * evidence + self.economy * economy * valid
        reward = weighted - self.price * len(info.hops) - self.malformed * (not valid)
        return {"reward": reward, "answer": answer, "evidence": evidence, "economy": economy, "valid": float(valid)}


def is_valid(said: str, info: Generation) -> bool:
    """The message was ended, says something, and every search looks for something."""
    return info.finish_reason == "stop" and bool(said) and all(hop.query for hop in info.hops)


def means(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]} if parts else {}
