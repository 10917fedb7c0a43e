"""From a request's fields to sequences that can run: every bound checked, prompts as token ids.

``InvalidRequest`` names the parameter. What passes here will be answered.
"""

import secrets
from dataclasses import dataclass
from typing import Any

from gateway.core.errors import ContextExceeded, InvalidRequest, ModelNotFound
from gateway.core.limits import Limits, max_new_tokens
from gateway.request_models import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    SamplingRequest,
    StreamOptions,
    check_message,
)
from gateway.tokenization import Tokenizer
from messages.codec import pack_tokens
from messages.sampling import MAX_LOGIT_BIAS, MAX_LOGPROBS, SamplingParams, seed_of_sample

DEFAULT_COMPLETION_TOKENS = 16
CHAT_ROLES = ("system", "developer", "user", "assistant")
TEMPLATE_SWITCHES = ("enable_thinking", "thinking")
"""The template variables that a request may set."""


@dataclass(frozen=True, slots=True)
class Prompt:
    text: str | None
    """None where the client sent token ids."""
    tokens: list[int]
    packed: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One request, ready to run. Choice ``i`` continues prompt ``i // n``."""

    prompts: list[Prompt]
    sampling: list[SamplingParams]
    """One a choice."""
    num_prompt_tokens: int
    """Of all prompts together."""
    n: int
    cache_salt: str
    stops: tuple[str, ...]
    include_stop: bool
    echo: bool
    logprobs: bool
    stream: bool
    include_usage: bool
    resumable: bool
    return_token_ids: bool


class Planner:
    """Thread-safe: long prompts are planned off the event loop."""

    def __init__(self, tokenizer: Tokenizer, model: str, max_model_len: int, limits: Limits) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._max_model_len = max_model_len
        self._limits = limits

    def completion(
        self,
        request: CompletionRequest,
        *,
        default: int | None = DEFAULT_COMPLETION_TOKENS,
        prompt_logprobs: int | None = None,
    ) -> Plan:
        """``default``: tokens where the request does not say how many; None: all that there is room for.
        ``prompt_logprobs``: wanted of each prompt token, whether it is repeated or not."""
        self._check_model(request.model)
        n = 1 if request.n is None else request.n
        if request.best_of is not None and request.best_of != n:
            raise InvalidRequest("best_of other than n is not supported", param="best_of")
        prompts = [request.prompt] if _is_single(request.prompt) else request.prompt
        self._limits.check_fan_out(len(prompts), n)
        if not prompts:
            raise InvalidRequest("the prompt is empty", param="prompt")
        special = request.add_special_tokens is not False
        encoded = [self._prompt(prompt, add_special_tokens=special) for prompt in prompts]
        echo = bool(request.echo)
        if request.max_tokens == 0 and not echo:
            raise InvalidRequest("max_tokens must be at least 1, or 0 with echo", param="max_tokens")
        logprobs = _logprobs("logprobs", request.logprobs)
        scores = _logprobs("prompt_logprobs", prompt_logprobs)
        return self._plan(
            request,
            encoded,
            n,
            length="max_tokens",
            wanted=request.max_tokens,
            default=default,
            logprobs=logprobs,
            prompt_logprobs=logprobs if echo else scores,
            echo=echo,
        )

    def chat(self, request: ChatRequest) -> Plan:
        self._check_model(request.model)
        n = 1 if request.n is None else request.n
        self._limits.check_fan_out(1, n)
        if request.top_logprobs is not None and not request.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        wanted, length = request.max_completion_tokens, "max_completion_tokens"
        if wanted is None:
            wanted, length = request.max_tokens, "max_tokens"
        if wanted is not None and wanted < 1:
            raise InvalidRequest(f"{length} must be at least 1", param=length)
        logprobs = _logprobs("top_logprobs", request.top_logprobs or 0) if request.logprobs else None
        text = self._render(request)
        # The template writes special tokens itself.
        prompt = self._prompt(text, add_special_tokens=False)
        return self._plan(
            request,
            [prompt],
            n,
            length=length,
            wanted=wanted,
            default=None,
            logprobs=logprobs,
            prompt_logprobs=None,
            echo=False,
        )

    def _check_model(self, model: str) -> None:
        if model != self._model:
            raise ModelNotFound(f"the model {model[:100]!r} does not exist", param="model")

    def _render(self, request: ChatRequest) -> str:
        if not self._tokenizer.has_chat_template:
            raise InvalidRequest("the model has no chat template; use /v1/completions", param="messages")
        if not 1 <= len(request.messages) <= self._limits.max_messages:
            raise InvalidRequest(f"messages: 1 to {self._limits.max_messages} are possible", param="messages")
        options: dict[str, Any] = {
            "add_generation_prompt": request.add_generation_prompt is not False,
            "continue_final_message": bool(request.continue_final_message),
        }
        if request.continue_final_message:
            if request.add_generation_prompt:
                raise InvalidRequest("continue_final_message excludes add_generation_prompt", param="messages")
            options["add_generation_prompt"] = False
        for name, value in (request.chat_template_kwargs or {}).items():
            if name not in TEMPLATE_SWITCHES or not isinstance(value, bool):
                allowed = ", ".join(TEMPLATE_SWITCHES)
                raise InvalidRequest(f"only these may be set, to a bool: {allowed}", param="chat_template_kwargs")
            options[name] = value
        messages = [self._message(i, message) for i, message in enumerate(request.messages)]
        if self._tokenizer.surely_longer("".join(message["content"] for message in messages), self._max_model_len):
            raise self._too_long()
        return self._tokenizer.render_chat(messages, options)

    def _message(self, i: int, message: ChatMessage) -> dict[str, str]:
        check_message(message, f"messages[{i}]")
        if message.role not in CHAT_ROLES:
            roles = ", ".join(CHAT_ROLES)
            raise InvalidRequest(f"the role must be one of {roles}", param=f"messages[{i}].role")
        if message.content is None:
            raise InvalidRequest("a message needs content", param=f"messages[{i}].content")
        rendered = {"role": message.role, "content": _text_of(message.content, f"messages[{i}].content")}
        if message.name is not None:
            if len(message.name) > self._limits.max_label_chars:
                raise InvalidRequest("the name is too long", param=f"messages[{i}].name")
            rendered["name"] = message.name
        return rendered

    def _prompt(self, prompt: Any, *, add_special_tokens: bool) -> Prompt:
        text = None
        if isinstance(prompt, str):
            text = prompt
            if self._tokenizer.surely_longer(text, self._max_model_len):
                raise self._too_long()
            tokens = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        elif isinstance(prompt, list):
            tokens = prompt
            if len(tokens) > self._max_model_len:
                raise self._too_long()
            for token in tokens:
                if type(token) is not int or not 0 <= token < self._tokenizer.vocab_size:
                    most = self._tokenizer.vocab_size
                    raise InvalidRequest(f"token ids must be integers in [0, {most})", param="prompt")
        else:
            raise InvalidRequest(
                "a prompt is a string, a list of strings, of token ids, or of such lists", param="prompt"
            )
        if not tokens:
            raise InvalidRequest("the prompt is empty", param="prompt")
        return Prompt(text, tokens, pack_tokens(tokens))

    def _too_long(self) -> ContextExceeded:
        return ContextExceeded(f"the prompt is longer than the context of {self._max_model_len} tokens", param="prompt")

    def _plan(
        self,
        request: SamplingRequest,
        prompts: list[Prompt],
        n: int,
        *,
        length: str,
        wanted: int | None,
        default: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
        echo: bool,
    ) -> Plan:
        """``length``: the name of the parameter that said ``wanted``. A prompt is scored once, by its first choice."""
        if wanted is not None and wanted < 0:
            raise InvalidRequest(f"{length} must not be negative", param=length)
        if request.user is not None and len(request.user) > self._limits.max_label_chars:
            raise InvalidRequest("user is too long", param="user")
        self._limits.check_salt(request.cache_salt)
        if request.stream_options is not None and not request.stream:
            raise InvalidRequest("stream_options needs stream to be true", param="stream_options")
        options = request.stream_options or StreamOptions()
        stops = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
        self._limits.check_stop(stops)
        fields = self._sampling_fields(request)
        fields["logprobs"] = logprobs
        sampling = []
        for prompt in prompts:
            most = max_new_tokens(len(prompt.tokens), wanted, default, self._max_model_len, param=length)
            for child in range(n):
                seed = secrets.randbits(63) if request.seed is None else seed_of_sample(request.seed, child)
                scores = prompt_logprobs if child == 0 else None
                own = {"max_tokens": most, "seed": seed, "prompt_logprobs": scores}
                sampling.append(_sampling_params(fields | own))
        return Plan(
            prompts=prompts,
            sampling=sampling,
            num_prompt_tokens=sum(len(prompt.tokens) for prompt in prompts),
            n=n,
            cache_salt=request.cache_salt or "",
            stops=stops,
            include_stop=bool(request.include_stop_str_in_output),
            echo=echo,
            logprobs=logprobs is not None,
            stream=bool(request.stream),
            include_usage=options.include_usage,
            resumable=options.resumable,
            return_token_ids=bool(request.return_token_ids),
        )

    def _sampling_fields(self, request: SamplingRequest) -> dict[str, Any]:
        """The fields that are set, all but those of length, seed and log-probabilities."""
        names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        fields = {name: value for name in names if (value := getattr(request, name)) is not None}
        if request.top_k is not None:
            fields["top_k"] = 0 if request.top_k == -1 else request.top_k
        fields["ignore_eos"] = bool(request.ignore_eos)
        vocab = self._tokenizer.vocab_size
        stop_ids = tuple(request.stop_token_ids or ())
        if not all(0 <= token < vocab for token in stop_ids):
            raise InvalidRequest(f"stop_token_ids must be in [0, {vocab})", param="stop_token_ids")
        fields["stop_token_ids"] = stop_ids
        fields["logit_bias"] = _logit_bias(request.logit_bias or {}, vocab)
        return fields


def _is_single(prompt: str | list[Any]) -> bool:
    return isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))


def _logprobs(name: str, count: int | None) -> int | None:
    if count is not None and not 0 <= count <= MAX_LOGPROBS:
        raise InvalidRequest(f"{name} must be in [0, {MAX_LOGPROBS}], got {count}", param=name)
    return count


def _logit_bias(biases: dict[str, float], vocab_size: int) -> dict[int, float]:
    if len(biases) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"logit_bias has at most {MAX_LOGIT_BIAS} entries", param="logit_bias")
    parsed = {}
    for key, bias in biases.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) < vocab_size):
            raise InvalidRequest(f"the keys of logit_bias are token ids in [0, {vocab_size})", param="logit_bias")
        parsed[int(key)] = bias
    return parsed


def _sampling_params(fields: dict[str, Any]) -> SamplingParams:
    try:
        return SamplingParams(**fields)
    except ValueError as error:  # out of bounds; the message begins with the parameter's name
        message = str(error)
        named = [name for name in fields if name in message.split(" must be ")[0]]
        raise InvalidRequest(message, param=named[0] if named else None) from error


def _text_of(content: str | list[dict[str, Any]], param: str) -> str:
    """Nothing but text is taken, and nothing is ever fetched."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        if part.get("type") != "text" or part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise InvalidRequest(
                'content parts other than {"type": "text", "text": ...} are not supported', param=param
            )
        texts.append(part["text"])
    return "\n".join(texts)
