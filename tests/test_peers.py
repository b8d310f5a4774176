"""States of PyTorch's optimizers in few bits: what they hold, and a run that goes on from them.

`benchmarks/codec/peer_states.py` made tests/data/peers, with the libraries themselves.
"""

import hashlib
import json
import re
from functools import cache
from pathlib import Path

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import stquant_jax as stquant
from tests import oracle, oracle_storage, test_interop

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data" / "peers"
ABOUT = json.loads((DATA / "about.json").read_text())
RUNS = "bitsandbytes", "torchao_8bit", "torchao_4bit", "torchao_fp8", "flashoptim"
PRECISION = stquant.Fixed(8, 8)
by_run = pytest.mark.parametrize("run", RUNS)


def to_flax(x):
    return {
        "embed": {"embedding": x["embed.weight"]},
        "fc": {"kernel": x["fc.weight"].T, "bias": x["fc.bias"]},
        "head": {"kernel": x["head.weight"].T, "bias": x["head.bias"]},
    }


@cache
def file(run):
    return dict(np.load(DATA / f"{run}.npz"))


def read(run, convert=to_flax, **changes):
    """With some of its arrays replaced, or left out if None."""
    tensors = {k: x for k, x in (file(run) | changes).items() if x is not None}
    return stquant.from_torch(tensors, convert, run.split("_")[0])


@by_run
def test_decoded_as_the_library_does(run):
    """To the bit."""
    got, samples = read(run, dict), np.load(DATA / "decoded.npz")
    assert got.count == ABOUT["steps"] and got.count.dtype == np.int32
    assert got.mu.keys() == got.nu.keys() and len(got.mu) == 5
    for name in got.mu:
        moments = got.mu[name], got.nu[name]
        for x, want in zip(moments, samples[f"{run}.{name}"], strict=False):
            assert x.dtype == np.float32
            np.testing.assert_array_equal(x.ravel()[:: ABOUT["stride"]], want)
        hashes = [hashlib.sha256(x.tobytes()).hexdigest() for x in moments]
        assert hashes == ABOUT["sha256 of mu, nu"][f"{run}.{name}"]


@by_run
def test_next_update_is_the_librarys(run):
    """Optax goes on from there as the library did: one update, at a learning rate of 1."""
    got, samples = read(run, dict), np.load(DATA / "decoded.npz")
    for name in got.mu:
        _, _, grad, moved = samples[f"{run}.{name}"]
        mu, nu = (x[name].ravel()[:: ABOUT["stride"]] for x in (got.mu, got.nu))
        state = optax.ScaleByAdamState(jnp.asarray(got.count), mu, nu)
        update, _ = optax.scale_by_adam().update(grad, state)
        # What moved are parameters, normal at first: their rounding is in it, to bfloat16 in
        # FlashOptim's run.
        step = 2.0**-8 if run == "flashoptim" else 2.0**-23
        np.testing.assert_allclose(update, -moved, 1e-5, 8 * step)


@by_run
def test_imported(run):
    """Small leaves to the bit; of the others each group has its energy of nu."""
    adam = read(run)
    state = stquant.from_optax(adam, adam.mu, PRECISION)
    back = stquant.to_optax(state, adam.mu, PRECISION)
    assert int(back.count) == ABOUT["steps"]
    chex.assert_trees_all_equal(*([x.mu["head"], x.nu["head"]] for x in (adam, back)))
    for layer, name in (("embed", "embedding"), ("fc", "kernel")):
        place = oracle_storage.place(adam.nu[layer][name].shape)
        v, v_q = (test_interop.tiles(x.nu[layer], name, {name: place}) for x in (adam, back))
        energy, energy_q = test_interop.sums(v), test_interop.sums(v_q)
        living = energy > 2.0**-126
        off = test_interop.octaves(energy_q, energy)[living]
        assert living.any() and np.max(np.abs(off)) <= oracle.BASE_STEP + test_interop.ULP
        assert not energy_q[~living].any()


def zeros(adam):
    return jax.tree.map(jnp.zeros_like, adam.mu)


def gradients(seed, adam):
    """Of the root mean square that each leaf has had."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda v: np.sqrt(v.mean()) * random.standard_normal(v.shape, np.float32), adam.nu
    )


SCHEDULE = optax.linear_schedule(1e-3, 0.0, 100)
EXACT, OURS = optax.adamw(SCHEDULE), stquant.adamw(SCHEDULE, precision=PRECISION)
STEPS = [jax.jit(tx.update) for tx in (EXACT, OURS)]


@by_run
def test_goes_on(run):
    """A chain with a schedule, near the one in float32."""
    adam = read(run)
    params = zeros(adam)
    state = optax.tree.set(EXACT.init(params), **adam._asdict())
    states = [state, stquant.from_optax(state, params, PRECISION)]
    error = energy = 0
    for seed in range(10):
        grads = gradients(seed, adam)
        pairs = [step(grads, old, params) for step, old in zip(STEPS, states, strict=True)]
        (want, got), states = zip(*pairs, strict=True)
        flat = [jax.flatten_util.ravel_pytree(x)[0] for x in (want, got)]
        error += jnp.sum((flat[1] - flat[0]) ** 2)
        energy += jnp.sum(flat[0] ** 2)
    assert error < 0.01 * energy  # benchmarks/results/codec.json has up to 0.009 for these widths
    for x in states:
        counts = [n for _, n in optax.tree.get_all_with_path(x, "count")]
        assert counts == [ABOUT["steps"] + 10] * 2


def test_on_a_mesh():
    """Moments on the host go to the devices of their parameters: a leaf that all of them have as on
    one device, parts under `min_size` exact."""
    adam, mesh = read("torchao_4bit"), jax.make_mesh((8,), ("data",))
    specs = jax.tree.map(lambda _: P(), adam.mu)
    specs["fc"]["kernel"] = P("data")
    where = {"precision": PRECISION, "sharding": stquant.Sharding(mesh, specs)}
    state = stquant.from_optax(adam, adam.mu, **where)
    assert len(state.arena.sharding.device_set) == 8
    back = stquant.to_optax(state, adam.mu, **where)
    alone = stquant.from_optax(adam, adam.mu, PRECISION)
    alone = stquant.to_optax(alone, adam.mu, PRECISION)
    for got, one, exact in ((back.mu, alone.mu, adam.mu), (back.nu, alone.nu, adam.nu)):
        same(got["embed"], one["embed"])
        same(got["fc"], exact["fc"])


# --- files that differ ---

FC = "fc.weight."
BNB = FC + "__bnb_optimizer_quant_state__."


def same(got, want):
    chex.assert_trees_all_equal(got, want)


def test_names():
    """Of any kind: an index, dots, one of the fields'."""
    for name in ("0", "layers.0.weight", "exp_avg", "a.step"):
        state = {f"{name}.{k}": x for k, x in moments(np.arange(4.0)).items()}
        got = stquant.from_torch(state, lambda x, name=name: x[name], "torch")
        same(got.nu, np.arange(4, dtype=np.float32))


def moments(x, step=3.0):
    return {"step": np.float32(step), "exp_avg": -x, "exp_avg_sq": x}


def test_without_the_wrapper():
    """bitsandbytes puts one into its state dict only."""
    plain = {k.replace("__bnb_optimizer_quant_state__.", ""): x for k, x in file(RUNS[0]).items()}
    assert not plain.keys() & {k for k in file(RUNS[0]) if "__bnb" in k}
    same(stquant.from_torch(plain, to_flax, "bitsandbytes"), read("bitsandbytes"))


def test_halves():
    """FlashOptim's float16 in the guise of bfloat16, as in its state dict; moments in bfloat16."""
    run = "flashoptim"
    disguised = {k: x.view(jnp.bfloat16) for k, x in file(run).items() if k.endswith("::scales")}
    error_bits = {"fc.weight.error_bits": np.zeros((32, 128), np.int8)}
    same(read(run, **disguised, **error_bits), read(run))
    half = np.arange(4.0).astype(jnp.bfloat16)
    state = {f"w.{k}": x for k, x in moments(half).items()}
    for format in ("torch", "torchao", "flashoptim"):
        got = stquant.from_torch(state, dict, format)
        same(got.mu["w"], -np.arange(4, dtype=np.float32))


def test_other_integers():
    got = read("torchao_8bit", **{"fc.bias.step": np.array([20], np.int32)})
    same(got, read("torchao_8bit"))


def test_convert_moves():
    """Layers stacked, a projection split."""
    tensors = {f"{i}.qkv.{k}": x for i in range(2) for k, x in moments(np.eye(6, 2) + i).items()}

    def convert(x):
        qkv = np.stack([x[f"{i}.qkv"].reshape(3, 2, 2) for i in range(2)])
        return dict(zip("qkv", np.moveaxis(qkv, 1, 0).swapaxes(-1, -2), strict=True))

    got = stquant.from_torch(tensors, convert, "torch")
    np.testing.assert_array_equal(got.nu["q"][0], np.eye(2))
    np.testing.assert_array_equal(got.nu["v"][1], np.ones((2, 2)))


CONVERTS = {
    "adds": (lambda x: x | {"fc.weight": 1 + x["fc.weight"]}, "unchanged"),
    "scales": (lambda x: x | {"fc.weight": 2 * x["fc.weight"]}, "unchanged"),
    "drops": (lambda x: {"kernel": x["fc.weight"]}, "made 4096 elements of 8451"),
    "repeats": (lambda x: [x, x], "made 16902 elements of 8451"),
    "swaps": (lambda x: x | {"embed.weight": x["fc.weight"], "more": np.zeros(128)}, "sum"),
    "asks": (lambda x: x["fc.kernel"], r"asked for 'fc.kernel'.*'fc.weight' \[32, 128\]"),
}


@pytest.mark.parametrize("convert, message", CONVERTS.values(), ids=CONVERTS)
def test_convert_that_does_more(convert, message):
    with pytest.raises(ValueError, match=message):
        read("bitsandbytes", convert)


def bad(x, i, value):
    x = np.array(x)
    x.reshape(-1)[i] = value
    return x


# A run, arrays of it replaced, and what the message says.
BAD = {
    "missing moment": ("torchao_8bit", {"fc.bias.exp_avg_sq": None}, "no 'fc.bias.exp_avg_sq'"),
    "missing map": ("bitsandbytes", {BNB + "qmap2": None}, "no 'fc.weight.qmap2'.*have absmax2"),
    "missing scale": ("flashoptim", {FC + "exp_avg::scales": None}, "exp_avg::scales"),
    "missing shape": ("torchao_4bit", {FC + "exp_avg.shape": None}, "no 'fc.weight.exp_avg.shape'"),
    "missing step": ("bitsandbytes", {"fc.bias.step": None}, "'fc.bias.*no step of it"),
    "extra field": (
        "torchao_8bit",
        {"fc.bias.max_exp_avg_sq": np.zeros(32, np.float32)},
        "'fc.bias.max_exp_avg_sq', which is not of Adam",
    ),
    "extra key": ("torchao_8bit", {"epoch": np.array(3)}, "'epoch', and no step of it"),
    "int8 codes": (
        "bitsandbytes",
        {BNB + "state1": np.zeros((32, 128), np.int8)},
        "state1'. has dtype int8: expected uint8",
    ),
    "unsigned m": (
        "flashoptim",
        {FC + "exp_avg::quantized": np.zeros((32, 128), np.uint8)},
        "dtype uint8: expected int8",
    ),
    "integer moment": (
        "torchao_8bit",
        {"fc.bias.exp_avg": np.zeros(32, np.int32)},
        "dtype int32: expected floating",
    ),
    "half map": (
        "bitsandbytes",
        {BNB + "qmap1": np.zeros(128, np.float32)},
        r"qmap1'. has shape \(128,\): expected \(256,\)",
    ),
    "odd map": (
        "torchao_4bit",
        {FC + "exp_avg.qmap": np.zeros(8, np.float32)},
        r"shape \(8,\): expected \(16,\) or \(256,\)",
    ),
    "a block less": (
        "bitsandbytes",
        {BNB + "absmax2": np.ones(15, np.float32)},
        r"absmax2'. has shape \(15,\): expected \(16,\)",
    ),
    "a group more": (
        "flashoptim",
        {FC + "exp_avg::scales": np.ones(129, np.float16)},
        r"shape \(129,\): expected \(128,\)",
    ),
    "uneven blocks": (
        "torchao_8bit",
        {FC + "exp_avg.scale": np.ones(17, np.float32)},
        r"shape \(17,\): expected one scale for every block of 4096 codes",
    ),
    "no blocks": (
        "torchao_fp8",
        {FC + "exp_avg.scale": np.ones(0, np.float32)},
        "expected one scale",
    ),
    "codes of half a leaf": (
        "torchao_4bit",
        {FC + "exp_avg.codes": np.zeros(1024, np.uint8)},
        "holds 2048 codes: expected 4096",
    ),
    "other shapes": (
        "bitsandbytes",
        {"fc.bias.__bnb_optimizer_quant_state__.state1": np.zeros((2, 32), np.float32)},
        r"'fc.bias' have shapes \(\(2, 32\), \(32,\)\)",
    ),
    "NaN absmax": (
        "bitsandbytes",
        {BNB + "absmax1": bad(np.ones(16, np.float32), 7, np.nan)},
        "absmax1'. has NaN or infinite",
    ),
    "infinite scale": (
        "flashoptim",
        {FC + "exp_avg::scales": bad(np.ones(128, np.float16), 7, np.inf)},
        "exp_avg::scales'. has NaN or infinite",
    ),
    "NaN in float8": (
        "torchao_fp8",
        {FC + "exp_avg.codes": np.full((32, 128), 127, np.uint8)},
        "exp_avg.codes'. has NaN",
    ),
    "infinite moment": (
        "torchao_8bit",
        {"fc.bias.exp_avg": np.full(32, 1e300)},
        "exp_avg'. has NaN or infinite",
    ),
    "negative nu": (
        "torchao_8bit",
        {"fc.bias.exp_avg_sq": np.full(32, -1.0)},
        "nu of 'fc.bias' has negative",
    ),
    "steps apart": (
        "torchao_8bit",
        {"fc.bias.step": np.float32(19)},
        "'fc.bias.step' is 19, '.*' is 20: expected",
    ),
    "half a step": ("torchao_8bit", {"fc.bias.step": np.float32(1.5)}, "step'. is 1.5"),
    "NaN steps": ("torchao_8bit", {"fc.bias.step": np.float32("nan")}, "step'. is nan"),
    "steps of elements": ("torchao_8bit", {"fc.bias.step": np.ones(32)}, "the number of steps"),
    "negative steps": ("torchao_8bit", {"fc.bias.step": np.array(-1)}, "step'. is -1"),
}


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("run, changes, message", BAD.values(), ids=BAD)
def test_bad_files(run, changes, message):
    with pytest.raises(ValueError, match=message):
        read(run, **changes)


def test_foreign_files():
    """Of another format, of no optimizer, or not a file."""
    for run in RUNS:
        for format in {"torch", "bitsandbytes", "torchao", "flashoptim"} - {run.split("_")[0]}:
            with pytest.raises(ValueError, match="tensors have"):
                stquant.from_torch(file(run), to_flax, format)
    weights = {"fc.weight": np.zeros((32, 128)), "fc.bias": np.zeros(32)}
    with pytest.raises(ValueError, match="'fc.weight', and no step of it: expected Adam's state"):
        stquant.from_torch(weights, to_flax, "torch")
    with pytest.raises(ValueError, match="tensors have nothing"):
        stquant.from_torch({}, to_flax, "torch")
    with pytest.raises(ValueError, match="tensors is str: expected a mapping"):
        stquant.from_torch("adam.npz", to_flax, "torch")  # type: ignore
    with pytest.raises(ValueError, match="format='bnb': expected one of bitsandbytes, flashoptim"):
        stquant.from_torch({}, to_flax, "bnb")


def test_page():
    """Its examples run, and its export is the one that made the files."""
    text = (ROOT / "docs" / "how-to" / "from_torch.md").read_text()
    (export,) = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    assert export in (ROOT / "benchmarks" / "codec" / "peer_states.py").read_text()
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    state, fresh = names["state"], jax.eval_shape(names["tx"].init, names["params"])
    chex.assert_trees_all_equal_shapes_and_dtypes(state, fresh)
    assert int(state[0].count) == ABOUT["steps"]
