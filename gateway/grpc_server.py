"""gRPC in a gateway's process, on its event loop: its services, their health, and reflection."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from gateway.auth import Keyring
from gateway.connections import affordable
from gateway.grpc_calls import Calls
from gateway.grpc_engine import VllmEngine
from gateway.grpc_generation import Generator
from gateway.grpc_guard import Guard
from gateway.grpc_inference import Inference
from gateway.hub import Hub
from gateway.openai_api import Api
from gateway.protos import open_inference_pb2, vllm_engine_pb2
from gateway.protos.open_inference_pb2_grpc import add_GRPCInferenceServiceServicer_to_server as add_inference
from gateway.protos.vllm_engine_pb2_grpc import add_VllmEngineServicer_to_server

log = logging.getLogger(__name__)

SERVICES = (
    vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"].full_name,
    open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
)
SEND_BYTES = 64 << 20
"""The longest message that is sent: a long prompt's log-probabilities."""
HEADER_BYTES = 32 << 10
IDLE_MS = 300_000
"""After so long without a call a connection is closed; clients make another one."""
PING_MS = 30_000
"""After so long without a byte the client is asked whether it is there, and is gone if it does not answer."""
PING_TIMEOUT_MS = 10_000
CLOSE_AFTER = 0.5
"""Seconds that calls get to end once their requests are answered."""
LEAST_PING_MS = 10_000
"""A client may ask as often; more is taken for an attack."""


class GrpcServer:
    """``serving`` while it takes calls."""

    def __init__(self, api: Api) -> None:
        config = api.config
        self._api = api
        keyring = None if config.tenants is None else Keyring(config.tenants)
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[
                Calls(Guard(keyring), api.metrics, body_timeout=config.body_timeout, stall=config.client_stall)
            ],
            maximum_concurrent_rpcs=config.max_connections,
            options=[
                ("grpc.max_allowed_incoming_connections", affordable(config.max_connections, "gRPC", 4)),
                ("grpc.server_handshake_timeout_ms", round(1000 * config.headers_timeout)),
                ("grpc.max_connection_idle_ms", IDLE_MS),
                ("grpc.max_receive_message_length", config.limits.max_body_bytes),
                ("grpc.max_send_message_length", SEND_BYTES),
                ("grpc.max_metadata_size", HEADER_BYTES),
                ("grpc.absolute_max_metadata_size", HEADER_BYTES),
                ("grpc.so_reuseport", 1),  # as of HTTP's socket: a replacement listens before this one has stopped to
                ("grpc.keepalive_time_ms", PING_MS),
                ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", LEAST_PING_MS),
            ],
        )
        generator = Generator(api)
        add_VllmEngineServicer_to_server(VllmEngine(generator), self._server)  # type: ignore[no-untyped-call]
        add_inference(Inference(generator), self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    @contextlib.asynccontextmanager
    async def serving(self, host: str, port: int) -> AsyncIterator[int]:
        """Take calls; yields the port. Raises ``OSError``."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            port = self._bind(address)
        except RuntimeError as error:
            raise OSError(f"gRPC cannot listen on {address}") from error
        await self._server.start()
        log.info("gRPC listens on port %d", port)
        watching = asyncio.create_task(self._watch(self._api.hub))
        try:
            yield port
        finally:
            watching.cancel()
            await self._server.stop(CLOSE_AFTER)

    def _bind(self, address: str) -> int:
        tls = self._api.config.tls
        if tls is None:
            return self._server.add_insecure_port(address)
        pair = (Path(tls.key).read_bytes(), Path(tls.cert).read_bytes())
        return self._server.add_secure_port(address, grpc.ssl_server_credentials([pair]))

    async def drain(self, grace: float) -> bool:
        """Take no more calls; whether those under way have ended within ``grace`` seconds."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + grace
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace)
        return loop.time() < give_up

    async def _watch(self, hub: Hub) -> None:
        """Health as the cluster's: what the router said last."""
        while True:
            ready = hub.ready
            status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
            for name in ("", *SERVICES):
                await self._health.set(name, status)
            await asyncio.sleep(self._api.config.state_every)
