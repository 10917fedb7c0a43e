"""The topology: one small YAML file that says what runs.

``Topology.load(path)`` gives a checked topology or a ``TopologyError`` with one line for each thing that is wrong.
What depends on the model or on this machine is checked by ``cluster.plan`` and ``cluster.validate``.
"""

import copy
import ipaddress
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError

from cluster.complaints import complaints
from cluster.document import Document, Loc, read
from cluster.errors import TopologyError
from messages.common import Role
from runtime.core.disaggregation import MAX_LOCAL_PREFILL_LENGTH

_SIZE = re.compile(r"(\d{1,30}(?:\.\d{1,30})?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_LABEL_VALUE = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_SELECTOR = re.compile(rf"!?{_LABEL_VALUE}|!?in\({_LABEL_VALUE}(?:, ?{_LABEL_VALUE})*\)")
_LABEL_KEY = re.compile(rf"(?:[A-Za-z0-9.-]{{1,253}}/)?{_LABEL_VALUE}")
_RESOURCE = re.compile(r"[A-Za-z_][A-Za-z0-9_.:-]{0,99}")
_OWN_RESOURCES = ("CPU", "GPU", "memory", "object_store_memory")


def parse_size(value: object) -> object:
    """``"256MiB"`` -> bytes; a whole number is bytes already."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError("must be a size such as 256MiB or 2GiB")
    number, unit = match[1], (match[2] or "").lower()
    base = 1024 if unit.endswith("i") else 1000
    return int(Fraction(number) * base ** _UNITS[unit.removesuffix("i")])


def _plain_host(host: str) -> str:
    if host in ("", "*"):
        raise ValueError("would listen on every network; write the one address to listen on, such as 127.0.0.1")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?", host):
            raise ValueError("is no address or host name; write one such as 127.0.0.1") from None
        return host
    if address.is_unspecified:
        raise ValueError("would listen on every network; write the one address to listen on, such as 127.0.0.1")
    return host


def _ray_address(address: str) -> str:
    if address.startswith("ray://"):
        raise ValueError("means Ray Client, which is not supported yet; run on a node of that Ray, and write auto")
    if address not in ("local", "auto") and not re.fullmatch(r"[^\s:/]+:\d{1,5}", address):
        raise ValueError("must be local (start a Ray here), auto (use the Ray running here) or HOST:PORT")
    return address


def _selector(labels: dict[str, str]) -> dict[str, str]:
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no label; write one as `ray start --labels` takes it, such as role")
        if not _SELECTOR.fullmatch(value):
            raise ValueError(f"{value!r} selects nothing; write a value, !value, in(a, b) or !in(a, b)")
    return labels


def _own_resources(resources: dict[str, float]) -> dict[str, float]:
    for name in resources:
        if name in _OWN_RESOURCES:
            raise ValueError(f"{name} belongs into resources; here stand those of `ray start --resources`")
        if not _RESOURCE.fullmatch(name):
            raise ValueError(f"{name!r} is no resource; write one as `ray start --resources` takes it")
    return resources


Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
SizeOrNone = Annotated[int, BeforeValidator(parse_size), Field(ge=0)]
Host = Annotated[str, AfterValidator(_plain_host)]
File = Annotated[str, Field(min_length=1, max_length=4096)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,39}$")]
KVDtype = Literal["auto", "float32", "bfloat16", "float16", "fp8", "int8"]
Positive = Annotated[int, Field(ge=1, le=10_000_000)]


class Section(BaseModel):
    """Unknown keys are refused, and "8" is not 8."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ClusterSection(Section):
    name: Name | None = None
    """For `baton status NAME`; the file's name if it is not given."""
    address: Annotated[str, AfterValidator(_ray_address)] = "local"
    allow_open_ray: bool = False
    """Join a Ray of several hosts that asks for no token too: where nobody else can reach it."""
    chaos: bool = False
    """Whether `baton chaos` may put faults into the links between its workers."""
    min_hosts: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Hosts of the Ray, this one included, that have to be there before workers are placed: the first to come would
    get them all."""
    wait_for_room: Annotated[float, Field(ge=0, le=86400)] = 120.0
    """Seconds to wait for these, and that a worker waits for room: on a host that joins, comes back, or is made."""


class Resources(Section):
    """What one process takes from its host, in Ray's books; a worker has ``tensor_parallel`` of them."""

    cpus: Annotated[float, Field(gt=0, le=1024)] = 0.25
    gpus: Annotated[float, Field(ge=0, le=64)] = 0
    memory: Size | None = None


class Placement(Section):
    """The hosts for a pool's workers, of a Ray of several. All ranks of a worker run on one host."""

    labels: Annotated[dict[str, str], Field(max_length=16), AfterValidator(_selector)] = {}
    """As `ray start --labels` gives them; ``value``, ``!value``, ``in(a, b)`` or ``!in(a, b)``."""
    resources: Annotated[
        dict[str, Annotated[float, Field(gt=0, le=1_000_000)]], Field(max_length=16), AfterValidator(_own_resources)
    ] = {}
    """As `ray start --resources` gives them; a worker takes as much for each of its ranks."""

    def __str__(self) -> str:
        labels = ", ".join(f"{key}={value}" for key, value in self.labels.items())
        return labels and f"labelled {labels}"


class Pool(Section):
    name: Name
    role: Literal["prefill", "decode", "colocated"]
    replicas: Annotated[int, Field(ge=1, le=1000)] = 1
    tensor_parallel: Annotated[int, Field(ge=1, le=256)] = 1
    """Ranks of each worker: processes that hold a part of the model each."""
    resources: Resources = Resources()
    placement: Placement | None = None
    """Any host that has room, if it is not given."""
    max_num_seqs: Positive = 32
    max_num_batched_tokens: Positive = 2048
    prefill_chunk: Positive = 512
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    kv_dtype: KVDtype | None = None
    """Of this pool's KV; ``kv.dtype`` if it is not given."""


class KV(Section):
    """Each worker's KV pool, and how its blocks move."""

    block_size: Positive = 16
    memory: Size | None = None
    num_blocks: Positive | None = None
    transport: Literal["auto", "shm", "nccl", "zmq"] = "auto"
    """auto: for each pair of workers, by where they are."""
    enable_prefix_caching: bool = True
    preemption: Literal["recompute", "swap"] = "recompute"
    """What becomes of the KV of a sequence that has to make room."""
    swap_space: SizeOrNone = 0
    """Of each worker, in host memory: for KV that is swapped, and that the prefix cache has no room for."""
    dtype: KVDtype = "auto"
    """auto: what the model computes in. int8 and fp8 have a scale for each head's K or V in a block."""


class Disaggregation(Section):
    """Whether a prompt is computed by a prefill worker, and its KV handed over, or by the worker that decodes it."""

    policy: Literal["auto", "always", "never"] = "auto"
    """auto: decode computes it where that is measured to be clearly cheaper. always, never: hand every prompt over, or
    none."""
    max_local_prefill_length: Annotated[int, Field(ge=0, le=10_000_000)] = MAX_LOCAL_PREFILL_LENGTH
    """auto: uncached tokens that a decode worker computes itself at most."""


class Gateway(Section):
    host: Host = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0: any free port."""
    grpc_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """0: any free port; without it there is no gRPC."""
    replicas: Annotated[int, Field(ge=1, le=64)] = 1
    """Each a process with ports of its own: ``port``, the one after it, ...; so for ``grpc_port``."""
    cpus: Annotated[float, Field(gt=0, le=1024)] = 0.1


class RouterSection(Section):
    liveness_timeout: Annotated[float, Field(ge=0.5, le=600)] = 1.95
    """Seconds without a report after which a worker is taken for lost; and without an answer after which the router
    itself is replaced."""
    max_waiting: Positive = 1024
    wait_timeout: Annotated[float, Field(gt=0, le=3600)] = 30.0
    retry_after: Annotated[float, Field(gt=0, le=3600)] = 1.0
    cpus: Annotated[float, Field(gt=0, le=1024)] = 0.1


class Limits(Section):
    max_model_len: Positive | None = None
    """Tokens of prompt and answer; the model's own context if it is not given."""
    max_body_bytes: Size = 8 << 20
    max_concurrent_requests: Positive = 1024
    """Sequences in flight; more are told to come back later."""


class TlsFiles(Section):
    """PEM files."""

    cert: File
    """The certificate, and those between it and a root that clients know."""
    key: File


class Security(Section):
    """Files are relative to the topology's; `baton keys` makes them."""

    keys: File | None = None
    """The cluster's key pair, with which its processes speak to each other. Without it they are on loopback."""
    api_keys: File | None = None
    """Who may use the gateways. Without it everybody may, and they are on loopback."""
    tls: TlsFiles | None = None
    """Of the gateways. Without it what clients say, API keys too, can be read on its way."""


class Debug(Section):
    record: File | None = None
    """A folder, relative to the file, in which every process writes down what its state machines were told and what
    they answered, for `baton replay`. Holds prompts, answers and keys, and grows with every step."""


class Topology(Section):
    """What runs. Made by ``load``, ``parse`` or ``with_overrides``, which check it as a whole."""

    model: Annotated[str, Field(min_length=1, max_length=4096)]
    """A folder, relative to the file or to the working directory, or a Hugging Face id."""
    served_model_name: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["int8", "fp8"] | None = None
    """Of the weights, while they are loaded."""
    device: Annotated[str, Field(pattern=r"^(cpu|cuda)$")] = "cpu"
    pools: Annotated[tuple[Pool, ...], Field(min_length=1, max_length=100, strict=False)]
    kv: KV = KV()
    disaggregation: Disaggregation = Disaggregation()
    gateway: Gateway = Gateway()
    router: RouterSection = RouterSection()
    limits: Limits = Limits()
    cluster: ClusterSection = ClusterSection()
    security: Security = Security()
    debug: Debug = Debug()

    _document: Document = PrivateAttr(default=Document("topology", {}))
    _base: Path = PrivateAttr(default=Path())

    @classmethod
    def load(cls, path: Path) -> Self:
        """The topology in a YAML file."""
        return cls._checked(read(path), path.resolve().parent)

    @classmethod
    def parse(cls, data: Mapping[str, Any], base: Path = Path()) -> Self:
        """The same from plain data; ``base`` is what a relative model folder is relative to."""
        return cls._checked(Document("topology", copy.deepcopy(dict(data))), base.resolve())

    def with_overrides(self, overrides: Mapping[str, Any]) -> Self:
        """This topology with some values replaced: ``{"kv.transport": "zmq", "pools.0.replicas": 1}``."""
        data = copy.deepcopy(self._document.data)
        for key, value in overrides.items():
            *way, last = key.split(".")
            place: Any = data
            for step in way:
                place = place[int(step)] if isinstance(place, list) else place.setdefault(step, {})
            place[int(last) if isinstance(place, list) else last] = value
        return self._checked(Document(self._document.file, data, self._document.lines), self._base)

    @classmethod
    def _checked(cls, document: Document, base: Path) -> Self:
        try:
            # A section whose keys are all commented out is the section's defaults.
            topology = cls.model_validate({key: value for key, value in document.data.items() if value is not None})
        except ValidationError as error:
            raise document.error(complaints(cls, document, error)) from None
        topology._document, topology._base = document, base
        impossible = list(topology._impossible())
        if impossible or document.problems:
            raise document.error(impossible)
        return topology

    @property
    def name(self) -> str:
        if self.cluster.name is not None:
            return self.cluster.name
        stem = re.sub(r"[^a-z0-9-]+", "-", Path(self._document.file).stem.lower()).strip("-")
        return stem[:40] if stem[:1].isalpha() else f"c-{stem}"[:40].rstrip("-")

    @property
    def base(self) -> Path:
        """The folder that a relative model path is relative to."""
        return self._base

    @property
    def cpus(self) -> float:
        """What all processes take together, in Ray's books."""
        workers = sum(pool.replicas * pool.tensor_parallel * pool.resources.cpus for pool in self.pools)
        return workers + self.router.cpus + self.gateway.cpus * self.gateway.replicas

    def file(self, path: str) -> Path:
        """Where a file is that the topology names."""
        return self._base / os.path.expanduser(path)

    def error(self, loc: Loc, text: str) -> TopologyError:
        """A complaint about the value at ``loc``, with file and line."""
        return self.errors([(loc, text)])

    def errors(self, found: Iterable[tuple[Loc, str]]) -> TopologyError:
        """Several at once, in the order of the file."""
        return self._document.error(found)

    def pools_of(self, *roles: Role) -> list[Pool]:
        return [pool for pool in self.pools if pool.role in roles]

    def _impossible(self) -> Iterator[tuple[Loc, str]]:
        """Values that are fine alone and cannot be together, or that nothing here can do yet."""
        yield from self._impossible_pools()
        kv, gateway = self.kv, self.gateway
        if kv.block_size & (kv.block_size - 1) or kv.block_size > 1024:
            yield ("kv", "block_size"), f"kv.block_size must be a power of two up to 1024, got {kv.block_size}"
        if kv.memory is not None and kv.num_blocks is not None:
            yield ("kv", "num_blocks"), "kv.memory and kv.num_blocks say the same thing; keep one of them"
        if kv.preemption == "swap" and not kv.swap_space:
            yield ("kv", "preemption"), "kv.preemption swap needs room to swap to; write kv.swap_space, such as 1GiB"
        if gateway.port and gateway.port + gateway.replicas > 65536:
            yield ("gateway", "replicas"), f"{gateway.replicas} ports from {gateway.port} on are too many; write fewer"
        yield from self._impossible_grpc()
        if self.device == "cuda":
            yield ("device",), "pools on GPUs come next; write cpu"

    def _impossible_grpc(self) -> Iterator[tuple[Loc, str]]:
        port, grpc, replicas = self.gateway.port, self.gateway.grpc_port, self.gateway.replicas
        if not grpc:
            return
        if grpc + replicas > 65536:
            yield ("gateway", "grpc_port"), f"{replicas} ports from {grpc} on are too many; write a lower one"
        if port and abs(port - grpc) < replicas:
            text = f"gateway.grpc_port {grpc} meets the ports of HTTP, {port} ... {port + replicas - 1}"
            yield ("gateway", "grpc_port"), f"{text}; write one that is {replicas} further"

    def _impossible_pools(self) -> Iterator[tuple[Loc, str]]:
        roles = {pool.role for pool in self.pools}
        seen: set[str] = set()
        seen_roles: set[str] = set()
        for index, pool in enumerate(self.pools):
            here: Loc = ("pools", index)
            if pool.name in seen:
                yield (*here, "name"), f"pool {pool.name!r} is there twice; give each pool a name of its own"
            if pool.name == "gateway" and self.gateway.replicas > 1:
                yield (*here, "name"), "the gateways are called gateway-0, gateway-1 ...; give the pool another name"
            seen.add(pool.name)
            if pool.prefill_chunk > pool.max_num_batched_tokens:
                text = f"prefill_chunk {pool.prefill_chunk} can never fit max_num_batched_tokens"
                yield (*here, "prefill_chunk"), f"{text} {pool.max_num_batched_tokens}; lower it, or raise the other"
            if pool.resources.gpus and self.device == "cpu":
                yield (*here, "resources", "gpus"), "resources.gpus asks for GPUs, but device is cpu; write gpus: 0"
            if pool.role in seen_roles:
                continue  # said already
            seen_roles.add(pool.role)
            if pool.role == "colocated" and len(roles) > 1:
                text = "a colocated pool does prefill and decode itself; remove it, or the prefill and decode pools"
                yield (*here, "role"), text
            if pool.role == "prefill" and "decode" not in roles:
                yield (*here, "role"), "a prefill pool needs a decode pool to hand over to; add one with role: decode"
            if pool.role == "decode" and "prefill" not in roles:
                yield (*here, "role"), "a decode pool needs a prefill pool; add one, or make this one role: colocated"
