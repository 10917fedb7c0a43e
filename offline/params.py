"""What a script may ask of a generation, by the names and with the defaults of vLLM."""

from dataclasses import dataclass, fields
from typing import Any

import msgspec

from gateway.request_models import ChatRequest, CompletionRequest

MODEL = ""
"""A request's ``model`` where there is only one."""
_OWN = {"prompt_logprobs", "logprobs"}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to generate. ``temperature=0`` is greedy. Bounds are checked when they are used, against the model."""

    n: int = 1
    """Samples a prompt; they share the prompt's KV blocks. Sample ``i`` draws with ``seed + i``."""
    max_tokens: int | None = 16
    """None: as many as the context has room for."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 and -1 keep all tokens."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    """None: another one each time."""
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    """Likeliest alternatives to report with each token; 0 reports the token only."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt but the first."""
    logit_bias: dict[int, float] | None = None

    def completion(self, prompt: str | list[int], *, room: int) -> CompletionRequest:
        """The request that the HTTP API would get; ``ValueError`` names a field of a wrong type. ``room``: tokens that
        fit the context."""
        wanted = self._fields()
        if self.max_tokens is None:
            wanted["max_tokens"] = room
        made: CompletionRequest = _convert({"prompt": prompt, "logprobs": self.logprobs, **wanted}, CompletionRequest)
        return made

    def chat(self, messages: list[dict[str, Any]]) -> ChatRequest:
        """The same for a conversation."""
        asked = {} if self.logprobs is None else {"logprobs": True, "top_logprobs": self.logprobs}
        made: ChatRequest = _convert({"messages": messages, **asked, **self._fields()}, ChatRequest)
        return made

    def _fields(self) -> dict[str, Any]:
        wanted = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _OWN}
        if self.logit_bias is not None:
            wanted["logit_bias"] = {str(token): bias for token, bias in self.logit_bias.items()}
        return {"model": MODEL, **wanted}


def _convert(values: dict[str, Any], kind: type[Any]) -> Any:
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error
