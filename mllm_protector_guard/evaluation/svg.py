"""The pictures of a report as inline SVG; colours come from the page's style sheet by class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from mllm_protector_guard.evaluation.curves import HISTOGRAM_BINS, Curves, ReliabilityBin, RocPoint

__all__ = ["LINE_STYLES", "Line", "histogram", "reliability_diagram", "roc_chart"]

LINE_STYLES = 6
"""Lines of one picture that look different; a seventh looks like the first."""

_LEFT, _TOP, _SIDE, _BOTTOM, _RIGHT = 46, 12, 240, 40, 14
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of a picture.

    Attributes:
        name: What it stands for.
        style: Number of its colour and dashes.
        points: From left to right, both coordinates in [0, 1].
        mark: A point to stand out, with what is to be said of it.
    """

    name: str
    style: int
    points: Sequence[RocPoint] | Sequence[tuple[float, float]]
    mark: tuple[float, float, str] | None = None


def roc_chart(lines: Iterable[Line]) -> str:
    """Recall over the false positive rate; the marks are the thresholds."""
    return _chart("ROC curve: recall over false positive rate", "false positive rate", "recall", map(_drawn, lines))


def reliability_diagram(models: Iterable[tuple[str, int, Sequence[ReliabilityBin]]]) -> str:
    """The share of harmful answers over their mean score, by bin; the area of a dot tells the rows in it.

    Args:
        models: Name, style and bins of each.
    """
    parts = []
    for name, style, bins in models:
        points = [(one.mean_score, one.harmful_share) for one in bins]
        parts.append(_drawn(Line(name=name, style=style, points=points)))
        most = max((one.rows for one in bins), default=1)
        parts += [
            _dot(
                one.mean_score, one.harmful_share, 1.5 + 4.5 * (one.rows / most) ** 0.5, style,
                f"{name}: {one.rows:,} answers, mean score {one.mean_score:.3f}, {one.harmful_share:.3f} harmful",
            )
            for one in bins
        ]  # fmt: skip
    return _chart("Reliability: share of harmful answers over mean score", "mean score", "share harmful", parts)


def histogram(curves: Curves, *, threshold: float) -> str:
    """Scores of harmful answers above the middle and of harmless ones below it, each as shares of their class."""
    classes = (("harmful", curves.harmful_histogram, -1), ("harmless", curves.harmless_histogram, 1))
    totals = {name: sum(counts) for name, counts, _ in classes}
    top = max((max(counts) / totals[name] for name, counts, _ in classes if totals[name]), default=1.0)
    middle, half = _TOP + _SIDE / 2, 0.88 * _SIDE / 2
    parts = []
    for name, counts, sign in classes:
        for index, count in enumerate(counts):
            height = half * count / totals[name] / top if totals[name] else 0.0
            x, width = _x(index / HISTOGRAM_BINS), _SIDE / HISTOGRAM_BINS - 1.0
            y = middle - height if sign < 0 else middle
            low, high = index / HISTOGRAM_BINS, (index + 1) / HISTOGRAM_BINS
            said = f"score {low:.2f}–{high:.2f}: {count:,} {name} answers"
            parts.append(
                f'<rect class="{name}" x="{x + 0.5:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}">'
                f"<title>{said}</title></rect>"
            )
    at = _x(threshold)
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_LEFT + _SIDE}" y1="{middle}" y2="{middle}"/>')
    parts.append(
        f'<line class="threshold" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_TOP + _SIDE}">'
        f"<title>threshold {threshold:.4g}</title></line>"
    )
    anchor, shift = ("start", 4) if threshold < 0.7 else ("end", -4)
    parts.append(_text(at + shift, _TOP + 9, f"threshold {threshold:.3g}", anchor))
    parts += [
        _text(_LEFT - 6, middle - half + 4, f"{top:.0%}", "end"),
        _text(_LEFT - 6, middle + 4, "0", "end"),
        _text(_LEFT - 6, middle + half + 4, f"{top:.0%}", "end"),
        f'<text class="label" transform="translate(12 {middle - half / 2:.0f}) rotate(-90)">harmful</text>',
        f'<text class="label" transform="translate(12 {middle + half / 2:.0f}) rotate(-90)">harmless</text>',
    ]
    return _svg("Histogram of scores: shares of harmful and harmless answers", [*_ticks_below("score"), *parts])


def _x(value: float) -> float:
    return _LEFT + _SIDE * value


def _y(value: float) -> float:
    return _TOP + _SIDE * (1.0 - value)


def _drawn(line: Line) -> str:
    points = " ".join(f"{_x(x):.1f},{_y(y):.1f}" for x, y in line.points)
    style = f"line s{line.style % LINE_STYLES}"
    drawn = f'<polyline class="{style}" points="{points}"><title>{escape(line.name)}</title></polyline>'
    if line.mark is None:
        return drawn
    x, y, said = line.mark
    return drawn + _dot(x, y, 4.5, line.style, f"{line.name}: {said}")


def _dot(x: float, y: float, radius: float, style: int, said: str) -> str:
    return (
        f'<circle class="dot s{style % LINE_STYLES}" cx="{_x(x):.1f}" cy="{_y(y):.1f}" r="{radius:.1f}">'
        f"<title>{escape(said)}</title></circle>"
    )


def _chart(title: str, x_label: str, y_label: str, parts: Iterable[str]) -> str:
    frame = [
        f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + _SIDE}" y1="{_y(tick):.1f}" y2="{_y(tick):.1f}"/>'
        f"{_text(_LEFT - 6, _y(tick) + 4, f'{tick:g}', 'end')}"
        for tick in _TICKS
    ]
    frame.append(f'<line class="chance" x1="{_x(0):.1f}" y1="{_y(0):.1f}" x2="{_x(1):.1f}" y2="{_y(1):.1f}"/>')
    frame.append(f'<text class="label" transform="translate(12 {_TOP + _SIDE / 2:.0f}) rotate(-90)">{y_label}</text>')
    return _svg(title, [*frame, *_ticks_below(x_label), *parts])


def _ticks_below(label: str) -> list[str]:
    base = _TOP + _SIDE
    lines = [
        f'<line class="grid" x1="{_x(tick):.1f}" x2="{_x(tick):.1f}" y1="{_TOP}" y2="{base}"/>'
        f"{_text(_x(tick), base + 15, f'{tick:g}', 'middle')}"
        for tick in _TICKS
    ]
    return [*lines, f'<text class="label" x="{_LEFT + _SIDE / 2}" y="{base + 33}">{label}</text>']


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _svg(title: str, parts: Iterable[str]) -> str:
    width, height = _LEFT + _SIDE + _RIGHT, _TOP + _SIDE + _BOTTOM
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
