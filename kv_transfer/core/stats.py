"""What a worker counts of its ends of hand-overs, for its reports."""

from dataclasses import dataclass, field

from msgspec import structs

from kv_transfer.core.trace import TransferTrace
from messages.common import AbortCounts, AbortReason, TransferCounts


@dataclass(slots=True)
class TransferStats:
    """All but the bytes, which are counted as they move."""

    seconds: float = 0.0
    hidden_bytes: int = 0
    repairs: int = 0
    quarantine_seconds: float = 0.0
    """Of those that are over."""
    aborts: dict[AbortReason, int] = field(default_factory=lambda: dict.fromkeys(AbortReason, 0))

    def sent(self, trace: TransferTrace, aborted: AbortReason | None) -> None:
        """A sender's session has ended; ``aborted``: why it did not come to its ack."""
        self.repairs += trace.repairs
        if aborted is not None:
            self.aborts[aborted] += 1
        elif trace.pushes:
            self.seconds += trace.last_byte - trace.first_push
            self.hidden_bytes += trace.hidden_bytes

    def received(self, repairs: int, seconds: float, aborted: AbortReason | None) -> None:
        """A receiver's session has ended, ``seconds`` after its promise."""
        self.repairs += repairs
        if aborted is not None:
            self.aborts[aborted] += 1
        else:
            self.seconds += seconds

    def counts(self, *, in_flight: int, quarantined_blocks: int = 0, quarantine_seconds: float = 0.0) -> TransferCounts:
        """``quarantine_seconds``: of those that are not over."""
        return TransferCounts(
            in_flight=in_flight,
            seconds=self.seconds,
            hidden_bytes=self.hidden_bytes,
            repairs=self.repairs,
            quarantined_blocks=quarantined_blocks,
            quarantine_seconds=self.quarantine_seconds + quarantine_seconds,
            aborts=AbortCounts(**{reason.value: count for reason, count in self.aborts.items()}),
        )


def both(sender: TransferCounts, receiver: TransferCounts) -> TransferCounts:
    """Of a worker that is either."""
    ends = structs.asdict(sender), structs.asdict(receiver)
    counted = {name: ends[0][name] + ends[1][name] for name in ends[0] if name != "aborts"}
    aborts = {name: count + getattr(receiver.aborts, name) for name, count in structs.asdict(sender.aborts).items()}
    return TransferCounts(**counted, aborts=AbortCounts(**aborts))
