"""A comparison as pictures: similarity matrices of the adapters, and where in the model they interfere."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from mergekit_lr.errors import UsageError
from mergekit_lr.report.page.places import Place, kinds_of, layers_of, places_of
from mergekit_lr.verbs.compare import CompareReport

PANELS = (
    ("cosine", "cosine of the deltas", -1.0, 1.0, "RdBu_r"),
    ("output", "overlap of output directions", 0.0, 1.0, "viridis"),
    ("input", "overlap of input directions", 0.0, 1.0, "viridis"),
    ("opposite", "entries with opposite signs", 0.0, 1.0, "viridis"),
)


def draw_comparison(report: CompareReport, path: str | Path) -> None:
    """Write four matrices and one map of interference, layer by kind of module, as PNG, SVG or PDF.

    Raises:
        UsageError: matplotlib is not installed, or the ending names no format.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"{path}: pictures end in .png, .svg or .pdf")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("pictures need matplotlib: pip install 'lrmerge[plot]'") from None
    count = len(report.names)
    side = max(3.6, 0.5 * count + 1.6)
    figure = Figure(figsize=(3 * side, 2 * side), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    for axis, (key, title, low, high, colours) in zip(axes, PANELS, strict=False):
        matrix = getattr(report, key)
        image = axis.imshow(matrix, vmin=low, vmax=high, cmap=colours)
        for t in range(count):
            for u in range(count):
                shade = image.norm(matrix[t][u])
                dark = abs(shade - 0.5) > 0.3 if colours == "RdBu_r" else shade < 0.6
                axis.text(u, t, f"{matrix[t][u]:.2f}", ha="center", va="center", fontsize=8, color="w" if dark else "k")
        axis.set_xticks(range(count), report.names, rotation=45, ha="right")
        axis.set_yticks(range(count), report.names)
        axis.set_title(title)
    _draw_interference(figure, axes[4], report)
    axes[5].bar(range(count), report.norms, color="#4c72b0")
    axes[5].set_xticks(range(count), report.names, rotation=45, ha="right")
    axes[5].set_title("norm of each adapter")
    figure.savefig(path, dpi=120)


def by_layer(report: CompareReport) -> tuple[list[str], list[str], dict[Place, float]]:
    """Layers, kinds of module, and the interference at each place, the mean where experts share one."""
    places = places_of([module.name for module in report.modules])
    groups: dict[Place, list[float]] = {}
    for place, module in zip(places, report.modules, strict=True):
        groups.setdefault(place, []).append(module.interference)
    return layers_of(places), kinds_of(places), {place: fmean(values) for place, values in groups.items()}


def _draw_interference(figure, axis, report: CompareReport) -> None:
    layers, kinds, cells = by_layer(report)
    grid = [[cells.get(Place(layer, kind), float("nan")) for layer in layers] for kind in kinds]
    image = axis.imshow(grid, aspect="auto", cmap="magma", vmin=0)
    axis.set_xticks(range(len(layers)), layers)
    axis.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axis.set_xlabel("layer")
    axis.set_title("singular task interference")
    figure.colorbar(image, ax=axis)
