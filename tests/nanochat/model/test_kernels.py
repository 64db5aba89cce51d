"""The switch between scans, and flash-linear-attention's against ours where Triton can be interpreted on a CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from nanochat.common import UserError
from nanochat.model import kernels

PARITY = """
import torch
from triton.runtime.autotuner import Autotuner
Autotuner._bench = lambda self, *args, **kw: [0.0, 0.0, 0.0]  # nothing to time here: take the first configuration
import builtins
import fla.ops.common.chunk_h as interpreted
import triton.language as tl
def tensors(*bounds):  # the interpreter's loops count in Python's integers, which have no .to(), as in these kernels
    return (tl.full((), i, tl.int32) for i in builtins.range(*(int(b) for b in bounds)))
interpreted.range = tensors
from nanochat.model import kernels
from nanochat.model.ssd import ssd_scan
generator = torch.Generator().manual_seed(0)
B, L, H, P, G, N = 2, 96, 2, 16, 1, 16
x, Bm, Cm = (torch.randn(B, L, h, n, generator=generator) for h, n in ((H, P), (G, N), (G, N)))
dt, A = torch.rand(B, L, H, generator=generator) * .1, -torch.rand(H, generator=generator) * 4 - 1
h0 = torch.randn(B, H, P, N, generator=generator)
given = [t.requires_grad_() for t in (x, dt, A, Bm, Cm, h0)]
seq = (torch.rand(B, L, generator=generator) < .05).long().cumsum(1)
for initial in (None, h0):
    for documents in (None, seq):
        results = []
        for scan in (ssd_scan, lambda *a: kernels.kernel_scan("fla", *a)):
            y, state = scan(x, dt, A, Bm, Cm, initial, documents)
            loss = (y * torch.linspace(-1, 1, L)[:, None, None]).sum() + state.square().sum()
            inputs = given if initial is not None else given[:-1]
            results.append([y, state, *torch.autograd.grad(loss, inputs)])
        for ours, theirs in zip(*results, strict=True):
            assert (ours - theirs).norm() / ours.norm() < 2e-3, (initial is None, documents is None)
print("equal")
"""


def test_fla_gives_the_same_scan_and_gradients_under_the_triton_interpreter():
    pytest.importorskip("triton")
    pytest.importorskip("fla")
    done = subprocess.run(
        [sys.executable, "-c", PARITY],
        env={"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip().endswith("equal"), done.stderr[-3000:]


def test_the_switch(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "_function", lambda name: len if name == "fla" else None)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    kernels.set_ssm_kernel("auto")
    assert (kernels.ssm_kernel(gpu), kernels.ssm_kernel(gpu), kernels.ssm_kernel(cpu)) == ("fla", "fla", "torch")
    assert capsys.readouterr().out == "state-space scan: fla\n"  # once
    kernels.set_ssm_kernel("torch")
    assert kernels.ssm_kernel(gpu) == "torch"
    with pytest.raises(UserError, match=r"mamba_ssm is not installed: pip install"):
        kernels.set_ssm_kernel("mamba_ssm")
    with pytest.raises(UserError, match="there are auto, mamba_ssm, fla, torch"):
        kernels.set_ssm_kernel("best")
    monkeypatch.setattr(kernels, "_function", lambda name: None)
    kernels.set_ssm_kernel("auto")
    assert kernels.ssm_kernel(gpu) == "torch"
