"""What the judges share: the requests as their clients see them, the state of the processes, and the verdict."""

from dataclasses import dataclass, field

from messages.ids import RequestId
from simulator.history import Asked, AttemptPlaced, Ended, Failed
from simulator.judges.health import NEVER, Health
from simulator.verdict import Answer, Bounds, Fault, Invariant, Truth, Verdict, Violation


@dataclass(frozen=True, slots=True)
class Hit:
    """A fault befell a worker that the request needed."""

    fault: Fault
    at: float
    attempt: int
    troubles: int
    """With this one; more of them later: it did not come alone."""


@dataclass(slots=True)
class Request:
    """What its client has, and what its gateway did for it."""

    asked: Asked
    troubles: int
    """How many there had been when it came."""
    progress: float
    """When its client heard something last."""
    gateway: str
    answer: Answer | None = None
    have: int = 0
    """Tokens that the client has."""
    text: list[str] = field(default_factory=list)
    end: Ended | Failed | None = None
    over_at: float = NEVER
    """When nothing of it was wanted any more."""
    orphan_at: float = NEVER
    """When its gateway died with it; ``NEVER`` where another one goes on with it."""
    attached_at: float | None = None
    """Since when its client waits for the first sign of another gateway."""
    begun: int = 0
    """The newest attempt that was asked for."""
    attempt: int = 0
    """The one whose tokens count."""
    superseded: dict[int, float] = field(default_factory=dict)
    """When each older attempt was."""
    placed: dict[int, AttemptPlaced] = field(default_factory=dict)
    decode_streams: bool = False
    """Whether its decode worker has sent tokens of this attempt: it needs no prefill worker any more."""
    hits: list[Hit] = field(default_factory=list)
    lost: bool = False

    @property
    def orphan(self) -> bool:
        """Whether no gateway has it."""
        return self.orphan_at < NEVER

    @property
    def live(self) -> bool:
        """Whether its client waits."""
        return self.over_at == NEVER


class Case:
    def __init__(self, truth: Truth, bounds: Bounds) -> None:
        self.bounds = bounds
        self.verdict = Verdict()
        self.health = Health(bounds.spare, bounds.needed)
        self.requests: dict[RequestId, Request] = {}
        self.live: dict[RequestId, Request] = {}
        self.now = 0.0
        self._truth = truth

    def broken(self, invariant: Invariant, request: Request | None, detail: str) -> None:
        whose = request.asked.request if request is not None else None
        self.verdict.violations.append(Violation(invariant, self.now, detail, whose))

    def answer(self, request: Request) -> Answer:
        """Of the run without faults."""
        if request.answer is None:
            request.answer = self._truth(request.asked)
        return request.answer

    def over(self, request: Request) -> None:
        """Nothing of it is wanted any more."""
        if request.live:
            request.over_at = self.now
            del self.live[request.asked.request]
            if request.orphan:
                self.health.keep(request.asked.request, self.now + self.bounds.orphaned)
            else:
                self.health.close(request.asked.request, self.now)

    def lose(self, request: Request) -> None:
        """Its client did not get what it should."""
        if not request.lost:
            request.lost = True
            self.verdict.lost += 1
