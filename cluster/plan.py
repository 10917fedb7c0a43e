"""From a topology to what each process is told: the model is read here, and memory becomes blocks."""

import difflib
import re
import secrets
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cluster.api_keys import read_api_keys
from cluster.document import Loc
from cluster.errors import TopologyError
from cluster.keys import KeyFileError, read_keys
from cluster.model_folder import MODEL_FILES, ModelSource, fingerprint
from cluster.topology import Pool, Topology
from engine.core.errors import ModelError
from engine.core.kv_layout import KVLayout
from engine.core.scheduler import Preemption
from engine.core.shards import head_shard
from engine.models.config import ModelConfig
from gateway.auth import Tenant
from gateway.config import GatewayConfig, Tls
from gateway.core.limits import Limits
from gateway.core.session import SessionTimeouts
from kv_transfer.curve import CurveKeys
from messages.common import Role
from router.actor import RouterConfig
from router.core.machine import RouterSettings
from runtime.core.disaggregation import Disaggregation, Policy
from runtime.worker_config import WorkerConfig

LOOPBACK = "127.0.0.1"
DEFAULT_KV_MEMORY = 256 << 20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class PlannedWorker:
    """One rank of a worker: one process."""

    config: WorkerConfig
    pool: Pool


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first process starts."""

    topology: Topology
    model: Path
    model_config: ModelConfig
    served_model_name: str
    dtype: str
    """That the model computes in."""
    max_model_len: int
    transport: str
    cluster_key: bytes = field(repr=False)
    curve: CurveKeys | None = None
    """With which all processes speak to each other; None: in the clear, on loopback."""

    @property
    def spread(self) -> bool:
        """Whether processes may run on other hosts than this one, and so listen on their hosts' addresses: on a Ray
        that was there, if there are keys for it. Without keys a placement is kept where all hosts are on loopback."""
        wanted = self.curve is not None or any(pool.placement for pool in self.topology.pools)
        return wanted and self.topology.cluster.address != "local"

    @property
    def model_source(self) -> ModelSource:
        """Where other hosts find the model."""
        on_hub = not any(_is_dir(folder) for folder in _places(self.topology))
        return ModelSource(
            folder=str(self.model),
            hub_id=self.topology.model if on_hub else "",
            revision=self.model.name if on_hub else "",  # the Hub's cache has a folder for each
            fingerprint=fingerprint(self.model),
        )

    def workers(self, router: str) -> list[PlannedWorker]:
        """Every rank of all workers, given the router's address; a worker's ranks beside each other, 0 first."""
        return [
            PlannedWorker(self._worker(pool, index, rank, router), pool)
            for pool in self.topology.pools
            for index in range(pool.replicas)
            for rank in range(pool.tensor_parallel)
        ]

    def router_config(self, port: int = 0) -> RouterConfig:
        wanted = self.topology.router
        settings = RouterSettings(
            cluster_key=self.cluster_key,
            liveness_timeout=wanted.liveness_timeout,
            max_waiting=wanted.max_waiting,
            wait_timeout=wanted.wait_timeout,
            retry_after=wanted.retry_after,
            block_size=self.topology.kv.block_size,
            disaggregation=self.disaggregation,
        )
        return RouterConfig(host=LOOPBACK, port=port, curve=self.curve, settings=settings, record=self.record)

    @property
    def record(self) -> str:
        """The folder of ``debug.record``; empty where nothing is recorded."""
        folder = self.topology.debug.record
        return "" if folder is None else str(self.topology.base / folder)

    @property
    def disaggregation(self) -> Disaggregation:
        wanted = self.topology.disaggregation
        return Disaggregation(policy=Policy(wanted.policy), max_local_prefill_length=wanted.max_local_prefill_length)

    @property
    def gateways(self) -> tuple[str, ...]:
        """Their names."""
        count = self.topology.gateway.replicas
        return tuple(f"gateway-{index}" for index in range(count)) if count > 1 else ("gateway",)

    @property
    def tenants(self) -> tuple[Tenant, ...] | None:
        """Of ``security.api_keys`` as they are now, so that a gateway that is started again knows of new ones; raises
        ``KeyFileError``."""
        file = self.topology.security.api_keys
        return None if file is None else read_api_keys(self.topology.file(file))

    @property
    def tls(self) -> Tls | None:
        files = self.topology.security.tls
        if files is None:
            return None
        return Tls(str(self.topology.file(files.cert)), str(self.topology.file(files.key)))

    def gateway_config(self, router: str, index: int = 0) -> GatewayConfig:
        """Of one replica: each listens on a port of its own, one after the other, where they are not any free ones.
        Raises ``KeyFileError``."""
        topology = self.topology
        port = topology.gateway.port
        limits = Limits(
            max_body_bytes=topology.limits.max_body_bytes,
            max_sequences=topology.limits.max_concurrent_requests,
            retry_after=topology.router.retry_after,
        )
        return GatewayConfig(
            model=str(self.model),
            served_model_name=self.served_model_name,
            router=router,
            host=topology.gateway.host,
            port=port + index if port else 0,
            grpc_port=topology.gateway.grpc_port and topology.gateway.grpc_port + index,
            tenants=self.tenants,
            tls=self.tls,
            mailbox_host=LOOPBACK,
            curve=self.curve,
            max_model_len=self.max_model_len,
            limits=limits,
            record=self.record,
            # The router answers first.
            timeouts=SessionTimeouts(placement=topology.router.wait_timeout + SessionTimeouts().placement),
        )

    def _worker(self, pool: Pool, index: int, rank: int, router: str) -> WorkerConfig:
        return WorkerConfig(
            worker=f"{pool.name}-{index}",
            role=Role(pool.role),
            host=LOOPBACK,
            router=router,
            cluster_key=self.cluster_key,
            curve=self.curve,
            model=str(self.model),
            dtype=self.dtype,
            quantization=self.topology.quantization,
            device=self.topology.device,
            num_blocks=self.num_blocks(pool),
            block_size=self.topology.kv.block_size,
            kv_dtype=self.layout(pool).dtype,
            enable_prefix_caching=self.topology.kv.enable_prefix_caching,
            preemption=Preemption(self.topology.kv.preemption),
            swap_blocks=self.topology.kv.swap_space // self.layout(pool).block_bytes,
            transport=self.transport,
            disaggregation=self.disaggregation,
            max_num_seqs=pool.max_num_seqs,
            max_num_batched_tokens=pool.max_num_batched_tokens,
            prefill_chunk=pool.prefill_chunk,
            max_model_len=self.max_model_len,
            record=self.record,
            threads=pool.threads,
            tensor_parallel=pool.tensor_parallel,
            rank=rank,
            chaos=self.topology.cluster.chaos,
        )

    def layout(self, pool: Pool) -> KVLayout:
        """Of the KV blocks of the pool's workers, all ranks together."""
        return _layout(self.topology, pool, self.model_config, self.dtype)

    def num_blocks(self, pool: Pool) -> int:
        """Of each of the pool's workers."""
        kv = self.topology.kv
        return kv.num_blocks or (kv.memory or DEFAULT_KV_MEMORY) // self.layout(pool).block_bytes

    def kv_memory(self, pool: Pool) -> int:
        """Bytes of one worker's KV."""
        return self.num_blocks(pool) * self.layout(pool).block_bytes


def make_plan(topology: Topology, *, download: bool = True) -> Plan:
    """``TopologyError`` where topology and model do not go together. Fetches a model from the Hub if ``download``."""
    folder = find_model(topology, download=download)
    try:
        config = ModelConfig.from_folder(folder)
        dtype = config.resolve_dtype(topology.dtype)
        # Raises where no dtype of KV would do.
        KVLayout(config.num_layers, config.num_kv_heads, config.head_dim, topology.kv.block_size, dtype)
    except (ModelError, ValueError) as error:
        raise topology.error(("model",), str(error)) from error
    if not any(folder.glob("*.safetensors")):
        raise topology.error(("model",), f"{folder} holds no *.safetensors; other weight formats are not read")
    max_model_len = topology.limits.max_model_len or config.max_position_embeddings
    if max_model_len > config.max_position_embeddings:
        text = f"the model's context is {config.max_position_embeddings} tokens, got {max_model_len}; lower it"
        raise topology.error(("limits", "max_model_len"), f"limits.max_model_len: {text}")
    plan = Plan(
        topology=topology,
        model=folder,
        model_config=config,
        served_model_name=topology.served_model_name or folder.name,
        dtype=dtype,
        max_model_len=max_model_len,
        transport=topology.kv.transport,
        cluster_key=secrets.token_bytes(32),
        curve=_curve(topology),
    )
    problems = [*_rank_problems(plan), *_kv_problems(plan), *_security_problems(plan)]
    if problems:
        raise topology.errors(problems)
    return plan


def _curve(topology: Topology) -> CurveKeys | None:
    file = topology.security.keys
    try:
        return None if file is None else read_keys(topology.file(file))
    except KeyFileError as error:
        raise topology.error(("security", "keys"), f"security.keys: {error}") from error


def find_model(topology: Topology, *, download: bool) -> Path:
    """The model's folder: relative to the file, to the working directory, or from the Hugging Face Hub."""
    places = _places(topology)
    for folder in places:
        if _is_dir(folder):
            return folder.resolve()
    if _may_be_hub_id(topology):
        return _from_hub(topology, download=download)
    known = {str(Path(topology.model).parent / near.name): None for folder in places for near in _models_beside(folder)}
    close = difflib.get_close_matches(topology.model, known, n=1)
    advice = f"did you mean {close[0]!r}?" if close else "name a folder that holds config.json, or a Hugging Face id"
    where = "" if Path(topology.model).is_absolute() else f" beside this file or in {Path.cwd()}"
    raise topology.error(("model",), f"there is no folder {topology.model!r}{where}; {advice}")


def is_hub_id(topology: Topology) -> bool:
    """Whether the model is still to be fetched from the Hub."""
    try:
        find_model(topology, download=False)
    except TopologyError:
        return _may_be_hub_id(topology)
    return False


def _places(topology: Topology) -> list[Path]:
    """Where the model's folder may be."""
    try:
        model = Path(topology.model).expanduser()
    except RuntimeError as error:  # ~somebody
        raise topology.error(("model",), f"{topology.model!r}: nobody here has that home; write it out") from error
    return [topology.base / model, Path.cwd() / model]


def _may_be_hub_id(topology: Topology) -> bool:
    """``models/tiny`` beside a folder ``models`` is a folder's name."""
    return _HUB_ID.fullmatch(topology.model) is not None and not any(_is_dir(p.parent) for p in _places(topology))


def _models_beside(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.parent.iterdir() if (path / "config.json").is_file()]
    except (OSError, ValueError):
        return []


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # too long, or not allowed to look
        return False


def _from_hub(topology: Topology, *, download: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(topology.model, allow_patterns=MODEL_FILES, local_files_only=not download)
        ).resolve()
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        if not download:
            reason = "it has not been downloaded yet"
        text = (
            f"{topology.model!r} is no folder beside this file, and not to be had from the Hugging Face Hub: {reason}"
        )
        raise topology.error(("model",), text) from error


def _layout(topology: Topology, pool: Pool, config: ModelConfig, dtype: str) -> KVLayout:
    kv_dtype = pool.kv_dtype or topology.kv.dtype
    stored = dtype if kv_dtype == "auto" else kv_dtype
    # Where heads are fewer than ranks, several ranks hold the same one.
    heads = max(config.num_kv_heads, pool.tensor_parallel)
    return KVLayout(config.num_layers, heads, config.head_dim, topology.kv.block_size, stored)


def _rank_problems(plan: Plan) -> Iterator[tuple[Loc, str]]:
    """Pools of which some rank would have nothing to hold."""
    heads, kv_heads = plan.model_config.num_heads, plan.model_config.num_kv_heads
    for index, pool in enumerate(plan.topology.pools):
        try:
            head_shard(heads, kv_heads, 0, pool.tensor_parallel)
        except ValueError as error:
            text = f"tensor_parallel is {pool.tensor_parallel}: {error}; write {heads} or less"
            yield ("pools", index, "tensor_parallel"), text


def _kv_problems(plan: Plan) -> Iterator[tuple[Loc, str]]:
    """What is wrong with the pools' KV: one complaint about its shape, then those about what goes together."""
    topology = plan.topology
    for index, pool in enumerate(topology.pools):
        try:
            plan.layout(pool)
        except ValueError as error:
            yield _kv_dtype_of(index, pool), str(error)
            return
    swap, most = topology.kv.swap_space, max(plan.layout(pool).block_bytes for pool in topology.pools)
    if 0 < swap < most:
        yield ("kv", "swap_space"), f"kv.swap_space: {size(swap)} hold no block of {size(most)}; raise it, or write 0"
    smallest = min(topology.pools, key=lambda pool: plan.num_blocks(pool) * plan.layout(pool).block_size)
    if plan.num_blocks(smallest) < plan.layout(smallest).blocks_for(plan.max_model_len):
        yield _too_small(plan, smallest)
    for index, pool in enumerate(topology.pools):
        for source in topology.pools_of(Role.PREFILL) if pool.role == "decode" else []:
            here, there = plan.layout(source), plan.layout(pool)
            if here.quantized and there.dtype != here.dtype:
                text = f"pool {source.name!r} hands over {here.dtype} KV, which cannot become {there.dtype}"
                advice = f"write kv_dtype: {here.dtype} here, or a float dtype there"
                yield _kv_dtype_of(index, pool), f"{text}; {advice}"


def _security_problems(plan: Plan) -> Iterator[tuple[Loc, str]]:
    """Files without which no gateway would start."""
    try:
        _ = plan.tenants
    except KeyFileError as error:
        yield ("security", "api_keys"), f"security.api_keys: {error}"
    if plan.tls is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(plan.tls.cert, plan.tls.key, password=_no_password)
        except (OSError, ValueError) as error:  # ssl's own errors are OSErrors
            reason = getattr(error, "strerror", None) or error
            yield ("security", "tls"), f"security.tls: {plan.tls.cert} and {plan.tls.key} cannot be used: {reason}"


def _no_password() -> str:
    raise ValueError("the key is encrypted; nobody is there to say its password")


def _kv_dtype_of(index: int, pool: Pool) -> Loc:
    """Where the dtype of a pool's KV is said."""
    return ("pools", index, "kv_dtype") if pool.kv_dtype is not None else ("kv", "dtype")


def _too_small(plan: Plan, pool: Pool) -> tuple[Loc, str]:
    layout, num_blocks, max_model_len = plan.layout(pool), plan.num_blocks(pool), plan.max_model_len
    needed = layout.blocks_for(max_model_len)
    advice = "raise it"
    if num_blocks:
        advice += f", or set limits.max_model_len to {num_blocks * layout.block_size} or less"
    if plan.topology.kv.num_blocks is not None:
        text = f"kv.num_blocks: {num_blocks} blocks are less than the {needed} of one context"
        return ("kv", "num_blocks"), f"{text} of {max_model_len} tokens; {advice}"
    memory, least = size(num_blocks * layout.block_bytes), size(needed * layout.block_bytes)
    text = f"kv.memory: {memory} of blocks are less than the {least} of one context of {max_model_len} tokens"
    return ("kv", "memory"), f"{text}; {advice}"


def size(count: float) -> str:
    """Bytes for people: ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
