"""The plots of a report's page, each drawn by matplotlib into SVG that takes its colours and fonts from the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from eval.measurement import Measurement
    from eval.speed.speed_fit import Published

WIDTH = 5.0  # inches, 360 points: a phone's width, so that text keeps its size there
INK = "#010203"  # becomes the page's text colour
COLOURS = {"npu": "#3b82f6", "cpu": "#f59e0b", "float": "#8b95a1"}
LIMIT = "#dc2626"
Z95 = 1.96  # half-width of a 95 % interval in standard errors
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 12,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


@dataclass(frozen=True)
class Mark:
    """A figure in a plot: its row's name, its series ("npu", "cpu", "float"), value, and 95 % interval."""

    row: str
    series: str
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, row: str, series: str, figure: Measurement) -> Mark:
        """A measurement with its error, without an interval where it has none."""
        half = Z95 * figure.error if figure.error is not None and math.isfinite(figure.error) else 0.0
        return cls(row, series, figure.value, figure.value - half, figure.value + half)


def intervals(panels: Mapping[str, Sequence[Mark]], limits: Mapping[str, float], names: Mapping[str, str]) -> str:
    """One panel a figure: a dot with its 95 % interval for each row, and the budget's limit as a line.

    Args:
        panels: title -> marks. limits: title -> limit, where the budget has one. names: series -> legend.
    """

    def draw(figure: Figure) -> None:
        heights = [len(dict.fromkeys(m.row for m in marks)) + 0.8 for marks in panels.values()]
        shown = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        for axes, (title, marks) in zip(shown, panels.items(), strict=True):
            _panel(axes, title, marks, limits.get(title))
        _legend(figure, names, {m.series for marks in panels.values() for m in marks}, bool(limits))

    rows = sum(len(dict.fromkeys(m.row for m in marks)) for marks in panels.values())
    return _svg("intervals" + "".join(panels), 0.55 + 0.62 * len(panels) + 0.3 * rows, draw)


def _panel(axes: Axes, title: str, marks: Sequence[Mark], limit: float | None) -> None:
    rows = list(dict.fromkeys(m.row for m in marks))
    series = list(dict.fromkeys(m.series for m in marks))
    for mark in marks:
        apart = (series.index(mark.series) - (len(series) - 1) / 2) * 0.28
        y = rows.index(mark.row) + apart
        colour = COLOURS.get(mark.series, INK)
        axes.plot([mark.low, mark.high], [y, y], color=colour, linewidth=2.5, solid_capstyle="round")
        axes.plot([mark.value], [y], "o", color=colour, markersize=5.5)
    if limit is not None:
        axes.axvline(limit, color=LIMIT, linestyle="--", linewidth=1.3)
    axes.set_title(title)
    axes.set_yticks(range(len(rows)) if any(rows) else [], rows if any(rows) else [])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=5)
    axes.ticklabel_format(axis="x", useOffset=False, style="plain")
    axes.grid(visible=False, axis="y")


def _legend(figure: Figure, names: Mapping[str, str], series: set[str], limited: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=COLOURS.get(s, INK), marker="o", label=label) for s, label in names.items() if s in series
    ]
    if limited:
        handles.append(Line2D([], [], color=LIMIT, linestyle="--", label="budget"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def lines(series: Mapping[str, Mapping[int, float]], names: Mapping[str, str], *, xlabel: str, ylabel: str) -> str:
    """A line a series over whole numbers, on a logarithmic scale."""

    from matplotlib.ticker import MaxNLocator

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for key, points in series.items():
            axes.plot(*zip(*sorted(points.items()), strict=True), marker="o", color=COLOURS[key], label=names[key])
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if all(value > 0 for points in series.values() for value in points.values()):
            axes.set_yscale("log")
            _plain_ticks(axes.yaxis)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()

    return _svg("lines" + ylabel, 2.9, draw)


def bars(parts: Mapping[str, float], *, unit: str) -> str:
    """A bar a part, the largest first, with its value and its share of the whole behind it."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        names, values = list(ordered), list(ordered.values())
        drawn = axes.barh(names, values, color=COLOURS["npu"], height=0.62)
        total = sum(values) or 1.0
        labels = [f"{value:,.3g} {unit}, {_share(value / total)}" for value in values]
        axes.bar_label(drawn, labels=labels, padding=4)
        axes.set_xlim(0, max(values) * 1.6)
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.grid(visible=False, axis="y")

    ordered = dict(sorted(parts.items(), key=lambda part: -part[1]))
    return _svg("bars" + unit, 0.7 + 0.32 * len(parts), draw)


def _share(share: float) -> str:
    return f"{share:.0%}" if share >= 0.005 else "< 1%"


def published_speeds(rows: Sequence[Published], soc: str, parameters_b: float, own: Measurement, runtime: str) -> str:
    """Tokens/s over the model's size: published figures, this chip's in colour, and the estimate with its interval."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        here = [row for row in rows if row.soc.name == soc]
        others = [row for row in rows if row.soc.name != soc]
        for chosen, colour, label in (
            (others, COLOURS["float"], "published, other chips"),
            (here, COLOURS["npu"], f"published, {soc}"),
        ):
            if chosen:
                axes.scatter(
                    [r.parameters_b for r in chosen], [r.tokens_s for r in chosen], s=22, alpha=0.75, color=colour,
                    label=label, linewidths=0,
                )  # fmt: skip
        low, high = own.low or own.value, own.high or own.value
        axes.errorbar(
            [parameters_b], [own.value], yerr=[[own.value - low], [high - own.value]], fmt="D", color=LIMIT, capsize=4,
            markersize=7, label=f"this artifact, {own.how}",
        )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="parameters, billions", ylabel=f"{runtime} decode, tokens/s")
        _plain_ticks(axes.xaxis)
        _plain_ticks(axes.yaxis)
        figure.legend(loc="outside lower center", ncols=1)

    return _svg("published" + soc, 4.0, draw)


def _plain_ticks(axis: Axis) -> None:
    """Numbers such as 0.5, 2 and 20 on a logarithmic axis instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low)
    subs = range(1, 10) if decades < 0.7 else (1, 2, 5) if decades < 2.2 else (1,)
    axis.set_major_locator(LogLocator(base=10, subs=list(subs)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _svg(salt: str, height: float, draw: Callable[[Figure], None]) -> str:
    """An <svg> element; the same drawing gives the same text."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        figure.patch.set_alpha(0)
        draw(figure)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # names that every plot would repeat
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)  # the page gives it its size
    return text.replace(INK, "currentColor")
