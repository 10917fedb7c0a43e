"""Which workers there are, which of them live, and who has been silent for the longest time."""

from collections import OrderedDict, deque
from collections.abc import Iterator

from messages.common import Role, WorkerAddress
from messages.ids import Epoch, WorkerId
from router.core.policies.base import Policy
from router.core.views import WorkerView

FORMER = 16
"""Incarnations of a worker that are remembered after another one took its name."""


class Members:
    """The newest incarnation of every worker that ever registered, and a policy over the live ones of each role."""

    def __init__(self, policies: dict[Role, Policy]) -> None:
        self.policies = policies
        self._views: dict[WorkerId, WorkerView] = {}
        self._by_silence: OrderedDict[WorkerId, WorkerView] = OrderedDict()
        """Live workers, the one that was not heard for the longest time first."""
        self._former: dict[WorkerId, deque[WorkerAddress]] = {}
        self._longest: dict[Role, int] = {}

    def __iter__(self) -> Iterator[WorkerView]:
        return iter(self._views.values())

    def get(self, worker: WorkerId, epoch: Epoch | None = None) -> WorkerView | None:
        """The worker, if ``epoch`` is its newest incarnation (None: whichever)."""
        view = self._views.get(worker)
        return view if view is not None and epoch in (None, view.epoch) else None

    def former(self, worker: WorkerId, epoch: Epoch | None) -> WorkerAddress | None:
        """The incarnation of that epoch, if another process has taken its place."""
        return next((address for address in self._former.get(worker, ()) if address.epoch == epoch), None)

    def live(self) -> Iterator[WorkerView]:
        return iter(self._by_silence.values())

    def join(self, view: WorkerView) -> None:
        """Take in a worker, in place of one of the same name that is not live any more."""
        known = self._views.get(view.worker)
        if known is not None and known.epoch != view.epoch:
            former = [each for each in self._former.get(view.worker, ()) if each.epoch != view.epoch]
            self._former[view.worker] = deque([*former, known.address], maxlen=FORMER)
        self._views[view.worker] = view
        self._by_silence[view.worker] = view
        if not view.draining:
            self.policies[view.role].add(view)
        self._note_longest()

    def drain(self, view: WorkerView) -> None:
        """Have nothing placed on ``view``."""
        view.draining, view.idle_reports = True, 0
        self.policies[view.role].remove(view)

    def call_off(self, view: WorkerView, detail: str) -> None:
        """``view`` keeps its role, and is not draining any more."""
        view.draining, view.becoming, view.called_off = False, None, detail
        view.moving.clear()
        if view.alive:
            self.policies[view.role].add(view)

    def undrain(self, view: WorkerView) -> None:
        """Have requests placed on ``view`` again."""
        view.draining, view.becoming = False, None
        view.moving.clear()
        self.policies[view.role].add(view)

    def change_role(self, view: WorkerView, role: Role) -> None:
        """``view`` does something else from now on; nothing of what it did is left."""
        self.policies[view.role].remove(view)
        view.role = role
        self.undrain(view)
        self._note_longest()

    def _note_longest(self) -> None:
        self._longest = {
            role: max((v.max_model_len for v in self._views.values() if v.role is role), default=0) for role in Role
        }

    def heard(self, view: WorkerView) -> None:
        self._by_silence.move_to_end(view.worker)

    def silent(self, timeout: float, now: float) -> list[WorkerView]:
        """Those that must have died, or hang."""
        late = []
        for view in self._by_silence.values():
            if view.heard + timeout > now:
                break
            if view.deadline(timeout) <= now:
                late.append(view)
        return late

    def stood_still(self, seconds: float, now: float) -> None:
        """For so long nobody could be heard."""
        for view in self._by_silence.values():
            view.heard = min(now, view.heard + seconds)

    def leave(self, view: WorkerView) -> None:
        view.alive = False
        del self._by_silence[view.worker]
        self.policies[view.role].remove(view)

    def most_silent(self) -> WorkerView | None:
        return next(iter(self._by_silence.values()), None)

    def has_live(self, role: Role) -> bool:
        return len(self.policies[role]) > 0

    def is_last(self, view: WorkerView) -> bool:
        """Whether no other worker of its role can be chosen."""
        policy = self.policies[view.role]
        return len(policy) == (view in policy)

    def knows(self, role: Role) -> bool:
        """Whether a worker of this role ever registered."""
        return role in self._longest and self._longest[role] > 0

    def longest(self, role: Role) -> int:
        """Tokens of the longest sequence that any worker of this role takes, live or not."""
        return self._longest.get(role, 0)

    def check_integrity(self) -> None:
        for view in self._views.values():
            assert view.alive == (view.worker in self._by_silence), f"{view.worker}: alive is {view.alive}"
            placeable = view.alive and not view.draining
            assert placeable == (view in self.policies[view.role]), f"{view.worker} and its policy disagree"
            assert not (view.alive and view.dead_for_good), f"{view.worker} lives after its death"
        heard = [view.heard for view in self._by_silence.values()]
        assert heard == sorted(heard), "members are not in the order of their silence"
        chosen_from = sum(not view.draining for view in self._by_silence.values())
        assert sum(map(len, self.policies.values())) == chosen_from, "a policy holds a lost worker"
