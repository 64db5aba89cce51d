"""The commands and snippets of README.md and RAG_USER_GUIDE.md, run in order as a reader would, at a smaller size."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SMALLER = {
    "scripts.prepare_rag_dataset": ["--num_documents", "60"],
    "scripts.tok_train": ["--vocab_size", "400"],
    "scripts.base_train": ["--num_steps", "2", "--d_model", "32", "--head_dim", "16"]
    + [a for name in ("copy", "far_copy", "recall", "record") for a in (f"--{name}_warmup_steps", "1")],
    "scripts.chat_sft": ["--num_steps", "2"],
    "scripts.rag_finetune": ["--num_steps", "3", "--total_batch_size", "2304", "--eval_every", "0"],
    "scripts.refrag_finetune": [
        *["--num_steps", "3", "--eval_every", "0", "--rl_steps", "2", "--group_size", "2", "--queries_per_step", "2"],
        *["--max_tokens", "8", "--min_valid", "0"],
    ],
    "scripts.drag_finetune": [
        "--num_questions",
        "40",
        "--num_val",
        "4",
        "--num_steps",
        "2",
        "--device_batch_size",
        "4",
    ],
    "scripts.rag_eval": ["--num_questions", "5"],
    "scripts.rag_chat": ["--max_tokens", "5"],
}
MY_DOCUMENTS = """\
{"id": "policy_001", "title": "Return policy", "content": "Customers can return items within 30 days of purchase."}
{"id": "policy_002", "title": "Shipping", "content": "Shipping is free from 50 euros. Standard takes 3 to 5 days."}
"""


def blocks(file: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (REPOSITORY / file).read_text(encoding="utf-8"), re.DOTALL)


def commands(file: str) -> list[list[str]]:
    lines = "\n".join(blocks(file, "bash")).replace("\\\n", " ").split("\n")
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def environment(home: Path) -> dict[str, str]:
    own = {"NANOCHAT_BASE_DIR": str(home), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own}


def run(words: list[str], cwd: Path, home: Path) -> str:
    done = subprocess.run(words, cwd=cwd, env=environment(home), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr[-2000:]}"
    return done.stdout


def serve_once(words: list[str], cwd: Path, home: Path) -> None:
    """Start a server, ask it one thing as the guide's clients do, and stop it."""
    openai = pytest.importorskip("openai")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([*words, "--port", str(port)], cwd=cwd, env=environment(home), stdout=subprocess.PIPE)
    try:
        line = server.stdout.readline().decode()
        assert f"http://localhost:{port}" in line
        client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=20)
        asked = [{"role": "user", "content": "How long can I return an item?"}]
        model = client.models.list().data[0].id
        answer = client.chat.completions.create(model=model, messages=asked, max_tokens=5)
        assert answer.sources[0]["id"].startswith("policy")
    finally:
        server.terminate()
        server.wait(30)


def test_messages_that_the_guide_explains_are_those_of_the_program():
    guide = (REPOSITORY / "RAG_USER_GUIDE.md").read_text(encoding="utf-8")
    rows = guide[guide.index("| message | what to do |") :].split("\n\n")[0].split("\n")[2:]
    quoted = [
        part
        for row in rows
        if row.startswith("| `") and "of PyTorch" not in row
        for part in re.findall(r"`([^`]+)`", row.split(" | ")[0])
    ]
    assert len(quoted) >= 8
    files = [path for folder in ("nanochat", "scripts", "tasks") for path in (REPOSITORY / folder).rglob("*.py")]
    # as a reader sees them: string literals that stand in two lines are one
    said = re.sub(r'"\s+f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in files))
    for message in quoted:
        for part in filter(None, (part.strip(" :") for part in message.split("..."))):
            assert part in said, f"no program says {part!r}"


def test_user_guide_from_start_to_end(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/my_documents.jsonl").write_text(MY_DOCUMENTS)
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    (tmp_path / "my_folder").mkdir()
    for n in range(12):
        page = f"# Bridge B{n}\n\nBridge B{n} was opened in Old Haven by the mayor on {n + 1} May 1904."
        (tmp_path / f"my_folder/{n}.md").write_text(page)
    assert MY_DOCUMENTS.strip() in (REPOSITORY / "RAG_USER_GUIDE.md").read_text()
    ran = 0
    for words in commands("RAG_USER_GUIDE.md"):
        module = words[words.index("-m") + 1]
        if words[0] == "torchrun":  # eight GPUs and a d20 are not at hand: the same settings on the tiny checkpoint
            settings = ["--model_tag", "demo", "--block_pattern", "", "--base_tasks", "", "--retriever_type", "bm25"]
            settings += ["--queries", "data/rag_examples/queries/train.jsonl", "--max_seq_len", "512"]
            words = ["python", *words[words.index("-m") :], *settings]
        if module == "scripts.chat_web":
            serve_once([sys.executable, *words[1:]], tmp_path, tmp_path / "home")
            ran += 1
            continue
        out = run([sys.executable, *words[1:], *SMALLER.get(module, [])], tmp_path, tmp_path / "home")
        if "--search" in words:
            assert "Return policy" in out
        ran += 1
    assert ran >= 12
    for snippet in blocks("RAG_USER_GUIDE.md", "python"):
        run([sys.executable, "-c", snippet], tmp_path, tmp_path / "home")


def test_readme_commands_exist():
    """README's commands are those of the guide, or scripts that other tests and the release checks run whole."""
    for words in commands("README.md"):
        if words[0] == "bash":
            assert (REPOSITORY / words[1]).is_file()
        elif "-m" in words and words[0].endswith("python") and words[words.index("-m") + 1] != "venv":
            module = words[words.index("-m") + 1]
            path = REPOSITORY / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
    flags = re.findall(r"^\| `(--\w+)`", (REPOSITORY / "RAG_USER_GUIDE.md").read_text(), re.MULTILINE)
    from scripts import rag_finetune, refrag_finetune

    known = {*rag_finetune.Config.__dataclass_fields__, *refrag_finetune.Config.__dataclass_fields__}
    assert flags and all(flag[2:] in known for flag in flags if flag != "--type")
