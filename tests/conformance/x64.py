"""Every optimizer under `jax_enable_x64`: prints, as JSON, what became of each.

A program of its own, since the switch is one of the whole process. Packed, updates are lowered but
not compiled, which would take minutes.
"""

import json

import jax
import jax.numpy as jnp

from tests.conformance.cases import CASES, STORAGES, types


def outcome(case, storage, run):
    """None, or the error."""
    model = {"kernel": jnp.ones((48, 40), jnp.float32), "double": jnp.ones((48, 40), jnp.float64)}
    tx = case.optimizer(storage)
    try:
        state = tx.init(model)
        lowered = jax.jit(tx.update).lower(model, state, model)
        assert types(lowered.out_info) == types((model, state)), "other types"
        wide = [x for x in jax.tree.leaves(state) if x.dtype.itemsize > 4]
        assert not wide or storage.min_size, "64 bits of state"
        if run:
            lowered.compile()(model, state, model)
    except (AssertionError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def main():
    jax.config.update("jax_enable_x64", True)
    print(json.dumps({
        f"{case.name}, {name}": outcome(case, storage, name == "exact")
        for case in CASES
        for name, storage in STORAGES.items()
    }))  # fmt: skip


if __name__ == "__main__":
    main()
