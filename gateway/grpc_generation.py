"""What both gRPC services do with a request that is understood: plan it, run its sequences, take what comes."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from gateway.answers import Exchange
from gateway.choice import Choice, Echo, Piece
from gateway.core.stop_strings import StopStrings
from gateway.detokenizer import Detokenizer
from gateway.grpc_guard import CALLER
from gateway.hub import Order
from gateway.openai_api import SHORT_BODY, Api
from gateway.orders import Plan
from messages.ids import RequestId

T = TypeVar("T")
News = list[tuple[Choice, Piece]]


class Silent:
    """A ``Detokenizer`` where nobody reads the text."""

    def step(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


@dataclass(frozen=True, slots=True)
class Generator:
    """Of one gateway; lives on its event loop."""

    api: Api

    async def plan(self, size: int, make: Callable[[], T]) -> T:
        """``make()``, which decides what is to be run: in a thread if the request has many bytes (``size``)."""
        if size <= SHORT_BODY:
            return make()
        return await asyncio.get_running_loop().run_in_executor(self.api.executor, make)

    @contextmanager
    def exchange(self) -> Iterator[Exchange]:
        """Whatever it has opened ends with it."""
        exchange = Exchange(self.api.hub)
        try:
            yield exchange
        finally:
            exchange.close()

    def open(
        self,
        exchange: Exchange,
        plan: Plan,
        *,
        arrived: float,
        detokenizer: Callable[[list[int]], Detokenizer],
        scored: bool = False,
    ) -> None:
        """Run ``plan`` for the caller. Raises ``GatewayError`` where it is too much now. ``detokenizer``: for what
        follows a prompt. ``scored``: the first piece of each choice begins with the prompt's log-probabilities."""
        id, tenant = secrets.token_hex(16), CALLER.get().name
        orders = [
            Order(
                prompt=plan.prompts[i // plan.n].packed,
                sampling=sampling,
                request=RequestId(f"{id}-{i}"),
                tenant=tenant,
                cache_salt=plan.cache_salt,
            )
            for i, sampling in enumerate(plan.sampling)
        ]
        echoes = [Echo("", prompt.tokens, logprobs=True) if scored else None for prompt in plan.prompts]
        choices = [
            Choice(
                index,
                detokenizer(plan.prompts[index // plan.n].tokens),
                StopStrings(plan.stops, include=plan.include_stop),
                include_stop=plan.include_stop,
                logprobs=plan.logprobs,
                echo=echoes[index // plan.n],
                is_first=index % plan.n == 0,
                arrived=arrived,
                changed=exchange.changed,
                metrics=self.api.metrics,
            )
            for index in range(len(plan.sampling))
        ]
        exchange.open(orders, choices)

    async def news(self, exchange: Exchange, *, even_without_text: bool) -> AsyncGenerator[News]:
        """What has come since the last time, until there is no more. Raises the ``GatewayError`` that ends it."""
        while True:
            error, over = exchange.first_error(), exchange.over
            fresh = [choice for choice in exchange.choices if choice.fresh]
            news = _taken(fresh, even_without_text=even_without_text)
            if news:
                yield news
            if error is not None:
                raise error
            if over:
                return
            await exchange.wait()

    async def whole(self, exchange: Exchange) -> News:
        """All of it, one piece a choice. Raises the ``GatewayError`` that ends it."""
        while not exchange.over and exchange.first_error() is None:
            await exchange.wait()
        error = exchange.first_error()
        if error is not None:
            raise error
        return _taken(exchange.choices, even_without_text=True)


def _taken(choices: list[Choice], *, even_without_text: bool) -> News:
    taken = [(choice, choice.take(even_without_text=even_without_text)) for choice in choices]
    return [(choice, piece) for choice, piece in taken if piece is not None]
