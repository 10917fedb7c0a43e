"""What all gRPC calls have in common: who may make them, what an error's status is, how long a client is waited for.

Each is counted by its method and status.
"""

import asyncio
import contextlib
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError, Message
from grpc.aio import ServicerContext

from gateway.auth import Tenant
from gateway.core.errors import BodyTimeout, GatewayError, InvalidRequest
from gateway.grpc_guard import CALLER, OPEN, OPEN_WITHIN, Guard
from gateway.metrics import Metrics
from gateway.rendering import retry_after

log = logging.getLogger(__name__)

Context = ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"
Metadata = tuple[tuple[str, str], ...]

STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
"""By the HTTP status of an error; any other is INTERNAL."""
LEAVES_WITHIN = 0.1
"""Seconds from the end of a client's messages to the news that it has left, if that is why they end."""
OTHER = "other"
"""The method as which calls are counted that come to none."""


class Stalled(Exception):
    """The client did not read what was written for it."""

    def __init__(self, writing: "asyncio.Task[None]") -> None:
        super().__init__()
        self.writing = writing
        """It ends when the client reads on, or leaves."""


def status_of(error: GatewayError) -> grpc.StatusCode:
    return STATUS.get(error.status, grpc.StatusCode.INTERNAL)


def details_of(error: GatewayError) -> str:
    """Its message, which says what it is about."""
    about = error.param is not None and error.param not in error.message
    return f"{error.param}: {error.message}" if about else error.message


def metadata_of(error: GatewayError) -> Metadata:
    """``retry-after`` is HTTP's, in seconds; gRPC's own retries look at ``grpc-retry-pushback-ms``."""
    code = () if error.code is None else (("error-code", error.code),)
    seconds = retry_after(error)
    if seconds is None:
        return code
    return (*code, ("retry-after", str(seconds)), ("grpc-retry-pushback-ms", str(1000 * seconds)))


class Calls(grpc.aio.ServerInterceptor):
    """Around every call of the server."""

    def __init__(self, guard: Guard, metrics: Metrics, *, body_timeout: float, stall: float) -> None:
        """``body_timeout``: seconds that the message of a unary request may take to come, if its method
        wants a key; ``stall``: that a message of ours may wait for its client to read."""
        self._guard = guard
        self._metrics = metrics
        self._body_timeout = body_timeout
        self._stall = stall

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """None where there is no such method."""
        method = handler_call_details.method
        try:
            tenant = self._guard.admit(handler_call_details)
        except GatewayError as error:
            return self._refusal(error)
        handler = await continuation(handler_call_details)
        if handler is None:
            self._count(OTHER, grpc.StatusCode.UNIMPLEMENTED)
            return None
        return self._wrapped(handler, method, tenant)

    def _refusal(self, error: GatewayError) -> Handler:
        """Streams in both directions, for which nothing is read: so it fits any method."""

        async def refused(_: Any, context: Context) -> None:
            self._count(OTHER, status_of(error))
            await context.abort(status_of(error), details_of(error), metadata_of(error))

        return grpc.stream_stream_rpc_method_handler(refused)

    def _wrapped(self, handler: Any, method: str, tenant: Tenant) -> Handler:
        """Takes a stream of requests whatever the method, and itself reads the message of a unary one: gRPC would wait
        for that for ever. A stream may rest before its first message, as before any other."""

        within = min(self._body_timeout, OPEN_WITHIN) if method in OPEN else self._body_timeout

        async def taken(requests: Any, context: Context) -> Any:
            return requests if handler.request_streaming else await _message(context, within)

        def answer(behaviour: Any) -> Any:
            async def answered(requests: Any, context: Context) -> Any:
                async with self._call(method, tenant, context):
                    return await behaviour(await taken(requests, context), context)

            return answered

        def stream(behaviour: Any) -> Any:
            async def streamed(requests: Any, context: Context) -> None:
                async with (
                    self._call(method, tenant, context),
                    contextlib.aclosing(behaviour(await taken(requests, context), context)) as messages,
                ):
                    async for message in messages:
                        await self._write(context, message)

            return streamed

        kinds = {True: "stream", False: "unary"}
        behaviour = getattr(handler, f"{kinds[handler.request_streaming]}_{kinds[handler.response_streaming]}")
        streams = handler.response_streaming
        make = grpc.stream_stream_rpc_method_handler if streams else grpc.stream_unary_rpc_method_handler
        writes_itself = inspect.iscoroutinefunction(behaviour)  # as health does where it streams
        return make(
            stream(behaviour) if streams and not writes_itself else answer(behaviour),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    async def _write(self, context: Context, message: Message) -> None:
        """Waits while the client does not read. Raises ``Stalled`` after a while."""
        writing = asyncio.create_task(context.write(message))
        try:
            done, _ = await asyncio.wait([writing], timeout=self._stall)
        except asyncio.CancelledError:
            writing.cancel()
            raise
        if not done:
            raise Stalled(writing)
        writing.result()

    @contextlib.asynccontextmanager
    async def _call(self, method: str, tenant: Tenant, context: Context) -> AsyncIterator[None]:
        """An error ends the call with its status; of one that we did not foresee the client hears nothing more."""
        code = grpc.StatusCode.OK
        CALLER.set(tenant)  # a call has a task, and so a context, of its own
        try:
            yield
        except GatewayError as error:
            code = status_of(error)
            await context.abort(code, details_of(error), metadata_of(error))
        except Stalled as stalled:
            code = grpc.StatusCode.ABORTED
            log.info("a client did not read for %.0f s: its request is dropped", self._stall)
            await stalled.writing  # no status can be sent before
            await context.abort(code, f"nothing was read for {self._stall:g} s")
        except grpc.aio.AbortError:  # by a service that is not ours, such as health
            code = context.code()
            raise
        except asyncio.CancelledError:  # by the client, its deadline or its connection
            code = grpc.StatusCode.CANCELLED
            raise
        except Exception:
            code = grpc.StatusCode.INTERNAL
            log.exception("%s failed", method)
            await context.abort(code, "internal error")
        finally:
            self._count(method, code)

    def _count(self, method: str, code: grpc.StatusCode) -> None:
        self._metrics.grpc_responses.labels(method, code.name).inc()


async def _message(context: Context, within: float) -> Any:
    """The one message of a unary request, which may take ``within`` seconds. Raises ``GatewayError``."""
    try:
        async with asyncio.timeout(within):
            message = await context.read()
    except TimeoutError:
        raise BodyTimeout(f"the message did not arrive within {within:g} s") from None
    except DecodeError as error:
        raise InvalidRequest("the bytes are no message of the method's type") from error
    if message is grpc.aio.EOF:
        await asyncio.sleep(LEAVES_WITHIN)  # the same comes where the client has left: this is cancelled then
        raise InvalidRequest("there is no message in the call")
    return message
