"""The self-test of scripts.doctor: the parts that answers depend on, each at a size of a second or two.

A check is given an empty folder, returns what it found in a few words, and raises where something is wrong. Everything
is imported inside of the checks: one whose package is broken fails, and the others still run.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.common import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nanochat.model.lm import HybridLM

Check = Callable[[Path], str]
THREAD = "self-test"  # name of the thread that runs a check
TEXTS = ["The old bridge over the river was built in 1987.", "Ein Fluß, eine Brücke und ein Berg. 東京"] * 5


def self_test(seconds: float, folder: Path | None) -> Iterator[tuple[str, bool, str]]:
    """(name, whether it is well, what was found) of each check, one by one; all of them within so many seconds. folder:
    where they may write, by default where temporary files go."""
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder, ignore_cleanup_errors=True) as directory:
        for name, check in CHECKS.items():
            place = Path(directory) / name.replace(" ", "_")
            place.mkdir()
            yield name, *_within(deadline, seconds, check, place)


def _within(deadline: float, seconds: float, check: Check, place: Path) -> tuple[bool, str]:
    """Run a check in a thread of its own, which is left to itself when the time is over."""
    over = f"the {seconds:g} seconds of the self-test were over; --seconds gives it more"
    began = time.monotonic()
    if began >= deadline:
        return False, f"not run: {over}"
    outcome: list[tuple[bool, str]] = []

    def run() -> None:
        try:
            outcome.append((True, check(place)))
        except Exception as error:  # a package may break in any way
            outcome.append((False, one_line(error)))

    with contextlib.redirect_stdout(io.StringIO()):  # what the parts say is not part of the table
        thread = threading.Thread(target=run, name=THREAD, daemon=True)
        thread.start()
        thread.join(deadline - began)
    if not outcome:
        return False, f"not finished: {over}"
    well, said = outcome[0]
    return well, f"{said} ({time.monotonic() - began:.1f} s)" if well else said


def one_line(error: BaseException) -> str:
    """An error in one line that is not too long."""
    said = " ".join(str(error).split())
    said = said if isinstance(error, UserError) else f"{type(error).__name__}: {said}"
    return said if len(said) <= 300 else said[:297] + "..."


def _expect(well: bool, otherwise: str) -> None:
    if not well:
        raise UserError(otherwise)


def _model(vocab_size: int, noise: float = 0.05) -> HybridLM:
    """A block of each kind. noise: on all weights, for the projections that start at zero would hide every mixer."""
    import torch

    from nanochat.model.lm import HybridLM, ModelConfig

    torch.manual_seed(0)
    shape = {"d_model": 32, "head_dim": 16, "d_state": 16, "mamba_head_dim": 16}
    model = HybridLM(ModelConfig.from_depth(vocab_size, block_pattern="MT", **shape))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * noise)
    return model


def _tokens(rows: int, length: int, below: int) -> Tensor:
    import torch

    return torch.randint(below, (rows, length), generator=torch.Generator().manual_seed(0))


def _relative(found: Tensor, expected: Tensor) -> float:
    """The distance of two tensors as a share of the second; nan where either has one."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return ((found - expected).norm() / expected.norm()).item()


def training(place: Path) -> str:
    """A model learns a batch by heart."""
    import torch

    from nanochat.optim import Optimizers

    model, tokens = _model(64, noise=0.0), _tokens(4, 33, 64)
    optimizers = Optimizers(model)
    losses = []
    for _ in range(20):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step()
        optimizers.zero_grad()
        losses.append(loss.item())
    said = f"loss {losses[0]:.2f}, after {len(losses)} steps {losses[-1]:.2f}"
    _expect(losses[-1] < 0.8 * losses[0], f"{said}: it should have fallen by a fifth")  # nan is not less either
    return said


def checkpoint(place: Path) -> str:
    """What is loaded gives the logits of what was saved, bit for bit."""
    import torch

    from nanochat.checkpoint_manager import load_checkpoint, save_checkpoint
    from nanochat.optim import Optimizers
    from nanochat.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(TEXTS, 300)
    for text in TEXTS:
        _expect(tokenizer.decode(tokenizer.encode(text)) == text, f"the tokenizer does not give {text!r} back")
    model, tokens = _model(tokenizer.vocab_size), _tokens(2, 24, tokenizer.vocab_size)
    optimizers = Optimizers(model)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizers.step()
    saved = optimizers.state_dict()
    save_checkpoint(place, 1, model, tokenizer, {}, saved)
    loaded, loaded_tokenizer, _, state = load_checkpoint(place)
    with torch.no_grad():
        _expect(torch.equal(model(tokens), loaded(tokens)), "the loaded model has other logits than the saved one")
    _expect(loaded_tokenizer.fingerprint == tokenizer.fingerprint, "the loaded tokenizer is not the saved one")
    same = state is not None and state.keys() == saved.keys() and all(torch.equal(state[k], saved[k]) for k in saved)
    _expect(same, "the loaded state of the optimizer is not the saved one")
    return "saved and loaded, logits equal bit for bit"


def _scan_inputs() -> tuple[list[Tensor], Tensor]:
    """x, dt, A, B, C and an initial state in float64, and where documents begin; 96 steps are two chunks."""
    import torch

    g = torch.Generator().manual_seed(0)
    B, L, H, P, N = 2, 96, 2, 16, 16
    x, Bm, Cm, h0 = (torch.randn(s, generator=g).double() for s in ((B, L, H, P), *[(B, L, 1, N)] * 2, (B, H, P, N)))
    dt, A = torch.rand(B, L, H, generator=g).double() * 0.1, -torch.rand(H, generator=g).double() * 15 - 1
    return [x, dt, A, Bm, Cm, h0], (torch.rand(B, L, generator=g) < 0.05).long().cumsum(1)


def _recurrence(x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, h: Tensor, seq: Tensor) -> list[Tensor]:
    """The scan as the paper has it, one step at a time (shapes as in nanochat/model/ssd.py, one group)."""
    import torch

    ys = []
    for t in range(x.shape[1]):
        if t:
            h = h * (seq[:, t] == seq[:, t - 1]).to(h.dtype)[:, None, None, None]
        u = (dt[:, t, :, None] * x[:, t]).unsqueeze(-1) * Bm[:, t].unsqueeze(2)
        h = (dt[:, t] * A).exp()[..., None, None] * h + u
        ys.append((h * Cm[:, t].unsqueeze(2)).sum(-1))
    return [torch.stack(ys, 1), h]


def scan(place: Path) -> str:
    """The chunked scan against the recurrence, outputs and gradients."""
    import torch

    from nanochat.model.ssd import ssd_scan

    inputs, seq = _scan_inputs()
    exact, fast = ([t.to(dtype).requires_grad_() for t in inputs] for dtype in (torch.float64, torch.float32))
    results = []
    for given, (y, state) in ((exact, _recurrence(*exact, seq)), (fast, ssd_scan(*fast, seq))):
        results.append([y, state, *torch.autograd.grad(y.square().sum() + state.square().sum(), given)])
    error = max(_relative(found, expected) for expected, found in zip(*results, strict=True))
    said = f"{error:.0e} from the step-by-step recurrence, gradients included"
    _expect(error < 1e-3, said)
    return said


def decoding(place: Path) -> str:
    """Token by token with a cache against the whole sequence at once."""
    import torch

    model, tokens = _model(64).eval(), _tokens(2, 24, 64)
    with torch.no_grad():
        whole, cache = model(tokens), model.new_cache(2)
        parts = [model(tokens[:, :10], cache=cache)]
        parts += [model(tokens[:, i : i + 1], cache=cache) for i in range(10, 24)]
    error = _relative(torch.cat(parts, 1), whole)
    said = f"{error:.0e} between logits with a cache and without"
    _expect(error < 1e-4, said)
    return said


def knowledge_base(place: Path) -> str:
    """Built, searched, changed, verified; needs no torch."""
    from nanochat.retrieval import Document, RetrievalManager
    from nanochat.retrieval.knowledge_base import add_documents, build_knowledge_base, delete_documents

    names = ("Marrow", "Elmsby", "Quillon", "Harrowgate")
    towns = [
        Document(name, f"Town of {name}", f"The bridge of {name} is of {1900 + i}.") for i, name in enumerate(names)
    ]
    path = place / "kb"
    build_knowledge_base(towns[:3], path, "bm25")
    manager = RetrievalManager(knowledge_base_path=path)

    def expect_first(found: str, question: str = "how old is the bridge of Quillon?") -> None:
        first = [document.id for document in manager.retrieve(question, 1)]
        _expect(first == [found], f"{question} finds {first} in place of {found}")

    expect_first("Quillon")
    add_documents(path, towns[3:])
    delete_documents(path, ["Quillon"])
    _expect(manager.refresh(now=True), "a new version of the base is not seen")
    expect_first("Harrowgate", "Harrowgate bridge")
    left = {document.id for document in manager.retrieve("how old is the bridge of Quillon?", 5)}
    _expect("Quillon" not in left, "a deleted document is still found")
    manager.knowledge_base.verify()
    return f"built, searched, changed, {len(manager.knowledge_base.manifest['files'])} files verified"


def gpu(place: Path) -> str:
    """Every kernel of the scan that is installed against the recurrence, and a backward pass against the CPU's."""
    import torch

    if not torch.cuda.is_available():
        return "no CUDA GPU, nothing to compare"
    return _compared_with_cpu(torch.device("cuda"))


def _compared_with_cpu(device: torch.device) -> str:
    import torch

    from nanochat.model.kernels import PACKAGES, kernel_scan, set_ssm_kernel
    from nanochat.model.ssd import ssd_scan

    inputs, seq = _scan_inputs()
    expected = _recurrence(*inputs, seq)
    given = [t.to(device, torch.float32) for t in inputs]
    errors = {}
    for name in ("torch", *PACKAGES):
        try:
            set_ssm_kernel(name)
        except UserError:
            continue  # not installed
        scan = ssd_scan if name == "torch" else partial(kernel_scan, name)
        found = scan(*given, seq.to(device))
        errors[f"scan by {name}"] = max(_relative(a, b) for a, b in zip(found, expected, strict=True))
    set_ssm_kernel("auto")
    gradients = [_gradients(torch.device("cpu")), _gradients(device)]
    errors["gradients"] = max(_relative(b, a) for a, b in zip(*gradients, strict=True))
    said = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
    _expect(all(error < 1e-2 for error in errors.values()), f"too far from the CPU: {said}")  # TF32 has ten bits
    return f"differences from the CPU: {said}"


def _gradients(device: torch.device) -> list[Tensor]:
    """The embedding's and the output layer's for one batch of two packed documents a row."""
    import torch

    model, tokens = _model(64).to(device), _tokens(2, 65, 64).to(device)
    seq_idx = (torch.arange(64, device=device) >= 40).long().expand(2, -1)
    model(tokens[:, :-1], tokens[:, 1:], seq_idx=seq_idx).backward()
    return [model.embed.weight.grad, model.lm_head.weight.grad]


CHECKS: dict[str, Check] = {
    "training": training,
    "checkpoint": checkpoint,
    "scan": scan,
    "decoding": decoding,
    "knowledge base": knowledge_base,
    "gpu": gpu,
}
