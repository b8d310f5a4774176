"""Train a Llama-like byte-level model on many devices and hosts, with checkpoints for any mesh.

    python -m examples.train_pod --cpu-devices 4 --fsdp 2 --tensor 2

is one process with four devices that are threads of a CPU; it takes about a minute on two cores.
Two processes of two devices each, the second one with `--process 1`:

    python -m examples.train_pod --cpu-devices 2 --fsdp 2 --tensor 2 \
        --coordinator localhost:1234 --processes 2 --process 0

On every host of a TPU slice the command is the same, and nothing says who is who:

    python -m examples.train_pod --model llama-7b --fsdp 32 --tensor 2 --directory gs://...

The same command again continues from the newest checkpoint that is complete, on the same mesh or on
another. The text is the standard library of Python, which must be the same on all hosts.

`--aot v5p:4x4x4` compiles the training step for 64 chips that are not there, in some minutes, and
prints what lies in each one's memory (`pip install '.[aot]'`):

    python -m examples.train_pod --model llama-7b --fsdp 32 --tensor 2 --batch 64 --length 2048 \
        --aot v5p:4x4x4
"""

import argparse
import dataclasses
import functools
import re
import sysconfig
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import stquant_jax as stquant
from benchmarks._io import environment, write_json
from examples.train_gpt import flag, load_corpus, rotate, windows


@dataclasses.dataclass(frozen=True)
class Model:
    layers: int
    width: int
    hidden: int  # of the gated layers
    heads: int
    words: int
    dtype: Any  # of the arithmetic; parameters are float32


MODELS = {
    "tiny": Model(2, 256, 512, 4, 256, jnp.float32),
    "llama-7b": Model(32, 4096, 11008, 32, 32000, jnp.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = flag("tiny", "which of the models", choices=tuple(MODELS))
    layers: int = flag(0, "another number of layers than the model's")
    data: int = flag(1, "size of the mesh along which only the batch is divided")
    fsdp: int = flag(1, "... along which batch and parameters are")
    tensor: int = flag(1, "... along which heads, gated units and words are")
    cpu_devices: int = flag(0, "run on the CPU, with so many devices in each process")
    coordinator: str = flag("", "host:port of process 0")
    processes: int = flag(1, "how many processes there are")
    process: int = flag(0, "which of them this is")
    steps: int = flag(200, "training steps")
    batch: int = flag(8, "sequences per step, of all processes together")
    length: int = flag(128, "bytes per sequence")
    lr: float = flag(1e-3, "peak learning rate")
    weight_decay: float = flag(0.1, "decoupled weight decay")
    bits: float = flag(5.0, "all-in bits per element of optimizer state")
    interval: int = flag(50, "steps between two moves of bits")
    seed: int = flag(0, "seed of the weights and of the order of the data")
    directory: str = flag("", "where checkpoints are, on storage that all processes share")
    save_every: int = flag(50, "steps between two checkpoints")
    keep: int = flag(2, "checkpoints to keep")
    log_every: int = flag(10, "steps between two lines with the loss")
    aot: str = flag("", "compile for this TPU topology instead, and say what its memory holds")
    json: str = flag("", "file for all numbers")


# --- model: Llama, its layers stacked, so that it compiles as fast as one of them ---

Params = dict[str, Any]


def init_params(model: Model, key: jax.Array) -> Params:
    """Kernels are [in, out], those of all layers [layers, in, out]."""
    d, layers = model.width, model.layers
    kernels = dict.fromkeys("qkvo", (d, d))
    kernels |= {"gate": (d, model.hidden), "up": (d, model.hidden), "down": (model.hidden, d)}
    keys = iter(jax.random.split(key, len(kernels) + 2))

    def normal(*shape: int) -> jax.Array:
        return 0.02 * jax.random.normal(next(keys), shape)

    return {
        "embedding": normal(model.words, d),
        "layers": {name: normal(layers, *shape) for name, shape in kernels.items()}
        | {name: jnp.ones((layers, d)) for name in ("norm1", "norm2")},
        "norm": jnp.ones(d),
        "head": normal(d, model.words),
    }


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6)
    return (wide * scale).astype(x.dtype)


def layer(model: Model, x: jax.Array, w: Params) -> jax.Array:
    batch, length, _ = x.shape
    kernel = {name: value.astype(x.dtype) for name, value in w.items()}
    y = rms_norm(x, w["norm1"])
    q, k, v = ((y @ kernel[name]).reshape(batch, length, model.heads, -1) for name in "qkv")
    q, k = rotate(q).astype(x.dtype), rotate(k).astype(x.dtype)
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + mixed.reshape(x.shape) @ kernel["o"]
    y = rms_norm(x, w["norm2"])
    return x + (jax.nn.silu(y @ kernel["gate"]) * (y @ kernel["up"])) @ kernel["down"]


def loss_of(model: Model, mesh: Mesh, params: Params, text: jax.Array) -> jax.Array:
    """Mean cross-entropy, nats per word, of `text` uint8[batch, length + 1]."""

    def divided(x):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, BATCH))

    @jax.checkpoint
    def run(x, w):
        return divided(layer(model, x, w)), None

    x = divided(params["embedding"].astype(model.dtype)[text[:, :-1]])
    x, _ = jax.lax.scan(run, x, params["layers"])
    logits = rms_norm(x, params["norm"]) @ params["head"].astype(model.dtype)
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()


# --- who has what ---

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
SPECS = {  # a pattern of the path of a parameter -> how it is divided
    r"embedding": P("tensor", "fsdp"),
    r"layers\.(q|k|v|gate|up)$": P(None, "fsdp", "tensor"),
    r"layers\.(o|down)$": P(None, "tensor", "fsdp"),
    r"head": P("fsdp", "tensor"),
    r"norm": P(),
}


def spec_of(path: Any, _: Any) -> P:
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return next(spec for pattern, spec in SPECS.items() if re.search(pattern, name))


def placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings
    )


class Trainer:
    """Programs, and the shapes and places of what they work on; nothing is computed yet."""

    def __init__(self, cfg: Config, devices: Any = None, backend: str | None = None):
        self.cfg, self.model = cfg, MODELS[cfg.model]
        if cfg.layers:
            self.model = dataclasses.replace(self.model, layers=cfg.layers)
        sizes = cfg.data, cfg.fsdp, cfg.tensor
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        self.mesh = Mesh(grid, AXES, (AxisType.Auto,) * len(AXES))
        self._key = jax.random.key(cfg.seed)
        shapes = jax.eval_shape(functools.partial(init_params, self.model), self._key)
        specs = jax.tree_util.tree_map_with_path(spec_of, shapes)
        self.how = {  # what stquant is told, always the same
            "precision": stquant.Budget(cfg.bits, interval=cfg.interval),
            "storage": stquant.Storage(backend=backend),
            "sharding": stquant.Sharding(self.mesh, specs),
        }
        schedule = optax.warmup_cosine_decay_schedule(0.0, cfg.lr, cfg.steps // 10, cfg.steps)
        adamw = stquant.adamw(schedule, weight_decay=cfg.weight_decay, **self.how)
        self.tx = optax.chain(optax.clip_by_global_norm(1.0), adamw)

        of = functools.partial(NamedSharding, self.mesh)
        params_at = jax.tree.map(of, specs)
        self.params = placed(shapes, params_at)
        state = jax.eval_shape(self.tx.init, self.params)
        state_at = stquant.state_shardings(state, self.params, **self.how)
        self.state = placed(state, state_at)
        self.text_at = of(BATCH)
        self.text = placed(
            jax.ShapeDtypeStruct((cfg.batch, cfg.length + 1), np.uint8), self.text_at
        )

        self.step = jax.jit(
            self._step, donate_argnums=(0, 1), out_shardings=(params_at, state_at, of(P()))
        )
        self._init = jax.jit(self._make, out_shardings=(params_at, state_at))

    def _step(self, params, state, text):
        loss, grads = jax.value_and_grad(functools.partial(loss_of, self.model, self.mesh))(
            params, text
        )
        updates, state = self.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    def _make(self, key):
        params = init_params(self.model, key)
        return params, self.tx.init(params)

    def init(self) -> tuple[Params, Any]:
        """Every device makes its own parts."""
        return self._init(self._key)

    def batch(self, text: np.ndarray, step: int) -> jax.Array:
        """The sequences of a step, a function of the seed and the step alone; of them a process
        reads those of its own devices."""
        random = np.random.default_rng((self.cfg.seed, step))
        starts = random.integers(0, text.size - self.cfg.length, self.cfg.batch)

        def read(index: Any) -> np.ndarray:
            return windows(text, starts[index[0]], self.cfg.length)

        return jax.make_array_from_callback(self.text.shape, self.text_at, read)


# --- checkpoints: parameters, and the optimizer's state as it is on no mesh in particular ---


class Checkpoints:
    def __init__(self, trainer: Trainer):
        cfg, self._trainer = trainer.cfg, trainer
        options = ocp.CheckpointManagerOptions(
            max_to_keep=cfg.keep,
            cleanup_tmp_directories=True,  # of a process that died while it saved
        )
        path = cfg.directory if "://" in cfg.directory else Path(cfg.directory).absolute()
        self._manager = ocp.CheckpointManager(path, options=options)

    def save(self, step: int, params: Params, state: Any) -> None:
        """It is written while training goes on."""
        tree = self._tree(params, state)
        self._manager.save(step, args=ocp.args.StandardSave(tree), force=True)

    def restore(self) -> tuple[int, Params, Any] | None:
        """The newest that is complete, for the mesh of today."""
        step = self._manager.latest_step()
        if step is None:
            return None
        trainer = self._trainer
        target = self._tree(trainer.params, trainer.state)
        tree = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        state = stquant.from_portable(tree["state"], trainer.params, **trainer.how)
        return step, tree["params"], state

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def _tree(self, params: Params, state: Any) -> dict[str, Any]:
        portable = stquant.to_portable(state, self._trainer.params, **self._trainer.how)
        return {"params": params, "state": portable}


# --- training ---


def connect(cfg: Config) -> None:
    """Makes one of all processes; before anything asks for devices."""
    if cfg.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", cfg.cpu_devices)
    if cfg.coordinator:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(cfg.coordinator, cfg.processes, cfg.process)
    elif not cfg.cpu_devices:
        try:
            jax.distributed.initialize()  # on a TPU slice JAX knows all processes
        except ValueError as error:
            print(f"one process: {error}")


def train(cfg: Config) -> dict[int, float]:
    """Losses of the steps that were still to do."""
    connect(cfg)
    trainer = Trainer(cfg)
    text, _ = load_corpus(Path(sysconfig.get_path("stdlib")))
    checkpoints = Checkpoints(trainer) if cfg.directory else None
    first, params, state = (checkpoints and checkpoints.restore()) or (0, *trainer.init())
    losses, speaks = {}, jax.process_index() == 0
    bar = tqdm(total=cfg.steps, initial=first, unit="step", disable=None if speaks else True)
    for step in range(first, cfg.steps):
        params, state, loss = trainer.step(params, state, trainer.batch(text, step))
        bar.update()
        if (step + 1) % cfg.log_every == 0 or step + 1 == cfg.steps:
            losses[step + 1] = float(loss)
            if speaks:
                bar.write(f"step {step + 1} loss {losses[step + 1]:.4f}")
        if checkpoints and ((step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps):
            checkpoints.save(step + 1, params, state)
    bar.close()
    if checkpoints:
        checkpoints.close()
    return losses


# --- what a chip's memory will hold, as its compiler lays it out ---


def argument_bytes(*arguments: Any) -> int:
    """Of these arguments on one device."""
    program = jax.jit(lambda *x: None, keep_unused=True).lower(*arguments).compile()
    memory: Any = program.memory_analysis()
    return memory.argument_size_in_bytes


def measure(cfg: Config) -> dict[str, Any]:
    """Bytes on each device of a topology that need not be there."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=cfg.aot)
    trainer = Trainer(cfg, topology.devices, "pallas_tpu")
    plan = stquant.plan(trainer.params, **trainer.how)
    with jax.default_device(topology.devices[0]):  # lowering asks it for which chip a kernel is
        begin = time.perf_counter()
        lowered = trainer.step.lower(trainer.params, trainer.state, trainer.text)
        middle = time.perf_counter()
        memory: Any = lowered.compile().memory_analysis()
        end = time.perf_counter()
        others = argument_bytes(trainer.params, trainer.text)
        return {
            "chip": topology.devices[0].device_kind,
            "chips": len(topology.devices),
            "libtpu": version("libtpu"),
            "parameters": sum(x.size for x in jax.tree.leaves(trainer.params)),
            "leaves": len(plan.leaves),
            "torn": [leaf.path for leaf in plan.leaves if "no whole tiles" in leaf.reason],
            "parameter_bytes": argument_bytes(trainer.params),
            "state_bytes": memory.argument_size_in_bytes - others,
            "plan_bytes": plan.total_bytes,
            "float32_bytes": plan.reference_bytes,
            "donated_bytes": memory.alias_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
            "code_bytes": memory.generated_code_size_in_bytes,
            "lower_s": round(middle - begin, 1),
            "compile_s": round(end - middle, 1),
        }


def parse() -> Config:
    parser = argparse.ArgumentParser(
        description="Train a Llama-like model on many devices.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in dataclasses.fields(Config):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, default=field.default, type=type(field.default), **field.metadata)
    return Config(**vars(parser.parse_args()))


def main() -> None:
    cfg = parse()
    if cfg.aot:
        record: dict[str, Any] = {"per_device": measure(cfg)}
        for name, value in record["per_device"].items():
            print(f"{name:>16} {value:,}" if isinstance(value, int) else f"{name:>16} {value}")
    else:
        record = {"loss": train(cfg)}
    if cfg.json and cfg.process == 0:
        config = dataclasses.asdict(cfg)
        write_json(Path(cfg.json), {"environment": environment(), "config": config, **record})


if __name__ == "__main__":
    main()
