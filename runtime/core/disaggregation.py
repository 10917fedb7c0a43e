"""Conditional disaggregation: who computes a prompt, a prefill worker or the worker that will decode it.

A hand-over is worth its shipping where the uncached tail of the prompt is long, or decode is busy. The rule is asked in
two places, each with what is known there: by the router before a request is placed, and by decode when a transfer is
opened and it has looked into its prefix cache. Either way a chunk of a local prefill is bounded as any other step is.
"""

from dataclasses import dataclass
from enum import StrEnum

from messages.common import DecisionCounts
from runtime.core.pace import MEASURED
from runtime.core.recent import Cost

CLEARLY = 0.8
"""Computing here must cost no more than this part of handing over: rates are of the past, and decode has others."""
MAX_LOCAL_PREFILL_LENGTH = 512


class Policy(StrEnum):
    AUTO = "auto"
    """By lengths, cache hits and measured rates."""
    ALWAYS = "always"
    """Every prompt is handed over."""
    NEVER = "never"
    """Decode workers do it all, as a colocated pool does: for comparison."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disaggregation:
    """The rule's settings."""

    policy: Policy = Policy.AUTO
    max_local_prefill_length: int = MAX_LOCAL_PREFILL_LENGTH
    """Tokens of a tail that decode computes itself at most, while a prefill worker can."""

    @property
    def without_prefill(self) -> bool:
        """Whether decode computes any prompt where no prefill worker can."""
        return self.policy is not Policy.ALWAYS


ALWAYS = Disaggregation(policy=Policy.ALWAYS)
"""Where nobody has asked for a rule."""


class Reason(StrEnum):
    """Why a prompt is computed where it is; the fields of ``DecisionCounts``."""

    ALWAYS = "always"
    """Handed over: the policy says so."""
    NEVER = "never"
    """Local: the policy says so."""
    TOO_LONG = "too_long"
    """Handed over: the tail is longer than decode may compute."""
    UNMEASURED = "unmeasured"
    """Handed over: the prefill worker, or its transfers, have not been measured yet."""
    DECODE_BUSY = "decode_busy"
    """Handed over: cheaper for this request, but those that decode runs would wait for it."""
    COSTS_MORE = "costs_more"
    """Handed over: a prefill worker is as quick, shipping included."""
    COSTS_LESS = "costs_less"
    """Local."""
    TOO_LATE = "too_late"
    """Handed over: when decode offered to compute the tail, the prefill worker had done it."""
    NO_PREFILL = "no_prefill"
    """Local: no prefill worker lives, or all that do have failed the request, or cannot reach decode."""

    @property
    def local(self) -> bool:
        return self in (Reason.NEVER, Reason.COSTS_LESS, Reason.NO_PREFILL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One prompt, and what is known of the two workers. A rate of 0 is not known."""

    num_tokens: int
    decode_cached: int = 0
    """Leading tokens whose KV the decode worker has."""
    prefill_cached: int = 0
    """The same of the prefill worker."""
    decode_rate: float
    """Prompt tokens a second. Where it is not known it is taken to be the prefill worker's, for both have the same
    engine: what comes of that measures it."""
    prefill_rate: float
    transfer_cost: Cost
    """Of KV bytes between the two, once the prompt is computed."""
    token_bytes: float
    """KV of one token, as it travels."""
    decode_running: int
    """Sequences that wait while decode computes a prompt."""
    decode_queued: int = 0
    """Tokens that decode has to compute before."""
    prefill_queued: int = 0


def decide(settings: Disaggregation, case: Case) -> Reason:
    """Who computes the prompt, and why. Costs are in seconds, added up over all sequences that wait for it."""
    if settings.policy is not Policy.AUTO:
        return Reason.ALWAYS if settings.policy is Policy.ALWAYS else Reason.NEVER
    tail = case.num_tokens - case.decode_cached
    if tail > settings.max_local_prefill_length:
        return Reason.TOO_LONG
    if not (case.prefill_rate > 0 and (case.transfer_cost.latency > 0 or case.transfer_cost.rate > 0)):
        return Reason.UNMEASURED
    alone = (case.decode_queued + max(tail, MEASURED)) / (case.decode_rate or case.prefill_rate)
    remote = (case.prefill_queued + max(case.num_tokens - case.prefill_cached, MEASURED)) / case.prefill_rate
    bearable = CLEARLY * (remote + case.transfer_cost.seconds(tail * case.token_bytes))
    if alone * (1 + case.decode_running) <= bearable:
        return Reason.COSTS_LESS
    return Reason.DECODE_BUSY if alone <= bearable else Reason.COSTS_MORE


class Decisions:
    """Decisions of one process, counted by reason."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(Reason, 0)

    def add(self, reason: Reason) -> None:
        self._counts[reason] += 1

    def counts(self) -> DecisionCounts:
        return DecisionCounts(**self._counts)
