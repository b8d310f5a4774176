"""Pictures of widths, by leaf and moment."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from stquant_jax.precision.slots import WIDEST
from stquant_jax.storage.arena import MOMENTS

_MOST_LABELS = 40  # of leaves along an axis


def draw(path: Path, leaves: list[str], fill: Callable[[Any, list], None]) -> None:
    """A panel for each moment, a line for each leaf."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError(
            "Report.plot needs matplotlib: pip install 'stquant-jax[examples]'"
        ) from error
    stride = -(-len(leaves) // _MOST_LABELS)
    height = 1.5 + 0.22 * min(len(leaves), _MOST_LABELS)
    figure = matplotlib.figure.Figure(figsize=(9, height), layout="constrained")
    panels = list(figure.subplots(1, len(MOMENTS), sharey=True))
    for moment, axes in zip(MOMENTS, panels, strict=True):
        axes.set_title(moment)
    fill(figure, panels)
    panels[0].set_yticks(range(0, len(leaves), stride), leaves[::stride], fontsize="small")
    panels[0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def bars(figure: Any, panels: list, widths: np.ndarray) -> None:
    """Widths int[leaves, moments]."""
    del figure
    for axes, of_leaves in zip(panels, widths.T, strict=True):
        axes.barh(range(len(of_leaves)), of_leaves)
        axes.set(xlabel="bits of a code", xlim=(0, WIDEST), xticks=range(WIDEST + 1))


def heat_maps(figure: Any, panels: list, edges: list[int], widths: np.ndarray) -> None:
    """Widths int32[slots, times] between the steps ``edges``."""
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm

    norm = BoundaryNorm(np.arange(WIDEST + 2) - 0.5, WIDEST + 1)
    colors = colormaps["viridis"].resampled(WIDEST + 1)
    for i, axes in enumerate(panels):
        of_moment = widths[i :: len(panels)]
        lines = np.arange(len(of_moment) + 1) - 0.5
        image = axes.pcolormesh(edges, lines, of_moment, cmap=colors, norm=norm)
        axes.set_xlabel("step")
    bar = figure.colorbar(image, ax=panels, label="bits of a code")
    bar.set_ticks(range(WIDEST + 1))
    bar.minorticks_off()
