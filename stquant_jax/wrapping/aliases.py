"""Optax's own optimizers with `quantize_state` around them: their signatures, and ours behind.

stquant.lion(1e-4, b2=0.98)  is  stquant.quantize_state(optax.lion(1e-4, b2=0.98), leafwise=True)
"""

import inspect
from collections.abc import Callable
from typing import Any

import optax
from optax import contrib

from stquant_jax.engine.checks import check_fine
from stquant_jax.precision import Budget, Policy
from stquant_jax.sharding.specs import Sharding
from stquant_jax.storage.settings import Storage
from stquant_jax.wrapping.quantize import UNSIGNED, quantize_state

_DOC = """`{original}` with quantized state: {what}.

``{name}(...)`` is ``quantize_state({original}(...), leafwise=True)``: moments are decoded and
encoded one parameter at a time.

Args:
  *: those of `{original}`, in its order.
  precision, storage, sharding: see `quantize_state`, which keeps the state.

Returns:
  A gradient transformation whose state is a `QuantizedState`. XLA only.

Raises:
  ValueError: as `quantize_state`; a decay in a dtype too coarse for it{raises}.
"""


def _wrapped(
    name: str,
    make: Callable[..., optax.GradientTransformation],
    what: str,
    *,
    unsigned: str = UNSIGNED,
    refused: dict[str, str] | None = None,
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """A function like ``make``.

    Args:
      what: in words, what of its state is quantized.
      refused: arguments that have to be false, and why.
    """
    refused = refused or {}

    def wrapped(
        *args: Any,
        precision: Policy = Budget(8.0),  # noqa: B008
        storage: Storage = Storage(),  # noqa: B008
        sharding: Sharding | None = None,
        **kwargs: Any,
    ) -> optax.GradientTransformationExtraArgs:
        given = signature.bind(*args, **kwargs).arguments
        for argument in slow & given.keys():
            check_fine(argument, given[argument])
        for argument, reason in refused.items():
            if given.get(argument):
                raise ValueError(f"{argument}={given[argument]!r}: expected False, {reason}")
        tx = make(*args, **kwargs)
        return quantize_state(tx, precision, storage, sharding, unsigned=unsigned, leafwise=True)

    signature = inspect.signature(make)
    # Decays that would be 1 in bfloat16.
    slow = {
        name
        for name, x in signature.parameters.items()
        if isinstance(x.default, float) and 1 - 2**-9 <= x.default < 1
    }
    own = [
        x
        for x in inspect.signature(wrapped).parameters.values()
        if x.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    module = "optax.contrib" if "contrib" in make.__module__ else "optax"
    original = f"{module}.{make.__name__}"
    raises = "".join(f"; ``{argument}``, {reason}" for argument, reason in refused.items())
    wrapped.__signature__ = signature.replace(  # pyright: ignore[reportFunctionMemberAccess]
        parameters=[*signature.parameters.values(), *own],
        return_annotation=optax.GradientTransformationExtraArgs,
    )
    wrapped.__name__ = wrapped.__qualname__ = name
    wrapped.__doc__ = _DOC.format(name=name, original=original, what=what, raises=raises)
    return wrapped


adabelief = _wrapped("adabelief", optax.adabelief, "mu, and nu, the belief")
adafactor = _wrapped(
    "adafactor",
    optax.adafactor,
    "the momentum; v is factored and stays exact, or is quantized where it is not factored",
    unsigned=rf"{UNSIGNED}|(^|\.)v$",
)
ademamix = _wrapped("ademamix", contrib.ademamix, "m1, the slow m2, and nu")
amsgrad = _wrapped("amsgrad", optax.amsgrad, "mu, nu, and the largest nu so far")
lion = _wrapped("lion", optax.lion, "mu")
muon = _wrapped(
    "muon", contrib.muon, "the momentum of matrices, mu and nu of what Adam takes care of"
)
rmsprop = _wrapped(
    "rmsprop",
    optax.rmsprop,
    "nu, and the momentum if there is one",
    refused={"centered": "the difference of two quantized moments can be negative"},
)
sgd = _wrapped("sgd", optax.sgd, "the momentum, if there is one")

scale_by_ademamix_q = _wrapped(
    "scale_by_ademamix_q", contrib.scale_by_ademamix, "m1, the slow m2, and nu"
)
scale_by_amsgrad_q = _wrapped(
    "scale_by_amsgrad_q", optax.scale_by_amsgrad, "mu, nu, and the largest nu so far"
)
scale_by_belief_q = _wrapped("scale_by_belief_q", optax.scale_by_belief, "mu, and nu, the belief")
scale_by_lion_q = _wrapped("scale_by_lion_q", optax.scale_by_lion, "mu")
scale_by_rms_q = _wrapped("scale_by_rms_q", optax.scale_by_rms, "nu")
trace_q = _wrapped("trace_q", optax.trace, "the trace")
