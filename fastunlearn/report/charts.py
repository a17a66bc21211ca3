"""Charts as SVG: numbers in, one ``<svg>`` element out. Text stays text; colours are CSS variables of the page.

Every chart is drawn for a column 360 units wide, so that its letters are as large on a phone as on a desk. What is not
a finite number (None, NaN, infinities) is left out, never drawn somewhere else.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

WIDTH = 360.0
COLOURS = 9  # --s0 to --s8 of the style sheet; 0 is the original model's, 1 the reference's
SHAPES = 6
HEAT_TURN = 0.655  # share from which black (white in the dark) on a heat map's cell no longer reads best

_RAISED = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")
# Not allowed in XML, halves of a surrogate pair, and marks that turn the direction of the text after them.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


def text(value: object) -> str:
    """``value`` for HTML or XML: escaped, and what cannot be printed replaced by U+FFFD."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", str(value)))


def shorten(name: object, length: int) -> str:
    """At most ``length`` characters: both ends of the name, and an ellipsis between them."""
    name = " ".join(str(name).split())
    if len(name) <= length:
        return name
    tail = (length - 1) // 2
    return f"{name[: length - 1 - tail]}\u2026{name[len(name) - tail :]}"


def finite(value: object) -> float | None:
    """A number that can be drawn, or None."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return min(max(float(value), -1e100), 1e100)


def numbers(values: Iterable[object]) -> list[float]:
    """Those of ``values`` that can be drawn."""
    return [v for v in map(finite, values) if v is not None]


@dataclass(frozen=True)
class Scale:
    """Maps ``low`` to ``high`` onto the pixels ``start`` to ``end``, by decades when ``log``; clips what is outside.

    Raises ValueError for an empty or infinite range, and for a logarithmic one that does not begin above zero.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    percent: bool = False

    def __post_init__(self) -> None:
        if not (self.low < self.high and math.isfinite(self.high - self.low)):
            raise ValueError(f"a scale needs low < high, both finite, got {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic scale begins above zero, got {self.low}")

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[tuple[float, str]]:
        """Where the axis is marked, and what is written there: multiples of 1, 2, 2.5 or 5, or powers of ten."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            if last > first:
                stride = -(-(last - first) // most)
                powers = [10.0**k for k in range(last, first - 1, -stride)][::-1]
                return [(v, tick_label(v, v, self.percent)) for v in powers]
        step = nice_step((self.high - self.low) / most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(k * step, tick_label(k * step, step, self.percent)) for k in range(first, last + 1)]


def nice_step(least: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below ``least`` (> 0)."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * k for k in (1, 2, 2.5, 5, 10) if power * k >= least * (1 - 1e-9))


def tick_label(value: float, step: float, percent: bool = False) -> str:
    """``value`` with as many decimals as tell it from ``value + step``; thousands as k, M, G."""
    if percent:
        value, step = 100 * value, 100 * step
    size, unit = abs(value), ""
    if size < step * 1e-6:
        shown = "0"
    elif size >= 1e12 or size < 1e-3:
        mantissa, power = f"{value:.1e}".split("e")
        front = "" if mantissa == "1.0" else f"{mantissa.removesuffix('.0')}\u00b7"
        shown = f"{front}10{str(int(power)).translate(_RAISED)}"
    else:
        units = (("G", 1e9, 1e9), ("M", 1e6, 1e6), ("k", 1e3, 1e4), ("", 1.0, 0.0))
        unit, factor = next((name, factor) for name, factor, least in units if size >= least)
        decimals = next((d for d in range(6) if abs(step / factor * 10**d - round(step / factor * 10**d)) < 1e-6), 6)
        shown = f"{value / factor:.{decimals}f}"
    return f"{shown}{unit}".replace("-", "\N{MINUS SIGN}") + ("\u202f%" if percent else "")


def domain(values: Iterable[object], *, log: bool = False, least: float | None = None) -> tuple[float, float]:
    """Round ends of an axis that holds every one of ``values``; (0, 1), or (0.1, 1) by decades, without any.

    ``least`` is the narrowest that a linear axis may be. By decades only what is above zero counts, and at most
    12 decades below the largest.
    """
    found = numbers(values)
    if log:
        above = [v for v in found if v > 0]
        if not above:
            return 0.1, 1.0
        top = max(math.ceil(math.log10(max(above)) - 1e-9), -290)  # a decade below the smallest numbers is zero
        bottom = max(math.floor(math.log10(min(above)) + 1e-9), top - 12)
        return 10.0 ** min(bottom, top - 1), 10.0**top
    low, high = around(found, least)
    step = nice_step((high - low) / 5)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def around(values: Iterable[object], least: float | None = None) -> tuple[float, float]:
    """The smallest and largest of ``values``, moved apart to be ``least`` apart; (0, 1) without any."""
    found = numbers(values)
    if not found:
        return 0.0, 1.0
    low, high = min(found), max(found)
    width = max(high - low, least or 0.0, 1e-6 * max(abs(low), abs(high)), 1e-12)
    middle = low / 2 + high / 2
    return min(low, middle - width / 2), max(high, middle + width / 2)


def svg(ident: str, title: str, description: str, height: float, parts: Iterable[str], width: float = WIDTH) -> str:
    """The element, with a name and a description for those who do not see it; ``ident`` is unique on the page."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="{ident}-t" aria-describedby="{ident}-d" '
        f'xmlns="http://www.w3.org/2000/svg"><title id="{ident}-t">{text(title)}</title>'
        f'<desc id="{ident}-d">{text(description)}</desc>{"".join(parts)}</svg>'
    )


def colour(series: int) -> str:
    """The CSS class of a series: its own colour, and round again after the last (never the first two)."""
    return f"s{series if series < COLOURS else 2 + (series - 2) % (COLOURS - 2)}"


def marker(series: int, x: float, y: float, r: float = 4.0) -> str:
    """A shape for each series, so that colour is never all there is to tell them apart."""
    shape = series % SHAPES
    if shape == 0:
        d = f"M{x - r:.1f} {y:.1f}a{r:g} {r:g} 0 1 0 {2 * r:g} 0a{r:g} {r:g} 0 1 0 {-2 * r:g} 0z"
    elif shape == 1:
        d = f"M{x:.1f} {y - 1.3 * r:.1f}l{1.3 * r:.1f} {1.3 * r:.1f}l{-1.3 * r:.1f} {1.3 * r:.1f}"
        d += f"l{-1.3 * r:.1f} {-1.3 * r:.1f}z"
    elif shape == 2:
        d = f"M{x - 0.9 * r:.1f} {y - 0.9 * r:.1f}h{1.8 * r:.1f}v{1.8 * r:.1f}h{-1.8 * r:.1f}z"
    elif shape in (3, 4):
        up = 1.1 * r if shape == 3 else -1.1 * r
        d = f"M{x:.1f} {y - up:.1f}L{x + 1.2 * r:.1f} {y + 0.8 * up:.1f}H{x - 1.2 * r:.1f}z"
    else:
        a, b = 0.4 * r, 1.2 * r
        d = f"M{x - a:.1f} {y - b:.1f}h{2 * a:.1f}v{b - a:.1f}h{b - a:.1f}v{2 * a:.1f}h{a - b:.1f}v{b - a:.1f}"
        d += f"h{-2 * a:.1f}v{a - b:.1f}h{a - b:.1f}v{-2 * a:.1f}h{b - a:.1f}z"
    return f'<path class="mark {colour(series)}" d="{d}"/>'


def swatch(series: int, line: bool = False) -> str:
    """The sign of a series in a legend, for the eye alone."""
    wide = 28 if line else 16
    stroke = f'<path class="line {colour(series)} {dash(series)}" d="M1 8H27"/>' if line else ""
    return (
        f'<svg class="swatch{" wide" if line else ""}" viewBox="0 0 {wide} 16" aria-hidden="true">'
        f"{stroke}{marker(series, wide / 2, 8, 4.5)}</svg>"
    )


def dash(series: int) -> str:
    """The CSS class of a series' line: the original model's is dotted, the colours that come round again are dashed."""
    return "dotted" if series == 0 else "dashed" if series >= COLOURS else ""


def axes(x: Scale, y: Scale, xlabel: str, ylabel: str) -> list[str]:
    """Grid, marks and labels of a chart whose area is that of the two scales."""
    parts = []
    for value, label in x.ticks():
        at = x(value)
        parts.append(f'<path class="grid" d="M{at:.1f} {y.start:.1f}V{y.end:.1f}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{y.start + 15:.1f}" text-anchor="middle">{label}</text>')
    for value, label in y.ticks():
        at = y(value)
        parts.append(f'<path class="grid" d="M{x.start:.1f} {at:.1f}H{x.end:.1f}"/>')
        parts.append(f'<text class="tick" x="{x.start - 6:.1f}" y="{at + 3.8:.1f}" text-anchor="end">{label}</text>')
    parts.append(f'<path class="axis" d="M{x.start:.1f} {y.start:.1f}H{x.end:.1f}"/>')
    middle = (x.start + x.end) / 2
    parts.append(
        f'<text class="label" x="{middle:.1f}" y="{y.start + 31:.1f}" text-anchor="middle">{text(xlabel)}</text>'
    )
    parts.append(f'<text class="label" x="2" y="{y.end - 10:.1f}">{text(ylabel)}</text>')
    return parts


@dataclass(frozen=True)
class Line:
    """A series of points; with ``steps`` every value holds until the next point, as a thinned ROC's does."""

    xs: Sequence[object]
    ys: Sequence[object]
    series: int = 0
    name: str = ""
    steps: bool = False

    def path(self, x: Scale, y: Scale) -> str:
        """The ``d`` of its path, pixels rounded to tenths, points that fall on the one before left out."""
        d: list[str] = []
        last: tuple[str, str] | None = None
        for a, b in zip(map(finite, self.xs), map(finite, self.ys), strict=False):
            if a is None or b is None:
                continue
            point = (f"{x(a):.1f}", f"{y(b):.1f}")
            if point == last:
                continue
            if last is None:
                d.append(f"M{point[0]} {point[1]}")
            elif self.steps:
                d.append(
                    (f"H{point[0]}" if point[0] != last[0] else "") + (f"V{point[1]}" if point[1] != last[1] else "")
                )
            else:
                d.append(f"L{point[0]} {point[1]}")
            last = point
        return "".join(d)


def line_chart(
    ident: str,
    title: str,
    description: str,
    lines: Sequence[Line],
    xlabel: str,
    ylabel: str,
    *,
    x: tuple[float, float] | None = None,
    y: tuple[float, float] | None = None,
    log: bool = False,
    percent: bool = False,
    diagonal: bool = False,
    verticals: Sequence[tuple[float, str]] = (),
    dots: Sequence[tuple[float, float, int]] = (),
    height: float = 300.0,
) -> str:
    """Lines over ``x`` (their own range by default), both axes by decades when ``log``.

    ``diagonal`` draws y = x; ``verticals`` are marked values of x with their labels; ``dots`` are (x, y, series).
    """
    x = x or domain((v for line in lines for v in line.xs), log=log)
    y = y or domain((v for line in lines for v in line.ys), log=log)
    across = Scale(*x, 46, WIDTH - 20, log, percent)
    up = Scale(*y, height - 38, 30, log, percent)
    parts = axes(across, up, xlabel, ylabel)
    if diagonal:
        low, high = max(x[0], y[0]), min(x[1], y[1])
        if low < high:
            ends = f"M{across(low):.1f} {up(low):.1f}L{across(high):.1f} {up(high):.1f}"
            parts.append(f'<path class="guide" d="{ends}"/>')
    for value, label in verticals:
        at = across(value)
        parts.append(f'<path class="guide" d="M{at:.1f} {up.start:.1f}V{up.end:.1f}"/>')
        parts.append(f'<text class="tick" x="{at + 3:.1f}" y="{up.end + 9:.1f}">{text(label)}</text>')
    for line in lines:
        if d := line.path(across, up):
            kind = f"line {colour(line.series)} {dash(line.series)}".strip()
            parts.append(f'<path class="{kind}" d="{d}"><title>{text(line.name)}</title></path>')
    parts += [
        marker(series, across(a), up(b), 3.2)
        for a, b, series in dots
        if finite(a) is not None and finite(b) is not None
    ]
    return svg(ident, title, description, height, parts)


@dataclass(frozen=True)
class Dot:
    """A value, and its interval where it has one."""

    value: float
    series: int = 0
    low: float | None = None
    high: float | None = None
    note: str = ""


def dot_chart(
    ident: str,
    title: str,
    description: str,
    rows: Sequence[tuple[str, Sequence[Dot]]],
    *,
    band: tuple[float, float] | None = None,
    line: float | None = None,
    least: float | None = None,
    limits: tuple[float, float] | None = None,
    written: Sequence[str] = (),
    label_width: float = 104.0,
    row: float = 22.0,
) -> str:
    """One line per row: its name, its dots with their intervals, and (``written``) a text at the right.

    ``band`` shades a range of values and ``line`` marks one: where the retrained models lie. The axis is
    at least ``least`` wide, so that small differences look small; it and the intervals end at ``limits``.
    """
    drawn = [(name, [d for d in dots if finite(d.value) is not None]) for name, dots in rows]
    found = [v for _, dots in drawn for d in dots for v in (d.value, d.low, d.high)]
    right = WIDTH - (46 if written else 16)
    top, bottom = 6.0, 6 + row * len(drawn)
    bottom_value, top_value = limits or (-math.inf, math.inf)

    def within(value: float) -> float:
        return min(max(value, bottom_value), top_value)

    low, high = map(within, around([*found, *(band or ()), line], least))
    if low == high:
        low, high = around([low])
    margin = 0.04 * (high - low)  # no dot on the edge
    across = Scale(low - margin, high + margin, label_width + 8, right)
    parts = []
    if band and finite(band[0]) is not None and finite(band[1]) is not None:
        left = across(within(band[0]))
        wide = max(across(within(band[1])) - left, 1.5)
        parts.append(f'<rect class="band" x="{left:.1f}" y="{top}" width="{wide:.1f}" height="{bottom - top:.1f}"/>')
    for value, label in across.ticks():
        at = across(value)
        parts.append(f'<path class="grid" d="M{at:.1f} {top}V{bottom:.1f}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 14:.1f}" text-anchor="middle">{label}</text>')
    if line is not None and finite(line) is not None:
        parts.append(f'<path class="reference" d="M{across(line):.1f} {top}V{bottom:.1f}"/>')
    most = int(label_width / 6.1)
    for k, (name, dots) in enumerate(drawn):
        y = top + row * (k + 0.5)
        parts.append(f'<text x="{label_width:.1f}" y="{y + 3.8:.1f}" text-anchor="end">{text(shorten(name, most))}')
        parts.append(f"<title>{text(name)}</title></text>")
        for d in dots:
            whisker = ""
            if finite(d.low) is not None and finite(d.high) is not None:
                a, b = across(within(d.low or 0.0)), across(within(d.high or 0.0))
                whisker = f'<path class="whisker {colour(d.series)}" d="M{a:.1f} {y:.1f}H{b:.1f}"/>'
            parts.append(f"<g><title>{text(d.note or name)}</title>{whisker}{marker(d.series, across(d.value), y)}</g>")
        if written:
            parts.append(f'<text class="value" x="{WIDTH - 2:g}" y="{y + 3.8:.1f}" text-anchor="end">')
            parts.append(f"{text(written[k])}</text>")
    return svg(ident, title, description, bottom + 22, parts)


def bars(
    ident: str,
    title: str,
    description: str,
    rows: Sequence[tuple[str, object, str]],
    *,
    series: int = 2,
    top: float | None = None,
    label_width: float = 128.0,
    row: float = 18.0,
) -> str:
    """A bar from zero per (name, value, written value); ``top`` is the end of the axis, by default the largest."""
    heights = [max(finite(value) or 0.0, 0.0) for _, value, _ in rows]
    end = top or max(heights, default=0.0) or 1.0
    across = Scale(0.0, end, label_width + 8, WIDTH - 52)
    most = int(label_width / 6.1)
    parts = [f'<path class="axis" d="M{across.start:.1f} 4V{4 + row * len(rows):.1f}"/>']
    for k, ((name, _, written), value) in enumerate(zip(rows, heights, strict=True)):
        y, wide = 4 + row * k, across(value) - across.start
        parts.append(f'<text x="{label_width:.1f}" y="{y + row / 2 + 3.8:.1f}" text-anchor="end">')
        parts.append(f"{text(shorten(name, most))}<title>{text(name)}</title></text>")
        parts.append(
            f'<rect class="bar {colour(series)}" x="{across.start:.1f}" y="{y + 3:.1f}" width="{wide:.1f}" '
            f'height="{row - 6:.1f}" rx="1.5"><title>{text(name)}: {text(written)}</title></rect>'
        )
        at = across.start + wide + 5
        parts.append(f'<text class="value" x="{at:.1f}" y="{y + row / 2 + 3.8:.1f}">{text(written)}</text>')
    return svg(ident, title, description, 8 + row * len(rows), parts)


def heat_map(
    ident: str,
    title: str,
    description: str,
    shares: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
) -> str:
    """Cells of 0 to 1 under their column's and beside their row's name; percent is written where it fits."""
    letters = min(max((len(name) for name in [*rows, *columns]), default=1), 11)
    left, top, right = 10 + 5.7 * letters, 14 + 4.4 * letters, 26.0
    cell = min((WIDTH - left - right) / max(len(columns), 1), 34.0)
    parts = []
    for j, name in enumerate(columns):
        x, y = left + cell * (j + 0.5) + 3, top - 6
        parts.append(f'<text class="tick" x="{x:.1f}" y="{y:.1f}" transform="rotate(-50 {x:.1f} {y:.1f})">')
        parts.append(f"{text(shorten(name, 11))}<title>{text(name)}</title></text>")
    for i, (name, values) in enumerate(zip(rows, shares, strict=True)):
        y = top + cell * i
        parts.append(f'<text x="{left - 6:.1f}" y="{y + cell / 2 + 3.8:.1f}" text-anchor="end">')
        parts.append(f"{text(shorten(name, 11))}<title>{text(name)}</title></text>")
        for j, value in enumerate(values):
            share = min(max(finite(value) or 0.0, 0.0), 1.0)
            x = left + cell * j
            note = f"<title>{text(name)} as {text(columns[j])}: {100 * share:.1f} %</title>"
            parts.append(
                f'<rect class="cell{" own" if name == columns[j] else ""}" x="{x:.1f}" y="{y:.1f}" '
                f'width="{cell - 1:.1f}" height="{cell - 1:.1f}" fill-opacity="{share:.3f}">{note}</rect>'
            )
            if cell >= 20 and share >= 0.005:
                kind = "high" if share >= HEAT_TURN else "low"
                parts.append(
                    f'<text class="heat {kind}" x="{x + cell / 2 - 0.5:.1f}" y="{y + cell / 2 + 3:.1f}" '
                    f'text-anchor="middle">{100 * share:.0f}</text>'
                )
    return svg(ident, title, description, top + cell * len(rows) + 4, parts)


def histogram(
    ident: str,
    title: str,
    description: str,
    edges: Sequence[float],
    counts: Sequence[float],
    xlabel: str,
    *,
    mark: float | None = None,
    mark_label: str = "",
    height: float = 240.0,
) -> str:
    """``counts`` [n] between ``edges`` [n + 1]; what lies beyond ``mark`` in the accent's colour.

    The axis goes by decades when all edges are above zero and span more than three of them.
    Raises ValueError when the edges do not rise or their number is not one more than that of the counts.
    """
    if len(edges) != len(counts) + 1 or len(numbers(edges)) != len(edges):
        raise ValueError(f"a histogram needs one more edge than counts, all finite, got {len(edges)} and {len(counts)}")
    if any(b <= a for a, b in pairwise(edges)):
        raise ValueError("the edges of a histogram must rise")
    log = edges[0] > 0 and edges[-1] / edges[0] > 1e3
    mark = finite(mark)
    if log and mark is not None and mark <= 0:
        mark = None
    ends = [edges[0], edges[-1]]
    if mark is not None:
        ends = [min(ends[0], mark), max(ends[1], mark)]
    across = Scale(ends[0], ends[1], 46, WIDTH - 20, log)
    up = Scale(0.0, domain([0.0, max([1.0, *numbers(counts)])])[1], height - 38, 30)
    parts = axes(across, up, xlabel, "count")
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        y = up(finite(count) or 0.0)
        pieces = [(low, high, "")]
        if mark is not None:
            cut = min(max(mark, low), high)
            pieces = [(low, cut, ""), (cut, high, " beyond")]
        for a, b, kind in pieces:
            if b > a and y < up.start:
                x, wide = across(a), across(b) - across(a)
                parts.append(
                    f'<rect class="column{kind}" x="{x:.1f}" y="{y:.1f}" width="{max(wide - 0.4, 0.3):.1f}" '
                    f'height="{up.start - y:.1f}"><title>{low:.4g} to {high:.4g}: {count:,}</title></rect>'
                )
    if mark is not None:
        at = across(mark)
        side, anchor = (at - 4, "end") if at > (across.start + across.end) / 2 else (at + 4, "start")
        parts.append(f'<path class="reference" d="M{at:.1f} {up.start:.1f}V{up.end - 14:.1f}"/>')
        parts.append(f'<text class="value" x="{side:.1f}" y="{up.end - 6:.1f}" text-anchor="{anchor}">')
        parts.append(f"{text(mark_label)}</text>")
    return svg(ident, title, description, height, parts)


@dataclass(frozen=True)
class Slope:
    """One sample's values, a column after the other; None where it has none."""

    values: Sequence[object]
    name: str = ""
    kind: str = ""  # "", "worst" or "middle"


def slope_chart(
    ident: str,
    title: str,
    description: str,
    columns: Sequence[str],
    slopes: Sequence[Slope],
    ylabel: str,
    *,
    height: float = 280.0,
) -> str:
    """Every sample as a line through its values, those of ``kind`` drawn last and stronger."""
    up = Scale(*domain(v for s in slopes for v in s.values), height - 26, 34)
    first, last = 78.0, WIDTH - 40
    xs = [first + (last - first) * k / max(len(columns) - 1, 1) for k in range(len(columns))]
    parts = []
    for value, label in up.ticks():
        parts.append(f'<path class="grid" d="M46 {up(value):.1f}H{WIDTH - 10:g}"/>')
        parts.append(f'<text class="tick" x="40" y="{up(value) + 3.8:.1f}" text-anchor="end">{label}</text>')
    for x, name in zip(xs, columns, strict=True):
        parts.append(f'<path class="axis" d="M{x:.1f} {up.start:.1f}V{up.end:.1f}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 8:g}" text-anchor="middle">{text(shorten(name, 16))}</text>')
    parts.append(f'<text class="label" x="2" y="{up.end - 14:g}">{text(ylabel)}</text>')
    for slope in sorted(slopes, key=lambda s: ("", "worst", "middle").index(s.kind)):
        points = [(x, up(v)) for x, v in zip(xs, map(finite, slope.values), strict=True) if v is not None]
        if not points:
            continue
        d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        ends = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>' for x, y in points)
        parts.append(f'<g class="slope {slope.kind}"><title>{text(slope.name)}</title><path d="{d}"/>{ends}</g>')
    return svg(ident, title, description, height, parts)
