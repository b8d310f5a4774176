"""Do the kernels compute what the XLA backend does, always the same, and nothing beside it?"""

import contextlib
import functools
import io
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stquant_jax as stquant
from benchmarks.gpu.setting import ONE_TILE, Setting, Tree, gaussian, unequal
from benchmarks.shapes import SETS, Shapes
from stquant_jax.storage.arena import ROW_BYTES

BACKENDS = ("pallas_gpu", "xla_gpu")
BUDGET = stquant.Budget(5.0, interval=None)
STORED = ("arena", "mu_scale", "nu_scale", "nu_row")
# Every way that a leaf reaches its kernel: groups along the rows and along the columns with ragged
# ends, folded, flat, rows that the copy engine cannot address, and leaves of a model.
KINDS: Shapes = {
    "rows": (300, 1016),
    "columns": (1010, 288),
    "folded": (1600, 32),
    "flat": (9, 40, 36),
    "not aligned": (256, 1001),
    **SETS["gpt2-block"],
}
CASES = ((jnp.float32, False), (jnp.bfloat16, False), (jnp.float32, True), (jnp.bfloat16, True))
STEPS = 4
GUARD, GUARD_ROWS = 0xDEADBEEF, 64  # pattern and number of the rows behind those in use


def _step(setting: Setting, backend: str, applied: bool = False, interpret: Any = True) -> Any:
    """A jitted step (grads, state[, params]) -> (updates or params, state); nothing is donated."""
    storage = setting.storage(backend, interpret)
    if not applied:
        return jax.jit(stquant.scale_by_adam_q(precision=BUDGET, storage=storage).update)
    tx = stquant.adamw(1e-3, weight_decay=0.1, precision=BUDGET, storage=storage)
    return jax.jit(functools.partial(stquant.fused_update, tx))


def _start(params: Tree, applied: bool = False) -> Any:
    """A state; that of the kernels is the same."""
    make = functools.partial(stquant.adamw, 1e-3) if applied else stquant.scale_by_adam_q
    return make(precision=BUDGET, storage=stquant.Storage(backend="xla")).init(params)


def stquant_state(state: Any) -> stquant.ScaleByAdamQState:
    return state if isinstance(state, stquant.ScaleByAdamQState) else state[0]


def _difference(a: jax.Array, b: jax.Array) -> float:
    """Largest difference, relative to the largest number."""
    x, y = np.float32(a), np.float32(b)
    return float(np.max(np.abs(x - y)) / max(np.max(np.abs(y)), 1e-30))


def parity(setting: Setting) -> Iterator[dict[str, Any]]:
    """Each step from the same state in both backends for GPUs, on the same device.

    The interpreter gives XLA's bits. A GPU may round products and approximate divisions otherwise,
    so that a code next to a boundary falls on its other side. Largest over the steps: shares of
    stored words and, by leaf, of decoded moments that differ; by leaf, the difference of updates
    (of new parameters, if applied).
    """
    shapes = ONE_TILE if setting.interpret else KINDS
    xla = stquant.Storage(backend="xla")
    decode = jax.jit(functools.partial(stquant.to_optax, precision=BUDGET, storage=xla))
    for dtype, applied in CASES[:1] if setting.interpret else CASES:
        steps = {name: _step(setting, name, applied) for name in BACKENDS}
        params = gaussian(shapes, 99, 0.02, dtype)
        state = _start(params, applied)
        worst: dict[str, dict[str, float]] = {name: {} for name in ("stored", *shapes)}

        def note(what: str, key: str, share: float, worst: dict = worst) -> None:
            worst[what][key] = max(worst[what].get(key, 0.0), share)

        for i in range(1 if setting.interpret else STEPS):
            grads = gaussian(shapes, i, dtype=dtype)
            rest = (params,) if applied else ()
            got, want = (steps[name](grads, state, *rest) for name in BACKENDS)
            ours, theirs = (stquant_state(state) for _, state in (got, want))
            for key in STORED:
                note("stored", key, unequal(getattr(ours, key), getattr(theirs, key)))
            decoded, expected = (decode(x, params) for x in (ours, theirs))
            for name in shapes:
                note(name, "update", _difference(got[0][name], want[0][name]))
                note(name, "mu", unequal(decoded.mu[name], expected.mu[name]))
                note(name, "nu", unequal(decoded.nu[name], expected.nu[name]))
            state, params = want[1], want[0] if applied else params
        stored = worst.pop("stored")
        largest = max(leaf["update"] for leaf in worst.values())
        row = {"dtype": np.dtype(dtype).name, "applied": applied, "update_difference": largest}
        yield row | {"words_unequal": stored, "leaves": worst}


def races(setting: Setting) -> Iterator[dict[str, Any]]:
    """JAX's interpreter for GPU kernels watches every access of shared and of global memory.

    It runs on CPU arrays, in a process without a GPU: its races between the copy engine and the
    threads, and between tiles, are those of the program, not of the timing of a card.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    watching = plgpu.InterpretGPUParams(detect_races=True)
    kinds: dict[str, Shapes] = {"rows": {"kernel": (60, 248)}, "columns": {"kernel": (250, 64)}}
    for kind, shapes in ({"one tile": ONE_TILE} if setting.interpret else kinds).items():
        for applied in (False,) if setting.interpret else (False, True):
            params = gaussian(shapes)
            step = _step(Setting(interpret=True), "pallas_gpu", applied, watching)
            told = io.StringIO()
            with contextlib.redirect_stdout(told):  # the interpreter prints what it finds
                rest = (params,) if applied else ()
                jax.block_until_ready(step(params, _start(params, applied), *rest))
            found = "RACE" in told.getvalue().upper()
            row = {"kind": kind, "applied": applied, "races": found}
            yield row | ({"told": told.getvalue()[:2000]} if found else {})


def memory(setting: Setting) -> Iterator[dict[str, Any]]:
    """Repeated runs, what lies behind the arena's last row, and where donated buffers end up.

    Rows between the slots of different leaves need no guard: they are other leaves' codes, which
    `parity` compares.
    """
    params = gaussian(setting.shapes("gpt2-block"), 99, 0.02)
    grads = gaussian(setting.shapes("gpt2-block"))
    tx = stquant.adamw(1e-3, precision=BUDGET, storage=setting.storage())
    step = jax.jit(functools.partial(stquant.fused_update, tx), donate_argnums=(1, 2))
    adam, *others = tx.init(params)
    used = adam.arena.shape[0]
    guard = jnp.full((GUARD_ROWS, adam.arena.shape[1]), GUARD, jnp.uint32)
    adam = adam._replace(arena=jnp.concatenate([adam.arena, guard]))
    start = jax.device_get((params, (adam, *others)))

    results, moved = [], []
    for _ in range(2 if setting.interpret else 20):
        params, state = jax.tree.map(jnp.array, start)
        before = jax.block_until_ready((params, state[0]))
        pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(before)]
        params, state = step(grads, state, params)
        after = jax.tree_util.tree_leaves_with_path((params, state[0]))
        moved = [
            jax.tree_util.keystr(path, simple=True, separator=".")
            for pointer, (path, x) in zip(pointers, after, strict=True)
            if pointer != x.unsafe_buffer_pointer()
        ]
        results.append(jax.device_get((params, state)))
    first, *repeats = (jax.tree.leaves(result) for result in results)
    differ = [any(map(unequal, first, again)) for again in repeats]
    behind = results[0][1][0].arena[used:]
    yield {
        "elements": sum(x.size for x in params.values()),
        "runs": len(results),
        "runs_that_differ": sum(differ),
        "guard_bytes": GUARD_ROWS * ROW_BYTES,
        "guard_untouched": bool(np.all(behind == GUARD)),
        "donated_buffers": len(pointers),
        "donated_and_moved": moved,
    }
