"""What there is to measure, what it takes and which table of the documentation it makes.

    python -m benchmarks

Times are of two cores and a whole run, seconds or minutes or hours where nobody has measured them.
"""

from typing import NamedTuple

from rich.console import Console
from rich.table import Column, Table


class Benchmark(NamedTuple):
    """A module of this folder that runs."""

    module: str
    answers: str
    takes: str  # time; what it needs beside the extra `benchmarks`
    tables: tuple[str, ...] = ()  # between whose markers `benchmarks.tables` puts its figures


BENCHMARKS = (
    Benchmark(
        "quality.training",
        "does training suffer, over rates and seeds",
        "hours",
        ("quality", "versus", "rates", "questions"),
    ),
    Benchmark("quality.switch", "another optimizer in the middle of a run", "minutes", ("switch",)),
    Benchmark("quality.wrapped", "Optax's optimizers at 8 bits", "minutes", ("wrapped",)),
    Benchmark("codec.streams", "gradients to measure codecs on", "minutes"),
    Benchmark("codec.formats", "other libraries' formats, listed or checked", "seconds"),
    Benchmark("codec.closed_loop", "error of the update, by bits", "minutes", ("codec",)),
    Benchmark("codec.gain", "how long steps are", "minutes", ("gain",)),
    Benchmark(
        "codec.allocation", "does moving precision pay", "40 minutes", ("allocation", "estimates")
    ),
    Benchmark(
        "codec.peers", "other libraries on the same gradients", "minutes; the libraries", ("peers",)
    ),
    Benchmark(
        "codec.peer_states", "states of PyTorch's optimizers, for tests", "seconds; the libraries"
    ),
    Benchmark("codec.fuzz", "random runs against float64", "--minutes; tests"),
    Benchmark("speed.step", "time of an update", "minutes", ("step", "profile")),
    Benchmark("speed.peers", "the same of PyTorch's optimizers", "minutes", ("step_peers",)),
    Benchmark("speed.policy", "time of a decision and of a repack", "minutes", ("policy",)),
    Benchmark("speed.compile", "what XLA makes of an update", "minutes", ("compile",)),
    Benchmark(
        "speed.compile_parts", "what compiling costs, by parts", "minutes", ("compile_parts",)
    ),
    Benchmark("speed.eager", "calls outside of jit", "minutes", ("eager",)),
    Benchmark("speed.ops", "operations per element", "seconds"),
    Benchmark("speed.aot", "programs for TPUs that are not there", "minutes; aot", ("programs",)),
    Benchmark("speed.aot_cycles", "cycles of the TPU kernel", "a minute; aot", ("cycles",)),
    Benchmark("memory.training", "bytes of a whole training step", "minutes; aot", ("memory",)),
    Benchmark("memory.host", "the most that a process takes", "minutes", ("host",)),
    Benchmark("distributed.sharded", "many meshes, the same bits", "minutes", ("sharded",)),
    Benchmark("distributed.faults", "training that is killed", "five minutes", ("faults",)),
    Benchmark("gpu.suite", "all that a card tells of the kernels", "eight minutes; a GPU"),
    Benchmark(
        "gpu.ptxas",
        "what Nvidia's assembler makes of them",
        "minutes; `make ptxas` brings the assembler",
        ("arithmetic",),
    ),
    Benchmark(
        "gpu.xla",
        "what XLA makes of its backend for GPUs",
        "minutes; `make ptxas` brings the compiler",
        ("xla_gpu",),
    ),
    Benchmark("first_page", "the README's picture and table", "seconds", ("first_page",)),
    Benchmark("tables", "writes all tables from the JSON", "seconds"),
)


def main():
    table = Table(Column("python -m benchmarks.", no_wrap=True), "answers", "takes", "tables")
    folder = None
    for x in BENCHMARKS:
        if folder not in (None, x.module.rpartition(".")[0]):
            table.add_section()
        folder = x.module.rpartition(".")[0]
        table.add_row(x.module, x.answers, x.takes, ", ".join(x.tables))
    console = Console()
    console.print(table)
    console.print("Each has --help, and writes its figures to benchmarks/results.")


if __name__ == "__main__":
    main()
