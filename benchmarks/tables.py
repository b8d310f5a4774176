"""Writes the tables of the README and of docs/, from the committed JSON and from the table of
tests/conformance, between their `<!-- name -->` markers.

python -m benchmarks.tables           rewrite the pages
python -m benchmarks.tables --check   exit 1 if one would change
"""

import argparse
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import _io, first_page
from benchmarks.codec import gain, peers
from benchmarks.memory import host, traffic
from benchmarks.memory import training as memory
from benchmarks.quality import training as quality
from tests.conformance import table as conformance

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))
MARKED = re.compile(r"<!-- (\w+) -->\n(?:.*?\n)?<!-- /\1 -->", re.DOTALL)
STREAMS = ("gpt", "vit", "synthetic")
OURS = ((2, 0), (4, 0), (5, 0), (5, 2), (5, 3), (5, 4), (6, 6), (8, 8))


def first_page_() -> str:
    """The few numbers that decide."""
    return _table(*first_page.table()).rstrip("\n")


def _errors(*names: str) -> tuple[dict, list[list[str]]]:
    """Errors of these names on each stream, a row for each format, by bits."""
    record = _io.read_json(_io.RESULTS / "codec.json")
    rows = [row for row in record["results"] if not row.get("window") and row["format"] != "fp32"]
    rows = [row for row in rows if "mu" not in row or (row["mu"], row["nu"]) in OURS]
    errors: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: STREAMS.index(row["stream"])):
        ours = "mu" in row
        label = f"**mu {row['mu']} nu {row['nu']}**" if ours else row["format"]
        errors.setdefault(label, {"bits": row["bits"]})[row["stream"]] = row
    return record, [
        [label, f"{e['bits']:.2f}", *(f"{e[s][name]:.3g}" for s in STREAMS for name in names)]
        for label, e in sorted(errors.items(), key=lambda item: item[1]["bits"])
    ]


def codec() -> str:
    """Error of the update of each format, by bits."""
    record, body = _errors("error")
    return _table(["format", "bits", "GPT", "ViT", "synthetic"], body) + _source(record)


def codec_early() -> str:
    """The same of the first steps."""
    _, body = _errors("error_1_20", "error_21_150")
    spans = "1 to 20", "21 to 150"
    header = [f"{stream}, {span}" for stream in ("GPT", "ViT", "synthetic") for span in spans]
    return _table(["format", "bits", *header], body).rstrip("\n")


def ops() -> str:
    """Operations per element of both programs, by stage."""
    record = _io.read_json(_io.RESULTS / "ops.json")
    both = list(record["operations_per_element"].values())
    stages = sorted(both[0]["by_stage"], key=lambda name: -both[0]["by_stage"][name])
    body = [[name, *(f"{x['by_stage'].get(name, 0):.1f}" for x in both)] for name in stages]
    body.append(["all", *(f"{x['all']:.1f}" for x in both)])
    return _table(["operations per element", *record["operations_per_element"]], body) + _source(
        record
    )


def allocation() -> str:
    """Error of policies and of the best single pair of widths, at equal bytes."""
    record = _io.read_json(_io.RESULTS / "allocation.json")
    told: dict[tuple, dict] = {}
    for row in record["results"]:
        if "pair_error" in row:
            key = row["stream"], row["pair"]
            told.setdefault(key, {"bits": row["bits"], "pair": row["pair_error"]})
            told[key][row["policy"]] = row["error"]
    policies = [k for k in ("STQuant", "Budget") if any(k in errors for errors in told.values())]
    body = []
    for (stream, pair), errors in sorted(told.items(), key=lambda x: STREAMS.index(x[0][0])):
        ratio = f"{errors['pair'] / errors['Budget']:.2f}"
        cells = (f"{errors[k]:.3g}" if k in errors else "" for k in ("pair", *policies))
        body.append([stream, f"{errors['bits']:.2f}", pair, *cells, ratio])
    header = ["stream", "bits", "best pair", "its error", *policies, "pair over Budget"]
    return _table(header, body) + _source(record)


def estimates() -> str:
    """What a policy estimates of a leaf's error over what it is, after step 500."""
    record = _io.read_json(_io.RESULTS / "allocation.json")
    ratios: dict[tuple, list[float]] = {}
    for row in record["results"]:
        first = row["steps"].index(500) + 1
        true, guessed = (row[key][first:] for key in ("error_by_leaf", "estimate_by_leaf"))
        for leaf, width in enumerate(row["widths"][1::2]):  # those the run ended with
            found = [g[leaf] / t[leaf] for g, t in zip(guessed, true, strict=True)]
            coded = "with codes of nu" if width else "without"
            ratios.setdefault((row["stream"], coded), []).extend(found)
    body = []
    for (stream, coded), found in sorted(ratios.items(), key=lambda x: STREAMS.index(x[0][0])):
        near = sum(0.5 <= x <= 2 for x in found) / len(found)
        body.append([stream, coded, f"{statistics.median(found):.2f}", f"{near:.0%}"])
    header = ["stream", "leaves", "estimate over truth, median", "within a factor of 2"]
    return _table(header, body) + _source(record)


def step_in_place() -> str:
    """Time of whole AdamW steps, everything donated."""
    return _steps("step_in_place.json")


def step() -> str:
    """Time of an update against fp32 Optax in the same run."""
    return _steps("step.json")


def step_peers() -> str:
    """AdamW steps of other libraries on a CPU, beside ours."""
    record = _io.read_json(_io.RESULTS / "step_peers.json")
    told: dict[str, dict[int, str]] = {}
    for row in record["results"]:
        name = f"{row['name']}, {row['version']}" if "version" in row else row["name"]
        ns = row.get("ns_per_element")
        told.setdefault(name, {})[row["cores"]] = "failed" if ns is None else f"{ns:.1f}"
        if "optax" in row:
            told.setdefault("optax.adamw", {})[row["cores"]] = f"{row['optax']:.1f}"
    body = [[name, *(ns.get(cores, "") for cores in (1, 2))] for name, ns in told.items()]
    return _table(["AdamW, ns per element", "1 core", "2 cores"], body) + _source(record)


def xla_gpu() -> str:
    """What XLA makes of its backend for GPUs, without one."""
    record = _io.read_json(_io.RESULTS / "xla_gpu.json")
    body = [
        [
            row["card"],
            f"{row['scratch_bytes'] >> 20}",
            *(str(row[key]) for key in ("kernels", "exact", "copies", "waits")),
            f"{row['bytes_per_element']:.0f}",
            f"{row['milliseconds']:.1f}",
            f"{row['temporary_bytes'] / 2**20:.0f}",
            f"{row['compile_seconds']:.0f}",
        ]
        for row in record["results"]
    ]
    header = ["card", "scratch MiB", "kernels", "exact", "copies", "waits", "bytes an element"]
    header += ["ms", "temporaries MiB", "compile s"]
    return _table(header, body) + _source(record)


def _steps(name: str) -> str:
    record = _io.read_json(_io.RESULTS / name)
    body = [
        [
            row["shapes"],
            str(row["cores"]),
            row["precision"],
            f"{row['ns_per_element']['stquant']:.1f}",
            f"{row['ns_per_element']['optax']:.1f}",
            f"{row['ratio']:.2f}",
        ]
        for row in record["results"]
        if row["shapes"] == "gpt2" or row["precision"] in ("budget 5.0", "budget 3.0", "mu 5 nu 0")
    ]
    header = ["shapes", "cores", "precision", "ns per element", "Optax fp32", "ratio"]
    return _table(header, body) + _source(record)


def policy() -> str:
    """Milliseconds of a decision and of a move to another plan, against those of a step."""
    record = _io.read_json(_io.RESULTS / "policy.json")
    body = []
    for name, found in record["shapes"].items():
        seconds = found["step_seconds"]["None"], found["decide_seconds"]
        seconds += tuple(found["repack"]["seconds"][part] for part in ("none", "tenth", "all"))
        cells = (f"{1e3 * x:.3g}" for x in seconds)
        body.append([name, str(found["slots"]), *cells, f"{found['share']['100']:.2%}"])
    header = ["shapes", "slots", "step, ms", "decide", "repack: none", "a tenth", "all"]
    return _table([*header, "share at interval 100"], body) + _source(record)


def profile(largest: int = 12) -> str:
    """Where the time of one update goes, traced on one core."""
    record = _io.read_json(_io.RESULTS / "step_profile.json")
    (row,) = record["results"]
    stages = sorted(row["profile"]["stages"].items(), key=lambda item: -item[1])
    whole = sum(ns for _, ns in stages)
    named, rest = stages[:largest], stages[largest:]
    named.append(("all else", sum(ns for _, ns in rest)))
    body = [[stage, f"{ns:.2f}", f"{ns / whole:.0%}"] for stage, ns in named]
    return _table(["stage", "ns per element", "share"], body) + _source(record)


def compile_() -> str:
    """Seconds to compile the update for GPT-2 small, and what the executable needs."""
    record = _io.read_json(_io.RESULTS / "compile.json")
    body = [
        [
            row["transformation"],
            *(f"{row['seconds'][k]:.2f}" for k in ("trace", "lower", "compile", "total")),
            f"{row['temporaries_over_gradient']:.2f}",
            str(row.get("arena_copies", "-")),
        ]
        for row in record["results"]
    ]
    header = ["update", "trace s", "lower s", "compile s", "total s", "temporaries", "arena copies"]
    return _table(header, body) + _source(record)


def demo() -> str:
    """The demo's outcome at each budget, and the noise between seeds of fp32."""
    record = _io.read_json(_io.RESULTS / "train_gpt.json")
    runs = {name: x for name, x in record.items() if isinstance(x, dict) and "val_loss" in x}
    base = runs["optax.adamw"]
    body = [
        [
            name,
            f"{run['val_loss']:.4f}",
            f"{run['state_bytes']:,}",
            f"{run['state_bytes'] / base['state_bytes']:.4f}",
            f"{run['seconds_per_step']:.3f}",
        ]
        for name, run in runs.items()
    ]
    seeds = ", ".join(f"{loss:.4f}" for loss in record["val_loss_by_seed"])
    return (
        _table(["optimizer", "validation loss", "state bytes", "ratio", "s per step"], body)
        + "\nSOLO with the b1 its authors advise at these bits (0.8, 0.527), the others with 0.9. "
        + f"fp32 over seeds: {seeds}. {record['corpus_bytes']:,} bytes of corpus, "
        + f"{record['device']}, {record['cores']} cores, python {record['python']}, "
        + f"jax {record['jax']}, optax {record['optax']}, {record['date']}."
    )


def wrapped() -> str:
    """Optimizers of Optax with their state in float32 and at 8 bits: validation loss."""
    record = _io.read_json(_io.RESULTS / "wrapped.json")
    body = []
    for name, runs in record["results"].items():
        losses = {kind: [run["val_loss"] for run in runs[kind]] for kind in ("optax", "quantized")}
        pairs = list(zip(losses["optax"], losses["quantized"], strict=False))  # more of the former
        noise = max(losses["optax"]) - min(losses["optax"])
        ours, theirs = (runs[kind][0]["state_bytes"] for kind in ("quantized", "optax"))
        body.append(
            [
                name,
                *(" / ".join(f"{x:.4f}" for x in losses[kind]) for kind in losses),
                f"{sum(b - a for a, b in pairs) / len(pairs):+.4f}",
                f"{noise:.4f}" if len(losses["optax"]) > 1 else "",
                f"{32 * ours / theirs:.2f}",
            ]
        )
    header = [
        "optimizer",
        "loss by seed, float32",
        "quantized",
        "difference",
        "between seeds",
        "bits",
    ]
    return _table(header, body) + _source(record)


def quality_() -> str:
    """Validation loss of every format less that of float32, on three tasks."""
    records = _quality()
    cells: dict[str, dict[str, str]] = {}
    for task, record in records.items():
        for row in quality.summary(record):
            here = cells.setdefault(row["format"], {"bits": f"{row['bits']:.2f}"})
            loss = statistics.fmean(row["losses"])
            told = quality.told(row["difference"], row["half"])
            here[task] = f"{loss:.4f}" if row["format"] == "fp32" else told
            here[f"{task} n"] = str(len(row["losses"]))
    body = [
        [
            name,
            here["bits"],
            *(f"{here[task]} ({here[f'{task} n']})" if task in here else "" for task in records),
        ]
        for name, here in cells.items()
    ]
    header = ["format", "bits", *records]
    return _table(header, body) + _source(*records.values())


def versus() -> str:
    """Ours against every format of another library that takes more bits, on three tasks."""
    records = _quality()
    bits = {row["format"]: row["bits"] for row in quality.summary(records["gpt"])}
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for task, record in records.items():
        for row in quality.versus(record):
            told = quality.told(row["difference"], row["half"])
            here = cells.setdefault((row["format"], row["ours"]), {})
            here[task] = f"{told} ({row['seeds']})"
    body = [
        [theirs, f"{bits[theirs]:.2f}", ours, f"{bits[ours]:.2f}"]
        + [here.get(task, "") for task in records]
        for (theirs, ours), here in cells.items()
    ]
    header = ["format", "bits", "ours", "bits", *records]
    return _table(header, body) + _source(*records.values())


def rates() -> str:
    """The same on the GPT, at the same learning rate as float32, for every rate."""
    record = _quality()["gpt"]
    found = quality.by_rate(record)
    columns = sorted(found["fp32"])
    body = [
        [name, *(quality.told(*here[lr]) if lr in here else "" for lr in columns)]
        for name, here in found.items()
        if name != "fp32"
    ]
    return _table(["format", *(f"{lr:g}" for lr in columns)], body) + _source(record)


def gain_() -> str:
    """Length of the update along the exact one, by steps of a training run."""
    record = _io.read_json(_io.RESULTS / "gain.json")
    body = [
        [row["stream"], row["format"], *(f"{span['gain']:.3f}" for span in row["spans"])]
        for row in record["results"]
    ]
    header = ["stream", "format", *("{} to {}".format(*span) for span in gain.SPANS)]
    return _table(header, body) + _source(record)


def questions() -> str:
    """What further formats answer about the design, on the GPT."""
    record = _quality()["gpt"]
    rate = quality.best_rate(record["results"], "fp32", quality.complete(record["results"], "fp32"))
    body = [
        [
            question if i == 0 else "",
            row["format"],
            f"{quality.told(row['difference'], row['half'])} ({row['seeds']})",
        ]
        for question, rows in quality.answers(record).items()
        for i, row in enumerate(rows)
    ]
    return (
        _table(["question", "format", "loss minus fp32"], body)
        + _source(record)
        + f" Rate {rate:g}."
    )


def memory_() -> str:
    """Bytes of a whole training step, and how much of what the state saves the peak saves."""
    record = _io.read_json(_io.RESULTS / "memory.json")
    body = []
    for setting, found in memory.settings(record["results"]):
        platform, model, batch, layers, params, first = setting
        special = [params] * (params != "float32") + ["state first"] * (first == "state")
        of = ", ".join([model, layers, *special])
        base = found.get(memory.BASE, {})
        for name, row in found.items():
            if "peak" not in row or "peak" not in base:
                continue
            cells = [f"{row[key] / 2**20:,.0f}" for key in ("state", "temporaries", "peak")]
            share = "" if name == memory.BASE else f"{memory.realized(row, base):.1%}"
            body.append([platform, of, str(batch), name, *cells, share])
    header = ["compiled for", "model", "batch", "optimizer", "state, MiB", "temporaries", "peak"]
    return _table([*header, "of the saving"], body) + _source(record)


def host_() -> str:
    """Peak of resident memory of a training process, by where its program comes from."""
    record = _io.read_json(_io.RESULTS / "host.json")
    rows = {(row["optimizer"], row["program"]): row for row in record["results"]}
    body = [
        [*key, *(f"{row[moment]:,}" for moment in host.MOMENTS)]
        + [f"{row['end'] / rows[memory.BASE, key[1]]['end']:.2f}"]
        for key, row in rows.items()
    ]
    header = ["optimizer", "program", "before it, MB", "with it", "after steps", "over Optax's"]
    return _table(header, body) + _source(record)


def compile_parts_() -> str:
    """What compiling a training step costs, by parts."""
    record = _io.read_json(_io.RESULTS / "compile_parts.json")
    models = {"four": "four leaves", "gpt2": "GPT-2 small", "many": "1200 leaves"}
    body = [
        [models[row["shapes"]], row["part"]]
        + [f"{row[name]:.1f}" for name in ("trace", "lower", "compile", "total")]
        + [f"{row['instructions']:,.0f}", f"{row['host_megabytes']:,.0f}"]
        for row in record["results"]
    ]
    header = ["model", "step", "trace s", "lower s", "compile s", "total s", "instructions"]
    return _table([*header, "host MiB"], body) + _source(record)


def eager_() -> str:
    """Calls outside of jit."""
    record = _io.read_json(_io.RESULTS / "eager.json")
    body = [
        [row["optimizer"], row["call"], f"{row['first_ms']:,.0f}", f"{row['ms']:.1f}"]
        + [str(row["compilations"])]
        for row in record["results"]
    ]
    header = ["optimizer", "call", "first, ms", "later, ms", "compilations in later ones"]
    return _table(header, body) + _source(record)


def peers_() -> str:
    """Error and time of the other libraries' own optimizers, and the least error of ours in no more
    bits."""
    record, body = _io.read_json(_io.RESULTS / "peers.json"), []
    for stream in dict.fromkeys(row["stream"] for row in record["results"]):
        for pair in peers.standing(record["results"], stream):
            theirs, ours = pair["library"], pair["ours"]
            cells = [stream, theirs["name"], f"{theirs['bits']:.2f}", *_error_and_time(theirs)]
            if ours:
                ratio = theirs["error"] / ours["error"]
                cells += [ours["name"], f"{ours['bits_held']:.2f}", *_error_and_time(ours)]
                cells.append(f"{ratio:.1f}")
            body.append(cells + [""] * (10 - len(cells)))
    told = ["bits", "error", "ms"]
    return _table(["stream", "optimizer", *told, "ours", *told, "ratio"], body) + _source(record)


def _error_and_time(row: dict) -> tuple[str, str]:
    seconds = row["seconds_per_step"]
    return f"{row['error']:.3g}", "" if seconds is None else f"{1e3 * seconds:.2g}"


def _quality() -> dict[str, dict]:
    records = {name: _io.read_json(quality.OUT / f"{name}.json") for name in quality.SMALL}
    return {name: record for name, record in records.items() if record}


def switch() -> str:
    """Validation losses of runs that changed their optimizer, by seed."""
    record = _io.read_json(_io.RESULTS / "switch.json")
    body = [
        [str(row["seed"]), *(f"{row[kind]['val_loss']:.4f}" for kind in ("optax", "switched"))]
        for row in record["results"]
    ]
    return _table(["seed", "optax.adamw", "switched"], body) + _source(record)


def pod() -> str:
    """What each chip of a slice holds, as its compiler lays it out."""
    record = _io.read_json(_io.RESULTS / "pod.json")
    held, cfg = record["per_device"], record["config"]
    names = {
        "parameter_bytes": "parameters, float32",
        "state_bytes": "optimizer state",
        "plan_bytes": "... by `stquant.plan`",
        "float32_bytes": "... of float32 Adam",
        "temporary_bytes": "temporaries of a step",
    }
    body = [[name, f"{held[key]:,}"] for key, name in names.items()]
    setting = (
        f"{held['parameters']:,} parameters, {cfg['bits']} bits, {cfg['fsdp']} x {cfg['tensor']} "
        f"chips by fsdp and tensor, {cfg['batch']} sequences of {cfg['length']}; libtpu "
        f"{held['libtpu']}."
    )
    header = [f"on each of {held['chips']} chips, {cfg['aot']}", "bytes"]
    return _table(header, body) + _source(record) + "\n" + setting


def sharded() -> str:
    """The same training on many meshes."""
    record = _io.read_json(_io.RESULTS / "sharded.json")
    header = ["mesh", "bits on a device", "differing: step 25", "step 50", "of elements"]
    body = [
        [
            name,
            f"{run['bits']:.2f}",
            str(run["differing_half_way"]),
            str(run["differing_at_the_end"]),
            f"{run['elements']:,}",
        ]
        for name, run in record["meshes"].items()
    ]
    return _table(header, body) + _source(record)


def faults() -> str:
    """Kills, and what became of the training."""
    record = _io.read_json(_io.RESULTS / "faults.json")
    names = {
        "kills": "kills",
        "during_a_save": "... while a checkpoint was being written",
        "restarts": "restarts from the newest complete checkpoint",
        "lost": "complete checkpoints lost",
        "arrays": "arrays in the last checkpoint",
        "differing": "... that differ from those of an undisturbed run",
    }
    found = {
        **record,
        "restarts": sum(hit["resumed_from"] == hit["before"] for hit in record["hits"]),
        "lost": sum(hit["complete"] < hit["before"] for hit in record["hits"]),
        "differing": len(record["differing"]),
    }
    body = [[name, str(found[key])] for key, name in names.items()]
    return _table(["a training process of two devices", "number"], body) + _source(record)


def _table(header: list[str], body: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _source(*records: dict) -> str:
    """What made a table's records, on what machine, with which versions and when: a line for all
    that are alike."""
    lines = []
    for env in (record["environment"] for record in records):
        command = " ".join(env["command"].split()[:3])
        versions = ", ".join(f"{name} {env[name]}" for name in ("python", "jax", "optax"))
        machine = f"{env['cpu']}, {env['cores']} cores"
        lines.append(f"\n`{command}`, {machine}, {versions}, {env['date'][:10]}.")
    return "".join(dict.fromkeys(lines))


MAKERS: dict[str, Callable[[], str]] = {
    "first_page": first_page_,
    "ops": ops,
    "codec": codec,
    "codec_early": codec_early,
    "allocation": allocation,
    "estimates": estimates,
    "step_in_place": step_in_place,
    "step": step,
    "step_peers": step_peers,
    "xla_gpu": xla_gpu,
    "profile": profile,
    "policy": policy,
    "compile": compile_,
    "demo": demo,
    "switch": switch,
    "wrapped": wrapped,
    "quality": quality_,
    "versus": versus,
    "rates": rates,
    "gain": gain_,
    "questions": questions,
    "memory": memory_,
    "host": host_,
    "compile_parts": compile_parts_,
    "eager": eager_,
    "peers": peers_,
    "pod": pod,
    "faults": faults,
    "sharded": sharded,
    "conformance": conformance.render,
    **traffic.TABLES,
}


def render(text: str) -> str:
    """A page with every table between its markers made anew."""

    def made(found: re.Match) -> str:
        name = found[1]
        if name not in MAKERS:
            raise ValueError(f"<!-- {name} --> is no table: expected one of {', '.join(MAKERS)}")
        return f"<!-- {name} -->\n{MAKERS[name]()}\n<!-- /{name} -->"

    return MARKED.sub(made, text)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only compare, exit 1 if not equal")
    args = parser.parse_args()
    for page in PAGES:
        old = page.read_text()
        new = render(old)
        if args.check and old != new:
            sys.exit(f"{page} differs from benchmarks/results: run python -m benchmarks.tables")
        page.write_text(new)


if __name__ == "__main__":
    main()
