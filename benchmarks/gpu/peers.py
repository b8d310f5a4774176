"""The same step in PyTorch, where it is installed: AdamW fused, and bitsandbytes' with 8 bits."""

import statistics
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from benchmarks.gpu.setting import Setting
from benchmarks.memory import traffic

REPEATS, TRAIN = 15, 10


def torch_optimizers(setting: Setting) -> Iterator[dict[str, Any]]:
    """In a process of their own, since JAX takes most of the card's memory; so they come with
    PyTorch's copies, by which both runs can be compared."""
    if not find_spec("torch"):
        yield {"contender": "torch", "skipped": "not installed"}
        return
    import torch

    device = "cpu" if setting.interpret else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        yield {"contender": "torch", "skipped": "installed without CUDA"}
        return

    def train(step: Callable[[], Any], length: int) -> float:
        """Seconds per step of several, one behind the other."""
        start = time.perf_counter()
        for _ in range(length):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / length

    def median(step: Callable[[], Any]) -> float:
        train(step, 2)  # the state is made
        repeats, length = (1, 1) if setting.interpret else (REPEATS, TRAIN)
        return statistics.median(train(step, length) for _ in range(repeats))

    shapes = setting.shapes("gpt2")
    x = torch.ones(2**18 if setting.interpret else 2**28, device=device)
    y = torch.empty_like(x)
    seconds = median(lambda: y.copy_(x))
    fastest = 2 * x.nbytes / seconds / 1e9
    yield {"operation": "torch copy", "gb_per_second": round(fastest, 2)}
    x = y = None

    def adamw(params):
        return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1, fused=True)

    def adamw_8bit(params):
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(params, lr=1e-3, weight_decay=0.1)

    for name, make in {"torch AdamW, fused": adamw, "bitsandbytes AdamW8bit": adamw_8bit}.items():
        params = [torch.randn(shape, device=device).requires_grad_() for shape in shapes.values()]
        for p in params:
            p.grad = 1e-3 * torch.randn_like(p)
        elements = sum(p.numel() for p in params)
        try:
            optimizer = make(params)
            seconds = median(optimizer.step)
        except ImportError as error:
            yield {"contender": name, "skipped": f"not installed: {error}"}
            continue
        except Exception as error:
            yield {"contender": name, "failed": f"{type(error).__name__}: {str(error)[:1000]}"}
            continue
        state = optimizer.state.values()
        tensors = (value for of_param in state for value in of_param.values())
        # bitsandbytes keeps its map of levels with every parameter: it is read, but only once.
        stored = sum({t.data_ptr(): t.nbytes for t in tensors if torch.is_tensor(t)}.values())
        moved = traffic.step_bytes(stored, 4 * elements, 4 * elements)
        yield {
            "contender": name,
            "elements": elements,
            "ns_per_element": round(1e9 * seconds / elements, 6),
            "state_bytes": stored,
            "least_bytes_per_element": round(moved / elements, 4),
            "gb_per_second": round(moved / seconds / 1e9, 2),
            "share_of_copy": round(moved / seconds / 1e9 / fastest, 4),
        }
