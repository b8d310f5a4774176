"""STQuant for Optax: optimizer state in a few bits per element, inside a fixed budget.

>>> import stquant_jax as stquant
>>> tx = stquant.adamw(3e-4, weight_decay=0.1, precision=stquant.Budget(5.0))
"""

from stquant_jax.fusing import fused_update
from stquant_jax.holding import QuantizedState
from stquant_jax.interop import from_optax, to_optax
from stquant_jax.introspect import plan, report
from stquant_jax.layout import Storage
from stquant_jax.optimizers import adam, adamw
from stquant_jax.peers import from_torch
from stquant_jax.placement import state_shardings
from stquant_jax.portable import from_portable, to_portable
from stquant_jax.precision import Budget, Fixed, Policy, STQuant
from stquant_jax.quantize import quantize_state
from stquant_jax.resizing import resize
from stquant_jax.sharding import Sharding
from stquant_jax.solo import (
    ScaleBySoloState,
    scale_by_solo,
    solo_adamw,
    solo_momentum,
    swamping_bound,
)
from stquant_jax.telemetry import metrics
from stquant_jax.transform import ScaleByAdamQState, scale_by_adam_q
from stquant_jax.wrapped import (
    adabelief,
    adafactor,
    ademamix,
    amsgrad,
    lion,
    muon,
    rmsprop,
    scale_by_ademamix_q,
    scale_by_amsgrad_q,
    scale_by_belief_q,
    scale_by_lion_q,
    scale_by_rms_q,
    sgd,
    trace_q,
)

__all__ = [
    "Budget",
    "Fixed",
    "Policy",
    "QuantizedState",
    "STQuant",
    "ScaleByAdamQState",
    "ScaleBySoloState",
    "Sharding",
    "Storage",
    "adabelief",
    "adafactor",
    "adam",
    "adamw",
    "ademamix",
    "amsgrad",
    "from_optax",
    "from_portable",
    "from_torch",
    "fused_update",
    "lion",
    "metrics",
    "muon",
    "plan",
    "quantize_state",
    "report",
    "resize",
    "rmsprop",
    "scale_by_adam_q",
    "scale_by_ademamix_q",
    "scale_by_amsgrad_q",
    "scale_by_belief_q",
    "scale_by_lion_q",
    "scale_by_rms_q",
    "scale_by_solo",
    "sgd",
    "solo_adamw",
    "solo_momentum",
    "state_shardings",
    "swamping_bound",
    "to_optax",
    "to_portable",
    "trace_q",
]
