"""Draws curves: as SVG charts for the report, and as image files such as those of the README."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence

# A curve: values of x and y. y is NaN or None where there is no measurement.
Series = tuple[Sequence[float], Sequence[float | None]]

# Distinguishable on light and dark backgrounds, also for colour-blind readers. The report has
# variants of these colours for dark mode.
COLORS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#475569")

WIDTH, HEIGHT = 460, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 26


@dataclasses.dataclass(frozen=True)
class Chart:
  """The content of one chart, from which the template of the report draws it.

  Lengths are in SVG units.

  Attributes:
    title: heading.
    lines: a dict for each curve, with these keys:
      name: name of the curve.
      color: index of its colour.
      points: points of the SVG line. They are smoothed if the curve has more than 30 points.
      raw: points of the SVG line without smoothing, or "" if `points` is not smoothed.
      dots: (x, y, tooltip) for each point if the curve has at most 30 points, otherwise empty.
      last: last value, as text.
    x_ticks, y_ticks: position and label of each tick.
    marks: position and name of each stage that starts after the first step.
  """

  title: str
  lines: list[dict]
  x_ticks: list[tuple[float, str]]
  y_ticks: list[tuple[float, str]]
  marks: list[tuple[float, str]]


def chart(
  title: str, series: Mapping[str, Series], stages: Sequence[tuple[float, str]] = ()
) -> Chart | None:
  """Computes the content of a chart. Returns None if no curve has a finite value.

  Args:
    title: heading of the chart.
    series: curves by name. Curves of more than 30 points are also drawn smoothed.
    stages: first step and name of each stage.
  """
  curves = {name: _finite(curve) for name, curve in series.items()}
  curves = {name: points for name, points in curves.items() if points}
  if not curves:
    return None
  x_low, x_high = _range([x for points in curves.values() for x, _ in points])
  y_low, y_high = _range([y for points in curves.values() for _, y in points])
  y_ticks = _ticks(y_low, y_high)
  y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])

  def place(x: float, y: float) -> tuple[float, float]:
    across = (x - x_low) / (x_high - x_low)
    up = (y - y_low) / (y_high - y_low)
    return (
      round(_LEFT + across * (WIDTH - _LEFT - _RIGHT), 1),
      round(HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM), 1),
    )

  def path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join("{},{}".format(*place(x, y)) for x, y in points)

  lines = []
  for number, (name, points) in enumerate(curves.items()):
    few = len(points) <= 30
    lines.append(
      {
        "name": name,
        "color": number % len(COLORS),
        "points": path(points if few else _smooth(points)),
        "raw": "" if few else path(points),
        "dots": [(*place(x, y), f"step {x:g}: {y:.4g}") for x, y in points] if few else [],
        "last": f"{points[-1][1]:.3g}",
      }
    )
  return Chart(
    title=title,
    lines=lines,
    x_ticks=[(place(x, y_low)[0], f"{x:g}") for x in _ticks(x_low, x_high) if x_low <= x <= x_high],
    y_ticks=[(place(x_low, y)[1], f"{y:g}") for y in y_ticks],
    marks=[(place(x, y_low)[0], name) for x, name in stages if x_low < x < x_high],
  )


def save_curve(
  path: str | os.PathLike,
  series: Mapping[str, Series],
  title: str = "",
  x_label: str = "step",
  y_label: str = "",
) -> None:
  """Draws curves in an image file of 1,280 × 720 pixels.

  Args:
    path: path of the image file. Its suffix determines the format.
    series: curves by name. Curves of more than 30 points are drawn smoothed, over the raw curve.
    title: heading of the picture. If it is empty, there is no heading.
    x_label: label of the horizontal axis.
    y_label: label of the vertical axis.
  """
  # Figure is used in place of pyplot, because pyplot has global state and may need a display.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(6.4, 3.6), dpi=200, layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  for number, (name, curve) in enumerate(series.items()):
    points = _finite(curve)
    color = COLORS[number % len(COLORS)]
    if len(points) > 30:
      axes.plot(*zip(*points, strict=True), color=color, alpha=0.25, linewidth=1)
      points = _smooth(points)
    axes.plot(
      [x for x, _ in points],
      [y for _, y in points],
      color=color,
      linewidth=2,
      label=name,
      marker="o" if len(points) <= 30 else None,
      markersize=4,
    )
  axes.set_title(title, loc="left", fontsize=11)
  axes.set_xlabel(x_label)
  axes.set_ylabel(y_label)
  axes.grid(axis="y", color="#e5e7eb")
  axes.set_axisbelow(True)
  axes.spines[["top", "right", "left"]].set_visible(False)
  axes.tick_params(length=0)
  if len(series) > 1:
    axes.legend(frameon=False)
  figure.savefig(path)


def _finite(curve: Series) -> list[tuple[float, float]]:
  return [
    (float(x), float(y)) for x, y in zip(*curve, strict=True) if y is not None and math.isfinite(y)
  ]


def _range(values: Sequence[float]) -> tuple[float, float]:
  """Returns minimum and maximum, moved apart if they are equal, so that they span an axis."""
  low, high = min(values), max(values)
  margin = 0.0 if high > low else abs(low) * 0.1 or 0.5
  return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
  """Returns about five round numbers that cover [low, high]."""
  from matplotlib.ticker import MaxNLocator

  locator = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10])
  # Rounding removes 0.30000000000000004.
  return [float(f"{tick:.6g}") for tick in locator.tick_values(low, high)]


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  """Returns the centred moving average over a tenth of the curve.

  Unlike an exponential moving average, it does not lag behind the curve.
  """
  reach = max(2, len(points) // 20)
  smooth = []
  for index, (x, _) in enumerate(points):
    window = [y for _, y in points[max(0, index - reach) : index + reach + 1]]
    smooth.append((x, sum(window) / len(window)))
  return smooth
