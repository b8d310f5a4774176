"""The example for many devices: two processes train as one does, on any mesh it goes on from there,
and a chip's memory holds what `plan` says.
"""

import functools
import json
import shutil
import socket

import jax
import pytest
from jax.sharding import AbstractMesh

import stquant_jax as stquant
from benchmarks.distributed import faults
from examples import train_pod
from tests import common

STEPS, HALF = 6, 3
FLAGS = ["--steps", STEPS, "--save-every", HALF, "--log-every", 1, "--keep", 9]
FLAGS += ["--batch", 4, "--length", 32, "--interval", 2, "--bits", 4.5]


def train(where, *processes):
    """Runs them all; of each its name and its flags."""
    with (where / "errors").open("w+") as errors:
        running = []
        for name, *flags in processes:
            files = "--directory", where / name, "--json", where / f"{name}.json"
            running.append(faults.start(*FLAGS, *files, *flags, env=common.QUICK, stderr=errors))
        try:
            for process in running:
                process.communicate(timeout=300)
        finally:
            for process in running:
                process.kill()
        assert not any(process.returncode for process in running), (where / "errors").read_text()


def two(name, *flags):
    """Two processes that find each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        both = name, *flags, "--coordinator", f"localhost:{free.getsockname()[1]}"
    return [(*both, "--processes", 2, "--process", i) for i in (0, 1)]


def losses(where, name):
    return json.loads((where / f"{name}.json").read_text())["loss"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Checkpoints and losses of four devices in one process, and in two."""
    where = tmp_path_factory.mktemp("runs")
    mesh = "--fsdp", 2, "--tensor", 2
    one = "one", *mesh, "--cpu-devices", 4
    train(where, one, *two("two", *mesh, "--cpu-devices", 2))
    return where


@pytest.mark.parametrize("step", (HALF, STEPS))
@pytest.mark.thorough
def test_two_processes_are_as_one(runs, step):
    """Sums over two devices have the same bits in either order, however they travel."""
    assert losses(runs, "two") == losses(runs, "one")
    assert not faults.differing(faults.read(runs / "two", step), faults.read(runs / "one", step))


@pytest.mark.thorough
def test_another_mesh(runs):
    """Two processes of a device each go on from what one of four devices saved half-way."""
    shutil.copytree(runs / "one" / str(HALF), runs / "other" / str(HALF))
    train(runs, *two("other", "--fsdp", 2, "--cpu-devices", 1))
    here, there = losses(runs, "other"), losses(runs, "one")
    assert list(here) == [str(step) for step in range(HALF + 1, STEPS + 1)]
    # Two devices add up other parts of the products than four do.
    assert here == pytest.approx({step: there[step] for step in here}, rel=1e-3)


@pytest.mark.parametrize(("model", "sizes"), [("tiny", (1, 2, 2)), ("llama-7b", (1, 32, 2))])
def test_parts_are_whole_tiles(model, sizes):
    """So that their bits do not depend on the mesh."""
    make = functools.partial(train_pod.init_params, train_pod.MODELS[model])
    shapes = jax.eval_shape(make, jax.random.key(0))
    specs = jax.tree_util.tree_map_with_path(train_pod.spec_of, shapes)
    sharding = stquant.Sharding(AbstractMesh(sizes, train_pod.AXES), specs)
    plan = stquant.plan(shapes, sharding=sharding)
    assert not [leaf for leaf in plan.leaves if "no whole tiles" in leaf.reason]
    divided = [leaf.path for leaf in plan.leaves if set(leaf.divided) == {"fsdp", "tensor"}]
    assert len(divided) == 9  # all but the norms


def test_memory():
    """As the compiler lays it out for 64 chips, two layers of Llama 7B."""
    pytest.importorskip("libtpu", reason="pip install '.[aot]' brings libtpu")
    cfg = train_pod.Config(
        "llama-7b", layers=2, fsdp=32, tensor=2, batch=64, length=128, aot="v5p:4x4x4"
    )
    told = train_pod.measure(cfg)
    assert told["chips"] == 64 and not told["torn"]
    assert told["state_bytes"] == pytest.approx(told["plan_bytes"], rel=0.02)
    assert told["donated_bytes"] >= told["parameter_bytes"] + told["state_bytes"]
