"""Runs on a host that has no key: tries every port in every language that is spoken in the cluster.

``python -m tests.hosts.stranger HOST:PORT...`` prints what was answered as if the stranger were a friend, in JSON.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx
import zmq

WITHIN = 2.0
PATHS = ("/", "/v1/models", "/status", "/metrics", "/api/version", "/api/jobs/", "/api/job_agent/jobs/", "/logs")
"""Of HTTP: the gateway's, and those of Ray's dashboard and agents. Whether somebody lives may be asked by all."""
POSTS = ("/get_runtime_envs_info",)
"""To Ray's agent for environments, which takes nothing else."""
METHODS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.RayletDriver/ListNamedActors",
    "/vllm.grpc.engine.VllmEngine/GetModelInfo",
    "/inference.GRPCInferenceService/ServerMetadata",
)


def admitted(target: str) -> list[str]:
    return [*http(target), *rpc(target), *handshake(target)]


def http(target: str) -> list[str]:
    found = []
    with httpx.Client(base_url=f"http://{target}", timeout=WITHIN, trust_env=False) as client:
        for path in PATHS:
            try:
                if (answer := client.get(path)).is_success:
                    found.append(f"HTTP {path}: {answer.text[:60]}")
            except httpx.HTTPError:
                return found  # it speaks something else
        for path in POSTS:
            if (answer := client.post(path)).is_success:
                found.append(f"HTTP {path}: {answer.text[:60]}")
    return found


def rpc(target: str) -> list[str]:
    found = []
    with grpc.insecure_channel(target) as channel:
        for method in METHODS:
            try:
                channel.unary_unary(method)(b"", timeout=WITHIN, metadata=[("client_id", "stranger")])
                found.append(f"gRPC {method}")
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    break  # it speaks something else
    return found


def handshake(target: str) -> list[str]:
    return [f"ZeroMQ {name}" for name in ("PUSH", "DEALER") if greeted(target, getattr(zmq, name))]


def greeted(target: str, kind: int) -> bool:
    """A mailbox takes PUSH alone, the KV of others DEALER."""
    with zmq.Context() as context, context.socket(kind) as socket:
        socket.linger = 0
        with socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED) as monitor:
            socket.connect(f"tcp://{target}")
            came = monitor.poll(WITHIN * 1000)
            socket.disable_monitor()
    return bool(came)


if __name__ == "__main__":
    targets = sys.argv[1:]
    with ThreadPoolExecutor(16) as threads:
        print(json.dumps(dict(zip(targets, threads.map(admitted, targets), strict=True))))
