"""The figures of parse_analysis.py: verbs with their objects in two rings (PNG and HTML), and word counts."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plotly.subplots import make_subplots
from scipy.optimize import isotonic_regression

from alpaca.answers.diversity import FIELDS
from alpaca.common.files import atomic_write

INCHES, EDGE = 12, 1.3  # of one pair of rings; radius where its axes end, in radii of the outer ring
POINT = 2 * EDGE / (INCHES * 72)  # a typographic point in radii
SMALLEST = 8  # points; a slice that is narrower than its label at this size has the label outside
LINE = 1.3  # height of a line of text in its font sizes


def ring_figure(summaries: dict[str, dict]) -> Figure:
    """The two-ring figure of one or two datasets (name -> diversity.summarize) side by side, each slice labelled."""
    figure = Figure(figsize=(INCHES * len(summaries), INCHES + 0.8), dpi=110)
    for position, (name, summary) in enumerate(summaries.items(), start=1):
        axes = figure.add_subplot(1, len(summaries), position)
        draw_rings(axes, summary["top"])
        share = summary["with_verb_and_object"] / max(1, summary["rows"])
        axes.set_title(
            f"{name}\n{summary['rows']:,} instructions, {share:.0%} with a verb and an object; "
            f"the figure shows {summary['share_shown']:.0%} of those",
            fontsize=13,
        )
        axes.set_xlim(-EDGE, EDGE)
        axes.set_ylim(-EDGE, EDGE)
    figure.tight_layout()
    return figure


def draw_rings(axes: Axes, top: Sequence[dict]) -> None:
    """Verbs inside, objects outside. A verb's arc is what its shown objects add up to, so that both rings meet."""
    if not top:
        axes.axis("off")
        axes.text(0, 0, "no instruction with a verb and an object", ha="center", fontsize=13)
        return
    colors = [colormaps["tab20"](index % 20)[:3] for index in range(len(top))]
    objects = [(entry["verb"], noun, count, color) for entry, color in zip(top, colors, strict=True)
               for noun, count in entry["objects"]]  # fmt: skip
    ring = {"startangle": 90, "counterclock": False}
    verb_wedges, _ = axes.pie(
        [sum(count for _, count in entry["objects"]) for entry in top], radius=0.62, colors=colors, **ring,
        wedgeprops={"edgecolor": "white", "width": 0.40},
    )  # fmt: skip
    object_wedges, _ = axes.pie(
        [count for _, _, count, _ in objects], radius=1.0, colors=[lighter(color) for *_, color in objects], **ring,
        wedgeprops={"edgecolor": "white", "width": 0.37},
    )  # fmt: skip
    labelled = {
        entry["verb"] for wedge, entry in zip(verb_wedges, top, strict=True)
        if label_inside(axes, wedge, entry["verb"], radius=0.42, size=12)
    }  # fmt: skip
    outside = [
        # Where the verb's own slice is too narrow for its name, its objects bring it along.
        (wedge, noun if verb in labelled else f"{verb} {noun}")
        for wedge, (verb, noun, *_) in zip(object_wedges, objects, strict=True)
        if verb not in labelled or not label_inside(axes, wedge, noun, radius=0.815, size=10)
    ]
    label_outside(axes, outside)


def lighter(color: Sequence[float]) -> tuple[float, ...]:
    """An RGB color (0 to 1) mixed with nearly as much white."""
    return tuple(0.55 * part + 0.45 for part in color[:3])


def luminance(color: Sequence[float]) -> float:
    """Relative luminance of an sRGB color (0 to 1), as the contrast rule of WCAG 2 defines it."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def label_inside(axes: Axes, wedge, text: str, radius: float, size: float) -> bool:
    """Writes `text` along the wedge's middle line in black or white, smaller where the arc is thin; False where it is
    thinner than SMALLEST."""
    size = min(size, math.radians(wedge.theta2 - wedge.theta1) * radius / (LINE * POINT))
    if size < SMALLEST:
        return False
    angle = (wedge.theta1 + wedge.theta2) / 2
    # White is the better one below the luminance at which both have the same contrast.
    color = "white" if luminance(wedge.get_facecolor()) < math.sqrt(1.05 * 0.05) - 0.05 else "black"
    axes.text(
        *place(angle, radius), text, fontsize=size, color=color, ha="center", va="center", rotation=upright(angle)
    )
    return True


def label_outside(axes: Axes, labels: Sequence[tuple]) -> None:
    """Writes the texts of (wedge, text) around the rings, each joined to its wedge by a line."""
    middles = [(wedge.theta1 + wedge.theta2) / 2 for wedge, _ in labels]
    moved = spread(middles, math.degrees(LINE * SMALLEST * POINT))
    for (_, text), middle, angle in zip(labels, middles, moved, strict=True):
        axes.plot(*zip(place(middle, 1.0), place(angle, 1.05), strict=True), color="gray", linewidth=0.6)
        side = "right" if upright(angle) != angle else "left"
        axes.text(
            *place(angle, 1.06), text, fontsize=SMALLEST, rotation=upright(angle), rotation_mode="anchor", ha=side,
            va="center",
        )  # fmt: skip


def place(angle: float, radius: float) -> tuple[float, float]:
    return radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))


def upright(angle: float) -> float:
    """The rotation of a text that runs along `angle` (degrees) and does not stand on its head."""
    return angle + 180 if 90 < angle % 360 < 270 else angle


def spread(angles: Sequence[float], gap: float) -> list[float]:
    """Descending angles (degrees) around a circle, moved as little as makes neighbours at least `gap` degrees apart."""
    if len(angles) < 2:
        return list(angles)
    clockwise = -np.array(angles)
    first = int(np.argmax(np.diff(clockwise, append=clockwise[0] + 360))) + 1  # the circle is cut at its widest gap
    cut = np.roll(clockwise, -first)
    cut[len(cut) - first :] += 360
    steps = gap * np.arange(len(cut))
    return list(-np.roll(isotonic_regression(cut - steps).x + steps, first))


def length_figure(summaries: dict[str, dict]) -> Figure:
    """Word-count histograms of instructions, inputs and outputs."""
    figure = Figure(figsize=(15, 4.2), dpi=110)
    for position, field in enumerate(FIELDS, start=1):
        axes = figure.add_subplot(1, 3, position)
        histograms = {name: summary["words"][field] for name, summary in summaries.items()}
        labels = max((list(h.get("bins", {})) for h in histograms.values()), key=len)
        width = 0.8 / len(histograms)
        for shift, (name, histogram) in enumerate(histograms.items()):
            shares = [histogram.get("bins", {}).get(label, 0) / max(1, histogram["texts"]) for label in labels]
            axes.bar([index + shift * width for index in range(len(labels))], shares, width, label=name)
        axes.set_xticks([index + 0.4 - width / 2 for index in range(len(labels))], labels, rotation=45, fontsize=8)
        axes.set_title(f"{field}: words")
        axes.set_ylabel("share of rows that have one")
        if len(histograms) > 1:
            axes.legend(fontsize=8)
    figure.tight_layout()
    return figure


def save_png(figure: Figure, path: Path) -> None:
    with atomic_write(path, "wb") as stream:
        figure.savefig(stream, format="png")


def save_html(summaries: dict[str, dict], path: Path) -> None:
    """The same rings with hover and zoom, in one page that needs no network."""
    figure = make_subplots(
        1, len(summaries), specs=[[{"type": "domain"}] * len(summaries)], subplot_titles=list(summaries)
    )
    for column, summary in enumerate(summaries.values(), start=1):
        slices = []  # (id, label, parent, count)
        for entry in summary["top"]:
            slices.append((entry["verb"], entry["verb"], "", sum(count for _, count in entry["objects"])))
            slices += [(f"{entry['verb']} {noun}", noun, entry["verb"], count) for noun, count in entry["objects"]]
        ids, labels, parents, values = zip(*slices, strict=True) if slices else ((),) * 4
        rings = go.Sunburst(
            ids=ids, labels=labels, parents=parents, values=values, branchvalues="total", sort=False,
            hovertemplate="%{id}: %{value}<extra></extra>",
        )  # fmt: skip
        figure.add_trace(rings, 1, column)
    figure.update_layout(title="Commonest verbs and their direct objects", height=900)
    with atomic_write(path) as stream:
        stream.write(figure.to_html(include_plotlyjs=True))
