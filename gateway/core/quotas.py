"""What one tenant may ask of one gateway, and what it has asked for."""

from dataclasses import dataclass

from gateway.core.errors import GatewayError, RateLimited


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """None: as much as there is."""

    max_concurrent_requests: int | None = None
    """Sequences in flight."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Of prompts and answers together."""


class _Bucket:
    """Holds a minute's worth and fills evenly; may be overdrawn, and is then empty for longer."""

    def __init__(self, per_minute: int, now: float) -> None:
        self._most = float(per_minute)
        self._left = self._most
        self._at = now

    def wait(self, now: float) -> float:
        """Seconds until one can be taken."""
        self._left = min(self._most, self._left + (now - self._at) * self._most / 60)
        self._at = now
        return max(0.0, 1 - self._left) * 60 / self._most

    def take(self, count: int) -> None:
        self._left -= count


class Quota:
    """One tenant's. ``now`` in seconds never goes back."""

    def __init__(self, allowance: Allowance, now: float, *, retry_after: float) -> None:
        """``retry_after``: seconds after which a tenant with too much in flight shall ask again."""
        self._most = allowance.max_concurrent_requests
        self._retry_after = retry_after
        self._requests = None if allowance.requests_per_minute is None else _Bucket(allowance.requests_per_minute, now)
        self._tokens = None if allowance.tokens_per_minute is None else _Bucket(allowance.tokens_per_minute, now)
        self.in_flight = 0
        """Sequences."""

    def crowded(self, sequences: int) -> GatewayError | None:
        """Why there is no room for so many more."""
        if self._most is None or self.in_flight + sequences <= self._most:
            return None
        text = f"more than {self._most} sequences of this tenant would be in flight"
        return RateLimited(text, retry_after=self._retry_after)

    def refusal(self, sequences: int, now: float) -> GatewayError | None:
        """Why a request of so many sequences cannot be taken now."""
        crowded = self.crowded(sequences)
        if crowded is not None:
            return crowded
        for bucket, what in ((self._requests, "requests"), (self._tokens, "tokens")):
            wait = 0.0 if bucket is None else bucket.wait(now)
            if wait > 0:
                return RateLimited(f"this tenant has used up its {what} of this minute", retry_after=wait)
        return None

    def begin(self, prompt_tokens: int) -> None:
        """A request is taken."""
        if self._requests is not None:
            self._requests.take(1)
        self.use(prompt_tokens)

    def use(self, tokens: int) -> None:
        if self._tokens is not None:
            self._tokens.take(tokens)
