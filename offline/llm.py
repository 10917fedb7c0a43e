"""A model in this process: ``LLM`` for scripts, ``AsyncLLM`` for programs on asyncio.

1. A prompt is checked, tokenised and made into sequences by the gateway's own planner.
2. They run on an engine in a thread (``engine_hub.py``), or, given a topology, on its workers as threads
   (``relay_hub.py``).
3. Tokens become text and stop strings are found by the gateway's own ``Choice``.
"""

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from engine.engine import Engine
from engine.models.config import ModelConfig
from engine.weights import resolve_model
from gateway.choice import Choice
from gateway.core.errors import InvalidRequest, Unavailable
from gateway.core.limits import Limits
from gateway.core.stop_strings import StopStrings
from gateway.hub import Listener, Order
from gateway.metrics import Metrics
from gateway.orders import Plan, Planner
from gateway.tokenization import Tokenizer
from offline.engine_hub import EngineHub
from offline.outputs import RequestOutput, Sample, by_position
from offline.params import MODEL, SamplingParams

if TYPE_CHECKING:
    from cluster.topology import Topology

T = TypeVar("T")
Prompt = str | list[int]
Messages = list[dict[str, Any]]
CLOSED = "this LLM is closed"
UNBOUNDED = Limits(max_sequences_per_request=1 << 20, max_sequences=1 << 40)
"""Nobody else's requests could be harmed."""


class Backend(Protocol):
    """What runs sequences."""

    def open(self, orders: Iterable[tuple[Order, Listener]]) -> list[Any]: ...
    def cancel(self, running: Any) -> None: ...
    async def close(self) -> None: ...


class AsyncLLM:
    """``await AsyncLLM.load(model)``, then ``generate`` as often and as many at once as you like; ``close`` at the end.

    Lives on the event loop that loaded it.
    """

    def __init__(self, tokenizer: Tokenizer, backend: Backend, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._backend = backend
        self._planner = Planner(tokenizer, MODEL, max_model_len, UNBOUNDED)
        self._max_model_len = max_model_len
        self._metrics = Metrics()
        self._under_way: dict[asyncio.Event, tuple[list[Sample], list[Any]]] = {}
        self._closed = False

    @classmethod
    async def load(
        cls, model: str | Path | None = None, *, topology: "str | Path | Topology | None" = None, **engine: Any
    ) -> Self:
        """``model``: a folder, or a Hugging Face id; not needed with a ``topology``, whose model it replaces.

        ``engine``: options of ``engine.engine.Engine`` (``dtype``, ``kv_bytes``, ``max_model_len``, ``max_num_seqs``,
        ...); a topology has its own. Raises ``ModelError`` or ``TopologyError`` with what to do.
        """
        if topology is None:
            if model is None:
                raise ValueError("give a model: a folder or a Hugging Face id")
            folder = resolve_model(str(model))
            ModelConfig.from_folder(folder)  # says soonest, and best, what is wrong with a folder
            tokenizer = Tokenizer(folder)
            made = await asyncio.to_thread(lambda: Engine(folder, **engine))
            return cls(tokenizer, EngineHub(made), made.max_model_len)
        if engine:
            raise ValueError(f"with a topology, these belong in it: {', '.join(engine)}")
        from cluster.topology import Topology  # heavy, and only needed here
        from offline.relay_hub import RelayHub, relay_plan

        chosen = topology if isinstance(topology, Topology) else Topology.load(Path(topology))
        if model is not None:
            chosen = chosen.with_overrides({"model": str(model)})
        plan = relay_plan(chosen)
        return cls(Tokenizer(plan.model), await RelayHub(plan).start(), plan.max_model_len)

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncIterator[RequestOutput]:
        """What has come so far, each time that something came; the last one is ``finished``.

        Leaving the iteration early stops the generation. ``ValueError`` for what cannot be generated, ``RuntimeError``
        after ``close``, and ``gateway.core.errors.Unavailable`` where ``close`` or a dead engine cuts it short.
        """
        asked = _asked(params)
        room = self._max_model_len - (len(prompt) if isinstance(prompt, list) else 0)
        plan = self._plan(lambda: self._planner.completion(self._completion(asked, prompt, room)))
        async for output in self._run(plan, asked):
            yield output

    async def chat(self, messages: Messages, params: SamplingParams | None = None) -> AsyncIterator[RequestOutput]:
        """The same for a conversation, by the model's chat template."""
        asked = _asked(params)
        plan = self._plan(lambda: self._planner.chat(asked.chat(messages)))
        async for output in self._run(plan, asked):
            yield output

    async def close(self) -> None:
        """End what still runs with an error, and let go of the model; harmless twice."""
        if self._closed:
            return
        self._closed = True
        for samples, running in self._under_way.values():
            for sample, each in zip(samples, running, strict=True):
                if not sample.over:
                    sample.failed(Unavailable(CLOSED))
                self._backend.cancel(each)
        await self._backend.close()

    def _completion(self, asked: SamplingParams, prompt: Prompt, room: int) -> Any:
        if asked.max_tokens is None and isinstance(prompt, str):
            room -= len(self._tokenizer.encode(prompt, add_special_tokens=True))
        return asked.completion(prompt, room=max(1, room))

    def _plan(self, make: Callable[[], Plan]) -> Plan:
        try:
            return make()
        except InvalidRequest as error:
            named = f"{error.param}: " if error.param and error.param not in error.message else ""
            raise ValueError(f"{named}{error.message}") from error

    async def _run(self, plan: Plan, asked: SamplingParams) -> AsyncIterator[RequestOutput]:
        if self._closed:
            raise RuntimeError(CLOSED)
        changed = asyncio.Event()
        prompt = plan.prompts[0]
        samples = [self._sample(plan, index, changed) for index in range(plan.n)]
        sampling = list(plan.sampling)
        if asked.prompt_logprobs is not None:  # a prompt is scored once, by its first sample
            sampling[0] = dataclasses.replace(sampling[0], prompt_logprobs=asked.prompt_logprobs)
        orders = [Order(prompt=prompt.packed, sampling=params) for params in sampling]
        running = self._backend.open(zip(orders, samples, strict=True))
        self._under_way[changed] = samples, running
        try:
            finished = False
            scored = None
            while not finished:
                await changed.wait()
                changed.clear()
                for sample in samples:
                    if sample.error is not None:
                        raise sample.error
                finished = all(sample.over for sample in samples)
                scores = samples[0].prompt_logprobs
                if scored is None and scores is not None:
                    scored = [None, *by_position(prompt.tokens[1:], scores, self._decoded)]
                outputs = [sample.output() for sample in samples]
                yield RequestOutput(prompt.text, prompt.tokens, scored, outputs, finished)
        finally:
            del self._under_way[changed]
            if not self._closed:
                for each in running:
                    self._backend.cancel(each)

    def _sample(self, plan: Plan, index: int, changed: asyncio.Event) -> Sample:
        choice = Choice(
            index,
            self._tokenizer.detokenizer(plan.prompts[0].tokens),
            StopStrings(plan.stops, include=plan.include_stop),
            include_stop=plan.include_stop,
            logprobs=False,
            echo=None,
            is_first=index == 0,
            arrived=asyncio.get_running_loop().time(),
            changed=changed.set,
            metrics=self._metrics,
        )
        return Sample(choice, self._decoded, logprobs=plan.logprobs)

    def _decoded(self, token: int) -> str:
        return self._tokenizer.token_text(token)[0]


class LLM:
    """The same for scripts: calls return when all is generated. A context manager; ``close`` does as well."""

    def __init__(
        self, model: str | Path | None = None, *, topology: "str | Path | Topology | None" = None, **engine: Any
    ) -> None:
        """See ``AsyncLLM.load``."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llm", daemon=True)
        self._thread.start()
        self._llm: AsyncLLM | None = None
        try:
            self._llm = self._await(AsyncLLM.load(model, topology=topology, **engine))
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """All ``prompts`` (a text, a list of token ids, or a list of such), in the order given.

        ``sampling_params``: one for all, or one a prompt. ``use_tqdm``: a progress bar on a terminal.
        """
        llm = self._loaded()
        many: list[Any] = [prompts] if _is_one(prompts) else list(prompts)
        return self._all(
            [partial(llm.generate, each, params) for each, params in _paired(many, sampling_params)], use_tqdm
        )

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """The same for one conversation, or several."""
        llm = self._loaded()
        many: list[Any] = [messages] if messages and isinstance(messages[0], dict) else list(messages)
        paired = _paired(many, sampling_params)
        return self._all([partial(llm.chat, each, params) for each, params in paired], use_tqdm)

    def close(self) -> None:
        """Let go of the model; harmless twice."""
        if self._loop.is_closed():
            return
        if self._llm is not None:
            self._await(self._llm.close())
            self._llm = None
        self._await(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _loaded(self) -> AsyncLLM:
        if self._llm is None:
            raise RuntimeError(CLOSED)
        return self._llm

    def _all(self, streams: list[Callable[[], AsyncIterator[RequestOutput]]], show: bool) -> list[RequestOutput]:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        with Progress(console=console, disable=not (show and console.is_terminal), transient=True) as bar:
            task = bar.add_task("prompts", total=len(streams))

            async def last(stream: AsyncIterator[RequestOutput]) -> RequestOutput:
                async for output in stream:
                    final = output
                bar.advance(task)
                return final

            async def every() -> list[RequestOutput]:
                async with asyncio.TaskGroup() as tasks:
                    made = [tasks.create_task(last(stream())) for stream in streams]
                return [each.result() for each in made]

            return self._await(_plain(every()))

    def _await(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:  # also Ctrl-C: what still runs is stopped
            future.cancel()
            raise


async def _plain(work: Coroutine[Any, Any, T]) -> T:
    """The first error of several, as itself."""
    try:
        return await work
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


def _asked(params: SamplingParams | None) -> SamplingParams:
    if not isinstance(params, SamplingParams | None):
        raise ValueError(f"sampling_params must be of SamplingParams, got {_kind(params)}")
    return params or SamplingParams()


def _kind(value: Any) -> str:
    return type(value).__qualname__


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    if not isinstance(prompts, str | list | tuple):
        raise ValueError(f"prompts must be a text, a list of token ids, or a list of such; got {_kind(prompts)}")
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))


def _paired(many: list[T], params: Any) -> list[tuple[T, SamplingParams | None]]:
    if params is None or isinstance(params, SamplingParams):
        return [(each, params) for each in many]
    if not isinstance(params, list | tuple):
        raise ValueError(f"sampling_params must be of SamplingParams, or a list of one a prompt; got {_kind(params)}")
    if len(params) != len(many):
        raise ValueError(f"{len(many)} prompts for {len(params)} sampling parameters")
    return list(zip(many, params, strict=True))
