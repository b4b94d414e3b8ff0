"""The plots of a report as SVG and PNG: distinguishable without colour, and readable at the width of a phone."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_convnext_det.errors import ArgumentError
from lightning_convnext_det.metrics.calibration import Reliability
from lightning_convnext_det.metrics.error_breakdown import ErrorBreakdown
from lightning_convnext_det.metrics.thresholds import ClassThreshold, ScoreCurve
from lightning_convnext_det.report.analysis import Group

# Okabe and Ito, "Color Universal Design", 2008: eight colours that colour-blind people can tell apart
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8a7f00")
Curve = tuple[Sequence[float], Sequence[float]]
"""Epochs and values."""
_STYLES = ("-", "--", "-.", ":")
_SIZE = (4.4, 3.2)  # inches; at the 390 pixels of a phone the text keeps its size
_DPI = 150
_MOST_CURVES = 8
_MOST_CLASSES = 20  # in a confusion matrix with numbers
_MOST_BARS = 30


class Plot(NamedTuple):
    """A plot as a drawing for pages, and as an image for slides and documents."""

    svg: str
    png: bytes


def check_matplotlib() -> None:
    """Refuse early where matplotlib is not installed.

    Raises:
        ArgumentError: with the extra that has it.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ArgumentError("a report needs matplotlib: pip install 'lightning-convnext-det[report]'") from None


def plot_precision_recall(curves: Sequence[ScoreCurve], names: Sequence[str]) -> Plot:
    """Precision against recall at IoU 0.5, of the classes with most objects."""
    figure, axes = _axes("recall", "precision")
    for style, label in enumerate(_most(curves)):
        curve = curves[label]
        recall, precision = np.append(0, curve.recall), np.append(curve.precision[:1], curve.precision)
        axes.plot(recall, precision, **_style(style), label=names[label])
    axes.set(xlim=(0, 1.005), ylim=(0, 1.02))
    return _with_legend(figure, axes)


def plot_f1(curves: Sequence[ScoreCurve], thresholds: Sequence[ClassThreshold], names: Sequence[str]) -> Plot:
    """F1 against the score threshold, with the threshold that is chosen."""
    figure, axes = _axes("score threshold", "F1 at IoU 0.5")
    for style, label in enumerate(_most(curves)):
        curve, chosen = curves[label], thresholds[label]
        look = _style(style)
        axes.plot(np.append(curve.high, 0), np.append(curve.f1, curve.f1[-1:]), **look, label=names[label])
        if chosen.threshold is not None:
            axes.plot(chosen.threshold, chosen.f1, "o", color=look["color"], markeredgecolor="white", markersize=7)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    return _with_legend(figure, axes)


def plot_confusion(matrix: NDArray[np.int64], names: Sequence[str]) -> Plot:
    """Confusion matrix; each row in per cent of its sum, background last; of many classes the most confused."""
    matrix, labels = _reduced(matrix, [*names, "background"])
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = max(3.2, 1.4 + 0.32 * len(labels))
    figure, axes = _axes("detected", "annotated", (side + 1.0, side))
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    short = [_short(label, 14) for label in labels]
    axes.set_xticks(range(len(labels)), short, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(labels)), short)
    axes.grid(False)
    size = 8 if len(labels) <= 8 else 6
    for row, column in np.argwhere(matrix > 0):
        color = "white" if share[row, column] > 0.55 else "black"
        axes.text(column, row, f"{matrix[row, column]}", ha="center", va="center", color=color, fontsize=size)
    return _saved(figure)


def plot_errors(breakdown: ErrorBreakdown) -> Plot:
    """AP50 lost by each of TIDE's kinds of errors."""
    meanings = {
        "Cls": "Cls: wrong class", "Loc": "Loc: box misplaced", "Both": "Both: class and box",
        "Dupe": "Dupe: found twice", "Bkg": "Bkg: nothing there", "Miss": "Miss: not found",
    }  # fmt: skip
    values = [100 * breakdown.loss[name] for name in meanings]
    counts = [breakdown.num_errors[name] for name in meanings]
    notes = [f"{v:.1f}  ({n})" for v, n in zip(values, counts, strict=True)]
    return _bars(list(meanings.values()), values, notes, "AP50 lost, points (number of errors)")


def plot_groups(groups: Sequence[Group]) -> Plot:
    """MAP of groups of objects."""
    names = [group.name for group in groups]
    values = [100 * group.map for group in groups]
    notes = [
        f"{value:.1f}  ({group.num_objects})" if group.num_objects else "no objects"
        for value, group in zip(values, groups, strict=True)
    ]
    return _bars(names, [0 if np.isnan(v) else v for v in values], notes, "mAP (objects)", limit=100)


def plot_reliability(table: Reliability) -> Plot:
    """Precision of the detections against their score."""
    figure, axes = _axes("score", "precision at IoU 0.5")
    bins = len(table.num_detections)
    middle = (np.arange(bins) + 0.5) / bins
    axes.bar(middle, np.nan_to_num(table.precision), width=0.9 / bins, color=COLORS[5], edgecolor=COLORS[0])
    axes.plot([0, 1], [0, 1], "--", color="black", linewidth=1, label="calibrated")
    axes.plot(table.score, table.precision, "o", color=COLORS[1], markersize=4, label="mean score of the bin")
    for x, y, count in zip(middle, np.nan_to_num(table.precision), table.num_detections, strict=True):
        axes.text(x, min(y + 0.015, 1.0), _thousands(int(count)), ha="center", va="bottom", fontsize=6.5)
    axes.set(xlim=(0, 1), ylim=(0, 1.09))
    return _with_legend(figure, axes)


def plot_counts(counts: Mapping[str, NDArray[np.int64]], names: Sequence[str]) -> Plot:
    """Objects of each class, in each split."""
    total = np.sum(list(counts.values()), axis=0)
    order = np.argsort(-total, kind="stable")[:_MOST_BARS]
    figure, axes = _axes("objects", "", (_SIZE[0], max(1.8, 0.9 + 0.17 * len(order) * (len(counts) + 0.5))))
    height = 0.8 / len(counts)
    hatches = ("", "///", "...")
    for index, (split, values) in enumerate(counts.items()):
        places = np.arange(len(order)) + (index - (len(counts) - 1) / 2) * height
        axes.barh(places, values[order], height * 0.92, label=split, color=COLORS[index], hatch=hatches[index],
                  edgecolor="white", linewidth=0)  # fmt: skip
    axes.set_yticks(range(len(order)), [_short(names[i], 18) for i in order])
    axes.invert_yaxis()
    if total.max(initial=0) > 50 * max(1, total[order].min(initial=1)):
        axes.set_xscale("symlog")
    return _with_legend(figure, axes)


def plot_sizes(sides: Mapping[str, NDArray[np.float64]]) -> Plot:
    """Sizes of the boxes of each split, in shares, so that splits of different length compare."""
    figure, axes = _axes("square root of the area, pixels", "share of the boxes")
    joined = np.concatenate([*sides.values(), np.ones(1)]).clip(min=1)
    edges = np.geomspace(max(1.0, joined.min()), joined.max() * 1.01 + 1, 25)
    for index, (split, values) in enumerate(sides.items()):
        if len(values):
            count, _ = np.histogram(values.clip(min=1), edges)
            axes.stairs(
                count / len(values), edges, label=split, color=COLORS[index], linestyle=_STYLES[index], linewidth=1.6
            )
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    return _with_legend(figure, axes)


def plot_learning(curves: Mapping[str, Curve], ylabel: str) -> Plot:
    """Values against the epoch."""
    figure, axes = _axes("epoch", ylabel)
    _draw_learning(axes, curves)
    return _with_legend(figure, axes)


def save_learning(groups: Mapping[str, Mapping[str, Curve]], destination: Path) -> None:
    """Write plots of values against the epoch beside each other into a PNG file, one for each label of the y axis."""
    from matplotlib.figure import Figure

    rows = max(math.ceil(len(curves) / 2) for curves in groups.values())  # of the legend
    height = _SIZE[1] + 0.15 * max(0, rows - 3)
    figure = Figure(figsize=(_SIZE[0] * len(groups), height), layout="constrained")
    for axes, (label, curves) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(True, color="#dddddd", linewidth=0.6)
        _draw_learning(axes, curves)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.5 / height), ncols=2, frameon=False, fontsize=7)
    figure.savefig(destination, dpi=110)


def _draw_learning(axes: Any, curves: Mapping[str, Curve]) -> None:
    for index, (name, (epochs, values)) in enumerate(curves.items()):
        marker = "o" if len(epochs) == 1 else None  # a line needs two points
        axes.plot(epochs, values, marker=marker, **_style(index), label=name)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)  # there is no epoch 3.85
    axes.margins(y=0.1)  # room for the marker of a single value
    axes.set_ylim(bottom=0)


def _axes(xlabel: str, ylabel: str, size: tuple[float, float] = _SIZE) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no state, no display

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _bars(names: Sequence[str], values: Sequence[float], notes: Sequence[str], xlabel: str, limit: float = 0.0) -> Plot:
    figure, axes = _axes(xlabel, "", (_SIZE[0], 0.8 + 0.27 * len(names)))
    axes.barh(range(len(names)), values, color=COLORS[0], height=0.68)
    longest = max(limit, *values, 1e-3)
    for place, (value, note) in enumerate(zip(values, notes, strict=True)):
        axes.text(value + 0.015 * longest, place, note, va="center", fontsize=8)
    axes.set_yticks(range(len(names)), [_short(name, 24) for name in names])
    axes.set_xlim(0, 1.3 * longest)
    axes.invert_yaxis()
    return _saved(figure)


def _with_legend(figure: Any, axes: Any) -> Plot:
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        figure.legend(loc="outside lower center", ncols=min(3, len(handles)), frameon=False, fontsize=8)
    return _saved(figure)


def _saved(figure: Any) -> Plot:
    import matplotlib as mpl

    text, image = io.StringIO(), io.BytesIO()
    # ids are hashes of what they name, so those that two plots on a page share name the same thing
    settings = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.family": ["sans-serif"]}
    with mpl.rc_context(settings):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
        figure.savefig(image, format="png", metadata={"Software": None}, dpi=_DPI, facecolor="white")
    svg = text.getvalue()
    return Plot(svg[svg.index("<svg") :], image.getvalue())


def _most(curves: Sequence[ScoreCurve]) -> list[int]:
    """The classes with most objects that are detected at all."""
    order = sorted(range(len(curves)), key=lambda label: -curves[label].num_objects)
    return [label for label in order if curves[label].num_objects and len(curves[label].f1)][:_MOST_CURVES]


def _style(index: int) -> dict[str, Any]:
    return {"color": COLORS[index % len(COLORS)], "linestyle": _STYLES[index % len(_STYLES)], "linewidth": 1.7}


def _reduced(matrix: NDArray[np.int64], labels: list[str]) -> tuple[NDArray[np.int64], list[str]]:
    """The classes that are most often confused with another class, and background."""
    if len(labels) <= _MOST_CLASSES + 1:
        return matrix, labels
    confused = matrix[:-1, :-1].astype(np.float64).copy()
    np.fill_diagonal(confused, 0)
    weight = confused.sum(0) + confused.sum(1)
    chosen = np.append(np.sort(np.argsort(-weight, kind="stable")[:_MOST_CLASSES]), len(labels) - 1)
    return matrix[np.ix_(chosen, chosen)], [labels[i] for i in chosen]


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _thousands(count: int) -> str:
    return str(count) if count < 10_000 else f"{count / 1000:.0f}k"
