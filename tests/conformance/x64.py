"""Every optimizer under `jax_enable_x64`: prints, as JSON, what became of each (`outcomes`), or
what one has stored (`digest`).

A program of its own, since the switch is one of the whole process. Packed, updates are lowered but
not compiled, which would take minutes, except for the one of which the bits are compared.
"""

import hashlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from tests.conformance.cases import CASES
from tests.conformance.shared import EXACT, PACKED, STORAGES, steps, types


def outcome(case, storage):
    """None, or the error."""
    model = {"kernel": jnp.ones((48, 40), jnp.float32), "double": jnp.ones((48, 40), jnp.float64)}
    tx = case.optimizer(storage)
    try:
        state = tx.init(model)
        lowered = jax.jit(tx.update).lower(model, state, model)
        assert types(lowered.out_info) == types((model, state)), "other types"
        if storage == EXACT:
            lowered.compile()(model, state, model)
    except (AssertionError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def digest():
    """Of what is stored after some steps of the first optimizer on float32 gradients."""
    _, state = steps(CASES[0], PACKED)[-1]
    arrays = (np.asarray(x).tobytes() for x in jax.tree.leaves(state))
    return hashlib.sha256(b"".join(arrays)).hexdigest()


def outcomes():
    return {
        f"{case.name}, {name}": outcome(case, storage)
        for case in CASES
        for name, storage in STORAGES.items()
    }


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    print(json.dumps({"outcomes": outcomes, "digest": digest}[sys.argv[1]]()))
