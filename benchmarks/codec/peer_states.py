"""Trains a tiny model with the 8-bit and 4-bit optimizers of PyTorch, for tests of `from_torch`.

    pip install torch torchao bitsandbytes flashoptim triton
    python -m benchmarks.codec.peer_states

writes to tests/data/peers what each optimizer stores, exported as docs/how-to/from_torch.md tells,
and what the library itself reads from it: of every parameter a hash of mu and of nu in float32, and
of a few elements mu, nu, gradient and update of one more step.

All of it runs on a CPU: bitsandbytes and torchao as they are; FlashOptim, whose codecs are
Triton's, in Triton's interpreter, its demand for a GPU left out. Its fused step does not run there:
its steps are those of ``fused=False``.
"""

import argparse
import datetime
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

if __name__ == "__main__":  # --help says what to install, so it comes before it is needed
    style = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=style).parse_args()

import torch  # noqa: E402

DATA = Path(__file__).parents[2] / "tests" / "data" / "peers"
STEPS, STRIDE = 20, 61  # a prime: places everywhere in blocks
PACKAGES = "torch", "torchao", "bitsandbytes", "flashoptim", "triton", "numpy"


# Quoted in docs/how-to/from_torch.md.
def flat(x, name):
    """NumPy arrays of one value of a state dict."""
    if hasattr(x, "tensor_attrs"):  # torchao: one tensor that is made of several
        x = {key: getattr(x, key) for key in x.tensor_attrs} | {"shape": x.shape}
    if isinstance(x, dict):
        return {k: v for key in x for k, v in flat(x[key], f"{name}.{key}").items()}
    x = torch.as_tensor(x).detach().cpu()
    if x.dtype is torch.float8_e4m3fn:  # NumPy has no such dtype
        x = x.view(torch.uint8)
    if x.dtype is torch.bfloat16:  # nor this one, as which FlashOptim may hide float16
        x = x.view(torch.float16) if name.endswith("::scales") else x.float()
    return {name: x.numpy()}


def exported(optimizer, model):
    names = {id(p): name for name, p in model.named_parameters()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    state = optimizer.state_dict()["state"]
    return {k: v for i in state for k, v in flat(state[i], order[i]).items()}


def train(make: Callable[[Any], Any], dtype: torch.dtype):
    """The model, its optimizer after STEPS steps, and the gradients of one more.

    Two matrices have 4096 elements at least: one is whole blocks, the other ends within a block of
    256, which bitsandbytes cuts short and torchao leaves in float32. Most of its rows have no
    gradient: files are small.
    """
    torch.manual_seed(0)
    layers = {
        "embed": torch.nn.Embedding(33, 128),
        "fc": torch.nn.Linear(128, 32),
        "tanh": torch.nn.Tanh(),
        "head": torch.nn.Linear(32, 3),
    }
    model = torch.nn.Sequential(OrderedDict(layers)).to(dtype)
    optimizer = make(model.parameters())
    for step in range(STEPS + 1):
        tokens = torch.randint(0, 3, (16,))
        loss = torch.nn.functional.cross_entropy(model(tokens).float(), tokens)
        optimizer.zero_grad()
        loss.backward()
        if step < STEPS:
            optimizer.step()
    return model, optimizer


def read_bitsandbytes(state, k):
    import bitsandbytes.functional as bnb

    x = state[f"state{k + 1}"]
    if x.dtype is torch.float32:
        return x
    absmax, qmap = state[f"absmax{k + 1}"], state[f"qmap{k + 1}"]
    return bnb.dequantize_blockwise(x, absmax=absmax, code=qmap, blocksize=256)


def read_torchao(state, k):
    x = state[("exp_avg", "exp_avg_sq")[k]]
    return x.dequantize() if hasattr(x, "dequantize") else x


def read_flashoptim(state, k):
    return state[("exp_avg", "exp_avg_sq")[k]].materialize()


def flashoptim_on_cpu(params, **options):
    """`FlashAdamW` whose codecs run in Triton's interpreter."""
    from flashoptim import optimizers as flash

    def set_data(self, data):
        how = {"signed": self._signed, "sqrt": self._sqrt, "softsign": self._softsign}
        self._data = None
        self._quantized, self._scales = flash.quantize(data, **how)

    for kernel in (flash._triton_quantize_kernel, flash._triton_dequantize_kernel):
        kernel.configs = kernel.configs[:1]  # the interpreter cannot tell which one is faster
    flash._get_sm_count = lambda device=None: 1
    flash._MaybeQuantizedTensor.set_data = set_data
    with mock.patch("torch.cuda.is_available", lambda: True):
        return flash.FlashAdamW(params, fused=False, master_weight_bits=None, **options)


def updates(model, optimizer) -> dict[str, np.ndarray]:
    """Of one more step, at a learning rate of 1."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(1.0) if torch.is_tensor(group["lr"]) else 1.0
    optimizer.step()
    return {name: array(p - before[name]) for name, p in model.named_parameters()}


def array(x: torch.Tensor) -> np.ndarray:
    return x.detach().float().numpy().copy()  # the next step overwrites it


def main():
    import bitsandbytes as bnb
    import torchao.optim as ao

    full, half = torch.float32, torch.bfloat16
    runs = {
        "flashoptim": (flashoptim_on_cpu, half, read_flashoptim),
        "bitsandbytes": (bnb.optim.AdamW8bit, full, read_bitsandbytes),
        "torchao_8bit": (ao.AdamW8bit, full, read_torchao),
        "torchao_4bit": (ao.AdamW4bit, full, read_torchao),
        "torchao_fp8": (ao.AdamWFp8, full, read_torchao),
    }
    about = {
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in PACKAGES},
        "steps": STEPS,
        "stride": STRIDE,
        "sha256 of mu, nu": {},
    }
    samples = {}
    for run, (make, dtype, read) in runs.items():
        how = partial(make, lr=1e-2, weight_decay=0.0)
        model, optimizer = train(how, dtype)
        np.savez_compressed(DATA / f"{run}.npz", **exported(optimizer, model))
        columns = {}
        for name, p in model.named_parameters():
            moments = [array(read(optimizer.state[p], k)) for k in range(2)]
            hashes = [hashlib.sha256(x.tobytes()).hexdigest() for x in moments]
            about["sha256 of mu, nu"][f"{run}.{name}"] = hashes
            columns[name] = [*moments, array(p.grad)]
        for name, x in updates(model, optimizer).items():
            column = [y.ravel()[::STRIDE] for y in (*columns[name], x)]
            samples[f"{run}.{name}"] = np.stack(column)
    np.savez_compressed(DATA / "decoded.npz", **samples)
    (DATA / "about.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
