"""What a state tells of itself, as arrays for any logger."""

from typing import Any

import jax
import jax.numpy as jnp

from stquant_jax.checks import check_arrays
from stquant_jax.finding import find_state
from stquant_jax.precision.statistics import distortion


def metrics(state: Any) -> dict[str, jax.Array]:
    """Widths, estimated errors and statistics of a state, inside `jax.jit` or outside.

    Slots are named by ``stquant.plan(...).slots``, leaves by every second of them. Statistics are
    averages over the last steps; of a leaf whose codes have just changed they start from 0.

    Args:
      state: a `ScaleByAdamQState`, or an optimizer's state that holds one.

    Returns:
      A dictionary of copies, which outlive a donated state.

      - ``count``: int32[], updates done.
      - ``widths``: int32[slots], bits of a code.
      - ``windows``: int32[slots], octaves that nu's codes span; 0 for mu.
      - ``distortion``: float32[slots], estimated squared error of the update that the slot causes
        in the closed loop, over the energy of its leaf's update; rough for nu until its memory is
        filled, and a guess where it has no codes.
      - ``nu_saturation``: float32[leaves], share of the update's energy where nu's codes are at the
        end of their window.
      - ``mu_zeros``: float32[leaves], share of mu's codes that stand for zero.
      - ``spread``: float32[leaves], error over energy if nu had no codes.
      - what the policy adds, of `Budget` ``unmet``: bool[slots], above ``max_distortion`` with no
        bits left; and ``promise_kept``: bool[], none is.

    Raises:
      ValueError: the state holds no `ScaleByAdamQState`, or several.
    """
    state = find_state(state)
    check_arrays(state, "state")
    plan, observed, _, memory = state.precision.renewed(state.count)
    sums = observed.sums
    told = {
        "count": state.count,
        "widths": plan.widths,
        "windows": plan.windows,
        "distortion": distortion(observed, plan.widths[1::2]),
        "nu_saturation": _share(sums.saturated, sums.energy),
        "mu_zeros": _share(sums.zeros, sums.elements),
        "spread": observed.spread,
        **memory._asdict(),
    }
    if "unmet" in told:
        told["promise_kept"] = ~jnp.any(told["unmet"])
    return {name: jnp.copy(x) for name, x in told.items()}


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
    """0 where nothing is counted yet."""
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0)
