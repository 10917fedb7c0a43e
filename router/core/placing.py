"""Where a request can run: the live workers that it needs, and who of them computes its prompt."""

from typing import NamedTuple

from messages.common import Role
from messages.gateway_to_router import PlacementWanted
from router.core.admission import expected_tokens, has_room
from router.core.membership import Members
from router.core.policies.take_over import stays
from router.core.views import WorkerView
from runtime.core.disaggregation import Case, Disaggregation, Reason, decide


class Found(NamedTuple):
    """Where a request can run now."""

    prefill: WorkerView | None
    """None where one worker does it all."""
    decode: WorkerView
    expected: int
    """Tokens to count on ``decode``."""
    reason: Reason | None
    """Why it is handed over, or not; None in a colocated pool."""


class Placing:
    """Chooses among ``members``, and changes nothing."""

    def __init__(self, members: Members, rule: Disaggregation, block_size: int) -> None:
        self._members = members
        self._rule = rule
        self._block_size = block_size
        self.settling = False
        """Whether what workers say of their load counts too."""

    @property
    def ready(self) -> bool:
        """Whether every role that a request needs has a live worker."""
        members = self._members
        if members.has_live(Role.COLOCATED):
            return True
        return members.has_live(Role.DECODE) and (members.has_live(Role.PREFILL) or self._rule.without_prefill)

    def find(self, wanted: PlacementWanted) -> Found | None:
        """Live workers of every role it needs, the one that decodes with room."""
        expected = expected_tokens(wanted, self._block_size)
        if self._members.has_live(Role.COLOCATED):
            worker = self.choose(Role.COLOCATED, wanted, expected)
            return None if worker is None else Found(None, worker, expected, None)
        best = self.choose(Role.PREFILL, wanted)
        if best is None and not self._rule.without_prefill:
            return None
        decode = self.choose(Role.DECODE, wanted, expected)
        if decode is None:
            return None
        if best is None or (best.worker in wanted.avoid and self._rule.without_prefill):
            return Found(None, decode, expected, Reason.NO_PREFILL)
        prefill = self._not_cut(wanted, self._previous(wanted, best) or best, decode)
        if prefill is None:
            return Found(None, decode, expected, Reason.NO_PREFILL)
        reason = self._decide(wanted, prefill, decode)
        return Found(None if reason.local else prefill, decode, expected, reason)

    def _not_cut(self, wanted: PlacementWanted, first: WorkerView, decode: WorkerView) -> WorkerView | None:
        """``first``, or else another prefill worker, whose KV may get through to ``decode`` for all that is known."""
        length = wanted.num_tokens + wanted.max_new_tokens

        def may(view: WorkerView) -> bool:
            return (view.worker, decode.worker) not in wanted.cut

        if may(first):
            return first
        policy = self._members.policies[Role.PREFILL]
        return policy.choose(
            lambda view: view.max_model_len >= length and view.worker not in wanted.avoid and may(view)
        )

    def _previous(self, wanted: PlacementWanted, best: WorkerView) -> WorkerView | None:
        """The prefill worker that has the KV of an earlier attempt, if this one should go there rather than to
        ``best``."""
        computed = wanted.computed
        view = None if computed is None else self._members.get(computed.worker, computed.epoch)
        if computed is None or view is None or view not in self._members.policies[Role.PREFILL]:
            return None
        fits = view.max_model_len >= wanted.num_tokens + wanted.max_new_tokens
        return view if fits and view.worker not in wanted.avoid and stays(view, best, computed) else None

    def _decide(self, wanted: PlacementWanted, prefill: WorkerView, decode: WorkerView) -> Reason:
        """Whether ``decode`` computes the prompt itself. Nothing is known here of its prefix cache."""
        computed = wanted.computed
        at_hand = computed is not None and (computed.worker, computed.epoch) == (prefill.worker, prefill.epoch)
        case = Case(
            num_tokens=wanted.num_tokens,
            prefill_cached=min(computed.num_tokens, wanted.num_tokens) if at_hand and computed is not None else 0,
            decode_rate=decode.prefill_rate,
            prefill_rate=prefill.prefill_rate,
            transfer_cost=prefill.transfer_cost,
            token_bytes=decode.token_bytes,
            decode_running=len(decode.requests),
            decode_queued=decode.prompt_tokens,
            prefill_queued=prefill.tokens,
        )
        return decide(self._rule, case)

    def choose(self, role: Role, wanted: PlacementWanted, expected: int | None = None) -> WorkerView | None:
        """``expected``: only a worker that has room for as many tokens."""
        policy, avoid, length = self._members.policies[role], wanted.avoid, wanted.num_tokens + wanted.max_new_tokens
        settling = self.settling
        room = None if expected is None else lambda view: has_room(view, expected, settling=settling)
        if avoid:
            other = policy.choose(lambda view: view.max_model_len >= length and view.worker not in avoid)
            if other is not None:  # worth waiting for
                return policy.choose(lambda view: view.max_model_len >= length and view.worker not in avoid, room)
        return policy.choose(lambda view: view.max_model_len >= length, room)

    def longest(self) -> int | None:
        """Tokens of the longest sequence that can be placed; None before workers of all roles needed are known."""
        members = self._members
        if members.knows(Role.COLOCATED):
            return members.longest(Role.COLOCATED)
        if members.knows(Role.PREFILL) and members.knows(Role.DECODE):
            return min(members.longest(Role.PREFILL), members.longest(Role.DECODE))
        return members.longest(Role.DECODE) if members.knows(Role.DECODE) and self._rule.without_prefill else None
