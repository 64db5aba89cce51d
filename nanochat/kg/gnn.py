"""The retriever of D-RAG: a graph neural network that reads the question and scores every fact around its topics.

    retriever = FactRetriever(RetrieverConfig(), vocabulary)
    scored = retriever(make_batch(graph, subgraphs, questions))
    scored.facts  # (F,) logits

Two ways to carry the question into the graph, both over edges in both directions:

    steps  at each step the question says what to look for (an instruction, by attention over its words), and nodes that
           are on the way send a message along the relations that fit it. He et al., "Improving Multi-hop Knowledge Base
           Question Answering by Learning Intermediate Supervision Signals" (NSM, WSDM 2021); Mavromatis and Karypis,
           "ReaRev" (EMNLP Findings 2022).
    gat    GATv2 layers whose edges are relations seen in the light of the instruction. Brody, Alon and Yahav, "How
           Attentive are Graph Attention Networks?" (ICLR 2022).

No entity has a vector of its own. A node is what it is to the question (a topic or not), the relations it has, and what
it was told, so that the retriever works on entities and graphs that it has not seen. D-RAG: Gao et al., "D-RAG:
Differentiable Retrieval-Augmented Generation for Knowledge Graph Question Answering" (EMNLP 2025).

    G questions of a batch, N nodes, F facts, E = 2F edges, R relations, D width, H heads
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanochat.common import UserError, atomic_write_text
from nanochat.kg.question_encoder import WORDS, SentenceEncoder, WordEncoder
from nanochat.kg.subgraphs import Batch

FORMAT = 1


@dataclass
class RetrieverConfig:
    kind: Literal["steps", "gat"] = "steps"
    width: int = 64
    steps: int = 3
    """Instructions, and layers: facts between a topic and an answer, at most."""
    heads: int = 4
    """gat: of attention."""
    encoder: str = WORDS
    """words: learned here; else a model of sentence-transformers, frozen."""


@dataclass
class Scored:
    """facts (F,): logits that a fact is on a path to an answer. ends (F, 2): that its head, and its tail, is an answer.
    vectors (F, D): what is known of a fact, from which both are read. nodes (N,): logits that a node is an answer."""

    facts: Tensor
    ends: Tensor
    vectors: Tensor
    nodes: Tensor


class FactRetriever(nn.Module):
    def __init__(self, config: RetrieverConfig, vocabulary: Sequence[str] = ()):
        """vocabulary: the words that are learned; see question_encoder.build_vocabulary."""
        super().__init__()
        D = config.width
        self.config, self.vocabulary = config, list(vocabulary)
        learned = config.encoder == WORDS
        self.encoder = WordEncoder(vocabulary, D) if learned else SentenceEncoder(config.encoder, D)
        self.ask = nn.ModuleList(nn.Linear(2 * D, D) for _ in range(config.steps))
        self.walked = nn.Linear(D, 2 * D)  # a relation from head to tail, and back
        self.has = nn.Linear(D, D)
        self.topic = nn.Parameter(torch.randn(D))
        steps = config.kind == "steps"
        self.layers = nn.ModuleList(Step(D) if steps else GATLayer(D, config.heads) for _ in range(config.steps))
        self.is_answer = nn.Linear(D, 1)
        self.of_head, self.of_tail, self.of_relation = (nn.Linear(D, D) for _ in range(3))
        self.says = nn.Linear(D, 3)  # of a fact: on a path, its head is an answer, its tail is

    def forward(self, batch: Batch) -> Scored:
        device, all_relations = batch.heads.device, len(batch.relation_names)
        texts = {text: at for at, text in enumerate(dict.fromkeys(batch.texts))}
        text_of_graph = torch.tensor([texts[text] for text in batch.texts], device=device)
        used, fact_relation = torch.unique(batch.relations, return_inverse=True)
        R = len(used)
        words, is_word, means = self.encoder([*texts, *(batch.relation_names[relation] for relation in used.tolist())])
        T = len(texts)
        instructions = self.instructions(words[:T], is_word[:T], means[:T])
        instructions = [instruction[text_of_graph] for instruction in instructions]  # (G, D) each
        relations = torch.cat(self.walked(means[T:]).chunk(2, dim=-1))  # (2R, D)
        # a message depends on the question, the relation and its direction alone: a row for each of these, and edges
        # that say which
        back = batch.edge_relation >= all_relations
        edge_relation = torch.searchsorted(used, batch.edge_relation - back * all_relations) + back * R
        row = batch.graph_of_node[batch.edge_to] * 2 * R + edge_relation  # (E,)

        has = bag(edge_relation, self.has(relations), batch.edge_starts, mode="mean")
        states = F.relu(has + batch.is_topic[:, None] * self.topic)  # (N, D)
        active = batch.is_topic.to(states.dtype)  # (N,)
        for instruction, layer in zip(instructions, self.layers, strict=True):
            table = (instruction[:, None] * relations).flatten(0, 1)  # (G * 2R, D)
            states, active = layer(states, active, table, row, batch)

        asked = self.of_relation(sum(instructions)[:, None] * relations[:R]).flatten(0, 1)  # (G * R, D)
        vectors = self.of_head(states)[batch.heads] + self.of_tail(states)[batch.tails]
        vectors = F.relu(vectors + asked[batch.graph_of_fact * R + fact_relation])  # (F, D)
        says = self.says(vectors)
        return Scored(says[:, 0], says[:, 1:], vectors, self.is_answer(states).squeeze(-1))

    def instructions(self, words: Tensor, is_word: Tensor, question: Tensor) -> list[Tensor]:
        """words (T, L, D), is_word (T, L), question (T, D) -> (T, D) for each step: what of the question it is about,
        by attention over its words, given what the step before was about."""
        instruction, found = torch.zeros_like(question), []
        for ask in self.ask:
            query = ask(torch.cat([question, instruction], dim=-1))
            scores = torch.einsum("tld,td->tl", words, query) * query.shape[-1] ** -0.5
            instruction = torch.einsum("tl,tld->td", scores.masked_fill(~is_word, -torch.inf).softmax(-1), words)
            found.append(instruction)
        return found

    # --- on disk

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), directory / "retriever.safetensors")
        about = {"format": FORMAT, "config": dataclasses.asdict(self.config), "vocabulary": self.vocabulary}
        atomic_write_text(directory / "retriever.json", json.dumps(about, ensure_ascii=False, indent=1))

    @classmethod
    def load(cls, directory: Path) -> FactRetriever:
        """UserError if there is none."""
        try:
            about = json.loads((directory / "retriever.json").read_text(encoding="utf-8"))
            state = load_file(directory / "retriever.safetensors")
        except FileNotFoundError as error:
            raise UserError(f"{directory} has no retriever: {error.filename or 'a file'} is missing") from None
        except (ValueError, OSError, SafetensorError) as error:
            raise UserError(f"{directory}: the retriever cannot be read: {error}") from None
        if about.get("format") != FORMAT:
            found = about.get("format")
            raise UserError(
                f"{directory}: the retriever has format {found}, this program reads {FORMAT}; train it anew"
            )
        retriever = cls(RetrieverConfig(**about["config"]), about["vocabulary"])
        retriever.load_state_dict(state)
        return retriever.eval()


class Step(nn.Module):
    """One step of reasoning: nodes that are on the way tell their neighbours over which relation they are reached."""

    def __init__(self, width: int):
        super().__init__()
        self.message = nn.Linear(width, width)
        self.update = nn.Linear(2 * width, width)
        self.on_the_way = nn.Linear(width, 1)

    def forward(
        self, states: Tensor, active: Tensor, table: Tensor, row: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """states (N, D), active (N,) in 0..1, table (G * 2R, D), row (E,) of the table -> the same after the step."""
        messages = F.relu(self.message(table))
        told = bag(row, messages, batch.edge_starts, mode="sum", per_sample_weights=active[batch.edge_from])
        # the logarithm: being reached by ninety films is not ninety times being reached by one
        states = F.relu(self.update(torch.cat([states, told.log1p()], dim=-1)))
        return states, self.on_the_way(states).squeeze(-1).sigmoid()


class GATLayer(nn.Module):
    """GATv2 with what the neighbours are and over which relations they are neighbours, apart."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.source, self.target, self.edge = (nn.Linear(width, width) for _ in range(3))
        self.attention = nn.Parameter(torch.randn(heads, width // heads) * (width // heads) ** -0.5)
        self.update = nn.Linear(3 * width, width)

    def forward(
        self, states: Tensor, active: Tensor, table: Tensor, row: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """See Step; active is not used."""
        source, target, edge = (
            linear(x).unflatten(-1, (self.heads, -1))
            for linear, x in ((self.source, states), (self.target, states), (self.edge, F.relu(table)))
        )
        weights = gatv2_weights(source, target, edge[row], self.attention, batch.edge_from, batch.edge_to)
        nodes = weighted_sum(weights, source[batch.edge_from], batch.edge_to, len(states))
        relations = weighted_sum(weights, edge[row], batch.edge_to, len(states))
        new = self.update(torch.cat([states, nodes.flatten(1), relations.flatten(1)], dim=-1))
        return states + F.relu(new), active


def bag(rows: Tensor, table: Tensor, starts: Tensor, **how: Any) -> Tensor:
    """Rows (E,) of a table (X, D), those of node v at starts[v] : starts[v + 1], brought together -> (N, D). What a
    message for every edge would do in three passes over (E, D), without ever holding it."""
    return F.embedding_bag(rows, table, starts, include_last_offset=True, **how)


def gatv2_weights(
    source: Tensor, target: Tensor, edge: Tensor, attention: Tensor, edge_from: Tensor, edge_to: Tensor
) -> Tensor:
    """source, target (N, H, D/H), edge (E, H, D/H), attention (H, D/H) -> (E, H), of each node's incoming edges 1."""
    seen = F.leaky_relu(source[edge_from] + target[edge_to] + edge, 0.2)
    return softmax_by(torch.einsum("ehd,hd->eh", seen, attention), edge_to, len(target))


def weighted_sum(weights: Tensor, values: Tensor, to: Tensor, count: int) -> Tensor:
    """weights (E, H), values (E, H, D/H), to (E,) below count -> (count, H, D/H)."""
    return values.new_zeros(count, *values.shape[1:]).index_add_(0, to, weights.unsqueeze(-1) * values)


def softmax_by(scores: Tensor, group: Tensor, count: int) -> Tensor:
    """Softmax of scores (X, ...) among those of the same group (X,) below count."""
    index = group.view(-1, *[1] * (scores.dim() - 1)).expand_as(scores)
    top = scores.new_full((count, *scores.shape[1:]), -torch.inf).scatter_reduce(0, index, scores.detach(), "amax")
    weights = (scores - top[group]).exp()
    return weights / weights.new_zeros(top.shape).index_add_(0, group, weights)[group]


def log_softmax_by(scores: Tensor, group: Tensor, count: int) -> Tensor:
    """Log-softmax of scores (X,) among those of the same group (X,) below count."""
    top = scores.new_full((count,), -torch.inf).scatter_reduce(0, group, scores.detach(), "amax")
    shifted = scores - top[group]
    return shifted - shifted.new_zeros(count).index_add_(0, group, shifted.exp()).log()[group]
