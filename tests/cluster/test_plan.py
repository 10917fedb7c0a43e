"""From a topology to what each process is told."""

import json
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import TopologyError
from cluster.plan import DEFAULT_KV_MEMORY, Plan, is_hub_id, make_plan, size
from cluster.processes import needs
from cluster.topology import Topology
from messages.common import Role

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs" / "topologies").glob("*.yaml"))
TOKEN_BYTES = 6 * 2 * 4 * 32 * 2
"""Of tiny-llama: layers x (K, V) x KV heads x head size x bytes of bfloat16."""
COLOCATED = [{"name": "a", "role": "colocated"}]


@pytest.fixture
def plan_of(tiny_llama: Path) -> Any:
    def plan(pools: list[dict[str, Any]] | None = None, **sections: Any) -> Plan:
        return make_plan(Topology.parse({"model": str(tiny_llama), "pools": pools or COLOCATED, **sections}))

    return plan


def complaint(topology: Topology, **options: Any) -> str:
    with pytest.raises(TopologyError) as caught:
        make_plan(topology, **options)
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_topologies_can_be_planned(path: Path, tiny_llama: Path) -> None:
    plan = make_plan(Topology.load(path))
    assert plan.model == tiny_llama
    assert plan.served_model_name == "tiny-llama"
    assert len(plan.workers("tcp://router:1")) == sum(pool.replicas for pool in plan.topology.pools)


def test_every_worker_is_told_its_pools_settings(plan_of: Any) -> None:
    pools = [
        {"name": "p", "role": "prefill", "replicas": 2, "prefill_chunk": 64, "threads": 3},
        {"name": "d", "role": "decode", "max_num_seqs": 5, "max_num_batched_tokens": 777},
    ]
    plan = plan_of(pools, kv={"block_size": 32, "num_blocks": 200, "transport": "zmq"}, limits={"max_model_len": 512})
    p0, p1, d0 = (worker.config for worker in plan.workers("tcp://router:1"))
    assert [(c.worker, c.role) for c in (p0, p1, d0)] == [
        ("p-0", Role.PREFILL), ("p-1", Role.PREFILL), ("d-0", Role.DECODE),
    ]  # fmt: skip
    assert (p0.prefill_chunk, p0.threads, d0.prefill_chunk, d0.threads) == (64, 3, 512, 1)
    assert (d0.max_num_seqs, d0.max_num_batched_tokens) == (5, 777)
    assert p0.quantization is None
    for config in (p0, p1, d0):
        assert (config.router, config.host, config.device) == ("tcp://router:1", "127.0.0.1", "cpu")
        assert (config.block_size, config.num_blocks, config.transport, config.max_model_len) == (32, 200, "zmq", 512)
        assert (config.dtype, config.cluster_key) == ("bfloat16", plan.cluster_key)


def test_every_cluster_has_a_key_of_its_own(plan_of: Any) -> None:
    assert len(plan_of().cluster_key) == 32
    assert plan_of().cluster_key != plan_of().cluster_key


@pytest.mark.parametrize("transport", ["auto", "shm", "zmq"])
def test_workers_are_told_the_transport_that_is_named(plan_of: Any, transport: str) -> None:
    assert {worker.config.transport for worker in plan_of(kv={"transport": transport}).workers("r")} == {transport}


@pytest.mark.parametrize(
    ("kv", "blocks"),
    [
        ({}, DEFAULT_KV_MEMORY // (16 * TOKEN_BYTES)),
        ({"memory": "96MiB"}, (96 << 20) // (16 * TOKEN_BYTES)),
        ({"memory": "96MiB", "block_size": 32}, (96 << 20) // (32 * TOKEN_BYTES)),
        ({"num_blocks": 1000}, 1000),
    ],
)
def test_memory_becomes_blocks(plan_of: Any, kv: dict[str, Any], blocks: int) -> None:
    plan = plan_of(kv=kv)
    (pool,) = plan.topology.pools
    assert plan.num_blocks(pool) == blocks
    assert plan.kv_memory(pool) == blocks * plan.layout(pool).block_bytes


def test_the_pool_must_hold_one_whole_context(plan_of: Any) -> None:
    assert plan_of(kv={"num_blocks": 256}).max_model_len == 4096
    assert plan_of(kv={"num_blocks": 2}, limits={"max_model_len": 32}).max_model_len == 32
    with pytest.raises(
        TopologyError, match=r"255 blocks are less than the 256 of one .* limits\.max_model_len to 4080"
    ):
        plan_of(kv={"num_blocks": 255})
    with pytest.raises(
        TopologyError, match=r"kv\.memory: 10\.0 MiB of blocks are less than the 12\.0 MiB of one conte"
    ):
        plan_of(kv={"memory": "10MiB"})


def test_each_pool_has_as_many_blocks_of_its_own_kv_as_fit_its_memory(plan_of: Any) -> None:
    pools = [{"name": "p", "role": "prefill"}, {"name": "d", "role": "decode", "kv_dtype": "int8"}]
    prefill, decode = (worker.config for worker in plan_of(pools, kv={"memory": "96MiB"}).workers("r"))
    assert (prefill.dtype, prefill.kv_dtype, prefill.num_blocks) == ("bfloat16", "bfloat16", (96 << 20) // (48 << 10))
    assert (decode.dtype, decode.kv_dtype) == ("bfloat16", "int8")
    assert decode.num_blocks == (96 << 20) // (6 * 2 * 4 * (16 * 32 + 16))
    (fp8,) = plan_of(kv={"dtype": "fp8"}, dtype="float32").workers("r")
    assert (fp8.config.dtype, fp8.config.kv_dtype) == ("float32", "fp8")


@pytest.mark.parametrize(
    ("kv", "pools", "told"),
    [
        ("int8", (None, "bfloat16"), "pool 'p' hands over int8 KV, which cannot become bfloat16; write kv_dtype: int8"),
        ("auto", ("fp8", None), "pool 'p' hands over fp8 KV, which cannot become bfloat16"),
        ("auto", ("fp8", "int8"), "pool 'p' hands over fp8 KV, which cannot become int8"),
    ],
)
def test_pools_whose_kv_cannot_be_handed_over_are_refused(
    plan_of: Any, kv: str, pools: tuple[str | None, str | None], told: str
) -> None:
    described = [
        {"name": role[0], "role": role, "kv_dtype": dtype}
        for role, dtype in zip(("prefill", "decode"), pools, strict=True)
    ]
    with pytest.raises(TopologyError, match=told):
        plan_of(described, kv={"dtype": kv})
    for good in (("float32", "int8"), ("int8", "int8"), ("fp8", "fp8"), ("float32", "bfloat16")):
        for pool, dtype in zip(described, good, strict=True):
            pool["kv_dtype"] = dtype
        assert [worker.config.kv_dtype for worker in plan_of(described).workers("r")] == [*good]


def test_blocks_that_no_scale_can_follow_are_refused(tmp_path: Path, tiny_llama: Path) -> None:
    config = {**json.loads((tiny_llama / "config.json").read_text()), "head_dim": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    topology = Topology.parse({"model": str(tmp_path), "pools": COLOCATED, "kv": {"dtype": "int8", "block_size": 1}})
    assert "int8 KV needs head_dim * block_size to be a multiple of 16, got 8 * 1" in complaint(topology)


def test_the_context_is_not_stretched(plan_of: Any) -> None:
    with pytest.raises(TopologyError, match="the model's context is 4096 tokens, got 4097; lower it"):
        plan_of(limits={"max_model_len": 4097})


def test_actors_ask_ray_for_their_pools_resources(plan_of: Any) -> None:
    resources = {"cpus": 0.5, "memory": "1GiB"}
    (worker,) = plan_of([{**COLOCATED[0], "resources": resources}]).workers("r")
    assert needs(worker) == {"CPU": 0.5, "memory": 1 << 30}
    (plain,) = plan_of().workers("r")
    assert needs(plain) == {"CPU": 0.25}


def test_the_models_folder_is_looked_for_beside_the_file_first(
    tmp_path: Path, monkeypatch: Any, tiny_llama: Path
) -> None:
    here, beside = tmp_path / "here", tmp_path / "there"
    for place in (here, beside):
        place.mkdir()
        (place / "m").symlink_to(tiny_llama)
    file = beside / "t.yaml"
    file.write_text("model: m\npools: [{name: a, role: colocated}]\n")
    monkeypatch.chdir(here)
    topology = Topology.load(file)
    assert make_plan(topology).model == tiny_llama
    (beside / "m").unlink()
    (beside / "m").mkdir()
    assert f"{beside}/m/config.json does not exist" in complaint(topology)
    (beside / "m").rmdir()
    assert make_plan(topology).model == tiny_llama


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("tiny-lama", "there is no folder 'tiny-lama' beside this file or in {cwd}; did you mean 'tiny-llama'?"),
        ("../models/tiny-lama", "; did you mean '../models/tiny-llama'?"),
        ("{cwd}/tinyllama", "there is no folder '{cwd}/tinyllama'; did you mean '{cwd}/tiny-llama'?"),
        ("something-else", "; name a folder that holds config.json, or a Hugging Face id"),
        ("x" * 4000, "there is no folder"),
        ("a\0b", "there is no folder"),
        ("~nobody-of-that-name/m", "nobody here has that home"),
    ],
)
def test_a_model_that_is_not_there_is_told_from_one_that_is(
    tmp_path: Path, monkeypatch: Any, tiny_llama: Path, model: str, why: str
) -> None:
    cwd = tmp_path / "models"
    cwd.mkdir()
    (cwd / "tiny-llama").symlink_to(tiny_llama)
    monkeypatch.chdir(cwd)
    topology = Topology.parse({"model": model.replace("{cwd}", str(cwd)), "pools": COLOCATED}, cwd)
    assert why.replace("{cwd}", str(cwd)) in complaint(topology)
    assert not is_hub_id(topology)


def test_a_mistyped_folder_is_not_taken_for_an_id_of_the_hub(monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    topology = Topology.parse({"model": "models/tiny-lama", "pools": COLOCATED})
    assert not is_hub_id(topology)
    assert "did you mean 'models/tiny-llama'?" in complaint(topology)
    hub = Topology.parse({"model": "nobody-here/has-this", "pools": COLOCATED})
    assert is_hub_id(hub)
    assert "it has not been downloaded yet" in complaint(hub, download=False)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (None, r"config\.json does not exist; a model folder holds config\.json and \*\.safetensors"),
        ("{", r"config\.json cannot be read"),
        ("[]", "holds no JSON object"),
        ({"architectures": ["BertModel"]}, "BertModel is not supported: it is no causal language model"),
        ({"num_hidden_layers": 0}, "has no empty side"),
        ({"num_hidden_layers": "many"}, r"config\.json: ValueError"),
        ({"torch_dtype": "float8"}, "dtype must be auto, float32, bfloat16, float16; got 'float8'"),
        ({}, r"holds no \*\.safetensors; other weight formats are not read"),
    ],
)
def test_a_folder_that_holds_no_model_of_ours_says_why(
    tmp_path: Path, tiny_llama: Path, config: dict[str, Any] | str | None, why: str
) -> None:
    if isinstance(config, dict):
        config = json.dumps({**json.loads((tiny_llama / "config.json").read_text()), **config})
    folder = tmp_path / "m"
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(config)
    file = tmp_path / "t.yaml"
    file.write_text("pools: [{name: a, role: colocated}]\nmodel: m\n")
    with pytest.raises(TopologyError, match=rf"^{file}:2: .*{why}"):
        make_plan(Topology.load(file))


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (96 << 20, "96.0 MiB"), (1 << 45, "32.0 TiB")]
)
def test_sizes_are_written_for_people(count: int, text: str) -> None:
    assert size(count) == text


NAMES = st.text(string.ascii_lowercase + string.digits + "-", max_size=12).map(lambda rest: f"p{rest}")
REPLICAS = st.integers(1, 20)
SETTINGS = st.fixed_dictionaries(
    {"replicas": REPLICAS},
    optional={
        "max_num_seqs": st.integers(1, 512),
        "prefill_chunk": st.integers(1, 2048),
        "threads": st.integers(1, 64),
        "resources": st.fixed_dictionaries(
            {}, optional={"cpus": st.floats(0.01, 64), "memory": st.integers(1, 1 << 40) | st.just("1.5GiB")}
        ),
    },
)


@st.composite
def topologies(draw: st.DrawFn) -> dict[str, Any]:
    """Any valid topology of tiny-llama, as plain data."""
    names = draw(st.lists(NAMES, min_size=2, max_size=5, unique=True))
    if draw(st.booleans()):
        roles = ["colocated"] * len(names)
    else:
        others = draw(
            st.lists(st.sampled_from(["prefill", "decode"]), min_size=len(names) - 2, max_size=len(names) - 2)
        )
        roles = ["prefill", "decode", *others]
    pools = [{"name": name, "role": role, **draw(SETTINGS)} for name, role in zip(names, roles, strict=True)]
    kv = draw(
        st.fixed_dictionaries(
            {"num_blocks": st.integers(256, 100_000)},
            optional={
                "block_size": st.sampled_from([16, 32, 64]),
                "transport": st.sampled_from(["auto", "shm", "zmq"]),
            },
        )
    )
    return {"model": str(ROOT / "models" / "tiny-llama"), "pools": pools, "kv": kv}


@settings(max_examples=60)
@given(topologies())
def test_any_topology_becomes_as_many_workers_as_it_asks_for_each_with_a_name_of_its_own(data: dict[str, Any]) -> None:
    topology = Topology.parse(data)
    plan = make_plan(topology)
    workers = plan.workers("tcp://router:1")
    names = [worker.config.worker for worker in workers]
    assert len(set(names)) == len(names) == sum(pool["replicas"] for pool in data["pools"])
    assert not {"router", "gateway"} & set(names)
    for pool in data["pools"]:
        mine = [worker for worker in workers if worker.pool.name == pool["name"]]
        assert [worker.config.worker for worker in mine] == [f"{pool['name']}-{i}" for i in range(pool["replicas"])]
        assert {worker.config.role for worker in mine} == {Role(pool["role"])}
    wanted = sum(needs(worker)["CPU"] for worker in workers) + topology.router.cpus + topology.gateway.cpus
    assert topology.cpus == pytest.approx(wanted)


@settings(max_examples=60)
@given(topologies())
def test_a_topology_written_and_read_again_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]
) -> None:
    file = tmp_path_factory.getbasetemp() / "round.yaml"
    file.write_text(yaml.safe_dump(data))
    topology = Topology.load(file)
    assert topology.model_dump() == Topology.parse(data).model_dump()
    assert topology.with_overrides({}).model_dump() == topology.model_dump()
    file.write_text(yaml.safe_dump(topology.model_dump(mode="json", exclude_none=True)))
    assert Topology.load(file).model_dump() == topology.model_dump()


def test_every_worker_quantises_its_weights_where_the_topology_says_so(plan_of: Any) -> None:
    plan = plan_of(quantization="fp8")
    assert [worker.config.quantization for worker in plan.workers("tcp://router:1")] == ["fp8"]
    with pytest.raises(TopologyError, match="quantization"):
        plan_of(quantization="awq")


def test_a_model_that_only_transformers_knows_is_planned_by_its_config(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 3, "n_head": 4, "n_embd": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    plan = make_plan(Topology.parse({"model": str(tmp_path), "pools": COLOCATED, "dtype": "float32"}))
    assert not plan.model_config.native
    layout = plan.layout(plan.topology.pools[0])
    assert (layout.num_layers, layout.num_kv_heads, layout.head_dim) == (3, 4, 16)


def test_each_gateway_has_a_name_and_a_port_of_its_own() -> None:
    def gateways(port: int, replicas: int) -> list[tuple[str, int]]:
        topology = Topology.load(ROOT / "configs/topologies/local.yaml")
        plan = make_plan(topology.with_overrides({"gateway.port": port, "gateway.replicas": replicas}))
        return [(name, plan.gateway_config("r", index).port) for index, name in enumerate(plan.gateways)]

    assert gateways(8000, 1) == [("gateway", 8000)]
    assert gateways(8000, 3) == [("gateway-0", 8000), ("gateway-1", 8001), ("gateway-2", 8002)]
    assert gateways(0, 2) == [("gateway-0", 0), ("gateway-1", 0)]


def test_so_has_grpc_where_it_is_wanted() -> None:
    def ports(**gateway: int) -> list[int | None]:
        topology = Topology.load(ROOT / "configs/topologies/local.yaml")
        plan = make_plan(topology.with_overrides({f"gateway.{key}": value for key, value in gateway.items()}))
        return [plan.gateway_config("r", index).grpc_port for index in range(len(plan.gateways))]

    assert ports() == [None]
    assert ports(grpc_port=9000, replicas=2) == [9000, 9001]
    assert ports(grpc_port=0, replicas=2) == [0, 0]
