"""How far the step that runs has come: whose KV moves while the rest computes sees which layers stand in the pool.

The thread that runs steps reports; any thread may look. Where nobody listens, a layer costs nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StepLayers:
    """The layers of one step."""

    __slots__ = ("_wakes", "failed", "num_layers", "num_ready")

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.num_ready = 0
        """Leading layers of which all KV that the step writes is in the pool."""
        self.failed = False
        """Whether the step broke off: nothing that it was to write is to be relied on."""
        self._wakes: list[Callable[[], None]] = []

    @property
    def complete(self) -> bool:
        return self.num_ready == self.num_layers

    @property
    def watched(self) -> bool:
        """Whether anybody listens."""
        return bool(self._wakes)

    def listen(self, wake: Callable[[], None]) -> None:
        """Have ``wake`` called, in the thread that runs the step, whenever there is more to see. It must not block.

        To be called in that thread too, before the step or between two of its layers: then what is there already is
        for the caller to see.
        """
        if wake not in self._wakes:
            self._wakes.append(wake)

    def advance(self, num_ready: int) -> None:
        """So many leading layers are there now."""
        if num_ready > self.num_ready:
            self.num_ready = num_ready
            self._tell()

    def fail(self) -> None:
        """There will be no more of them."""
        self.failed = True
        self._tell()

    def _tell(self) -> None:
        for wake in self._wakes:
            wake()


class LayerGate:
    """One rank's steps, one after the other. Belongs to the thread that runs them."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self.upcoming = StepLayers(num_layers)
        """Of the step that is to run next."""
        self.current: StepLayers | None = None
        """Of the step that runs, or else ran last."""

    @contextmanager
    def step(self) -> Iterator[StepLayers]:
        """Around the writes of a step: at its end all layers are there, or it has failed."""
        self.current = layers = self.upcoming
        self.upcoming = StepLayers(self._num_layers)
        try:
            yield layers
        except BaseException:
            layers.fail()
            raise
        layers.advance(self._num_layers)
