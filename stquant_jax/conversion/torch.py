"""Adam's moments out of PyTorch's optimizers in 8 and 4 bits, from files, without PyTorch.

    file -> `<parameter>.<field>`: array -> codes, scales -> mu, nu by name -> convert -> trees

Layouts are those of bitsandbytes 0.50, torchao 0.18 and flashoptim 0.1.4. In all of them blocks run
over the flattened tensor.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax

_FIELDS = "exp_avg", "exp_avg_sq"
# In which bitsandbytes hides its tensors from FSDP.
_WRAPPER = "__bnb_optimizer_quant_state__."


def from_torch(
    tensors: Mapping[str, np.ndarray],
    convert: Callable[[dict[str, np.ndarray]], Any],
    format: str,
) -> optax.ScaleByAdamState:
    """Adam's state of a PyTorch run, for Optax: its moments, decoded to float32.

    `from_optax` quantizes it. PyTorch is not needed, only a file with the optimizer's state, flat:
    ``<parameter>.<field>`` for each array. docs/how-to/from_torch.md has the lines that write it.

    Args:
      tensors: what `numpy.load` or ``safetensors.numpy.load_file`` makes of that file.
      convert: makes a tree like the parameters of a dictionary from PyTorch's names to arrays: the
        function that the model's weights go through. It is given mu, then nu, and must move
        elements only: transpose, reshape, split, stack, every element once.
      format: what wrote it, Adam or AdamW of

        - "bitsandbytes": 8 bits, and float32 under 4096 elements.
        - "torchao": 8 bits, 4 bits or float8; leaves that it left as they are.
        - "flashoptim": 8 bits, or as they are (``compress_state_dict=False``).
        - "torch": PyTorch's own.

    Returns:
      An `optax.ScaleByAdamState` of NumPy arrays, on the host: to the bit what the library itself
      decodes. ``count`` is its step.

    Raises:
      ValueError: an unknown format; a file of another one, or of another optimizer (AMSGrad, too);
        a field that is missing, or is of another dtype, shape or number of blocks than the format
        has; numbers that are not finite; negative nu; steps that differ between parameters, where
        Optax has one count; a ``convert`` that changes, drops or repeats elements, or asks for
        parameters that the file has not.

    Examples:
      >>> import numpy as np, stquant_jax as stquant
      >>> tensors = {"fc.weight.step": np.array(7)}  # Linear(3, 2)
      >>> tensors |= {f"fc.weight.{x}": np.ones((2, 3)) for x in ("exp_avg", "exp_avg_sq")}
      >>> state = stquant.from_torch(tensors, lambda x: {"kernel": x["fc.weight"].T}, "torch")
      >>> int(state.count), state.mu["kernel"].shape
      (7, (3, 2))
    """
    if format not in _FORMATS:
        raise ValueError(f"format={format!r}: expected one of {', '.join(sorted(_FORMATS))}")
    if not isinstance(tensors, Mapping):
        raise ValueError(
            f"tensors is {type(tensors).__name__}: expected a mapping from names to arrays, as "
            "numpy.load makes of a file"
        )
    counts, mu, nu = {}, {}, {}
    for name, keys in _keys(tensors, format).items():
        fields = _Fields(name, {field: tensors[key] for field, key in keys.items()})
        counts[name] = fields.count()
        mu[name], nu[name] = (_FORMATS[format](fields, k) for k in range(2))
        fields.check_empty()
        if mu[name].shape != nu[name].shape:
            shapes = mu[name].shape, nu[name].shape
            raise ValueError(f"moments of {name!r} have shapes {shapes}: expected one of both")
        if np.any(nu[name] < 0):
            raise ValueError(f"nu of {name!r} has negative elements: expected sums of squares")
    count = _the_one(counts)
    return optax.ScaleByAdamState(count, *(_converted(convert, x) for x in (mu, nu)))


# --- formats: fields of a parameter -> mu (k = 0) or nu (k = 1), float32 ---


def _torch(x: "_Fields", k: int) -> np.ndarray:
    return x.floats(_FIELDS[k])


def _bitsandbytes(x: "_Fields", k: int) -> np.ndarray:
    """value = qmap[code] absmax; codes in the tensor's shape."""
    state, qmap, absmax = (f"{field}{k + 1}" for field in ("state", "qmap", "absmax"))
    if x.is_float(state):  # under 4096 elements, or as the user asked
        return x.floats(state)
    codes = x.take(state, np.uint8)
    levels, scale = x.floats(qmap, (256,)), x.floats(absmax, _blocks(codes, 256))
    return _scaled(levels[codes], scale, 256)


def _torchao(x: "_Fields", k: int) -> np.ndarray:
    """value = qmap[code] scale, two codes of 4 bits in a byte, the first one high; without a qmap
    codes are the bits of float8_e4m3fn."""
    name = _FIELDS[k]
    if f"{name}.codes" not in x:  # under 4096 elements, or not whole blocks
        return x.floats(name)
    codes, shape = x.take(f"{name}.codes", np.uint8), x.take(f"{name}.shape", np.integer)
    if f"{name}.qmap" in x:
        levels = x.floats(f"{name}.qmap", (16,), (256,))
        values = levels[np.stack([codes >> 4, codes & 15], -1) if levels.size == 16 else codes]
    else:
        values = x.checked(f"{name}.codes", codes.view(jnp.float8_e4m3fn))
    if values.size != shape.prod():
        x.refuse(f"{name}.codes", f"holds {values.size} codes", f"{shape.prod()}, as in shape")
    scale = x.floats(f"{name}.scale")
    if scale.ndim != 1 or not scale.size or values.size % scale.size:
        blocks = f"one scale for every block of {values.size} codes, all blocks of one size"
        x.refuse(f"{name}.scale", f"has shape {scale.shape}", blocks)
    return _scaled(values.reshape(shape), scale, values.size // scale.size)


def _flashoptim(x: "_Fields", k: int) -> np.ndarray:
    """m = scale y / (2 - |y|), y = code / 127; v = (scale code / 255)^2; codes in the tensor's
    shape."""
    name, dtype, top = ((_FIELDS[0], np.int8, 127), (_FIELDS[1], np.uint8, 255))[k]
    x.forget("error_bits")  # of the parameter, not of Adam
    if f"{name}::quantized" not in x:
        return x.floats(name)
    codes = x.take(f"{name}::quantized", dtype)
    scale = x.take(f"{name}::scales", jnp.floating)
    if scale.dtype == jnp.bfloat16:  # so it calls float16, to survive PyTorch's casts to bfloat16
        scale = scale.view(np.float16)
    scale = x.checked(f"{name}::scales", scale, _blocks(codes, 32))
    y = codes.astype(np.float32) / top
    value = _scaled(y if k else y / (2 - np.abs(y)), scale, 32)
    return value * value if k else value


_FORMATS = {
    "bitsandbytes": _bitsandbytes,
    "flashoptim": _flashoptim,
    "torch": _torch,
    "torchao": _torchao,
}


def _blocks(codes: np.ndarray, size: int) -> tuple[int]:
    return (math.ceil(codes.size / size),)


def _scaled(values: np.ndarray, scale: np.ndarray, block: int) -> np.ndarray:
    """Each times the scale of its block; the last one may be short."""
    return values * np.repeat(scale, block)[: values.size].reshape(values.shape)


# --- files ---


class _Fields:
    """The arrays of one parameter, each to be taken once."""

    def __init__(self, name: str, arrays: Mapping[str, Any]):
        self._name = name
        self._arrays = {field: np.asarray(x) for field, x in arrays.items()}

    def __contains__(self, field: str) -> bool:
        return field in self._arrays

    def refuse(self, field: str, got: str, expected: str) -> NoReturn:
        raise ValueError(f"tensors['{self._name}.{field}'] {got}: expected {expected}")

    def forget(self, field: str) -> None:
        self._arrays.pop(field, None)

    def is_float(self, field: str) -> bool:
        return field in self and jnp.issubdtype(self._arrays[field].dtype, jnp.floating)

    def take(self, field: str, dtype: Any) -> np.ndarray:
        if field not in self:
            raise ValueError(
                f"tensors have no '{self._name}.{field}': of this parameter they have "
                f"{', '.join(self._arrays) or 'nothing else'}"
            )
        x = self._arrays.pop(field)
        if not jnp.issubdtype(x.dtype, dtype):
            kind = getattr(dtype, "__name__", dtype)
            self.refuse(field, f"has dtype {x.dtype}", kind)
        return x

    def floats(self, field: str, *shapes: tuple[int, ...]) -> np.ndarray:
        return self.checked(field, self.take(field, jnp.floating), *shapes)

    def checked(self, field: str, x: np.ndarray, *shapes: tuple[int, ...]) -> np.ndarray:
        """In float32, finite, of one of these shapes if any."""
        if shapes and x.shape not in shapes:
            self.refuse(field, f"has shape {x.shape}", " or ".join(map(str, shapes)))
        x = x.astype(np.float32)
        if not np.isfinite(x).all():
            self.refuse(field, "has NaN or infinite elements", "finite ones")
        return x

    def count(self) -> int:
        step = self.take("step", np.number)
        if step.size != 1 or not (0 <= step.item() < 2**31 and step.item() == int(step.item())):
            self.refuse("step", f"is {step}", "the number of steps done")
        return int(step.item())

    def check_empty(self) -> None:
        if self._arrays:
            raise ValueError(
                f"tensors have '{self._name}.{next(iter(self._arrays))}', which is not of Adam in "
                "this format: expected no other fields than its moments and its step"
            )


def _keys(tensors: Mapping[str, Any], format: str) -> dict[str, dict[str, str]]:
    """Of every parameter the key of every field; each parameter has one that ends in '.step'."""
    suffix = ".step"
    found = {key.removesuffix(suffix): {} for key in tensors if key.endswith(suffix)}
    for key in tensors:
        ends = (i for i in range(len(key) - 1, 0, -1) if key[i] == "." and key[:i] in found)
        end = next(ends, None)
        if end is None:
            raise ValueError(
                f"tensors have {key!r}, and no step of it: expected Adam's state in {format}, a "
                "'<parameter>.<field>' for each array and a '<parameter>.step' for each parameter"
            )
        found[key[:end]][key[end + 1 :].removeprefix(_WRAPPER)] = key
    return found


def _the_one(counts: dict[str, int]) -> np.ndarray:
    steps = {count: name for name, count in counts.items()}
    if len(steps) != 1:
        got = ", ".join(f"'{name}.step' is {count}" for count, name in sorted(steps.items()))
        raise ValueError(
            f"tensors have {got or 'nothing'}: expected parameters, all of one number of steps, as "
            "Optax has one count for all"
        )
    return np.asarray(next(iter(steps)), np.int32)


# --- trees ---


def _converted(convert: Callable[..., Any], moments: dict[str, np.ndarray]) -> Any:
    """A tree of them. That nothing is lost, repeated or changed shows in number and sum."""
    try:
        tree = jax.tree.map(np.asarray, convert(dict(moments)))
    except KeyError as error:
        have = ", ".join(f"{name!r} {list(x.shape)}" for name, x in moments.items())
        raise ValueError(
            f"convert asked for {error}: expected parameters of tensors: {have}"
        ) from error
    had, made = list(moments.values()), jax.tree.leaves(tree)
    sizes = [sum(x.size for x in arrays) for arrays in (had, made)]
    totals = [sum(np.sum(np.abs(x), dtype=np.float64) for x in arrays) for arrays in (had, made)]
    if sizes[0] != sizes[1] or not math.isclose(*totals, rel_tol=1e-9):
        raise ValueError(
            f"convert made {sizes[1]} elements of {sizes[0]}, their sum {totals[1]:.9g} of "
            f"{totals[0]:.9g}: expected each once, unchanged; take out of tensors what "
            "the tree has not"
        )
    return tree
