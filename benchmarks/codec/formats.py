"""What other libraries store for Adam, written from their formulas, to be measured in one loop.

A format is two codecs, one per moment. Each step decodes, advances and encodes again,

    m = b1 decode(mu) + (1 - b1) g            mu' = encode(m)
    v = b2 decode(nu) + (1 - b2) g^2          nu' = encode(v)
    u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

so that the update reads the new moments before they are rounded, as all of the libraries do, and
the rounding comes back one step later. Every leaf is quantized here, whatever its size, where the
libraries leave small ones (bitsandbytes, torchao: under 4096 elements) or ragged ones (torchao)
in float32. Blocks run over the flattened leaf; the last may be short.

`python -m benchmarks.codec.formats` lists the formats; with `--check` it compares the codecs with
the libraries themselves (on a CPU), which need ``pip install torch torchao bitsandbytes
flashoptim-jax solow``. Compared, with 2^18 normal, log-normal and zero values each: bitsandbytes
0.50.2, torchao 0.18.0, flashoptim-jax 0.1.0, solow 0.2.0 (with torch 2.13.0).
"""

import argparse
import math
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

B1, B2, EPS = 0.9, 0.999, 1e-8


class Codec(Protocol):
    """A lossy code of one leaf's moment; the first array of a code has the leaf's shape."""

    def bits(self, n: int) -> float:
        """Bits that a leaf of n elements takes, scales counted."""

    def encode(self, x: jax.Array, noise: jax.Array) -> tuple[jax.Array, ...]:
        """The code of x; `noise` is uniform in [0, 1), like x in shape, for who rounds with it."""

    def decode(self, code: tuple[jax.Array, ...]) -> jax.Array:
        """What the next step reads."""


def to_blocks(x: jax.Array, size: int) -> jax.Array:
    """[*shape] -> [ceil(n / size), size], flattened and filled up with zeros."""
    return jnp.pad(x.ravel(), (0, -x.size % size)).reshape(-1, size)


def from_blocks(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return blocks.ravel()[: math.prod(shape)].reshape(shape)


def dynamic_map(bits: int, signed: bool) -> np.ndarray:
    """Dynamic exponent: in each decade below 1, twice as many levels as in the one beneath.

    Decade i of bits - 1 holds the midpoints of 2^i (unsigned: 2^(i+1)) equal cells of [.1, 1],
    times 10^(i - bits + 2); 0 and 1 complete the 2^bits levels. Dettmers 2015, arXiv 1511.04561.
    """
    levels = [0.0, 1.0]
    for i in range(bits - 1):
        edges = np.linspace(0.1, 1, (2**i if signed else 2 ** (i + 1)) + 1)
        decade = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - bits + 2)
        levels += [*decade, *(-decade if signed else ())]
    return np.sort(levels).astype(np.float32)


# No zero: a v of zero would divide by eps alone. Li et al. 2023, arXiv 2309.01507.
LINEAR_4BIT = (np.arange(1, 17) / 16).astype(np.float32)

# Quantiles of a normal distribution with an exact zero. Dettmers et al. 2023, arXiv 2305.14314.
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
    + [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
    + [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
    + [0.7229568362236023, 1.0],
    np.float32,
)


@dataclass(frozen=True, eq=False)
class Lookup:
    """``x ~ scale * levels[code]``, scale = max |x| of the block in float32, nearest level.

    Checked: levels, codes and decoded values equal torchao's `OptimState4bit` and bitsandbytes'
    `create_dynamic_map`, `quantize_blockwise`, `dequantize_blockwise` (8 bits, both signs), but for
    one tie in 2^18. On a CPU bitsandbytes' float32 kernel is coarser than its own other paths near
    zero (0 becomes 2e-5 of the scale), so the check takes the path for other dtypes. Left out: the
    CUDA optimizer keeps the sign of an m that would round to zero.
    """

    levels: np.ndarray
    block: int

    def bits(self, n: int) -> float:
        return n * math.log2(len(self.levels)) + 32 * math.ceil(n / self.block)

    def encode(self, x, noise):
        blocks = to_blocks(x, self.block)
        scale = jnp.maximum(jnp.max(jnp.abs(blocks), axis=1, keepdims=True), 1e-12)
        middles = jnp.asarray((self.levels[1:] + self.levels[:-1]) / 2)
        method = "compare_all" if len(middles) < 16 else "scan"
        code = jnp.searchsorted(middles, blocks / scale, side="right", method=method)
        return from_blocks(code.astype(jnp.uint8), x.shape), scale

    def decode(self, code):
        blocks = jnp.asarray(self.levels)[to_blocks(code[0], self.block)] * code[1]
        return from_blocks(blocks, code[0].shape)


@dataclass(frozen=True)
class Softsign:
    """FlashOptim's first moment: ``2y / (1 + |y|)`` in 1/127, y = x / max |x|, scale in float16.

    arXiv 2602.23349. Checked: codes and decoded values equal those of flashoptim-jax's
    `quantize_momentum` and `dequantize_momentum`.
    """

    block: int = 32

    def bits(self, n: int) -> float:
        return 8 * n + 16 * math.ceil(n / self.block)

    def encode(self, x, noise):
        blocks = to_blocks(x, self.block)
        scale = jnp.max(jnp.abs(blocks), axis=1, keepdims=True)
        y = blocks / jnp.where(scale > 0, scale, 1)
        code = jnp.floor(127 * 2 * y / (1 + jnp.abs(y)) + 0.5).astype(jnp.int8)
        return from_blocks(code, x.shape), scale.astype(jnp.float16)

    def decode(self, code):
        y = to_blocks(code[0], self.block).astype(jnp.float32) / 127
        return from_blocks(y / (2 - jnp.abs(y)) * code[1].astype(jnp.float32), code[0].shape)


@dataclass(frozen=True)
class LinearRoot:
    """FlashOptim's second moment: ``sqrt(v) ~ scale * code / 255``, scale in float16.

    arXiv 2602.23349. Checked like `Softsign`, against `quantize_variance`.
    """

    block: int = 32

    def bits(self, n: int) -> float:
        return 8 * n + 16 * math.ceil(n / self.block)

    def encode(self, x, noise):
        blocks = jnp.sqrt(to_blocks(x, self.block))
        scale = jnp.max(blocks, axis=1, keepdims=True)
        code = jnp.floor(255 * (blocks / jnp.where(scale > 0, scale, 1)) + 0.5)
        return from_blocks(code.astype(jnp.uint8), x.shape), scale.astype(jnp.float16)

    def decode(self, code):
        root = to_blocks(code[0], self.block).astype(jnp.float32) / 255
        return from_blocks((root * code[1].astype(jnp.float32)) ** 2, code[0].shape)


@dataclass(frozen=True)
class Qema:
    """SOLO's second moment: ``v ~ D alpha^code``, D the block's maximum, stochastic rounding.

    alpha = x_p^(1/N), N = 2^b - 1, x_p the p-quantile of v / D; code = clip(round(log(v / D) /
    log(alpha) + U[-1/2, 1/2)), 0, N). D and alpha in float32. arXiv 2505.00347.

    Zeros are left out of the quantile and read as the lowest level: with x_p = 0 the published
    code divides -inf by -inf. Checked: without zeros and given the same U, codes and decoded values
    equal those of solow's `quantize_with_alpha` and `dequant_with_alpha`. SOLO advises a smaller b1
    with few bits; here every format runs the same Adam.
    """

    width: int
    block: int = 128
    quantile: float = 0.1

    def _block(self, n: int) -> int:
        """As solow: the largest divisor of n up to `block`, so that no block is short."""
        return max(size for size in range(1, min(n, self.block) + 1) if n % size == 0)

    def _x_p(self, y: jax.Array) -> jax.Array:
        """[blocks, size] -> [blocks, 1]: quantile of the positive values, inf without any."""
        smallest = min(int(self.quantile * (y.shape[1] - 1)) + 2, y.shape[1])  # no need to sort all
        low = -jax.lax.top_k(-jnp.where(y > 0, y, jnp.inf), smallest)[0]
        rank = jnp.maximum(self.quantile * (jnp.sum(y > 0, axis=1, keepdims=True) - 1), 0)
        i = jnp.floor(rank).astype(int)
        below = jnp.take_along_axis(low, i, axis=1)
        above = jnp.take_along_axis(low, jnp.minimum(i + 1, smallest - 1), axis=1)
        return below + jnp.where(rank > i, (rank - i) * (above - below), 0)

    def bits(self, n: int) -> float:
        return self.width * n + 64 * n / self._block(n)

    def encode(self, x, noise):
        top = 2**self.width - 1
        blocks = x.reshape(-1, self._block(x.size))
        scale = jnp.maximum(jnp.max(blocks, axis=1, keepdims=True), 1e-12)
        y = blocks / scale
        # A block of one value has x_p = 1, a zero block inf; any alpha below 1 serves both.
        alpha = jnp.minimum(self._x_p(y) ** (1 / top), 1 - 1e-6)
        steps = jnp.where(y > 0, jnp.log2(y) / jnp.log2(alpha), top)
        code = jnp.round(steps + noise.reshape(y.shape) - 0.5)
        return jnp.clip(code, 0, top).astype(jnp.uint8).reshape(x.shape), scale, alpha

    def decode(self, code):
        code, scale, alpha = code
        blocks = code.reshape(len(scale), -1).astype(jnp.float32)
        return (scale * alpha**blocks).reshape(code.shape)


@dataclass(frozen=True)
class Exact:
    """float32 as it is."""

    def bits(self, n: int) -> float:
        return 32 * n

    def encode(self, x, noise):
        return (x,)

    def decode(self, code):
        return code[0]


class State(NamedTuple):
    mu: Any
    nu: Any


@dataclass(frozen=True)
class Format:
    """Adam on one leaf whose moments are stored by two codecs."""

    name: str
    mu: Codec
    nu: Codec

    def bits(self, shape: tuple[int, ...]) -> float:
        """All-in bits per state element of a leaf."""
        n = math.prod(shape)
        return (self.mu.bits(n) + self.nu.bits(n)) / (2 * n)

    def init(self, shape: tuple[int, ...]) -> State:
        zero = jnp.zeros(shape, jnp.float32)
        return self._store(zero, zero, 0)

    def step(self, state: State, g: jax.Array, t) -> tuple[jax.Array, State]:
        """Step t = 1, 2, ...: the update (without learning rate) and the new state."""
        m, v = self.moments(state)
        m = B1 * m + (1 - B1) * g
        v = B2 * v + (1 - B2) * g**2
        update = m / (1 - B1**t) / (jnp.sqrt(v / (1 - B2**t)) + EPS)
        return update, self._store(m, v, t)

    def moments(self, state: State) -> tuple[jax.Array, jax.Array]:
        """m and v as the next step will read them."""
        return self.mu.decode(state.mu), self.nu.decode(state.nu)

    def _store(self, m, v, t) -> State:
        key = jax.random.fold_in(jax.random.key(m.size), t)
        noise = jax.random.uniform(key, (2, *m.shape))  # XLA drops it where nobody reads it
        return State(self.mu.encode(m, noise[0]), self.nu.encode(v, noise[1]))


def _lookup(bits: int, block: int) -> Lookup:
    return Lookup(dynamic_map(bits, signed=True), block)


PEERS = (
    Format("fp32", Exact(), Exact()),
    Format("FlashOptim 8-bit", Softsign(), LinearRoot()),
    Format("bitsandbytes 8-bit", _lookup(8, 256), Lookup(dynamic_map(8, signed=False), 256)),
    Format("torchao 4-bit", _lookup(4, 128), Lookup(LINEAR_4BIT, 128)),
    Format("NF4 + linear", Lookup(NF4, 128), Lookup(LINEAR_4BIT, 128)),
    Format("SOLO 4/2", _lookup(4, 128), Qema(2)),
    Format("SOLO 2/2", _lookup(2, 128), Qema(2)),
)


def _libraries(x: np.ndarray, v: np.ndarray):
    """Yields (name, our codec, input, noise, the library's codes and what it decodes)."""
    try:
        import bitsandbytes.functional as bnb
        import flashoptim_jax.quantization as flash
        import torch
        from torchao.optim.subclass_4bit import OptimState4bit

        package = find_spec("solo")  # solow's own imports ask for an old torchao: take one module
        if package is None:
            raise ImportError("No module named 'solo'", name="solow")
        path = Path(package.submodule_search_locations[0]) / "quantizer" / "utils.py"
        spec = spec_from_file_location("solow_utils", path)
        solow = module_from_spec(spec)
        spec.loader.exec_module(solow)
    except ImportError as error:
        packages = "torch torchao bitsandbytes flashoptim-jax solow"
        raise ImportError(f"--check lacks {error.name}: pip install {packages}") from error

    for signed, data in ((True, x), (False, v)):
        levels = bnb.create_dynamic_map(signed)
        ours = Lookup(dynamic_map(8, signed), 256)
        np.testing.assert_allclose(ours.levels, levels, rtol=2e-7)
        source = torch.from_numpy(data).double()  # not the float32 kernel: see Lookup
        code = torch.ops.bitsandbytes.quantize_blockwise(source, levels, 256)
        value = torch.ops.bitsandbytes.dequantize_blockwise(*code, levels, 256, torch.float32)
        yield f"bitsandbytes, signed={signed}", ours, data, None, code[0], value

        state = OptimState4bit.zeros(data.shape, signed, 128)
        state.copy_(torch.from_numpy(data))
        ours = Lookup(dynamic_map(4, True) if signed else LINEAR_4BIT, 128)
        np.testing.assert_allclose(ours.levels, state.qmap, rtol=2e-7)
        code = torch.stack([state.codes >> 4, state.codes & 15], dim=-1).ravel()
        yield f"torchao, signed={signed}", ours, data, None, code, state.dequantize()

    code = flash.quantize_momentum(jnp.asarray(x))
    yield "flashoptim-jax, m", Softsign(), x, None, code.values, flash.dequantize_momentum(code)
    code = flash.quantize_variance(jnp.asarray(v))
    yield "flashoptim-jax, v", LinearRoot(), v, None, code.values, flash.dequantize_variance(code)

    v = v[v > 0][: v.size // 256 * 128]
    noise = torch.rand((v.size // 128, 128), generator=torch.Generator().manual_seed(0)).numpy()
    for width in (2, 4):
        solow.adaq_generator = torch.Generator().manual_seed(0)
        y, scale, x_p = solow.scale_tensor(torch.from_numpy(v), 128, 0.1)
        alpha = x_p ** (1 / (2**width - 1))
        code = solow.quantize_with_alpha(y, alpha, width)
        value = solow.dequant_with_alpha(code, alpha, scale)
        yield f"solow, v at {width} bits", Qema(width), v, noise, code, value


def check(n: int = 2**18) -> Table:
    """Compares the codecs with the libraries' own on n values; raises where they disagree."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(n) * np.exp(2 * rng.standard_normal(n)) * (rng.random(n) > 0.1)
    x = x.astype(np.float32)
    table = Table("library", "codes", "codes that differ", "decoded, relative error")
    for name, ours, data, noise, code, value in _libraries(x, x**2):
        mine, value = ours.encode(jnp.asarray(data), noise), np.asarray(value)
        differ = np.sum(np.asarray(mine[0], int) != np.asarray(code, int))
        error = np.linalg.norm(ours.decode(mine) - value) / np.linalg.norm(value)
        table.add_row(name, str(data.size), str(differ), f"{error:.1e}")
        if differ > 1e-5 * data.size or error > 1e-5:  # a tie may fall either way
            raise AssertionError(f"{name}: {differ} codes differ, decoded error {error:.1e}")
    return table


def main():
    parser = argparse.ArgumentParser(description="Formats of other libraries, in bits per element.")
    parser.add_argument("--check", action="store_true", help="compare with the libraries installed")
    if parser.parse_args().check:
        table = check()
    else:
        table = Table("format", "bits per state element")
        for item in PEERS:
            table.add_row(item.name, f"{item.bits((1024, 1024)):.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
