"""What the benchmarks count in machine code and in schedules, on some that are written by hand."""

from collections import Counter

import pytest

from benchmarks.gpu import ptxas
from benchmarks.speed import aot_cycles

# A counter may start as zeros, as a move, or as a move by way of two halves.
STARTS = {
    "zeros": ("CS2R R6, SRZ", "1", "0x8"),
    "a move": ("UMOV UR7, 0x100", "0x200", "0x1100"),
    "halves": ("HFMA2.MMA R7, -RZ, RZ, 5.9604644775390625e-08, 0.0001220703125", "0x4", "0x10820"),
}


def pass_over_a_tile(label, start, step, end):
    counter = "UR7" if "UMOV" in start else "R7"
    step = hex(int(step, 0))
    yield start
    yield f"{label}:"
    yield "LDS R1, [R2]"
    yield f"IADD3 {counter}, {counter}, {step}, RZ"
    yield f"ISETP.NE.AND P0, PT, {counter}, {end}, PT"
    yield f"@P0 BRA `({label})"


def disassembly(passes):
    lines = ["MOV R7, R3"]
    for i, start in enumerate(passes):
        lines += pass_over_a_tile(f".L_x_{i}", *STARTS[start])
    lines += [".L_x_9:", "BAR.SYNC 0x0", "@!P1 BRA `(.L_x_9)", "EXIT"]
    return "\n".join(
        line if line.endswith(":") else f"  /*{16 * i:04x}*/   {line} "
        for i, line in enumerate(lines)
    )


def test_instructions():
    """Those of loops as often as they turn, of a loop that waits once."""
    counts = ptxas.executed(disassembly([*STARTS, "zeros"]), (4,))
    turns = 4 * ptxas.TURNS
    found = Counter(CS2R=2, UMOV=1, HFMA2=1, MOV=1, BAR=1, EXIT=1, BRA=turns + 1)
    assert counts == found | Counter(LDS=turns, IADD3=turns, ISETP=turns)


def test_passes_that_are_not_recognized():
    with pytest.raises(AssertionError, match="3 passes over a tile"):
        ptxas.executed(disassembly(STARTS), (4, 5))


def schedule(blocks):
    """A grid's step: a bundle, blocks of the programs after the first loops over planes, each of 8
    bundles, and 5 more."""
    lines = ["{ }", "> { %s1 = sld [smem:[#a]] }"]
    for i in range(len(aot_cycles.COPIES) * len(aot_cycles.WIDTHS)):
        if i == 6:
            for length in blocks:
                lines.append(f"{{ sbr.rel (%p1) target bundleno = {len(lines) + length} }}")
                lines.extend(["{ %v1 = vadd.f32 %v1, %v1 }"] * (length - 1))
        lines.extend(["{ dma.start }"] * 3)
        lines.append(f"{{ sbr.rel (!%p2) target bundleno = {len(lines) - 3} }}")
        lines.extend(["{ }"] * aot_cycles.DELAY)
    lines.extend(["{ sbr.rel target bundleno = 1 }", *["{ }"] * aot_cycles.DELAY])
    return "\n".join(f"  {hex(i)}   :  {line}" for i, line in enumerate(lines))


@pytest.mark.parametrize("coded", [True, False])
def test_cycles(coded):
    blocks = 300, 290, 400, 500, 450
    run = sum(n for n, runs in zip(blocks, aot_cycles.BLOCKS, strict=True) if runs == coded)
    planes = sum(aot_cycles.COPIES) * (sum(aot_cycles.WIDTHS) if coded else aot_cycles.WIDTHS[0])
    assert aot_cycles.cycles(schedule(blocks), coded) == round((6 + run) / 8 + planes, 1)


def test_blocks_that_are_not_recognized():
    with pytest.raises(ValueError, match="zip"):
        aot_cycles.cycles(schedule([300, 290]), True)
