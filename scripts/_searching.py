"""What the commands that teach a model to search share: settings, and the two stages, by example and by reward.

scripts/refrag_finetune.py searches for every question, scripts/agent_train.py where it has to; what each does by itself
stands there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch

from nanochat.checkpoint_manager import checkpoint_root, find_model_tag, load_checkpoint
from nanochat.common import Compute, UserError, compute_init, print0
from nanochat.engine import Engine
from nanochat.model.lm import HybridLM
from nanochat.packing import PackedBatches
from nanochat.retrieval import RetrievalManager
from nanochat.retrieval.document import read_queries
from nanochat.rl.rewards import Rewards
from nanochat.rl.rollout import RolloutBatches, Settings
from nanochat.searching import Searching
from nanochat.tokenizer import Tokenizer
from nanochat.training import Phase, TrainConfig, autocast, mean_loss, resolve_dtype, rows_per_step, train
from tasks.common import load_conversations, render_examples
from tasks.refrag import MultiHopRAGTask, StaticRAGTask, model_hops, multi_hop_figures

MOST_VAL_EXAMPLES = 500


@dataclass(kw_only=True)
class SearchConfig(TrainConfig, Settings):
    """Settings of both."""

    knowledge_base: Path
    """Directory or address of the knowledge base."""
    queries: list[Path] = field(default_factory=list)
    """Question files with hops (queries/multihop_train.jsonl) or without, separated by commas; by default those in
    queries/ beside the knowledge base."""
    query_samples: int = -1
    """Questions taken of each file, at random; -1: all."""
    val_queries: Path | None = None
    """Questions for validation; by default a tenth of the queries, at most 200, is held out."""
    conversations: list[Path] = field(default_factory=list)
    """Files of conversations with documents retrieved before, trained on beside the queries."""
    source: str = "rag"
    """Checkpoint to start from: rag, mid or base; one that these stages made: reinforcement only."""
    step: int | None = None
    """Step of that checkpoint; by default the newest."""
    retriever_type: str | None = None
    """simple, bm25, dense or hybrid; by default the one the base was built with."""
    max_hops: int = 3
    """Searches in one answer, at most."""
    top_k_per_hop: int = 3
    """Documents shown after each."""
    query_source: Literal["gold", "expander", "model"] = "gold"
    """Searches to learn from: the data's, those of a rule, or the model's own that found the gold documents."""
    cite: bool = True
    """Answers begin with the number of the document they stand in: "[4] 1904"."""
    max_doc_length: int = 500
    """Longest document in tokens; the rest is cut."""
    max_tokens: int = 128
    """What the model may write in one answer, searches included."""
    eval_questions: int = 100
    """Validation questions answered at each evaluation, with real searches."""
    device_batch_size: int = 2
    """Rows in one forward pass on one device."""
    max_seq_len: int = 4096
    """Length of a training row in tokens."""
    init_lr_frac: float = 0.1
    """Scales every learning rate; 1 for very small models."""
    use_rewards: bool = True
    """Go on with reinforcement."""
    rl_steps: int = 200
    """Steps of it."""
    rl_lr_frac: float = 0.01
    """Scales every learning rate in it."""
    rl_adamw_frac: float = 0.1
    """Scales the rates of embedding, output layer, norms and the scan's own parameters in it once more: AdamW's steps
    are as large for noise as for what was learned, and what rewards say is mostly noise."""
    rollout_batch_size: int = 8
    """Answers in one forward pass on one device."""
    reward_answer: float = 0.6
    """Weight of being right."""
    reward_evidence: float = 0.3
    """Weight of the share of gold documents found."""
    reward_economy: float = 0.1
    """Weight of showing few documents, where the answer is right."""
    reward_metric: Literal["f1", "em"] = "f1"
    """What right means."""
    retrieval_price: float = 0.0
    """Taken off for each search."""
    malformed: float = 0.5
    """Taken off for an answer without end or words, or a search for nothing."""


def question_files(config: SearchConfig) -> list[Path]:
    if config.queries or config.conversations:
        return config.queries
    folder = config.knowledge_base.parent / "queries"
    found = [path for name in ("multihop_train", "train") if (path := folder / f"{name}.jsonl").exists()]
    if not found:
        raise UserError(f"nothing to train on: give --queries FILE (there is no {folder}/multihop_train.jsonl)")
    print0(f"queries: {', '.join(map(str, found))}")
    return found


def supervised_phase(tasks: list, tokenizer: Tokenizer, config: SearchConfig, rows: int) -> Phase:
    """Every example once an epoch, in a new order with its documents shuffled anew."""
    order = [(t, i) for t, task in enumerate(tasks) for i in range(len(task))]
    examples = round(config.num_epochs * len(order))
    room = float("inf") if config.num_steps < 0 else max(1, config.num_steps) * rows * config.max_seq_len

    def conversations():
        made = 0
        for epoch in count():
            shuffled = order.copy()
            random.Random(f"{config.seed}/{epoch}").shuffle(shuffled)
            for t, i in shuffled:
                if config.num_steps < 0 and made >= examples:
                    return
                made += 1
                yield tasks[t].conversation(i, epoch)

    data, counts = render_examples(conversations(), tokenizer, config.max_seq_len, config.max_doc_length, room)
    print0(f"train: {counts}")
    batches = PackedBatches(data, config.max_seq_len, rows, config.seed)
    return Phase("supervised", batches, config.num_steps if config.num_steps >= 0 else batches.steps_per_epoch())


@dataclass
class Setup:
    """What all stages share."""

    config: SearchConfig
    compute: Compute
    tag: str
    manager: RetrievalManager
    model: HybridLM
    tokenizer: Tokenizer
    start: dict[str, Any]
    """Of the checkpoint: its meta.json, its directory and its tag."""
    stages: tuple[str, str]
    """Sources of the checkpoints after examples and after rewards."""
    train_queries: list[dict[str, Any]]
    val_queries: list[dict[str, Any]]
    score: Callable[..., dict[str, float]] = multi_hop_figures
    """Figures of answers to queries."""
    meta: dict[str, Any] = field(default_factory=dict)
    """What checkpoints say of themselves besides."""

    @property
    def by_example(self) -> bool:
        """Whether there is that stage, or the start has been through it."""
        return self.config.source not in self.stages

    @property
    def searching(self) -> Searching:
        c = self.config
        return Searching(
            self.manager.search, c.top_k_per_hop, c.max_hops, "answer", c.max_doc_length, max_context=c.max_seq_len
        )

    @property
    def rewards(self) -> Rewards:
        c = self.config
        return Rewards(
            c.reward_answer,
            c.reward_evidence,
            c.reward_economy,
            c.retrieval_price,
            c.malformed,
            c.reward_metric,
            max(1, c.max_hops * c.top_k_per_hop),
        )

    def saved_meta(self) -> dict[str, Any]:
        return {"top_k_per_hop": self.config.top_k_per_hop, "max_hops": self.config.max_hops, **self.meta}

    def root(self, source: str) -> Path:
        return checkpoint_root(source, self.tag)

    @torch.inference_mode()
    def answer_figures(self) -> dict[str, float]:
        """The first eval_questions of the validation queries answered with real searches."""
        queries = self.val_queries[: self.config.eval_questions]
        asked = [{"messages": [{"role": "user", "content": query["query"]}]} for query in queries]
        with autocast(self.model.device, resolve_dtype(self.config.dtype, self.model.device)):
            answers = Engine(self.model, self.tokenizer).generate_from_conversations(
                asked, 32, searching=self.searching, max_tokens=self.config.max_tokens
            )
        self.model.train()
        return self.score(queries, answers)


def begin(config: SearchConfig, stages: tuple[str, str]) -> Setup:
    """The model, the retriever and the questions."""
    compute = compute_init(config.device, config.seed)
    tag = find_model_tag(config.source, config.model_tag)
    model, tokenizer, start, _ = load_checkpoint(checkpoint_root(config.source, tag), config.step, compute.device)
    manager = RetrievalManager(config.retriever_type, config.knowledge_base)
    queries = []
    for path in question_files(config):
        some = read_queries(path)
        random.Random(config.seed).shuffle(some)
        queries += some[: config.query_samples] if config.query_samples >= 0 else some
    random.Random(config.seed).shuffle(queries)
    if config.val_queries:
        val_queries = read_queries(config.val_queries)
        random.Random(config.seed).shuffle(val_queries)
    else:
        held_out = min(200, len(queries) // 10)
        val_queries, queries = queries[:held_out], queries[held_out:]
    start["model_tag"] = tag
    return Setup(config, compute, tag.split("/")[0], manager, model, tokenizer, start, stages, queries, val_queries)


def multi_hop_task(setup: Setup, queries: Sequence[dict[str, Any]]) -> MultiHopRAGTask:
    c = setup.config
    source = "expander" if c.query_source == "expander" else "gold"
    return MultiHopRAGTask(queries, setup.manager, c.top_k_per_hop, c.cite, source, c.seed)


def supervise(setup: Setup, make_task: Callable[[Setup, list[dict[str, Any]]], Any] = multi_hop_task) -> None:
    """By example. make_task: conversations from queries."""
    config, model, tokenizer, train_queries = setup.config, setup.model, setup.tokenizer, setup.train_queries
    if config.query_source == "model":
        train_queries = model_hops(Engine(model, tokenizer), train_queries, setup.searching, config.max_tokens)
    tasks = [StaticRAGTask([talk for path in config.conversations for talk in load_conversations(path)])]
    if train_queries:
        tasks.append(make_task(setup, train_queries))
    rows = rows_per_step(config, setup.compute.world_size)
    phase = supervised_phase(tasks, tokenizer, config, rows)
    evaluate = None
    if setup.val_queries:
        val_task = make_task(setup, setup.val_queries[:MOST_VAL_EXAMPLES])
        data, counts = render_examples(val_task, tokenizer, config.max_seq_len, config.max_doc_length)
        print0(f"val: {counts}")
        val = PackedBatches(data, config.max_seq_len, rows, config.seed)

        def evaluate() -> dict[str, float]:
            loss = mean_loss(model, val, min(8, val.steps_per_epoch()), config, setup.compute)
            return {"val_loss": loss} | setup.answer_figures()

    train(model, tokenizer, [phase], config, setup.compute, setup.root(setup.stages[0]), evaluate, setup.saved_meta())


def reinforce(setup: Setup, best_by: str = "em") -> None:
    """By reward, unless it is not wanted, or only the plan of the stage before. best_by: the figure by which the best
    checkpoint is kept."""
    config, compute, model, by_example = setup.config, setup.compute, setup.model, setup.by_example
    if not config.use_rewards or (config.plan and by_example):
        return
    if not any(query["answers"] for query in setup.train_queries):
        raise UserError("reinforcement needs --queries with answers; --use_rewards false leaves it out")
    if config.save_every % config.updates or config.eval_every % config.updates:
        raise UserError(f"save_every and eval_every must be multiples of --updates {config.updates}")
    reference = None
    if config.kl > 0:  # from the disk and not from memory, so that a run that was resumed has the same one
        begun = (
            (setup.root(setup.stages[0]), None) if by_example else (Path(setup.start["directory"]).parent, config.step)
        )
        reference = load_checkpoint(*begun, compute.device, with_optimizer=False)[0]
    if config.algorithm == "ppo":
        model.add_value_head()
    run_dir = setup.root(setup.stages[1])
    batches = RolloutBatches(
        model,
        setup.tokenizer,
        setup.train_queries,
        replace(setup.searching, at_limit="stop"),
        setup.rewards,
        config,
        compute,
        reference,
        max_tokens=config.max_tokens,
        micro_batch=config.rollout_batch_size,
        dtype=resolve_dtype(config.dtype, compute.device),
        seed=config.seed,
        log=None if config.plan else run_dir / "rollouts.jsonl",
    )
    phase = Phase("reinforce", batches, config.rl_steps, loss=batches.loss, figures=batches.step_figures)
    rl_config = replace(
        config,
        embed_lr=config.embed_lr * config.rl_adamw_frac,
        head_lr=config.head_lr * config.rl_adamw_frac,
        scalar_lr=config.scalar_lr * config.rl_adamw_frac,
        num_steps=config.rl_steps,
        init_lr_frac=config.rl_lr_frac,
        device_batch_size=config.rollout_batch_size,
        log_every=min(5, config.log_every),
    )
    evaluate = setup.answer_figures if setup.val_queries else None
    best_by = best_by if evaluate and config.eval_every else ""
    train(model, setup.tokenizer, [phase], rl_config, compute, run_dir, evaluate, setup.saved_meta(), best_by)
