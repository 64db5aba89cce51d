"""DeepRAG's commands under the names its users know; each is one of the other scripts with the settings filled in.

    python -m scripts.deeprag prepare-data data=synthetic
    python -m scripts.deeprag train-dsi data=synthetic model=dsi_small training.max_steps=10
    python -m scripts.deeprag train-agent data=synthetic training.max_steps=2
    python -m scripts.deeprag train-joint data=synthetic training.max_steps=2
    python -m scripts.deeprag evaluate-model data=synthetic

data=synthetic: a small invented world, and a model of a few steps beside it, for a first try. data=hotpotqa: a file of
HotpotQA (--input hotpot_dev_distractor_v1.json). Everything lands in data/deeprag/NAME, models in the base
directory. Settings of the scripts themselves are given as there (--scheme title).
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from nanochat.checkpoint_manager import checkpoint_root
from nanochat.common import UserError, get_base_dir, run_main
from scripts import agent_train, base_train, dsi_train, joint_train, prepare_rag_dataset, rag_eval, tok_train

app = typer.Typer(help=__doc__, add_completion=False, no_args_is_help=True, rich_markup_mode=None)
REST = {"allow_extra_args": True, "ignore_unknown_options": True}
MODELS = {  # of an index
    "dsi_small": ["--width", "128", "--layers", "2"],
    "dsi_base": ["--width", "256", "--layers", "4"],
    "dsi_lm": ["--model", "lm", "--width", "128"],
}
Settings = Annotated[
    list[str] | None, typer.Argument(help="data=NAME model=NAME training.max_steps=N --flag VALUE ...")
]


def split(settings: list[str] | None, steps: str, models: dict[str, list[str]] | None = None) -> tuple[Path, list[str]]:
    """The folder of the data, and the settings as the scripts have them. steps: the flag that max_steps is."""
    name, words = "synthetic", []
    given = iter(settings or ())
    for word in given:
        key, equals, value = word.partition("=")
        if word.startswith("--config-name"):  # settings are Python files here; the defaults are filled in
            if not equals:
                next(given, None)
        elif word.startswith("--") or not equals:
            words.append(word)
        elif key == "data":
            name = value
        elif key == "training.max_steps":
            words += [steps, value]
        elif key == "model" and models is not None:
            if value not in models:
                raise UserError(f"model={value}: there are {', '.join(models)}")
            words += models[value]
        else:
            raise UserError(f"{word!r}: there are data=, model=, training.max_steps=, and the script's own --flags")
    if name not in ("synthetic", "hotpotqa"):
        raise UserError(f"data={name}: there are synthetic and hotpotqa; for your own documents call the scripts")
    return Path("data/deeprag") / name, words


def call(script: ModuleType, *words: object) -> None:
    before, sys.argv = sys.argv, [f"python -m {script.__name__}", *map(str, words)]
    try:
        script.main()
    finally:
        sys.argv = before


def prepared(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.exists():
        raise UserError(f"{path} is not there: python -m scripts.deeprag prepare-data data={folder.name}")
    return path


@app.command(context_settings=REST)
def prepare_data(settings: Settings = None) -> None:
    """Documents, questions and a knowledge base; for data=synthetic also a model of a few steps, if there is none."""
    folder, words = split(settings, "--num_documents")
    if folder.name == "hotpotqa":
        call(prepare_rag_dataset, "--mode", "hotpotqa", "--output", folder, *words)
        return
    call(prepare_rag_dataset, "--mode", "example", "--output", folder, "--num_documents", 200, *words)
    if not checkpoint_root("base", "").exists():
        text = folder / "text/train.jsonl"
        call(tok_train, "--input", text, "--vocab_size", 512)
        few = [word for name in ("copy", "far_copy", "recall", "record") for word in (f"--{name}_warmup_steps", 2)]
        call(base_train, "configs/demo_base.py", "--input", text, "--num_steps", 2, *few, "--model_tag", "deeprag")


@app.command(context_settings=REST)
def train_dsi(settings: Settings = None) -> None:
    """The index, from pseudo-queries and written questions."""
    folder, words = split(settings, "--num_steps", MODELS)
    documents, queries = prepared(folder, "documents.jsonl"), folder / "queries"
    tag = ["--model_tag", f"deeprag_{folder.name}", "--queries", queries / "train.jsonl"]
    val = ["--val_queries", queries / "val.jsonl"]
    call(dsi_train, "configs/dsi_tiny.py", "--documents", documents, *tag, *val, *words)


@app.command(context_settings=REST)
def train_agent(settings: Settings = None) -> None:
    """When to search: by imitation, then by PPO; training.max_steps of each."""
    folder, words = split(settings, "--rl_steps")
    if "--rl_steps" in words:
        words = ["--num_steps", words[words.index("--rl_steps") + 1], *words]
    base = ["--knowledge_base", prepared(folder, "knowledge_base"), "--queries", folder / "queries/train.jsonl"]
    if folder.name == "synthetic":  # a model of a few steps seldom ends an answer; that does not stop a smoke run
        base += ["--min_valid", 0]
    call(agent_train, "configs/agent_tiny.py", *base, "--source", answering(), *words)


@app.command(context_settings=REST)
def train_joint(settings: Settings = None) -> None:
    """The index, from answers."""
    folder, words = split(settings, "--num_steps")
    queries = ["--queries", folder / "queries/train.jsonl", "--val_queries", folder / "queries/val.jsonl"]
    index = ["--index_tag", f"deeprag_{folder.name}", "--source", answering()]
    call(
        joint_train,
        "configs/joint_tiny.py",
        "--documents",
        prepared(folder, "documents.jsonl"),
        *queries,
        *index,
        *words,
    )


@app.command(context_settings=REST)
def evaluate_model(settings: Settings = None) -> None:
    """Answers to the test questions closed book, from BM25's documents, from the index's and by the agent."""
    folder, words = split(settings, "--num_questions")
    base = ["--knowledge_base", prepared(folder, "knowledge_base"), "--queries", folder / "queries/test.jsonl"]
    call(rag_eval, "--source", answering(), "--systems", "closed,rag,dsi,joint,agent", *base, *words)


def answering() -> str:
    """The source of the best model that is there to answer."""
    for source in ("rag", "mid", "base"):
        if checkpoint_root(source, "").exists():
            return source
    raise UserError(f"no model in {get_base_dir()}: python -m scripts.deeprag prepare-data makes a small one")


def main() -> None:
    app(standalone_mode=False)


if __name__ == "__main__":
    run_main(main)
