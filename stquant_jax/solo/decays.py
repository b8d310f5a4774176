"""Which decays go with how many bits, in SOLO (arXiv 2505.00347)."""

# Half the median gap between neighbouring levels of the dynamic map of so many bits, to the digits
# the paper's table of momenta was made with.
HALF_GAP = {2: 0.275, 3: 0.135, 4: 0.067, 5: 0.034, 6: 0.017, 7: 0.008, 8: 0.004}


def solo_momentum(bits: int, reference: float = 0.9, reference_bits: int = 8) -> float:
    r"""The largest b1 for which m's rounding at ``bits`` hurts no more than at the reference.

    .. math::
      \frac{\beta'}{1 - \beta'} r(b') \le \frac{\beta}{1 - \beta} r(b)

    with r(b) half the median gap between levels, to the paper's three digits (arXiv 2505.00347).

    Args:
      bits: of m, from 2 to 8.
      reference: a b1 known to do well at ``reference_bits``.
      reference_bits: from 2 to 8.

    Raises:
      ValueError: an argument out of range.

    Examples:
      >>> from stquant_jax import solo_momentum
      >>> [round(solo_momentum(bits), 3) for bits in (4, 3, 2)]
      [0.35, 0.211, 0.116]
    """
    for name, value in (("bits", bits), ("reference_bits", reference_bits)):
        if not isinstance(value, int) or value not in HALF_GAP:
            raise ValueError(f"{name}={value!r}: expected an integer from 2 to 8")
    if not isinstance(reference, (int, float)) or not 0 <= reference < 1:
        raise ValueError(f"reference={reference!r}: expected a number, 0 <= reference < 1")
    odds = reference / (1 - reference) * HALF_GAP[reference_bits] / HALF_GAP[bits]
    return odds / (1 + odds)


def swamping_bound(bits: int) -> float:
    """The b2 from which on v would stand still with linear levels, however small the gradients.

    Without gradient v loses a share 1 - b2 of itself in a step. From ``b2 = 1 - 1 / (2 * (2**bits -
    1))`` on, even the largest level loses less than the half step that rounding to the nearest
    gives back. That is why SOLO's levels are logarithmic and its rounding stochastic
    (arXiv 2505.00347).

    Args:
      bits: of v, a positive integer.

    Raises:
      ValueError: ``bits`` is not a positive integer.

    Examples:
      >>> from stquant_jax import swamping_bound
      >>> [round(swamping_bound(bits), 3) for bits in (4, 3, 2)]
      [0.967, 0.929, 0.833]
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or bits < 1:
        raise ValueError(f"bits={bits!r}: expected a positive integer")
    return 1 - 1 / (2 * (2**bits - 1))
