"""What was measured of late: the past fades with each measurement, and what is old is believed no more.

A figure that was bad by chance keeps away the very work that would measure it again; so it is forgotten in time.
"""

from typing import NamedTuple

KEPT = 0.8
"""What the past weighs beside one more measurement."""
MEASURED_FOR = 30.0
"""Seconds for which a measurement is believed."""
ALIKE = 0.1
"""Sizes that spread less than this part of their mean do not tell what more of it would cost."""
UNSEEN = 0.01
"""A share of the cost that is nothing."""


class RecentRate:
    """How much was done a second."""

    def __init__(self) -> None:
        self._amount = self._seconds = 0.0
        self._at = float("-inf")

    def took(self, amount: float, seconds: float, now: float) -> None:
        """``amount`` was done in so many seconds."""
        if amount > 0 and seconds > 0:
            self._amount = KEPT * self._amount + amount
            self._seconds = KEPT * self._seconds + seconds
            self._at = now

    def forget_old(self, now: float) -> None:
        if now - self._at > MEASURED_FOR:
            self._amount = self._seconds = 0.0

    @property
    def value(self) -> float:
        """A second; 0 while it is not known."""
        return self._amount / self._seconds if self._seconds else 0.0


class Cost(NamedTuple):
    """Of a job of some size: ``latency + size / rate``. Both are 0 while it is not known."""

    latency: float
    """Seconds, whatever its size."""
    rate: float
    """Of its size a second; 0 where size makes no difference."""

    def seconds(self, size: float) -> float:
        return self.latency + (size / self.rate if self.rate > 0 else 0.0)


_NOTHING = (0.0,) * 5


class RecentCost:
    """What a job of some size took: a line through the measurements, by least squares, that never falls."""

    def __init__(self) -> None:
        self._sums: tuple[float, ...] = _NOTHING
        self._at = float("-inf")

    def took(self, size: float, seconds: float, now: float) -> None:
        """A job of ``size`` took so many seconds."""
        if size <= 0 or seconds <= 0:
            return
        one = (1.0, size, seconds, size * size, size * seconds)
        self._sums = tuple(KEPT * past + new for past, new in zip(self._sums, one, strict=True))
        self._at = now

    def forget_old(self, now: float) -> None:
        if now - self._at > MEASURED_FOR:
            self._sums = _NOTHING

    @property
    def value(self) -> Cost:
        count, sizes, seconds, squares, products = self._sums
        if not count:
            return Cost(0.0, 0.0)
        size, mean = sizes / count, seconds / count
        spread = squares / count - size * size
        if spread <= (ALIKE * size) ** 2:
            return Cost(mean, 0.0)
        slope = (products / count - size * mean) / spread
        if slope * size <= UNSEEN * mean:
            return Cost(mean, 0.0)
        latency = mean - slope * size
        return Cost(latency, 1 / slope) if latency > 0 else Cost(0.0, size / mean)
