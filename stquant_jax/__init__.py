"""STQuant for Optax: optimizer state in a few bits per element, inside a fixed budget.

>>> import stquant_jax as stquant
>>> tx = stquant.adamw(3e-4, weight_decay=0.1, precision=stquant.Budget(5.0))
"""

from stquant_jax.conversion.interop import from_optax, to_optax
from stquant_jax.conversion.portable import from_portable, to_portable
from stquant_jax.conversion.resize import resize
from stquant_jax.conversion.torch import from_torch
from stquant_jax.engine.aliases import adam, adamw
from stquant_jax.engine.differentiation import NotDifferentiableError
from stquant_jax.engine.fused_update import fused_update
from stquant_jax.engine.state import ScaleByAdamQState
from stquant_jax.engine.transform import scale_by_adam_q
from stquant_jax.inspection.metrics import metrics
from stquant_jax.inspection.placement import state_shardings
from stquant_jax.inspection.report import plan, report
from stquant_jax.precision import Budget, Fixed, Policy, STQuant
from stquant_jax.sharding.specs import Sharding
from stquant_jax.solo.decays import solo_momentum, swamping_bound
from stquant_jax.solo.state import ScaleBySoloState
from stquant_jax.solo.transform import scale_by_solo, solo_adamw
from stquant_jax.storage.settings import Storage
from stquant_jax.wrapping.aliases import (
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
from stquant_jax.wrapping.quantize import quantize_state
from stquant_jax.wrapping.state import QuantizedState

__all__ = [
    "Budget",
    "Fixed",
    "NotDifferentiableError",
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
