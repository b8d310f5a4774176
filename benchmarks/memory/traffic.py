"""Bytes that one update must move through memory, and what each backend moves beside them.

On an accelerator these are the floor of an update's time: docs/explanation/kernels.md has tables,
`benchmarks.gpu.suite` measures against them.
"""

from collections.abc import Callable, Iterator

from benchmarks import _io
from benchmarks.shapes import SETS, size
from stquant_jax.storage.planes import GROUP, TILE

BACKENDS = {"xla": "XLA loop", "pallas_tpu": "TPU kernel", "pallas_gpu": "GPU kernel"}
ADAM = 4 + 4  # m and v in float32
DTYPES = {4: "float32", 2: "bfloat16"}
# Vendors' nominal memory bandwidths, bytes per second; the page says whose.
H100 = {"processors": 132, "hertz": 1.98e9}  # the SXM's, at its highest clock
CHIPS = {"H100 SXM": 3.35e12, "TPU v5e": 0.82e12, "TPU v6e": 1.6e12, "TPU v5p": 2.77e12}


def stored(mu: float, nu: float) -> float:
    """Bytes of state per element of a whole tile, with codes of these widths.

    A group of 32 has a byte for mu's scale and two for nu's; a tile of 32 x 128 has a byte for
    each of its 32 rows.
    """
    return (mu + nu) / 8 + (1 + 2) / GROUP + GROUP / TILE


def stored_all_in(bits: float) -> float:
    """Bytes of state per element of a budget, all-in bits of each of the two moments."""
    return 2 * bits / 8


def step_bytes(stored: float, gradient: float = 4, param: float | None = None) -> float:
    """Bytes that one update must move: everything is read once and written once.

        update alone     stored + gradient read,            stored + update written
        update applied   stored + gradient + param read,    stored + param written

    Each number is bytes per element, or of a whole tree. Float32 Adam stores 8: its update moves
    24, and AdamW applied in the same program 28.

    Args:
      stored: of state.
      gradient: of gradients; updates have their dtype.
      param: of parameters, where the update is applied to them in the same pass.
    """
    return 2 * stored + gradient + (gradient if param is None else 2 * param)


def extra_bytes(backend: str) -> float:
    """Bytes per element that a backend moves beside `step_bytes`, for a leaf of whole tiles.

    * XLA: nothing. What the loop carries from one operation to the next is a chunk at a time, in
      cache.
    * TPU: rows of nu are bytes in the state and int32 in the kernel; XLA converts them before and
      after.
    * Both kernels: up to 16 statistics of each tile are written, and tallied by XLA.
    """
    statistics = 2 * 16 * 4 / TILE
    if backend == "xla":
        return 0.0
    if backend == "pallas_tpu":
        return (2 * (1 + 4) + 2 * 4 - 2 * 1) * GROUP / TILE + statistics
    if backend == "pallas_gpu":
        return statistics
    raise ValueError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}")


def staged_bytes(gradient: float = 4, param: float | None = None) -> float:
    """Bytes per element that a kernel's leaf costs more if it is first laid out tile by tile: what
    goes in and what comes out is read and written once more."""
    out = gradient if param is None else param
    return 2 * (gradient + (param or 0) + out)


def _cases() -> Iterator[tuple[float, int, int | None]]:
    """All-in bits, bytes of a gradient, bytes of a parameter if the update is applied."""
    for bits in (5.0, 3.5):
        for gradient in DTYPES:
            yield bits, gradient, None
            yield bits, gradient, gradient


def _table(header: list[str], body: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bytes_table() -> str:
    """Bytes per element, by backend."""
    body = []
    for bits, gradient, param in _cases():
        least = step_bytes(stored_all_in(bits), gradient, param)
        moved = [least + extra_bytes(backend) for backend in BACKENDS]
        adam = step_bytes(ADAM, gradient, param)
        what = "update" if param is None else "update applied"
        numbers = [f"{x:.3f}" for x in (least, *moved, adam)]
        body.append([f"{bits:g}", DTYPES[gradient], what, *numbers])
    header = ["bits", "gradients", "", "must move", *BACKENDS.values(), "fp32 Adam"]
    return _table(header, body)


def time_table() -> str:
    """Milliseconds that the bytes which must move take at nominal bandwidth, GPT-2 small."""
    elements = size(SETS["gpt2"])
    body = []
    for bits, gradient, param in _cases():
        moved = elements * step_bytes(stored_all_in(bits), gradient, param)
        what = "update" if param is None else "update applied"
        times = [f"{1e3 * moved / bandwidth:.3f}" for bandwidth in CHIPS.values()]
        body.append([f"{bits:g}", DTYPES[gradient], what, *times])
    moved = elements * step_bytes(ADAM)
    times = [f"{1e3 * moved / bandwidth:.3f}" for bandwidth in CHIPS.values()]
    body.append(["fp32 Adam", DTYPES[4], "update", *times])
    return _table(["bits", "gradients", "", *(f"{chip}, ms" for chip in CHIPS)], body)


def arithmetic_table() -> str:
    """What the GPU kernel executes per element, from its machine code, and the time it takes at
    least; of whole tiles of GPT-2 small on an H100."""
    tiles = size(SETS["gpt2"]) / TILE
    rate = H100["processors"] * H100["hertz"]
    body = []
    for kernel, found in _io.read_json(_io.RESULTS / "ptxas.json")["kernels"].items():
        cycles = found["least_cycles_per_tile"]
        instructions = found["instructions_per_element"]["all"]
        row = [kernel, f"{instructions:.0f}", str(cycles), f"{1e3 * tiles * cycles / rate:.2f}"]
        body.append(row)
    return _table(["GPU kernel", "instructions per element", "cycles per tile", "H100, ms"], body)


def cycles_table() -> str:
    """Cycles of the TPU kernel's schedule per tile, beside what its bytes take."""
    body = []
    for kernel, x in _io.read_json(_io.RESULTS / "aot_cycles.json")["kernels"].items():
        times = [x[name] for name in ("ns_per_tile", "ns_of_bytes", "ns_of_float32_adam")]
        sizes = [f"{x['vmem_bytes'] / 2**20:.1f}", f"{x['code_bytes'] / 1e3:.0f}"]
        cycles = f"{x['cycles_per_tile']:.0f}"
        body.append([kernel, cycles, *(str(t or "") for t in times), *sizes])
    header = ["TPU kernel", "cycles per tile", "ns", "bytes, ns", "fp32 Adam's bytes, ns"]
    return _table([*header, "VMEM, MiB", "code, kB"], body)


def programs_table() -> str:
    """What the TPU's programs cost before they run, as `benchmarks.speed.aot` found."""
    body = []
    for model, chips in _io.read_json(_io.RESULTS / "aot.json")["programs"].items():
        for chip, x in chips.items():
            seconds = [f"{x[name]:.1f}" for name in ("lower_s", "compile_s")]
            code = f"{x['code_bytes'] / 1e6:.1f}"
            temporaries, copies = f"{x['temporaries']:.3f}", str(x["arena_copies"])
            kernels = [str(x[name]) for name in ("leaves", "kernels")]
            body.append([model, chip, *kernels, *seconds, code, temporaries, copies])
    header = ["model", "chip", "leaves", "kernels", "lower, s", "compile, s", "code, MB"]
    return _table([*header, "temporaries / gradients", "arena copies"], body)


TABLES: dict[str, Callable[[], str]] = {
    "bytes": bytes_table,
    "times": time_table,
    "arithmetic": arithmetic_table,
    "cycles": cycles_table,
    "programs": programs_table,
}
