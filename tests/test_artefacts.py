"""No file runs code: nothing that a run leaves behind is or holds a pickle, and no source reads one.

The first half walks everything that a whole run writes, on a tiny world; the second half reads the sources' syntax.
"""

from __future__ import annotations

import ast
import bz2
import gzip
import importlib
import io
import lzma
import os
import pickle
import pickletools
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

REPOSITORY = Path(__file__).parents[1]

# --- what a file holds

HEAD = 1 << 20  # bytes of a file, or of what is compressed in it, that are looked at
RUNS_CODE = {"GLOBAL", "STACK_GLOBAL", "INST", "REDUCE", "BUILD"}


def is_pickle(data: bytes) -> bool:
    """Whether a pickle begins here. Protocols 2 and later begin with an opcode of their own, as other files may by
    chance: a few opcodes have to follow. Protocols 0 and 1 are read to their end, and have to be all there is or name a
    function; a text of one or two letters is no pickle worth the name."""
    names: list[str] = []
    end = -1
    try:
        for opcode, _, position in pickletools.genops(data):
            names.append(opcode.name)
            end = position + 1
    except Exception:  # not an opcode, or the end of what was read
        pass
    if names[:1] == ["PROTO"]:
        return len(names) >= 3
    return len(names) >= 3 and names[-1] == "STOP" and (end == len(data) or bool(RUNS_CODE.intersection(names)))


def unpacked(data: bytes) -> bytes:
    """The beginning of what a compressed file holds; b"" if it is none."""
    for decompressor in (zlib.decompressobj(47), bz2.BZ2Decompressor(), lzma.LZMADecompressor()):  # 47: gzip or zlib
        try:
            return decompressor.decompress(data, HEAD)
        except (zlib.error, OSError, lzma.LZMAError, EOFError, ValueError):
            continue
    return b""


def has_objects(data: bytes) -> bool:
    """Whether this is the beginning of a .npy file of Python objects, which are pickled."""
    if data[:6] != b"\x93NUMPY":
        return False
    start = 10 if data[6] == 1 else 12  # the header's length has two bytes, later four
    header = data[start : start + int.from_bytes(data[8:start], "little")]
    return np.lib.format.descr_to_dtype(ast.literal_eval(header.decode("utf-8"))["descr"]).hasobject


def faults(data: bytes, name: str, depth: int = 0) -> Iterator[str]:
    """What in a file could run code, with where it is."""
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.namelist():
                yield from faults(archive.read(member), f"{name}/{member}", depth + 1)
    elif has_objects(data):
        yield f"{name}: an array of Python objects"
    elif is_pickle(data[:HEAD]):
        yield f"{name}: a pickle"
    elif depth < 3 and (inner := unpacked(data[:HEAD])):
        yield from faults(inner, f"{name} unpacked", depth + 1)


def objects() -> np.ndarray:
    return np.array([{"a": 1}, None], dtype=object)


def joblib_like(value: np.ndarray) -> bytes:
    """A pickle in whose middle an array's bytes stand as they are."""
    return pickle.dumps({"array": os.path.join, "shape": value.shape}, 4)[:-1] + value.tobytes() + b"."


def saved(save, *values, **how) -> bytes:
    file = io.BytesIO()
    save(file, *values, **how) if save in (np.save, np.savez, np.savez_compressed) else save(*values, file, **how)
    return file.getvalue()


WEIGHTS = {"weight": torch.ones(3), "step": 1}
BAD = {
    **{f"pickle, protocol {p}": pickle.dumps({"a": [1, 2], "f": os.path.join}, p) for p in range(6)},
    **{f"pickled numbers, protocol {p}": pickle.dumps([1, 2, 3], p) for p in range(6)},
    "torch.save": saved(torch.save, WEIGHTS),
    "torch.save, the old way": saved(torch.save, WEIGHTS, _use_new_zipfile_serialization=False),
    "an array of objects": saved(np.save, objects()),
    "records with objects": saved(np.save, np.zeros(2, [("id", "O"), ("n", "i4")])),
    "arrays of objects": saved(np.savez_compressed, n=np.arange(3), ids=objects()),
    "joblib": joblib_like(np.arange(9.0)),
    "joblib, zlib": zlib.compress(joblib_like(np.arange(9.0)), 3),
    "joblib, gzip": gzip.compress(pickle.dumps(objects())),
    "joblib, bz2": bz2.compress(pickle.dumps(objects())),
    "joblib, xz": lzma.compress(pickle.dumps(objects())),
    "a pickle with something behind it": pickle.dumps(os.path.join, 0) + b"\x00 more",
}


@pytest.mark.parametrize("name", BAD)
def test_the_detector_finds(name):
    assert list(faults(BAD[name], "file"))


def test_the_detector_knows_what_joblib_writes(tmp_path):
    joblib = pytest.importorskip("joblib")
    for compress in (0, 3, ("gzip", 3), ("xz", 3)):
        joblib.dump({"weights": np.arange(50.0)}, tmp_path / "file", compress=compress)
        assert list(faults((tmp_path / "file").read_bytes(), "file")), compress


def test_the_detector_passes_what_only_looks_like_a_pickle(tmp_path):
    header = len(b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}')
    for size in (0x280, 0x380):  # the header's length comes first, here the two bytes that begin a pickle
        save_file({"x": np.zeros(4, np.float32)}, tmp_path / "file", {"m": "x" * (size - header - 24)})
        data = (tmp_path / "file").read_bytes()
        data = (
            size.to_bytes(8, "little") + data[8 : 8 + size].ljust(size) + data[8 + int.from_bytes(data[:8], "little") :]
        )
        assert data[0] == 0x80 and data[1] in (2, 3) and not list(faults(data, "file"))
    texts = [b"", b".", b"N.", b"I1\n.", b"(a note)", b'{"id": "1"}\n', b"Place of birth.", b"}", b"0.5"]
    arrays = [saved(np.save, np.arange(9)), saved(np.savez, a=np.zeros(2, "U5")), gzip.compress(b"text")]
    for data in [*texts, *arrays]:
        assert not list(faults(data, "file")), data


# --- what a whole run leaves behind

SHAPE = ["--block_pattern", "MT", "--d_model", 32, "--head_dim", 16, "--d_state", 16]
TINY = ["--num_steps", 2, "--max_seq_len", 256, "--total_batch_size", 512, "--device_batch_size", 2, "--eval_every", 2]
EXPECTED = """
    tokenizer/tokenizer.json tokenized/*/train_ids.npy retrieved/*.json
    checkpoints/base/tiny/step_000002/model.safetensors checkpoints/base/tiny/step_000002/optimizer.safetensors
    checkpoints/base/tiny/metrics.jsonl checkpoints/base/tiny/report.md checkpoints/base/tiny/loss.png
    checkpoints/rag/tiny/step_000002/lora.safetensors checkpoints/drag/tiny/step_000002/beside.safetensors
    checkpoints/dsi/tiny/step_000002/index.safetensors indexed/v0001/dsi/ids.npz
    fact_retriever/retriever.safetensors kg/edges.npy facts/v0001/graph/edges.npy facts/v0001/fact_rows.npy
    ex/knowledge_base/CURRENT hybrid/v0001/s0001/embeddings.npy hybrid/v0001/s0001/index.faiss
    hybrid/v0002/s0001/dead.npy hybrid/v0002/s0001/postings/*.npy
    eval/predictions.jsonl eval/results.json eval/report.md eval/figures.png
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Iterator[Path]:
    """A base directory after the commands that write every kind of file there is, run as they are, in this process."""
    pytest.importorskip("faiss")
    pytest.importorskip("peft")
    home = tmp_path_factory.mktemp("home")
    ex, kb = home / "ex", home / "ex/knowledge_base"
    graph, facts = ["--graph", home / "kg"], home / "facts.txt"
    rag = ["--base_tasks", "", "--retriever_type", "bm25", "--source", "base", "--lora_rank", 2, "--top_k", 2]
    dsi = ["--documents", home / "documents.jsonl", "--model", "lm", "--width", 32, "--block_pattern", "MT"]
    dsi += [
        "--vocab_size",
        400,
        "--scheme",
        "semantic",
        "--num_steps",
        2,
        "--total_batch_size",
        512,
        "--model_tag",
        "tiny",
    ]
    drag = [*graph, "--questions", ex / "queries/multihop_train.jsonl", "--num_questions", 40, "--num_val", 4]
    drag += ["--width", 16, "--pool", 4, "--k_facts", 2, "--model_tag", "tiny", *TINY]
    hybrid = ["--type", "hybrid", "--model", "self:base", "--faiss_index", "hnsw"]
    asked = ["--queries", ex / "queries/test.jsonl", "--num_questions", 4, "--max_tokens", 4, "--output", home / "eval"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(home))

        def run(module: str, *argv: object) -> None:
            patch.setattr(sys, "argv", [module, *map(str, argv)])
            importlib.import_module(module).main()

        run("scripts.prepare_rag_dataset", "--output", ex, "--num_documents", 60)
        documents = sorted(path for path in ex.rglob("*.jsonl") if path.name == "documents.jsonl")[0]
        (home / "documents.jsonl").write_bytes(documents.read_bytes())
        run("scripts.tok_train", "--input", ex / "text/train.jsonl", "--vocab_size", 400)
        run("scripts.base_train", "--input", ex / "text/train.jsonl", "--model_tag", "tiny", *SHAPE, *TINY)
        run("scripts.rag_finetune", "--knowledge_base", kb, *rag, *TINY)
        run("scripts.rag_eval", "--knowledge_base", kb, *asked)
        run("scripts.dsi_train", *dsi)
        run("nanochat.retrieval.__main__", "build", "--documents", documents, "--output", home / "hybrid", *hybrid)
        first = documents.read_text(encoding="utf-8").split('"')[3]
        run("nanochat.retrieval.__main__", "delete", "--knowledge_base", home / "hybrid", "--ids", first)
        index = ["--type", "dsi", "--index", home / "checkpoints/dsi/tiny/step_000002"]
        run("nanochat.retrieval.__main__", "build", "--documents", documents, "--output", home / "indexed", *index)
        facts.write_bytes((ex / "graph.txt").read_bytes())
        run("scripts.kg_prepare", "build", "--triples", facts, *graph)
        run("nanochat.retrieval.__main__", "build", "--triples", facts, "--output", home / "facts", "--type", "kg")
        run("scripts.drag_finetune", "--phase", 1, *drag)
        run("scripts.drag_finetune", "--phase", 2, *drag)
    yield home


def test_no_file_of_a_whole_run_runs_code(home):
    for pattern in EXPECTED.split():
        assert list(home.glob(pattern)), f"the run has not written {pattern}"
    files = [path for path in home.rglob("*") if path.is_file()]
    found = [fault for path in files for fault in faults(path.read_bytes(), str(path.relative_to(home)))]
    assert len(files) > 150 and not found, found


# --- what the sources do

FORBIDDEN = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
CALLS = {
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "torch.hub.load",
    "runpy.run_path",
}
CALLS |= {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "eval", "exec"}
FALSE = ("allow_pickle", "trust_remote_code", "shell")  # what these must be wherever they are given
BY_DESIGN = {"nanochat/config.py": {"runpy.run_path"}}  # config files are Python


def unsafe(source: str) -> list[tuple[int, str]]:
    """(line, what) of everything in a source that would read a pickle or run a text."""
    tree = ast.parse(source)
    full: dict[str, str] = {}  # what a name in this file stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full |= {a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names}
        if isinstance(node, ast.ImportFrom):
            full |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    found = []
    for node in ast.walk(tree):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [(node.lineno, module) for module in modules if module.split(".")[0] in FORBIDDEN]
        if not isinstance(node, ast.Call):
            continue
        first, _, rest = ast.unparse(node.func).partition(".")
        name = full.get(first, first) + (f".{rest}" if rest else "")
        given = {k.arg: getattr(k.value, "value", None) for k in node.keywords if k.arg}  # None: not a constant
        if name.removeprefix("builtins.") in CALLS or name.endswith(".read_pickle"):
            found.append((node.lineno, name.removeprefix("builtins.")))
        if name in ("torch.load", "torch.serialization.load") and given.get("weights_only") is not True:
            found.append((node.lineno, name))
        if name == "numpy.load" and len(node.args) > 2:
            found.append((node.lineno, "numpy.load with positional arguments"))
        found += [(node.lineno, f"{key}={given[key]}") for key in FALSE if key in given and given[key] is not False]
    return found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import numpy, joblib.externals as j",
        "import torch; torch.load(f)",
        "import torch as t; t.load(f, weights_only=False)",
        "from torch import load; load(f, weights_only=flag)",
        "import numpy as np; np.load(f, allow_pickle=True)",
        "import numpy as np; np.load(f, None, True)",
        "import numpy as np; np.save(f, x, allow_pickle=chosen)",
        "eval(text)",
        "exec(compile(text, 'file', 'exec'))",
        "import builtins; builtins.eval(text)",
        "import yaml; yaml.load(f, Loader)",
        "import pandas as pd; pd.read_pickle(f)",
        "from transformers import AutoModel\nAutoModel.from_pretrained(name, trust_remote_code=True)",
        "import subprocess as s; s.run(text, shell=True)",
        "import subprocess; subprocess.Popen(text, shell=chosen)",
        "import os; os.system(text)",
        "from os import system; system(text)",
    ],
)
def test_the_source_check_finds(line):
    assert unsafe(line)


def test_the_source_check_passes_what_is_safe():
    lines = "model.eval(); re.compile('eval('); text = 'pickle.load(f)  # shell=True'; np.load(f); torch.load(f, **how)"
    assert unsafe(f"import numpy as np, re\n{lines.replace('torch.load(f, **how)', 'x.load(f)')}") == []
    safe = "import torch, subprocess, numpy as np\ntorch.load(f, weights_only=True); subprocess.run(['a'], shell=False)"
    assert unsafe(f"{safe}\nnp.load(f, mmap_mode='r', allow_pickle=False)") == []
    assert unsafe(lines.replace("x", "y").partition("torch")[0] + "import torch; torch.load(f, **how)")


def test_no_source_reads_a_pickle_or_runs_a_text():
    found, count = [], 0
    for folder in ("nanochat", "scripts", "tasks", "bench"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            name = path.relative_to(REPOSITORY).as_posix()
            allowed = BY_DESIGN.get(name, set())
            found += [
                f"{name}:{n}: {what}" for n, what in unsafe(path.read_text(encoding="utf-8")) if what not in allowed
            ]
            count += 1
    assert count > 100 and not found, "\n".join(found)
