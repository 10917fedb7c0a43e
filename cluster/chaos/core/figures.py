"""Figures of a run: percentiles, and whether something grows."""

import math
from collections.abc import Sequence
from statistics import median


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest values; NaN where there are none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


MOST_POINTS = 256


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """How much ``values`` grow in a unit of time: the median slope of all pairs of points (Theil and Sen), which single
    outliers do not move. NaN for less than two points in time. Long series are thinned out first."""
    step = max(1, math.ceil(len(times) / MOST_POINTS))
    points = list(zip(times[::step], values[::step], strict=True))
    slopes = [
        (later[1] - earlier[1]) / (later[0] - earlier[0])
        for number, earlier in enumerate(points)
        for later in points[number + 1 :]
        if later[0] > earlier[0]
    ]
    return median(slopes) if slopes else math.nan
