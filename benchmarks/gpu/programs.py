"""Seconds to compile the update of GPT-2 small, and what the program is then made of."""

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import stquant_jax as stquant
from benchmarks.gpu.setting import Setting
from benchmarks.speed.compile import compile_update, copies


def compilation(setting: Setting) -> Iterator[dict[str, Any]]:
    """From shapes alone, nothing is allocated; all of JAX's caches are cleared before each.

    The first one of a process also warms up LLVM: Optax's, compiled twice. `code_bytes` is machine
    code that XLA made, `executable_bytes` all of the program, kernels as Mosaic hands them over.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    shapes = setting.shapes("gpt2")
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    storage = setting.storage()
    todo = {
        "optax, first of the process": optax.scale_by_adam(),
        "optax": optax.scale_by_adam(),
        "stquant, 5 bits": stquant.scale_by_adam_q(
            precision=stquant.Budget(5.0, interval=None), storage=storage
        ),
        "stquant, 5 bits, interval 100": stquant.scale_by_adam_q(storage=storage),
    }
    for name, tx in list(todo.items())[1:3] if setting.interpret else todo.items():
        seconds, compiled = compile_update(tx, params)
        rounded = {stage: round(float(taken), 3) for stage, taken in seconds.items()}
        row = {"transformation": name, "leaves": len(shapes), "seconds": rounded}
        yield row | _program(compiled, jax.eval_shape(tx.init, params))


def _program(compiled: Any, state: Any) -> dict[str, Any]:
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    row = {
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "instructions": len(re.findall(r"^ +(?:ROOT )?%\S+ = ", hlo, re.MULTILINE)),
        "custom_calls": len(re.findall(r" custom-call\(", hlo)),
        "kernels": len(re.findall(r'custom_call_target="mosaic_gpu', hlo)),
    }
    if isinstance(state, stquant.ScaleByAdamQState):
        row["arena_copies"] = copies(hlo, state.arena)
    try:
        row["executable_bytes"] = len(compiled.runtime_executable().serialize())
    except Exception as error:  # of a backend whose programs cannot be serialized
        row["executable_bytes"] = f"unknown: {type(error).__name__}"
    return row
