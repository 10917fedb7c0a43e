"""What a gateway takes on. Everything is bounded at the edge, before it costs anything."""

from dataclasses import dataclass

from gateway.core.errors import ContextExceeded, GatewayError, InvalidRequest, Overloaded


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    max_body_bytes: int = 8 << 20
    max_n: int = 128
    max_sequences_per_request: int = 256
    """Prompts times ``n``."""
    max_sequences: int = 1024
    """In flight in this gateway; further requests are told to come again."""
    max_stop_strings: int = 16
    max_stop_chars: int = 256
    """Of one stop string."""
    max_label_chars: int = 256
    """Of names and labels in a request."""
    max_messages: int = 4096
    retry_after: float = 1.0

    def admit(self, in_flight: int, wanted: int) -> GatewayError | None:
        """Why ``wanted`` more sequences cannot be taken now."""
        if in_flight + wanted > self.max_sequences:
            return Overloaded("too many requests are in flight", retry_after=self.retry_after)
        return None

    def check_fan_out(self, prompts: int, n: int) -> None:
        """Raises ``InvalidRequest`` where one request asks for too many sequences."""
        if not 1 <= n <= self.max_n:
            raise InvalidRequest(f"n must be in [1, {self.max_n}], got {n}", param="n")
        if prompts * n > self.max_sequences_per_request:
            most = self.max_sequences_per_request
            raise InvalidRequest(f"{prompts} prompts times n={n} are more than {most} sequences", param="prompt")

    def check_salt(self, salt: str | None) -> None:
        """Raises ``InvalidRequest`` for a salt that is empty, too long, or no plain text."""
        if salt is not None and not (1 <= len(salt) <= self.max_label_chars and salt.isprintable()):
            most = self.max_label_chars
            raise InvalidRequest(f"cache_salt must be 1 to {most} printable characters", param="cache_salt")

    def check_stop(self, stop: tuple[str, ...]) -> None:
        """Raises ``InvalidRequest`` for stop strings that are too many, too long or empty."""
        if len(stop) > self.max_stop_strings:
            raise InvalidRequest(f"at most {self.max_stop_strings} stop strings are possible", param="stop")
        for text in stop:
            if not 1 <= len(text) <= self.max_stop_chars:
                raise InvalidRequest(f"a stop string has 1 to {self.max_stop_chars} characters", param="stop")


def max_new_tokens(
    num_prompt_tokens: int, wanted: int | None, default: int | None, max_model_len: int, *, param: str
) -> int:
    """Tokens that a sequence may generate: as wanted, else ``default`` (None: all) as far as there is room.

    Raises ``ContextExceeded``, which names ``param``, where prompt and wanted tokens are more than the context.
    """
    room = max_model_len - num_prompt_tokens
    if room < (1 if wanted is None else 0):
        raise ContextExceeded(
            f"the prompt has {num_prompt_tokens} tokens, the context of the model {max_model_len}", param="prompt"
        )
    if wanted is None:
        return room if default is None else min(default, room)
    if wanted > room:
        raise ContextExceeded(
            f"{num_prompt_tokens} prompt tokens and {param}={wanted} exceed the context of {max_model_len} tokens",
            param=param,
        )
    return wanted
