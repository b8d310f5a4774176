"""What every policy offers, the part of the state that it owns, and `Fixed`, the simplest."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stquant_jax.precision.slots import (
    EXACT,
    MU,
    MU_WIDTHS,
    NU,
    NU_WIDTHS,
    WIDEST,
    Slots,
    checked_pins,
    is_whole,
    pin_of,
    room,
)
from stquant_jax.precision.statistics import Observed, nothing_observed, observe
from stquant_jax.precision.tally import Tally, cleared, nothing_tallied, total
from stquant_jax.storage.numerics import isolated

WINDOWS = (1, 2, 3, 4, 6, 8)  # octaves that a lattice of nu may span
# The window of nu that served best in the closed loop, by width 0..8.
DEFAULT_WINDOW = (2, 2, 2, 2, 2, 2, 3, 3, 4)
# How far an element's v is pulled to what its group and row predict, in the update: lattice
# noise over noise plus spread, as found in the closed loop. By width 0..8.
DEFAULT_SHRINKAGE = (1.0, 0.85, 0.65, 0.5, 0.25, 0.1, 0.03, 0.0, 0.0)

ROW_BYTES = 512


class Plan(NamedTuple):
    """How each slot is stored, [slots]; the latter two are 0 for mu."""

    widths: jax.Array  # int32, bits of a code
    windows: jax.Array  # int32, octaves
    shrinkage: jax.Array  # float32, of nu's roots toward their prediction, in the update


def plan_with(moment: np.ndarray, widths: Any, windows: Any, xp: Any = np) -> Plan:
    """The plan of these widths, and of these windows for nu, with the shrinkage of the widths.

    ``xp`` is jnp where they are traced.
    """
    nu = moment == NU
    shrinkage = xp.asarray(DEFAULT_SHRINKAGE, xp.float32)[widths]
    return Plan(
        jnp.asarray(widths, jnp.int32),
        jnp.asarray(xp.where(nu, windows, 0), jnp.int32),
        jnp.asarray(xp.where(nu, shrinkage, xp.float32(0))),
    )


def storable(plan: Plan, slots: Slots, rows: int) -> jax.Array:
    """bool[]: every code of a plan has a meaning, and the plan fits into so many rows."""
    nu = slots.moment == NU
    narrowest = np.where(nu, NU_WIDTHS[0], MU_WIDTHS[0])
    sound = (plan.widths >= narrowest) & (plan.widths <= WIDEST)
    sound &= ~nu | (plan.windows >= WINDOWS[0]) & (plan.windows <= WINDOWS[-1])
    sound &= ~nu | (plan.shrinkage >= 0) & (plan.shrinkage <= 1)
    return jnp.all(sound) & (room(rows, slots.tiles, plan.widths) >= 0)


class PrecisionState(NamedTuple):
    """The part of the optimizer's state that a policy owns."""

    plan: Plan
    observed: Observed
    tally: Tally  # of the steps since then
    memory: Any  # the policy's own arrays, a NamedTuple

    @property
    def widths(self) -> jax.Array:
        return self.plan.widths

    def renewed(self, count: jax.Array, axes: tuple[str, ...] = ()) -> "PrecisionState":
        """The same, with all that is tallied taken into what is observed.

        Args:
          count: int32[], updates done.
          axes: of the mesh, as for `stquant_jax.precision.tally.total`.
        """
        tally, nu_widths = self.tally, self.plan.widths[1::2]
        if not len(nu_widths):
            return self
        sums = total(tally, axes)
        decays = tally.decays[0], tally.decays[1]
        operands = self.observed, sums, tally.steps, nu_widths, decays, count
        observed = isolated(count >= 0, observe, *operands)
        return self._replace(observed=observed, tally=cleared(tally))


class NoMemory(NamedTuple):
    """A policy that remembers nothing."""


class Policy:
    """Base of all policies, which are frozen dataclasses.

    Attributes:
      pins: regular expression of a leaf's path -> its width, a pair of widths (mu, nu), or "exact"
        (float32). The first that is found in a path counts.
      interval: steps between two decisions; None where plans never change.
    """

    pins: Any = ()
    interval: int | None = None

    def __post_init__(self):
        # a tuple in place of the mapping, so that a policy can be hashed
        object.__setattr__(self, "pins", checked_pins(self.pins))

    def keeps_exact(self, path: str) -> bool:
        """A leaf is pinned to float32."""
        return pin_of(self.pins, path) == EXACT

    def rows(self, slots: Slots, fixed_bytes: int, reference_bytes: int) -> int:
        """Rows of the arena.

        Args:
          slots: static facts of the slots.
          fixed_bytes: what the state takes beside the arena.
          reference_bytes: what Optax's float32 state takes.
        """
        raise NotImplementedError

    def first_widths(self, slots: Slots, rows: int) -> np.ndarray:
        """int[slots]: widths to start with, on the host."""
        raise NotImplementedError

    def first_windows(self, widths: np.ndarray) -> np.ndarray:
        return np.array(DEFAULT_WINDOW)[widths]

    def first_memory(self, slots: Slots) -> Any:
        """What the policy remembers, arrays in a NamedTuple. `stquant.metrics` calls the entries of
        a last axis of [slots] by the slots' names."""
        return NoMemory()

    def decide(
        self, slots: Slots, rows: int, state: PrecisionState, decays: tuple, count: jax.Array
    ) -> PrecisionState:
        """The state with a new plan. Called under `jax.lax.cond` every ``interval`` steps.

        Widths are 2 to 8 for mu and 0 to 8 for nu, windows 1 to 8, shrinkage 0 to 1, and the sum of
        width x tiles is at most ``rows``. A plan that breaks this cannot be stored: the one before
        stays, and all quantized moments become NaN.

        Args:
          slots, rows: as for `first_widths`; static.
          state: the precision state, traced, renewed.
          decays: of mu and nu, scalars.
          count: int32[], updates done.
        """
        raise NotImplementedError

    def refit(self, slots: Slots, rows: int, widths: np.ndarray) -> np.ndarray:
        """int[slots]: widths to go on with after `stquant.resize`, from those so far."""
        return self.first_widths(slots, rows)

    def init(self, slots: Slots, rows: int) -> PrecisionState:
        """The state to start with."""
        widths = np.asarray(self.first_widths(slots, rows), np.int32)
        leaves = len(slots.tiles) // 2
        return PrecisionState(
            plan_with(slots.moment, widths, self.first_windows(widths)),
            nothing_observed(leaves),
            nothing_tallied(leaves),
            self.first_memory(slots),
        )


@dataclass(frozen=True)
class Fixed(Policy):
    """The same widths for all slots, from the first step to the last.

    Attributes:
      mu: bits of a code of the first moment, 2..8.
      nu: bits of a code of the second moment, 0..8.
      window: octaves that the second moment's lattice spans, 1, 2, 3, 4, 6 or 8; None for the best
        at that width.
      pins: other widths for some leaves: regular expression of the leaf's path -> width, (mu, nu)
        or "exact".
    """

    mu: int = 5
    nu: int = 4
    window: int | None = None
    pins: Mapping[str, Any] | tuple = ()

    def __post_init__(self):
        super().__post_init__()
        for name, low in (("mu", MU_WIDTHS[0]), ("nu", NU_WIDTHS[0])):
            value = getattr(self, name)
            if not is_whole(value, low, WIDEST):
                raise ValueError(
                    f"Fixed({name}={value!r}): expected an integer width from {low} to {WIDEST}"
                )
        if self.window is not None and not (is_whole(self.window, 1) and self.window in WINDOWS):
            raise ValueError(f"Fixed(window={self.window!r}): expected None or one of {WINDOWS}")

    def rows(self, slots: Slots, fixed_bytes: int, reference_bytes: int) -> int:
        return int(np.sum(slots.tiles * self.first_widths(slots, 0)))

    def first_widths(self, slots: Slots, rows: int) -> np.ndarray:
        return slots.pinned(np.where(slots.moment == MU, self.mu, self.nu))

    def first_windows(self, widths: np.ndarray) -> np.ndarray:
        if self.window is None:
            return super().first_windows(widths)
        return np.full_like(widths, self.window)
