"""What the controller hears, and what it wants done. ``incarnation`` counts a unit's starts: what comes late is dropped
by it."""

from typing import NamedTuple

from runtime.core.actions import WakeAt

# Events


class Begin(NamedTuple):
    """Start everything for the first time; Ray is there already."""


class Up(NamedTuple):
    """All of it works together. What dies from now on is started again."""


class Ready(NamedTuple):
    """All processes of the unit serve."""

    unit: str
    incarnation: int


class Failed(NamedTuple):
    """The unit could not be started; processes of it may be there."""

    unit: str
    incarnation: int
    cause: str


class Died(NamedTuple):
    unit: str
    incarnation: int
    process: str
    cause: str


class Gone(NamedTuple):
    """After ``Kill`` or ``Stop``: no process of it is left."""

    unit: str
    incarnation: int


class Tick(NamedTuple):
    """The time that a ``WakeAt`` asked for has come."""


class RestartWanted(NamedTuple):
    """Somebody asks for these units to be stopped and started anew, one after the other, workers drained before."""

    ticket: int
    units: tuple[str, ...]
    """Empty for all: the workers, then the router, then the gateways."""
    force: bool = False
    """Also where nobody can take over what the unit does."""


class DrainWanted(NamedTuple):
    """Somebody wants this worker to give away what it has, and to take nothing new."""

    ticket: int
    worker: str


class UndrainWanted(NamedTuple):
    ticket: int
    worker: str


class FlipWanted(NamedTuple):
    """Somebody wants a prefill worker to decode from now on, or the other way round."""

    ticket: int
    worker: str


class Moved(NamedTuple):
    """A ``Drain`` or ``Flip`` is through: nothing is left on the worker of what it had."""

    unit: str
    incarnation: int
    problem: str = ""
    """Why it is not; empty if it is."""


Wanted = RestartWanted | DrainWanted | UndrainWanted | FlipWanted
"""By people."""
Event = Begin | Up | Ready | Failed | Died | Gone | Tick | Moved | Wanted

# Actions


class Start(NamedTuple):
    """Make the unit's processes, and say ``Ready`` or ``Failed``."""

    unit: str
    incarnation: int
    role: str


class Stop(NamedTuple):
    """Ask it to end in good order, and say ``Gone``."""

    unit: str
    incarnation: int


class Retire(NamedTuple):
    """Have a gateway whose replacement listens already take nothing new, let its streams finish, and end it."""

    unit: str
    incarnation: int


class Kill(NamedTuple):
    """End what is left of it at once, and say ``Gone``."""

    unit: str
    incarnation: int


class TellDied(NamedTuple):
    """Tell the router that the worker's or gateway's process is gone."""

    unit: str
    incarnation: int
    detail: str


class Drain(NamedTuple):
    """Have the router drain the worker, and say ``Moved`` when nothing is left there."""

    worker: str
    incarnation: int


class Undrain(NamedTuple):
    worker: str
    incarnation: int


class Flip(NamedTuple):
    """Have the router drain the worker, and the worker register as ``role``; say ``Moved``."""

    worker: str
    incarnation: int
    role: str


class Note(NamedTuple):
    """For people: what happened to whom."""

    who: str
    what: str


class Done(NamedTuple):
    """What was asked for under ``ticket`` has ended, well if there is no ``problem``."""

    ticket: int
    problem: str


class GiveUp(NamedTuple):
    """The cluster does not come up."""

    cause: str


ToProcesses = Start | Stop | Retire | Kill | TellDied | Drain | Undrain | Flip
Action = ToProcesses | Note | Done | GiveUp | WakeAt
