"""Time of one update on a card, over the bytes that it must move, next to the card's own copies.

Steps are enqueued in trains, one behind the other as in training, and waited for at the end of
each: the host's part hides behind the device's, if it is the smaller one. What is compared takes
turns, train by train, with float32 `optax.scale_by_adam`.
"""

import functools
import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import stquant_jax as stquant
from benchmarks.gpu.setting import Setting, Tree, gaussian, nbytes, stored_bytes
from benchmarks.memory import traffic

COPY_MEGABYTES = (64, 256, 1024, 4096)
REPEATS, TRAIN = 15, 10  # trains, and steps in one, at most
TRAIN_SECONDS, ALL_SECONDS = 0.1, 3.0  # about, for slow ones
RATE, DECAY = 1e-3, 0.1

Carry = Any  # a pair: what a step returned: updates or parameters, and the state


class Contender(NamedTuple):
    """Something that makes a step of Adam.

    Attributes:
      step: jittable, (gradients, state, parameters or None) -> (updates or parameters, state).
      init: parameters to state.
      applies: the step returns parameters.
      stored: of parameters, bytes of the state that a step reads and writes.
      dtypes: of gradients and of parameters.
    """

    name: str
    step: Callable[[Any, Any, Any], Carry]
    init: Callable[[Any], Any]
    applies: bool = False
    stored: Callable[[Any], int] | None = None
    dtypes: tuple[Any, Any] = (jnp.float32, jnp.float32)


class Run:
    """A contender compiled, with its arrays."""

    def __init__(self, contender: Contender, grads: Tree, params: Tree):
        self.contender = contender
        gradient, param = contender.dtypes
        self.grads = jax.tree.map(lambda x: x.astype(gradient), grads)  # the same, if it has it
        # Its own: they are donated.
        params = jax.tree.map(lambda x: jnp.array(x, param, copy=True), params)
        state = contender.init(params)
        stored = contender.stored(params) if contender.stored else nbytes(state)
        applied = nbytes(params) if contender.applies else None
        self.least_bytes = traffic.step_bytes(stored, nbytes(self.grads), applied)
        self.state_bytes = nbytes(state)
        jitted = jax.jit(contender.step, donate_argnums=(1, 2) if contender.applies else 1)
        start = time.perf_counter()
        args = (self.grads, state, params if contender.applies else None)
        self.compiled = jitted.lower(*args).compile()
        self.compile_seconds = time.perf_counter() - start
        self.carry: Carry = (params if contender.applies else None, state)
        del args, params, state
        self.first_call_seconds = self.train(1)  # kernels may be assembled only then
        self.step_seconds = self.train(1)

    def train(self, length: int) -> float:
        """Seconds per step of several, one behind the other."""
        start = time.perf_counter()
        for _ in range(length):
            x, state = self.carry
            if not self.contender.applies:
                self.carry = x = None  # updates are let go before the next ones are made
            self.carry = self.compiled(self.grads, state, x)
        self.enqueue_seconds = (time.perf_counter() - start) / length  # of the last train
        jax.block_until_ready(self.carry)
        return (time.perf_counter() - start) / length


def copies(setting: Setting) -> Iterator[dict[str, Any]]:
    """Bandwidth of a jitted copy, and of an elementwise kernel, bytes read and written."""
    operations = {"copy": jnp.copy, "negative": jnp.negative}
    for megabytes in (1,) if setting.interpret else COPY_MEGABYTES:
        x = jnp.ones(megabytes * 2**18, jnp.float32)
        for name, operation in operations.items():
            run = jax.jit(operation)
            jax.block_until_ready(run(x))
            rates = []
            for _ in range(1 if setting.interpret else REPEATS):
                start = time.perf_counter()
                for _ in range(TRAIN):
                    y = run(x)
                y.block_until_ready()
                rates.append(2 * x.nbytes * TRAIN / (time.perf_counter() - start))
            found = {"megabytes": megabytes, "gb_per_second": round(np.median(rates) / 1e9, 2)}
            yield {"operation": name, **found}


def ours(setting: Setting, policy: stquant.Policy, backend: str, kind: str = "update") -> Contender:
    """`scale_by_adam_q`; with `fused`, `adamw` applied."""
    storage = setting.storage(backend)
    label = f"stquant {policy.bits:g} bits, interval {policy.interval}, {backend}"
    stored = functools.partial(stored_bytes, precision=policy, storage=storage)
    if kind == "fused":
        tx = stquant.adamw(RATE, weight_decay=DECAY, precision=policy, storage=storage)
        fused = functools.partial(stquant.fused_update, tx)
        return Contender(f"{label}, fused_update", fused, tx.init, True, stored)
    tx = stquant.scale_by_adam_q(precision=policy, storage=storage)
    return Contender(label, lambda g, state, _: tx.update(g, state), tx.init, False, stored)


def optax_adam() -> Contender:
    tx = optax.scale_by_adam()
    return Contender("optax.scale_by_adam", lambda g, state, _: tx.update(g, state), tx.init)


def optax_adamw() -> Contender:
    """Update and application in one program, as one jitted train step has them."""
    tx = optax.adamw(RATE, weight_decay=DECAY)

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Contender("optax.adamw and apply_updates", step, tx.init, True)


def flash_adamw() -> Contender:
    """flashoptim-jax with its defaults: 8-bit state, bfloat16 parameters and 8 bits beside them."""
    tx = importlib.import_module("flashoptim_jax").flash_adamw(RATE, weight_decay=DECAY)

    def step(grads, state, params):
        return tx.step(params, state, grads)

    return Contender("flashoptim-jax", step, tx.init, True, dtypes=(jnp.bfloat16, jnp.bfloat16))


def contenders(setting: Setting, shapes: str) -> Iterator[Callable[[], Contender]]:
    """The most telling first: a section may be cut off."""

    def kernels(policy: Any = 5.0, kind: str = "update", backend: str = "pallas_gpu") -> Any:
        fixed = isinstance(policy, float)
        policy = stquant.Budget(policy, interval=None) if fixed else policy
        return functools.partial(ours, setting, policy, backend, kind)

    small = shapes == "gpt2"
    if setting.interpret:  # a program takes the interpreter longer to compile than to run
        yield kernels() if small else optax_adamw
        return
    yield kernels()
    yield kernels(kind="fused")
    yield optax_adamw
    yield kernels(3.5)
    yield kernels(8.0)
    if small:
        yield flash_adamw
        yield lambda: half(kernels()())
        yield lambda: half(kernels(kind="fused")())
        yield kernels(stquant.Budget(5.0))  # moves bits every 100 steps, under a condition
        yield kernels(backend="xla_gpu")


def half(contender: Contender) -> Contender:
    dtypes = (jnp.bfloat16, jnp.bfloat16)
    return contender._replace(name=f"{contender.name}, bfloat16", dtypes=dtypes)


def measure(setting: Setting, shapes: str) -> Iterator[dict[str, Any]]:
    """Rows of copies, then a row for each contender."""
    copied = list(copies(setting))
    yield from copied
    # Of arrays that no cache holds.
    largest = max(row["megabytes"] for row in copied)
    fastest = max(row["gb_per_second"] for row in copied if row["megabytes"] == largest)
    grads = gaussian(setting.shapes(shapes))
    params = gaussian(setting.shapes(shapes), 1, 0.02)
    elements = sum(x.size for x in params.values())
    base = Run(optax_adam(), grads, params)
    for make in contenders(setting, shapes):
        name = getattr(make, "__name__", str(make))
        try:
            contender = make()
            name = contender.name
            run = Run(contender, grads, params)
            yield {"shapes": shapes, "elements": elements, **_row(setting, run, base, fastest)}
            del run  # before the next one takes its memory
        except ImportError as error:
            yield {"contender": name, "skipped": f"not installed: {error}"}
        except Exception as error:  # of one contender; the next one may run
            yield {"contender": name, "failed": f"{type(error).__name__}: {str(error)[:1000]}"}


def _row(setting: Setting, run: Run, base: Run, fastest: float) -> dict[str, Any]:
    slowest = max(run.step_seconds, base.step_seconds)
    length = max(1, min(TRAIN, int(TRAIN_SECONDS / slowest)))
    repeats = max(3, min(REPEATS, int(ALL_SECONDS / (2 * length * slowest))))
    if setting.interpret:
        length = repeats = 1
    pairs = np.array([(run.train(length), base.train(length)) for _ in range(repeats)])
    elements = sum(x.size for x in jax.tree.leaves(run.grads))
    seconds = np.median(pairs, axis=0)
    both = zip((run, base), seconds, strict=True)
    rates = [x.least_bytes / t / 1e9 for x, t in both]
    memory = run.compiled.memory_analysis()
    return {
        "contender": run.contender.name,
        "ns_per_element": round(1e9 * seconds[0] / elements, 6),
        "optax_ns_per_element": round(1e9 * seconds[1] / elements, 6),
        "ratio_of_pairs": round(float(np.median(pairs[:, 0] / pairs[:, 1])), 4),
        "least_bytes_per_element": round(run.least_bytes / elements, 4),
        "gb_per_second": round(rates[0], 2),
        "optax_gb_per_second": round(rates[1], 2),
        "share_of_copy": round(rates[0] / fastest, 4),
        "seconds": pairs.T.round(7).tolist(),
        "steps_in_a_train": length,
        "enqueue_seconds": round(run.enqueue_seconds, 7),
        "state_bytes": run.state_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "compile_seconds": round(run.compile_seconds, 2),
        "first_call_seconds": round(run.first_call_seconds, 3),
    }


gpt2 = functools.partial(measure, shapes="gpt2")
gpt3_xl = functools.partial(measure, shapes="gpt3-xl")
