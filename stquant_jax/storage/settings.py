"""What users say about storage: which leaves stay exact, which backend runs, the seed."""

from dataclasses import dataclass
from typing import Any

from stquant_jax.storage.planes import TILE


@dataclass(frozen=True)
class Storage:
    """How the state is stored and which backend updates it.

    Attributes:
      min_size: leaves of fewer elements (by their global shape) stay exact float32.
      row_alignment: rows of the arena that belong together: each leaf's tiles are padded to a
        multiple. None is what the backend needs, 8 for "pallas_tpu" and 1 for the others.
      backend: "xla", "xla_gpu", "pallas_tpu", "pallas_gpu", or None for the best one that can run
        here. A named backend runs or raises.
      interpret: run the kernels of a Pallas backend on the CPU, slowly, to test and debug them:
        True, or the interpreter's parameters (`pltpu.InterpretParams`, `plgpu.InterpretGPUParams`).
      seed: of the stochastic rounding; the same seed gives the same bits.
      scratch_bytes: about as much memory as the "xla_gpu" backend may take for its temporaries.
        With less of it a step has more operations, each on fewer elements.
    """

    min_size: int = TILE
    row_alignment: int | None = None
    backend: str | None = None
    interpret: Any = False
    seed: int = 0
    scratch_bytes: int = 2**28

    def __post_init__(self):
        for name, lowest in (
            ("min_size", 0),
            ("row_alignment", 1),
            ("seed", 0),
            ("scratch_bytes", 1),
        ):
            value = getattr(self, name)
            if name == "row_alignment" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise ValueError(
                    f"Storage({name}={value!r}): expected an integer of at least {lowest}"
                )
        if self.seed >= 2**32:
            raise ValueError(f"Storage(seed={self.seed}): expected an integer below 2**32")
        if self.backend not in (None, "xla", "xla_gpu", "pallas_tpu", "pallas_gpu"):
            raise ValueError(
                f"Storage(backend={self.backend!r}): expected None, 'xla', 'xla_gpu', 'pallas_tpu' "
                "or 'pallas_gpu'"
            )
        if not isinstance(self.interpret, bool) and not hasattr(self.interpret, "detect_races"):
            raise ValueError(
                f"Storage(interpret={self.interpret!r}): expected True, False or the parameters of "
                "an interpreter"
            )
        if self.interpret and self.backend not in ("pallas_tpu", "pallas_gpu"):
            raise ValueError(
                f"Storage(interpret={self.interpret!r}) with backend={self.backend!r}: expected "
                "backend='pallas_tpu' or 'pallas_gpu', there is nothing else to interpret"
            )
