"""Every public optimizer and transformation in one table, with what it can do as data.

A line is all that a new optimizer takes: tests run over the lines, and `tests.conformance.table`
prints them. What an optimizer cannot do is in its ``limits``, with the error that says so: the same
test then expects that error, so that the table is never behind the code.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import optax

import stquant_jax as stquant

# Capability -> what docs/reference/compatibility.md calls it.
CAPABILITIES = {
    "reference": "updates equal to Optax's on exact leaves",
    "targets": "a parabola and Rosenbrock's function minimised as by Optax's",
    "dtypes": "updates in the gradients' dtype",
    "control flow": "`scan`, `cond`, `while_loop`",
    "vmap": "`vmap`",
    "donation": "donation",
    "abstract": "`eval_shape`",
    "empty": "leaves without elements",
    "wrappers": "Optax's `chain`, `MultiSteps`, `apply_if_finite`, `masked`, `partition`, "
    "`lookahead`, `contrib.schedule_free`, `contrib.mechanize`, `contrib.reduce_on_plateau`",
    "inject": "`inject_hyperparams` in float32",
    "inject bfloat16": "`inject_hyperparams` in bfloat16",
    "tree_map_params": "`tree_map_params`",
    "x64": "`jax_enable_x64`",
    "explicit": "Explicit mesh axes",
    "frameworks": "`nnx.Optimizer`, Linen's `TrainState`, Haiku, Equinox (whole models too)",
    "budget": "a budget of bits",
    "kernels": "Pallas kernels",
    "fused": "`fused_update`",
    "metrics": "`metrics`",
    "to_optax": "`to_optax`",
    "portable": "`to_portable`",
}


@dataclass(frozen=True, eq=False)
class Case:
    """A line of the table.

    Attributes:
      name: of the optimizer, as a user writes it.
      make: what makes it, of a learning rate; of nothing if it is a ``direction``.
      reference: Optax's original, with the same arguments.
      options: arguments of both. ours: of ours alone, beside ``storage``.
      rate: a learning rate for the targets of `tests.conformance.test_targets`.
      error: squared error of a packed update over the reference's energy, after a few steps.
      static: arguments that `optax.inject_hyperparams` must not make arrays of.
      limits: capability -> the error that says it is lacking.
    """

    name: str
    make: Callable[..., optax.GradientTransformation]
    reference: Callable[..., optax.GradientTransformation]
    options: Mapping[str, Any] = field(default_factory=dict)
    ours: Mapping[str, Any] = field(default_factory=dict)
    direction: bool = False
    rate: float = 0.1
    network_rate: float = 5e-3
    error: float = 0.01
    loss: float = 0.02
    static: tuple[str, ...] = ()
    limits: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        assert self.limits.keys() <= CAPABILITIES.keys()

    def own(self, storage: stquant.Storage) -> dict[str, Any]:
        """Arguments of ours alone: a budget of eight bits, or codes of eight where leaves of a few
        elements are packed too, which no budget has room for."""
        precision = stquant.Budget(8.0) if storage.min_size else stquant.Fixed(8, 8)
        budget = {} if "budget" in self.limits else {"precision": precision}
        return {**budget, **self.ours, "storage": storage}

    def optimizer(self, storage: stquant.Storage, rate: Any = None, **more: Any) -> Any:
        own = {**self.own(storage), **more}
        return self._rated(partial(self.make, **self.options), rate, **own)

    def original(self, rate: Any = None) -> Any:
        return self._rated(partial(self.reference, **self.options), rate)

    def _rated(self, make: Callable, rate: Any, **own: Any) -> Any:
        rate = self.rate if rate is None else rate
        if self.direction:
            return optax.chain(make(**own), optax.scale_by_learning_rate(rate))
        return make(rate, **own)


def quantized(original: Callable) -> Callable[..., Any]:
    """What makes `quantize_state` of one of Optax's."""

    def quantize_state(learning_rate: optax.ScalarOrSchedule, b1=0.9, *, precision, storage):
        return stquant.quantize_state(original(learning_rate, b1), precision, storage)

    return quantize_state


ADAM = {"inject bfloat16": "hyperparam_dtype=jnp.float32"}
DIRECTION = {"fused": "expected what stquant.adam or stquant.adamw returned"}
ANY = {
    "fused": "expected what stquant.adam or stquant.adamw returned",
    "kernels": "cannot run .* no kernel",
    "to_optax": "expected the ScaleByAdamQState",
    "portable": "expected the ScaleByAdamQState",
}
# Optax's own limits.
MUON = {"explicit": "Contracting dimensions are sharded", "empty": "division by zero"}
SOLO = ANY | ADAM | {"budget": "unexpected keyword argument 'precision'"}
FOUR = {"bits": (4, 4)}
SGD = {"rate": 2e-3, "network_rate": 0.3}

CASES = (
    Case("scale_by_adam_q", stquant.scale_by_adam_q, optax.scale_by_adam, direction=True,
         limits=ADAM | DIRECTION),
    Case("adam", stquant.adam, optax.adam, limits=ADAM),
    Case("adam, nesterov", stquant.adam, optax.adam, {"nesterov": True}, limits=ADAM),
    Case("adamw", stquant.adamw, optax.adamw, limits=ADAM),
    Case("adamw, nesterov", stquant.adamw, optax.adamw, {"nesterov": True}, limits=ADAM),
    Case("scale_by_solo", stquant.scale_by_solo, optax.scale_by_adam, {"b1": 0.8}, FOUR,
         direction=True, error=0.2, loss=0.1, static=("quantile",), limits=SOLO),
    Case("solo_adamw", stquant.solo_adamw, optax.adamw, {"b1": 0.8}, FOUR, error=0.2, loss=0.1,
         static=("quantile",), limits=SOLO),
    Case("quantize_state(optax.lion)", quantized(optax.lion), optax.lion, error=0.2, limits=ANY),
    Case("adabelief", stquant.adabelief, optax.adabelief, limits=ANY | ADAM),
    Case("scale_by_belief_q", stquant.scale_by_belief_q, optax.scale_by_belief, direction=True,
         limits=ANY | ADAM),
    Case("adafactor", stquant.adafactor, optax.adafactor, {"multiply_by_parameter_scale": False},
         static=("min_dim_size_to_factor",), limits=ANY),
    Case("ademamix", stquant.ademamix, optax.contrib.ademamix, rate=0.05, limits=ANY | ADAM),
    Case("scale_by_ademamix_q", stquant.scale_by_ademamix_q, optax.contrib.scale_by_ademamix,
         direction=True, rate=0.05, limits=ANY | ADAM),
    Case("amsgrad", stquant.amsgrad, optax.amsgrad, limits=ANY | ADAM),
    Case("scale_by_amsgrad_q", stquant.scale_by_amsgrad_q, optax.scale_by_amsgrad, direction=True,
         limits=ANY | ADAM),
    Case("lion", stquant.lion, optax.lion, error=0.2, limits=ANY),
    Case("scale_by_lion_q", stquant.scale_by_lion_q, optax.scale_by_lion, direction=True, error=0.2,
         limits=ANY),
    Case("muon", stquant.muon, optax.contrib.muon, network_rate=0.05, static=("ns_steps",),
         limits=ANY | ADAM | MUON),
    Case("rmsprop", stquant.rmsprop, optax.rmsprop, limits=ANY),
    Case("scale_by_rms_q", stquant.scale_by_rms_q, optax.scale_by_rms, direction=True, limits=ANY),
    Case("sgd, momentum", stquant.sgd, optax.sgd, {"momentum": 0.9}, **SGD, limits=ANY),
    Case("trace_q", stquant.trace_q, optax.trace, {"decay": 0.9}, direction=True, **SGD,
         limits=ANY),
)  # fmt: skip
