"""One gateway as a thread with an event loop of its own: HTTP and gRPC in front, the mailbox behind, the hub amid."""

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import AsyncIterator, Callable
from concurrent import futures
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from gateway.config import GatewayConfig
from gateway.connections import Connections, affordable
from gateway.core.dispatch import Messages
from gateway.grpc_server import GrpcServer
from gateway.hub import Hub
from gateway.metrics import Metrics
from gateway.openai_api import Api, create_app
from gateway.orders import Planner
from gateway.streams import Streams
from gateway.tokenization import Tokenizer, UnusableModel
from kv_transfer.curve import Exposed, is_loopback
from messages.codec import decoder_for
from messages.ids import Address
from runtime.mailbox import AsyncMailbox
from runtime.recorder import Recorder
from runtime.threads import thread_pool

log = logging.getLogger(__name__)

HEADER_BYTES = 32 << 10
PLANNERS = 2
"""Threads that tokenise long prompts."""
CLOSE_AFTER = 2.0
"""Seconds that connections get to close once their requests are answered."""


class GatewayServer:
    """``start`` returns once requests are taken; ``stop`` once everything is closed. Neither is for an event loop."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self.on_failure: Callable[[BaseException], None] | None = None
        """Called from the gateway's thread when it fails after its start."""
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._hub: Hub | None = None
        self._http: uvicorn.Server | None = None
        self._grpc: GrpcServer | None = None
        self._port = 0
        self._grpc_port: int | None = None
        self._address = Address("")

    @property
    def port(self) -> int:
        """That HTTP is bound to."""
        return self._port

    @property
    def grpc_port(self) -> int | None:
        """That gRPC is bound to; None without gRPC."""
        return self._grpc_port

    @property
    def address(self) -> Address:
        """The mailbox's."""
        return self._address

    @property
    def url(self) -> str:
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        return f"{'http' if self._config.tls is None else 'https'}://{host}:{self._port}"

    @property
    def ready(self) -> bool:
        """Whether the cluster behind takes requests."""
        return self._hub is not None and self._hub.ready

    def start(self, timeout: float = 60.0) -> int:
        """Bind, start the thread, return HTTP's port. Raises what kept it from starting."""
        config = self._config
        if config.tenants is None and not is_loopback(config.host):
            raise Exposed(
                f"will not serve {config.host}, where others can connect, without API keys; run"
                " `baton keys api TENANT`, and name its file in the topology as security.api_keys"
            )
        tokenizer = Tokenizer(Path(config.model))
        listener = _listen(config.host, config.port, config.client_stall, reuse_port=config.reuse_port)
        self._port = listener.getsockname()[1]
        if config.grpc_port and not config.reuse_port:
            try:
                _check_free(_family(config.host), config.host, config.grpc_port)
            except OSError:
                listener.close()
                raise
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(tokenizer, listener, started), name="gateway", daemon=True
        )
        self._thread.start()
        if not futures.wait([started], timeout).done:
            raise TimeoutError(f"the gateway did not start within {timeout:g} s")
        started.result()
        return self._port

    def drain(self, grace: float) -> bool:
        """Listen no more, and let the requests that are here finish; whether they all have within ``grace`` seconds.
        The mailbox stays open: ``stop`` comes after it."""
        assert self._loop is not None and self._http is not None, "not started"
        return asyncio.run_coroutine_threadsafe(self._let_finish(self._http, grace), self._loop).result()

    async def _let_finish(self, http: uvicorn.Server, grace: float) -> bool:
        finishing = [_let_finish(http, grace)]
        if self._grpc is not None:
            finishing.append(self._grpc.drain(grace))
        return all(await asyncio.gather(*finishing))

    def stop(self, timeout: float = 30.0) -> None:
        """Finish or fail what is in flight, close everything. Harmless if it does not run."""
        if self._thread is None or self._loop is None or self._stop is None:
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"the gateway did not stop within {timeout:g} s")
        self._thread = None

    def _run(self, tokenizer: Tokenizer, listener: socket.socket, started: "Future[None]") -> None:
        try:
            asyncio.run(self._serve(tokenizer, listener, started))
        except BaseException as failure:
            error = _only(failure)
            if not started.done():
                started.set_exception(error)
                return
            log.error("the gateway has failed", exc_info=error)
            if self.on_failure is not None:
                self.on_failure(error)
        finally:
            listener.close()

    async def _serve(self, tokenizer: Tokenizer, listener: socket.socket, started: "Future[None]") -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        if self._config.tls is not None:  # uvicorn has no setting for it
            listen = partial(self._loop.create_server, ssl_handshake_timeout=self._config.headers_timeout)
            self._loop.create_server = listen  # type: ignore[method-assign]
        mailbox = AsyncMailbox(self._config.mailbox_host, decoder_for(*Messages), curve=self._config.curve)
        recorder = Recorder(Path(self._config.record), "gateway") if self._config.record else None
        with thread_pool(PLANNERS, "gateway-planner") as executor:
            try:
                metrics = Metrics()
                self._hub = hub = self._make_hub(mailbox, metrics, recorder)
                streams = Streams(grace=self._config.resume_grace, most=self._config.limits.max_sequences)
                api = self._make_api(tokenizer, hub, streams, metrics, executor)
                self._http = http = self._make_http(api)
                self._address = mailbox.address
                async with self._serving_grpc(api), asyncio.TaskGroup() as tasks:
                    messages = tasks.create_task(hub.run())
                    serving = tasks.create_task(http.serve(sockets=[listener]))
                    while not http.started:
                        if serving.done() and serving.exception() is None:  # else the group tells why
                            raise RuntimeError("HTTP has ended before it began")
                        await asyncio.sleep(0.005)
                    started.set_result(None)
                    await self._stop.wait()
                    await hub.drain(self._config.drain)
                    http.should_exit = True
                    await serving
                    streams.close()
                    messages.cancel()
            finally:
                mailbox.close()
                if recorder is not None:
                    recorder.close()

    def _make_hub(self, mailbox: AsyncMailbox, metrics: Metrics, recorder: Recorder | None) -> Hub:
        config = self._config
        return Hub(
            mailbox,
            Address(config.router),
            limits=config.limits,
            timeouts=config.timeouts,
            max_attempts=config.max_attempts,
            metrics=metrics,
            state_every=config.state_every,
            allowances={tenant.name: tenant.allowance for tenant in config.tenants or ()},
            recorder=recorder,
        )

    @contextlib.asynccontextmanager
    async def _serving_grpc(self, api: Api) -> AsyncIterator[None]:
        """Where it is wanted."""
        if self._config.grpc_port is None:
            yield
            return
        self._grpc = GrpcServer(api)
        async with self._grpc.serving(self._config.host, self._config.grpc_port) as self._grpc_port:
            yield

    def _make_api(self, tokenizer: Tokenizer, hub: Hub, streams: Streams, metrics: Metrics, executor: Any) -> Api:
        config = self._config
        max_model_len = config.max_model_len or tokenizer.max_position_embeddings
        if max_model_len is None:
            raise UnusableModel(f"{config.model} does not say how long its context is; set max_model_len")
        planner = Planner(tokenizer, config.served_model_name, max_model_len, config.limits)
        return Api(
            config=config,
            hub=hub,
            streams=streams,
            tokenizer=tokenizer,
            planner=planner,
            metrics=metrics,
            executor=executor,
            max_model_len=max_model_len,
        )

    def _make_http(self, api: Api) -> uvicorn.Server:
        config = self._config
        most = affordable(config.max_connections)
        connections = Connections(most=most, headers_timeout=config.headers_timeout, tls=config.tls is not None)
        settings = uvicorn.Config(
            create_app(api),
            http=connections.protocol(),
            ssl_certfile=None if config.tls is None else config.tls.cert,
            ssl_keyfile=None if config.tls is None else config.tls.key,
            timeout_keep_alive=config.keep_alive,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=HEADER_BYTES,
            timeout_graceful_shutdown=round(CLOSE_AFTER),
        )
        return uvicorn.Server(settings)


def _only(error: BaseException) -> BaseException:
    """What a group of one stands for."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _listen(host: str, port: int, stall: float, *, reuse_port: bool) -> socket.socket:
    """``reuse_port``: another socket may listen there; a later one with this flag always may beside this one."""
    family = _family(host)
    if not reuse_port:
        _check_free(family, host, port)
    # With the protocol named, asyncio turns Nagle's algorithm off; else small writes wait 40 ms for the client's ack.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):  # so that a replacement can listen before this one has stopped to
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # else what a client never reads would keep its connection for ever
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, round(1000 * stall)))
        listener.bind((host, port))
        listener.listen(2048)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _check_free(family: socket.AddressFamily, host: str, port: int) -> None:
    """Raises ``OSError`` where somebody listens."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


async def _let_finish(http: uvicorn.Server, grace: float) -> bool:
    """Each connection is closed once its request is answered, at once where there is none."""
    for server in http.servers:
        server.close()
    connections = http.server_state.connections
    for connection in list(connections):
        connection.shutdown()
    give_up = asyncio.get_running_loop().time() + grace
    while connections and asyncio.get_running_loop().time() < give_up:
        await asyncio.sleep(0.02)
    return not connections
