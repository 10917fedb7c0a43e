"""What goes wrong in a run: drawn up front, numbered, so that leaving some out leaves the others what they were."""

from dataclasses import dataclass, replace
from enum import StrEnum

SENDER, RECEIVER = "the sender", "the receiver"
"""Of the message with which a misfortune comes: stand for a name."""


class Kind(StrEnum):
    KILL = "kill"
    """SIGKILL. Another process takes the name later."""
    STOP = "stop"
    """SIGTERM: the process ends in good order; another takes the name later."""
    DRAIN = "drain"
    """Nothing is placed there and all that runs moves away, until the time is over."""
    RETIRE = "retire"
    """The same; when nothing is left it is stopped, and another process takes the name later."""
    FLIP = "flip"
    """The same; when nothing is left it takes the other role."""
    ROLL = "roll"
    """Every worker in turn is drained, stopped, and started again; then the router is."""
    FREEZE = "freeze"
    """SIGSTOP, and SIGCONT when the time is over."""
    CUT = "cut"
    """Nothing gets from one process to another."""
    LOSE = "lose"
    REPEAT = "repeat"
    REORDER = "reorder"
    DELAY = "delay"
    SLOW = "slow"
    """KV takes longer."""
    CORRUPT = "corrupt"
    SWAP = "swap"
    STALE = "stale"
    """What lands is a bit off; in another block; or not there."""
    FAIL = "fail"
    """Steps of a worker fail."""
    FILL = "fill"
    """Somebody else takes blocks of a worker's pool that nobody holds."""
    HEADLESS = "headless"
    """Ray's head is gone: nobody says who is dead, nobody is started again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfortune:
    number: int
    kind: Kind
    at: float = 0.0
    """When it begins, or from when on its message is looked for."""
    target: str = ""
    """Name of the process that it befalls, or that a link leads to."""
    source: str = ""
    """Where the link begins."""
    seconds: float = 0.0
    """How long it lasts; of KILL, STOP and RETIRE, until another process takes the name (never: infinite)."""
    chance: float = 1.0
    """That it strikes a message, a piece of KV, a step. Of DELAY: the longest, in seconds; of SLOW: how many times; of
    FILL: which part of what is free."""
    notice: float | None = None
    """Seconds after which the supervisor tells of a death; None: it never does."""
    holds: bool = False
    """Of CUT: what is sent arrives when it heals."""
    message: str = ""
    """It begins when anybody sends the ``nth`` message of this type; of a link, with that message itself."""
    nth: int = 1
    after: float = 0.0
    """Seconds from that message."""

    def at_message(self, source: str, target: str) -> "Misfortune":
        """The same, where the message was found that it waits for: from ``source``, for ``target``."""
        names = {SENDER: source, RECEIVER: target}
        return replace(
            self, source=names.get(self.source, self.source), target=names.get(self.target, self.target), message=""
        )

    @property
    def _moment(self) -> str:
        if not self.message:
            return ""
        return (f" {self.after:.3f} s after" if self.after else " with") + f" {self.message} number {self.nth}"

    def __str__(self) -> str:
        where = f"{self.source} -> {self.target}" if self.source else self.target
        when = f"at {self.at:.3f}" + self._moment
        parts = [f"[{self.number}] {self.kind} {where} {when}"]
        if self.seconds:
            parts.append(f"for {self.seconds:.3f} s")
        if self.chance != 1.0:
            parts.append(f"by {self.chance:g}")
        if self.kind in (Kind.KILL, Kind.STOP):
            parts.append("no notice" if self.notice is None else f"notice after {self.notice:.3f} s")
        if self.holds:
            parts.append("held back")
        return ", ".join(parts)
