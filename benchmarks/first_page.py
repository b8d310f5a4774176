"""The README's picture and table: the few numbers that decide, out of what other programs wrote.

python -m benchmarks.first_page
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _io
from benchmarks.quality import training as quality

PICTURE = _io.RESULTS / "first_page.png"
BASE = "optax.adamw"
PEER = "FlashOptim 8-bit"  # of other libraries' formats the nearest to float32, and it is JAX's
OURS = "Budget 5.0"


def table() -> tuple[list[str], list[list[str]]]:
    """Quality, bytes and time of float32, of the best peer and of ours: header and rows."""
    header = ["", f"float32, `{BASE}`", PEER, "`stquant.adamw`, 5 bits"]
    return header, [*_quality(), *_memory(), *_time()]


def _quality() -> list[list[str]]:
    formats = quality.summary(_io.read_json(quality.OUT / "gpt.json"))
    rows = {row["format"]: row for row in formats}
    base, loss = rows["fp32"], statistics.fmean(rows["fp32"]["losses"])
    told = [quality.told(rows[name]["difference"], rows[name]["half"]) for name in (PEER, OURS)]
    bits = [f"{rows[name]['bits']:.3g}" for name in ("fp32", PEER, OURS)]
    seeds = len(base["losses"])
    return [
        [f"validation loss of a small GPT, {seeds} seeds", f"{loss:.4f}", *told],
        ["state, bits per element", *bits],
    ]


def _memory() -> list[list[str]]:
    results = _io.read_json(_io.RESULTS / "memory.json")["results"]
    setting = "cpu | gpt2 | 8 | scanned | float32 | params | {}"
    rows = [results[setting.format(x)] for x in (BASE, "flashoptim-jax", "stquant.adamw 5")]
    names = {"state": "state, GPT-2 small", "peak": "peak of a training step, GPT-2 small"}
    return [
        [name, *(f"{row[key] / 2**20:,.0f} MiB" for row in rows)] for key, name in names.items()
    ]


def _time() -> list[list[str]]:
    runs = _io.read_json(_io.RESULTS / "train_gpt.json")
    step = [f"{1e3 * runs[x]['seconds_per_step']:.0f} ms" for x in (BASE, "stquant.adamw 5.0 bits")]
    found = _io.read_json(_io.RESULTS / "step_in_place.json")["results"]
    setting = {"shapes": "gpt2", "cores": 2, "precision": "budget 5.0"}
    (gpt2,) = [row for row in found if setting.items() <= row.items()]
    update = [
        f"{gpt2['elements'] * gpt2['ns_per_element'][x] / 1e6:.0f} ms" for x in ("optax", "stquant")
    ]
    libraries = _io.read_json(_io.RESULTS / "peers.json")["results"]
    small = {row["name"]: row for row in libraries if row["stream"] == "gpt"}
    both = [small[name] for name in ("FlashOptim flash_adamw", "Budget 5")]
    sizes = runs[BASE]["params"] / 1e6, gpt2["elements"] / 1e6, both[0]["elements"] / 1e6
    names = [f"of {size:.{int(size < 10)}f}M parameters" for size in sizes]
    unknown = "not measured"
    return [
        [f"time of a training step {names[0]}", step[0], unknown, step[1]],
        [f"time of AdamW in a step, in place, {names[1]}", update[0], unknown, update[1]],
        [
            f"time of an update {names[2]}",
            unknown,
            *(f"{1e3 * row['seconds_per_step']:.1f} ms" for row in both),
        ],
    ]


def plot(path: Path = PICTURE) -> Any:
    """Loss curves of the demo's training beside the bytes of its optimizers' states."""
    from matplotlib.figure import Figure

    record = _io.read_json(_io.RESULTS / "train_gpt.json")
    runs = {name: x for name, x in record.items() if name.split()[0] in (BASE, "stquant.adamw")}
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=[1.6, 1])
    for (name, run), width in zip(runs.items(), (5, 2, 1), strict=True):  # the thickest below
        span = max(1, len(run["loss"]) // 20)  # running mean
        smooth = np.convolve(run["loss"], np.full(span, 1 / span), "valid")
        (line,) = curves.plot(np.arange(span, span + smooth.size), smooth, label=name, lw=width)
        size = run["state_bytes"] / 1e6
        label = bars.barh(name, size, color=line.get_color())
        bars.bar_label(label, [f"{size:.1f} MB"], padding=3)
    curves.set(xlabel="step", ylabel="nats per byte", title="training loss of a small GPT")
    curves.legend()
    bars.set(title="bytes of optimizer state", xticks=[])
    bars.margins(x=0.2)  # for the labels
    bars.invert_yaxis()
    bars.spines[["top", "right", "bottom"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=PICTURE)
    plot(parser.parse_args().out)
