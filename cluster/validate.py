"""What would be wrong, before anything starts."""

import errno
import os
import socket
from collections.abc import Iterator

import psutil

from cluster.document import Loc
from cluster.errors import TopologyError
from cluster.plan import Plan, make_plan, size
from cluster.topology import Topology
from engine.core.kv_layout import DTYPE_BYTES
from kv_transfer.curve import is_loopback

_WAYS = {"auto": "shm on one host, over zmq between hosts", "nccl": "torch.distributed (gloo)"}
"""How transports are told."""


def check(topology: Topology, *, download: bool = True) -> Plan:
    """The plan, if this machine can run it; else a ``TopologyError`` with one line for each thing that is wrong."""
    try:
        plan = make_plan(topology, download=download)
    except TopologyError as error:
        machine = topology.errors(_machine_problems(topology))
        raise TopologyError(*error.lines, *machine.lines) from error
    problems = [*_model_problems(plan), *_machine_problems(topology)]
    if problems:
        raise topology.errors(problems)
    return plan


def check_machine(topology: Topology) -> None:
    """What can be said without the model; raises like ``check``."""
    problems = list(_machine_problems(topology))
    if problems:
        raise topology.errors(problems)


def summary(plan: Plan) -> Iterator[tuple[str, str]]:
    """What would start, as rows of name and text."""
    topology, config = plan.topology, plan.model_config
    how = "" if config.native else " through transformers"
    weights = plan.dtype if topology.quantization is None else f"{plan.dtype}, weights in {topology.quantization}"
    yield "model", f"{plan.served_model_name} ({config.architecture}{how}, {config.num_layers} layers, {weights})"
    yield "folder", str(plan.model)
    for pool in topology.pools:
        names = f"{pool.name}-0" if pool.replicas == 1 else f"{pool.name}-0 ... {pool.name}-{pool.replicas - 1}"
        kv = f"{plan.num_blocks(pool)} blocks ({size(plan.kv_memory(pool))}) of {plan.layout(pool).dtype} KV each"
        cpus = f"{pool.resources.cpus:g} CPUs"
        where = f", on hosts {pool.placement}" if pool.placement is not None and pool.placement.labels else ""
        yield pool.role, f"{names}: {pool.max_num_seqs} sequences a step, {cpus} and {kv}{where}"
    yield "kv", f"blocks of {topology.kv.block_size} tokens, moved over {_WAYS.get(plan.transport, plan.transport)}"
    yield "context", f"{plan.max_model_len} tokens"
    gateway = topology.gateway
    host = f"[{gateway.host}]" if ":" in gateway.host else gateway.host
    last = f" ... {gateway.port + gateway.replicas - 1}" if gateway.port and gateway.replicas > 1 else ""
    security = topology.security
    scheme, clear = ("http", ", in the clear") if security.tls is None else ("https", "")
    keys = "without API keys" if security.api_keys is None else f"API keys in {security.api_keys}{clear}"
    yield "gateway", f"{scheme}://{host}:{gateway.port or '(any free port)'}{last}, {keys}"
    yield "links", "in the clear, on loopback" if security.keys is None else f"encrypted with {security.keys}"
    if gateway.grpc_port is not None:
        last = f" ... {gateway.grpc_port + gateway.replicas - 1}" if gateway.grpc_port and gateway.replicas > 1 else ""
        yield "grpc", f"{host}:{gateway.grpc_port or '(any free port)'}{last}"
    yield "ray", "started here, on loopback" if topology.cluster.address == "local" else topology.cluster.address


def _model_problems(plan: Plan) -> Iterator[tuple[Loc, str]]:
    if not (plan.model / "tokenizer.json").is_file():
        yield ("model",), f"{plan.model} holds no tokenizer.json; save one there with the model's tokenizer"
    if plan.topology.cluster.address == "local":
        wanted, free = _memory(plan), psutil.virtual_memory().available
        if wanted > free:
            text = f"weights and KV of all workers take {size(wanted)}, this machine has {size(free)} free"
            yield ("kv", "memory"), f"{text}; lower kv.memory or replicas"


def _machine_problems(topology: Topology) -> Iterator[tuple[Loc, str]]:
    yield from _gateway_problems(topology)
    for index, pool in enumerate(topology.pools):
        if pool.placement is not None and topology.cluster.address == "local":
            text = "placement names hosts, but cluster.address is local, which is this machine alone"
            yield ("pools", index, "placement"), f"{text}; write address: auto, or start with `--address auto`"
    cpus = len(os.sched_getaffinity(0))
    if topology.cluster.address == "local" and topology.cpus > cpus + 1e-9:
        text = f"all processes together take {topology.cpus:,.6g} CPUs, this machine has {cpus}"
        yield ("pools",), f"{text}; lower replicas or resources.cpus"


def _gateway_problems(topology: Topology) -> Iterator[tuple[Loc, str]]:
    gateway = topology.gateway
    ports = [("port", gateway.port)]
    if gateway.grpc_port is not None:
        ports.append(("grpc_port", gateway.grpc_port))
    problems = [
        problem
        for name, first in ports
        for port in (range(first, first + gateway.replicas) if first else [0])
        for problem in _port_problems(gateway.host, port, name)
    ]
    yield from problems
    if not problems and topology.security.api_keys is None and not is_loopback(gateway.host):
        text = f"gateway.host: others can connect to {gateway.host}, and there are no API keys"
        advice = "run `baton keys api TENANT` and name its file as security.api_keys, or write 127.0.0.1"
        yield ("gateway", "host"), f"{text}; {advice}"


def _port_problems(host: str, port: int, name: str) -> Iterator[tuple[Loc, str]]:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):  # UnicodeError: a part of the name is too long
        yield ("gateway", "host"), f"gateway.host: {host!r} is not known here; write an address of this machine"
        return
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                yield ("gateway", "host"), f"gateway.host: {host} is not an address of this machine; write one that is"
            else:
                text = "is taken by another program" if error.errno == errno.EADDRINUSE else f"{error.strerror}"
                advice = "write another, or 0 for any free one"
                yield ("gateway", name), f"gateway.{name}: {port} {text}; {advice}"


def _memory(plan: Plan) -> int:
    """Bytes that all workers' weights and KV pools take, at least."""
    config = plan.model_config
    weights = sum(file.stat().st_size for file in plan.model.glob("*.safetensors"))
    if plan.topology.quantization is not None:
        weights //= DTYPE_BYTES.get(config.dtype, 1)  # a byte a value; embeddings take more
    total = 0
    for pool in plan.topology.pools:
        copies = 1 if config.native else pool.tensor_parallel  # transformers' code is not split over ranks
        total += pool.replicas * (copies * weights + plan.kv_memory(pool))
    return total
