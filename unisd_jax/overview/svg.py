"""Small charts as SVG text: colours come from the page's style, so that they follow its light and dark."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

# Drawn at about this many pixels on a phone and on a laptop, so that its letters are neither tiny nor huge.
WIDTH, HEIGHT = 380, 250
_TOP, _BOTTOM, _RIGHT = 26, 36, 18
_LETTER = 6.6  # the width of a digit at the charts' font size, rounded up
COLORS, MARKERS = 8, 6
DASHES = ("", "6 3", "2 3", "9 3 2 3", "1 4", "12 4", "5 6", "9 3 2 3 2 3")


class Style(NamedTuple):
    """Colour, dashes and marker by number; different numbers are told apart without colour too."""

    color: int
    dash: int = 0

    @property
    def stroke(self) -> str:
        """Attributes of a line."""
        dashes = DASHES[self.dash % len(DASHES)]
        return f'class="c{self.color % COLORS}"' + (f' stroke-dasharray="{dashes}"' if dashes else "")


class Point(NamedTuple):
    """A point with the ends of its bars, (low, high) or None, and what it is."""

    x: float
    y: float
    x_ends: tuple[float, float] | None
    y_ends: tuple[float, float] | None
    style: Style
    name: str


class Line(NamedTuple):
    """Points joined from left to right; None breaks the line. The band may lack."""

    xs: Sequence[float]
    ys: Sequence[float | None]
    lows: Sequence[float | None]
    highs: Sequence[float | None]
    style: Style
    name: str


class _Frame:
    """Axes with round ticks, and where a value lies between them."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], *, whole_x: bool = False):
        self.x_ticks, self.y_ticks = ticks(min(xs), max(xs), 5, whole=whole_x), ticks(min(ys), max(ys), 5)
        self.left = 10 + _LETTER * max(len(tick_text(tick)) for tick in self.y_ticks)

    def x(self, value: float) -> float:
        return self.left + _share(value, self.x_ticks) * (WIDTH - _RIGHT - self.left)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - _share(value, self.y_ticks) * (HEIGHT - _BOTTOM - _TOP)

    def draw(self, x_label: str, y_label: str) -> str:
        bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
        parts = [f'<text class="label" x="2" y="14">{escape(y_label)}</text>'] if y_label else []
        parts.append(f'<text class="label" x="{right}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>')
        for tick in self.y_ticks:
            y, strong = self.y(tick), " zero" if tick == 0 else ""
            parts.append(f'<path class="grid{strong}" d="M{self.left:.1f} {y:.1f}H{right}"/>')
            parts.append(f'<text x="{self.left - 5:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick_text(tick)}</text>')
        parts += [
            f'<text x="{self.x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick_text(tick)}</text>'
            for tick in _thinned(self.x_ticks, right - self.left)
        ]
        return "".join(parts)


def scatter(points: Sequence[Point], title: str, x_label: str, y_label: str) -> str:
    """Points with bars; the zero lines are part of it."""
    ends = [(point.x_ends or ()) for point in points], [(point.y_ends or ()) for point in points]
    xs = [0.0, *(point.x for point in points), *(end for pair in ends[0] for end in pair)]
    ys = [0.0, *(point.y for point in points), *(end for pair in ends[1] for end in pair)]
    frame = _Frame(xs, ys)
    parts = [frame.draw(x_label, y_label)]
    for point in points:
        x, y = frame.x(point.x), frame.y(point.y)
        bars = ""
        if point.x_ends:
            bars += f"M{frame.x(point.x_ends[0]):.1f} {y:.1f}H{frame.x(point.x_ends[1]):.1f}"
        if point.y_ends:
            bars += f"M{x:.1f} {frame.y(point.y_ends[0]):.1f}V{frame.y(point.y_ends[1]):.1f}"
        bar = f'<path class="c{point.style.color % COLORS} bar" d="{bars}"/>' if bars else ""
        parts.append(f"<g><title>{escape(point.name)}</title>{bar}{marker(point.style, x, y)}</g>")
    return _svg(title, f"{x_label} against {y_label}, {len(points)} points", "".join(parts))


def lines(drawn: Sequence[Line], title: str, x_label: str) -> str:
    """Lines with their bands."""
    xs = [x for line in drawn for x in line.xs]
    ys = [y for line in drawn for some in (line.ys, line.lows, line.highs) for y in some if y is not None]
    frame = _Frame(xs, ys, whole_x=True)
    bands, strokes = [], []
    for line in drawn:
        bands.append(f'<path class="c{line.style.color % COLORS} band" d="{_band(frame, line)}"/>')
        path, dots = _path(frame, line)
        dots = "".join(marker(line.style, x, y) for x, y in dots)
        name = f"<title>{escape(line.name)}</title>"
        strokes.append(f'<g>{name}<path {line.style.stroke} fill="none" d="{path}"/>{dots}</g>')
    return _svg(title, f"{len(drawn)} lines over {x_label}", frame.draw(x_label, "") + "".join(bands + strokes))


def swatch(style: Style, *, line: bool) -> str:
    """The sign of a legend."""
    stroke = f'<path {style.stroke} fill="none" d="M1 7H27"/>' if line else ""
    return f'<svg class="swatch" width="28" height="14" aria-hidden="true">{stroke}{marker(style, 14, 7)}</svg>'


def marker(style: Style, x: float, y: float) -> str:
    """A small mark whose shape goes with the colour."""
    shapes = (
        f"M{x - 4:.1f} {y:.1f}a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
        f"M{x - 3.5:.1f} {y - 3.5:.1f}h7v7h-7z",
        f"M{x:.1f} {y - 5:.1f}l4.7 8.4h-9.4z",
        f"M{x:.1f} {y - 5:.1f}l5 5-5 5-5-5z",
        f"M{x:.1f} {y + 5:.1f}l4.7-8.4h-9.4z",
        f"M{x - 1.5:.1f} {y - 5:.1f}h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5v-3h3.5z",
    )
    return f'<path class="c{style.color % COLORS} mark" d="{shapes[style.color % MARKERS]}"/>'


def ticks(low: float, high: float, about: int, *, whole: bool = False) -> list[float]:
    """Round values, evenly apart, from at most `low` to at least `high`."""
    # The mean of equal numbers can differ from them in the last bit, and ticks so close would all be one number.
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(low) / 2 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((factor * power for factor in (1, 2, 2.5, 5) if factor * power >= rough * 0.999), 10 * power)
    step = max(1.0, math.ceil(step)) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * place for place in range(first, last + 1)]


def tick_text(value: float) -> str:
    """Short, and without the noise of binary fractions."""
    return f"{round(value, 12):.6g}"


def _share(value: float, over: Sequence[float]) -> float:
    return (value - over[0]) / (over[-1] - over[0])


def _thinned(over: Sequence[float], width: float) -> Sequence[float]:
    """Every tick, or every second, … so that their labels do not touch."""
    needed = _LETTER * max(len(tick_text(tick)) for tick in over) + 12
    return over[:: math.ceil(needed * len(over) / width)]


def _path(frame: _Frame, line: Line) -> tuple[str, list[tuple[float, float]]]:
    """The line, and the points to be marked: where there are few, all, and else those that no line leads to."""
    parts, dots, drawing = [], [], False
    places = list(zip(line.xs, line.ys, strict=True))
    for number, (x, y) in enumerate(places):
        if y is not None:
            parts.append(f"{'L' if drawing else 'M'}{frame.x(x):.1f} {frame.y(y):.1f}")
            alone = not drawing and (number + 1 == len(places) or places[number + 1][1] is None)
            if len(places) <= 12 or alone:
                dots.append((frame.x(x), frame.y(y)))
        drawing = y is not None
    return "".join(parts), dots


def _band(frame: _Frame, line: Line) -> str:
    known = [
        (frame.x(x), frame.y(low), frame.y(high))
        for x, low, high in zip(line.xs, line.lows, line.highs, strict=True)
        if low is not None and high is not None
    ]
    upper = "L".join(f"{x:.1f} {high:.1f}" for x, _, high in known)
    lower = "L".join(f"{x:.1f} {low:.1f}" for x, low, _ in reversed(known))
    return f"M{upper}L{lower}z" if known else ""


def _svg(title: str, description: str, content: str) -> str:
    label = escape(f"{title}: {description}", quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{content}</svg>"
    )
