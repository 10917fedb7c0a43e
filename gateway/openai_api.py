"""The HTTP API: OpenAI's completions, chat completions and models; health, readiness, status, metrics.

A request's life here: read the body within its bounds -> decode it strictly -> plan its sequences -> hand them to the
hub -> send what comes back, as it comes.
"""

import asyncio
import importlib.metadata
import logging
import re
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import openapi
from gateway.answers import Answer, ErrorAnswer, EventStream, Exchange, WholeAnswer
from gateway.auth import Keyring
from gateway.body import Unread, read_body
from gateway.choice import Choice, Echo
from gateway.config import GatewayConfig
from gateway.core.chrome_trace import chrome_trace
from gateway.core.errors import GatewayError, InternalError, InvalidRequest, MethodNotAllowed, PathNotFound
from gateway.core.positions import START, Cursor, at_end, parse
from gateway.core.stop_strings import StopStrings
from gateway.description import describe, description_of, plan_of
from gateway.guard import Guard
from gateway.hub import Hub, Order
from gateway.metrics import Metrics
from gateway.orders import Plan, Planner, Prompt
from gateway.rendering import ChatRenderer, CompletionRenderer, Renderer, encode
from gateway.request_models import chat_request, completion_request
from gateway.streams import Stream, Streams, not_found
from gateway.tokenization import Tokenizer
from messages.common import Part
from messages.ids import RequestId
from messages.router_to_gateway import ClusterState

log = logging.getLogger(__name__)

SHORT_BODY = 4096
"""Bytes of a request that is planned on the event loop; longer ones are planned in a thread."""
TRACE_HEADER = "x-baton-trace"
"""1: say with the last chunk who ran the request."""
REQUEST_ID = re.compile(r"[0-9a-f]{32}")
TIMELINE = "timeline"
"""The header's value that has everyone note what is done for the request when: ``/traces/{x-request-id}``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """What the routes need."""

    config: GatewayConfig
    hub: Hub
    streams: Streams
    tokenizer: Tokenizer
    planner: Planner
    metrics: Metrics
    executor: Executor
    max_model_len: int

    async def complete(self, request: Request) -> Answer:
        return await self._generate(request, completion_request, self.planner.completion, CompletionRenderer)

    async def chat(self, request: Request) -> Answer:
        return await self._generate(request, chat_request, self.planner.chat, ChatRenderer)

    async def _generate(
        self,
        request: Request,
        decode: Callable[[bytes], Any],
        plan_for: Callable[[Any], Plan],
        renderer: type[Renderer],
    ) -> Answer:
        loop = asyncio.get_running_loop()
        arrived = loop.time()
        body = await read_body(request, self.config.limits.max_body_bytes, self.config.body_timeout)

        def planned() -> Plan:
            return plan_for(decode(body))

        plan = planned() if len(body) <= SHORT_BODY else await loop.run_in_executor(self.executor, planned)
        exchange = Exchange(self.hub)
        id, asked = request.state.request_id, request.headers.get(TRACE_HEADER, "")
        tenant = request.state.tenant.name
        owned = _owned(id, tenant)
        created, trace = int(time.time()), asked in ("1", TIMELINE)
        render = self._renderer(renderer, id, plan, created=created, trace=trace)
        orders = [
            Order(
                prompt=(prompt := plan.prompts[i // plan.n]).packed,
                sampling=sampling,
                request=_sequence(owned, i),
                tenant=tenant,
                cache_salt=plan.cache_salt,
                description=describe(plan, prompt, chat=renderer is ChatRenderer, created=created, trace=trace),
                trace=id if asked == TIMELINE else "",
            )
            for i, sampling in enumerate(plan.sampling)
        ]
        exchange.open(orders, self._choices(plan, exchange, arrived=arrived))
        if not plan.stream:
            return WholeAnswer(exchange, render(), exchange.close)
        leave = exchange.close
        if plan.resumable:
            stream = Stream(owned, plan, render, exchange.relays, exchange)
            self.streams.add(stream)
            leave = partial(self.streams.leave, stream, exchange)
        return self._event_stream(plan, exchange, render(), leave)

    async def resume(self, request: Request, id: str) -> Response:
        """Read on in a stream, behind the event that the client has seen last."""
        id = id.removeprefix(CompletionRenderer.prefix).removeprefix(ChatRenderer.prefix)
        after = request.query_params.get("after", request.headers.get("last-event-id", ""))
        if at_end(after):
            return Response(status_code=204)  # has an EventSource stop asking
        tenant = request.state.tenant.name
        stream = await self.streams.find(_owned(id, tenant), partial(self._adopt, id, tenant, after))
        request.state.request_id = id
        cursor = parse(after, len(stream.relays))
        for relay, position in zip(stream.relays, cursor.choices, strict=True):
            if relay is None and not position.ended:
                raise not_found(id)
        exchange = Exchange(self.hub)
        self.streams.read(stream, exchange, cursor, partial(self._choices, stream.plan))
        leave = partial(self.streams.leave, stream, exchange)
        return self._event_stream(stream.plan, exchange, stream.renderer(), leave, cursor)

    async def _adopt(self, id: str, tenant: str, after: str) -> Stream:
        """The stream that another gateway has begun. Raises ``StreamNotFound`` where nobody has it."""
        if REQUEST_ID.fullmatch(id) is None:
            raise not_found(id)
        likely = min(after.count(",") + 1, self.config.limits.max_sequences_per_request)
        owned = _owned(id, tenant)
        relays = await self.hub.adopt([_sequence(owned, i) for i in range(likely)], tenant)
        sessions = {i: relay.session for i, relay in enumerate(relays) if relay is not None}
        description = description_of(next(iter(sessions.values()))) if sessions else None
        if description is None:
            self.hub.cancel_all(relays)
            raise not_found(id)
        more = [_sequence(owned, i) for i in range(likely, description.num_choices)]
        try:
            relays = [*relays[: description.num_choices], *await self.hub.adopt(more, tenant)]
            sessions = {i: relay.session for i, relay in enumerate(relays) if relay is not None}
            plan = plan_of(description, sessions)
        except GatewayError:
            self.hub.cancel_all(relays)  # their workers hear of nobody else now
            raise
        renderer = ChatRenderer if description.chat else CompletionRenderer
        render = self._renderer(renderer, id, plan, created=description.created, trace=description.trace)
        exchange = Exchange(self.hub)
        exchange.relays = relays
        stream = Stream(owned, plan, render, relays, exchange)
        self.streams.add(stream)
        self.streams.leave(stream, exchange)  # it is kept like any other until somebody reads it
        return stream

    def _renderer(
        self, kind: type[Renderer], id: str, plan: Plan, *, created: int, trace: bool
    ) -> Callable[[], Renderer]:
        """Makes fresh ones for an answer."""
        name = self.config.served_model_name
        return partial(kind, id, name, plan, self.tokenizer, created=created, trace=trace)

    def _event_stream(
        self,
        plan: Plan,
        exchange: Exchange,
        renderer: Renderer,
        leave: Callable[[], None],
        cursor: Cursor | None = None,
    ) -> EventStream:
        return EventStream(
            exchange,
            renderer,
            leave,
            include_usage=plan.include_usage and not (cursor is not None and cursor.usage),
            stall=self.config.client_stall,
            resumed=cursor is not None,
        )

    def _choices(
        self, plan: Plan, exchange: Exchange, cursor: Cursor | None = None, *, arrived: float = 0.0
    ) -> list[Choice]:
        """``cursor``: what the client has already, of an answer that is resumed."""
        echoes = [self._echo(prompt, plan) for prompt in plan.prompts]
        return [
            Choice(
                index,
                self.tokenizer.detokenizer(plan.prompts[index // plan.n].tokens),
                StopStrings(plan.stops, include=plan.include_stop),
                include_stop=plan.include_stop,
                logprobs=plan.logprobs,
                echo=echoes[index // plan.n],
                is_first=index % plan.n == 0,
                arrived=arrived,
                changed=exchange.changed,
                metrics=self.metrics,
                after=START if cursor is None else cursor.choices[index],
                resumed=cursor is not None,
            )
            for index in range(len(plan.sampling))
        ]

    def _echo(self, prompt: Prompt, plan: Plan) -> Echo | None:
        if not plan.echo:
            return None
        text = self.tokenizer.decode(prompt.tokens) if prompt.text is None else prompt.text
        return Echo(text, prompt.tokens, logprobs=plan.logprobs)

    def models(self) -> Response:
        return _json({"object": "list", "data": [self._model_card()]})

    def model(self, name: str) -> Response:
        if name != self.config.served_model_name:
            raise PathNotFound(f"the model {name[:100]!r} does not exist", param="model", code="model_not_found")
        return _json(self._model_card())

    def _model_card(self) -> dict[str, Any]:
        return {
            "id": self.config.served_model_name,
            "object": "model",
            "created": 0,
            "owned_by": "baton",
            "max_model_len": self.max_model_len,
        }

    def trace(self, request_id: str) -> Response:
        """Who did what when, in the format that Perfetto opens."""
        found = self.hub.traces.find(request_id)
        if found is None:
            text = f"no trace of {request_id[:100]!r} is kept; send {TRACE_HEADER}: {TIMELINE} with a request"
            raise PathNotFound(text, code="trace_not_found")
        return _json(chrome_trace(found, self.hub.traces.clock))

    def document(self) -> dict[str, Any]:
        return openapi.document(
            version=version(),
            model=self.config.served_model_name,
            vocab_size=self.tokenizer.vocab_size,
            max_model_len=self.max_model_len,
            limits=self.config.limits,
            keyed=self.config.tenants is not None,
        )

    def ready(self) -> Response:
        ready = self.hub.ready
        return _json({"ready": ready}, 200 if ready else 503)

    def status(self) -> Response:
        cluster = None if self.hub.cluster is None else _cluster(self.hub.cluster)
        in_flight = self.hub.num_sequences
        return _json({"ready": self.hub.ready, "sequences_in_flight": in_flight, "cluster": cluster})


def create_app(api: Api) -> ASGIApp:
    """The application; ``api`` must live on the event loop that runs it."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    described = encode(api.document())

    def post(path: str, handler: Callable[[Request], Any]) -> None:
        async def route(request: Request) -> Any:
            return await handler(request)

        app.add_api_route(path, route, methods=["POST"], response_model=None, name=path)

    def get(path: str, handler: Callable[..., Response]) -> None:
        async def route() -> Response:
            return handler()

        app.add_api_route(path, route, methods=["GET"], response_model=None, name=path)

    post("/v1/completions", api.complete)
    post("/v1/chat/completions", api.chat)
    get("/v1/models", api.models)
    get("/health", lambda: _json({"status": "ok"}))
    get("/ready", api.ready)
    get("/status", api.status)
    get("/version", lambda: _json({"version": version()}))
    get("/openapi.json", lambda: Response(described, media_type="application/json"))
    get("/metrics", lambda: Response(api.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"))

    @app.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str) -> Response:
        return api.model(name)

    @app.get("/v1/streams/{id}", response_model=None)
    async def resume(request: Request, id: str) -> Response:
        return await api.resume(request, id)

    @app.get("/traces/{request_id}", response_model=None)
    async def trace(request_id: str) -> Response:
        return api.trace(request_id)

    _add_error_handlers(app)
    keyring = None if api.config.tenants is None else Keyring(api.config.tenants)
    return Envelope(Guard(app, keyring), api.metrics, {getattr(route, "path", "") for route in app.routes})


def _add_error_handlers(app: FastAPI) -> None:
    async def refused(_: Request, error: Any) -> Any:
        return ErrorAnswer(error)

    async def unread(_: Request, error: Any) -> Any:
        return ErrorAnswer(error.error, close=True)

    async def http(_: Request, error: Any) -> Any:
        if error.status_code == 404:
            return ErrorAnswer(PathNotFound("there is nothing at this path"))
        if error.status_code == 405:
            allow = (error.headers or {}).get("Allow", "")
            return ErrorAnswer(MethodNotAllowed("this path does not take this method"), [(b"allow", allow.encode())])
        return ErrorAnswer(InvalidRequest("the request is not valid"))

    async def bug(_: Request, error: Any) -> Any:
        return ErrorAnswer(InternalError("internal error"))

    app.add_exception_handler(GatewayError, refused)
    app.add_exception_handler(Unread, unread)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, bug)


class Envelope:
    """Gives each request an id of ours, shown in ``x-request-id``, and counts the responses."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: set[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["request_id"] = secrets.token_hex(16)
        route = scope["path"] if scope["path"] in self._routes else "other"

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", state["request_id"].encode())]
                self._metrics.responses.labels(route, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, labelled)


def _owned(request_id: str, tenant: str) -> str:
    """What the cluster calls a request. Whoever else learns its id, and asks for it, asks for another."""
    return f"{request_id}-{sha256(tenant.encode()).hexdigest()[:16]}"


def _sequence(owned: str, choice: int) -> RequestId:
    """One choice's id in the cluster."""
    return RequestId(f"{owned}-{choice}")


def _json(body: Any, status: int = 200) -> Response:
    return Response(encode(body), status, media_type="application/json")


def _cluster(state: ClusterState) -> dict[str, Any]:
    """Workers as objects; on the wire between processes they are arrays."""
    workers = [_fields(worker) | {"epoch": str(worker.epoch)} for worker in state.workers]
    return {
        "ready": state.ready,
        "queued": state.queued,
        "decisions": _fields(state.decisions),
        "workers": workers,
    }


def _fields(part: Part) -> dict[str, Any]:
    fields = {name: getattr(part, name) for name in part.__struct_fields__}
    return {name: _fields(value) if isinstance(value, Part) else value for name, value in fields.items()}


def version() -> str:
    try:
        return importlib.metadata.version("baton-serve")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
