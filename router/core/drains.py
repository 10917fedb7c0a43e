"""Workers that shall have nothing to do: to be stopped, or to change their role.

Nothing is placed on one that is draining. What is there ends; of a worker that decodes, what runs moves to others, with
its KV, as they have room: its gateway is asked to ask for the next attempt (``MoveWanted``), and until that begins the
tokens go on coming.
"""

from collections.abc import Callable
from typing import NamedTuple

from messages.common import Role
from messages.ids import RequestId, WorkerId
from messages.router_to_gateway import MoveWanted
from messages.worker_to_router import Report
from router.core.ledger import Ledger
from router.core.views import Move, WorkerView
from runtime.core.actions import Send

MOVING_AT_ONCE = 4
"""Sequences that move away from one worker: what they wait for is their own KV on its way, and little else."""
ASK_AGAIN = 1.0
"""Seconds."""
MOVE_WITHIN = 3.0
"""Seconds from the first question to the placement elsewhere; after that others go first."""
LATER = 5.0
"""Seconds until it has another turn."""


class Drain(NamedTuple):
    """Event: ``worker`` shall have nothing to do. ``force``: even if nothing can be served without it."""

    worker: WorkerId
    force: bool = False


class Undrain(NamedTuple):
    """Event: it is needed after all."""

    worker: WorkerId


class Flip(NamedTuple):
    """Event: ``worker`` shall do what ``role`` says, once it is drained."""

    worker: WorkerId
    role: Role


class Refused(ValueError):
    """What was asked for cannot be; the text says why."""


class Unknown(Refused):
    """The worker is not there, or not yet: a new router has to hear of it first."""


def moves(view: WorkerView, report: Report, ledger: Ledger, has_room: Callable[[int], bool], now: float) -> list[Send]:
    """Whom to ask to go on elsewhere now. ``has_room``: whether there is a worker with room for so many tokens."""
    view.moving = {
        request: move
        for request, move in view.moving.items()
        if (entry := ledger.get(request)) is not None and (entry.decode is view or entry.to_begin(view))
    }
    view.stuck = {request: until for request, until in view.stuck.items() if until > now and request in view.requests}
    for request, move in [*view.moving.items()]:
        if move.since + MOVE_WITHIN <= now and _runs_on(request, view, ledger):
            del view.moving[request]
            view.stuck[request] = now + LATER
    due = [
        request
        for request, move in view.moving.items()
        if move.asked + ASK_AGAIN <= now and _runs_on(request, view, ledger)
    ]
    spare = MOVING_AT_ONCE - max(len(view.moving), report.handovers.in_flight)
    for request in view.requests:
        if spare <= 0:
            break
        entry = ledger.get(request)
        if entry is None or entry.decode is not view or not entry.begun:
            continue
        if request in view.moving or request in view.stuck:
            continue
        if not has_room(entry.decode_tokens):
            break
        due.append(request)
        spare -= 1
    return [_ask(request, view, ledger, now) for request in due]


def _runs_on(request: RequestId, view: WorkerView, ledger: Ledger) -> bool:
    """Whether it is not placed elsewhere yet."""
    entry = ledger.get(request)
    return entry is not None and entry.decode is view


def _ask(request: RequestId, view: WorkerView, ledger: Ledger, now: float) -> Send:
    move = view.moving.setdefault(request, Move(now, now))
    move.asked = now
    entry = ledger.get(request)
    assert entry is not None
    return Send(entry.gateway, MoveWanted(request=request, worker=view.worker, epoch=view.epoch))
