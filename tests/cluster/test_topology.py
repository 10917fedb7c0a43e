"""A wrong topology is refused with one line for each thing that is wrong: file, line, and what to do."""

from pathlib import Path

import pytest

from cluster.errors import TopologyError
from cluster.topology import Topology, parse_size

SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "topologies").glob("*.yaml"))

MODEL = "model: m\n"
POOL = "pools:\n  - {name: a, role: colocated}\n"
GOOD = MODEL + POOL
"""Three lines long."""

# What the file holds, and the beginning of every complaint: its line and text.
WRONG = {
    "empty": ("", ["1: the file is empty; start with `model:`"]),
    "comments only": ("# model: m\n", ["1: the file is empty"]),
    "a list": ("- model\n", ["1: the file holds no mapping"]),
    "a word": ("model\n", ["1: the file holds no mapping"]),
    "two documents": (GOOD + "---\nmodel: x\n", ["4: a second document starts here"]),
    "a tab": ("model: m\npools:\n\t- name: a\n", ["3: a tab stands where YAML wants spaces; indent with spaces"]),
    "wrong indentation": ("model: m\n  pools: []\n", ["2: the YAML cannot be read: mapping values are not allowed"]),
    "an open quote": ('model: "m\n', ["2: the YAML cannot be read: found unexpected end of stream; check ind"]),
    "an open bracket": ("model: m\npools: [{name: a\n", ["3: the YAML cannot be read: "]),
    "an unknown alias": (GOOD + "kv: *x\n", ["4: the YAML cannot be read: found undefined alias"]),
    "control characters": ("model: m\x00\n", ["1: the file holds control characters"]),
    "nothing but an unknown key": (
        "modle: m\n",
        ["1: 'model' is missing; add it", "1: 'pools' is missing; add it", "1: unknown key 'modle'; did you mean 'mod"],
    ),
    "unknown keys": (
        GOOD + "kv:\n  blok_size: 16\n  colour: red\n",
        [
            "5: unknown key 'blok_size' in kv; did you mean 'block_size'?",
            "6: unknown key 'colour' in kv; known here: block_size, memory, num_blocks, transport, "
            "enable_prefix_caching, preemption, swap_space, dtype",
        ],
    ),
    "unknown keys in a pool": (
        "model: m\npools:\n  - name: a\n    rol: colocated\n    resources: {cpu: 1}\n",
        [
            "3: 'role' is missing in pools[0]; add it",
            "4: unknown key 'rol' in pools[0]; did you mean 'role'?",
            "5: unknown key 'cpu' in pools[0].resources; did you mean 'cpus'?",
        ],
    ),
    "keys that stand twice": (
        "model: m\nmodel: n\npools:\n  - {name: a, role: colocated, name: b}\n",
        ["2: 'model' stands twice, first on line 1; remove", "4: 'name' stands twice, first on line 4"],
    ),
    "keys that are no text": (GOOD + "1: 2\n[x]: 3\n", ["4: keys must be plain text", "5: keys must be plain text"]),
    "a merge key": (GOOD + "<<: {device: cpu}\n", ["4: keys must be plain text"]),
    "tags": (
        "model: !!python/object/apply:os.system [id]\npools: !include x\n",
        ["1: the tag !!python/object/apply:os.system is not allowed", "2: the tag !include is not allowed"],
    ),
    "a bad tag and a bad number": (
        "model: !env X\n" + POOL + "kv: {block_size: 12.5}\n",
        ["1: the tag !env is not allowed", "4: kv.block_size must be a whole number, got 12.5"],
    ),
    "a date": ("model: 2024-01-01\n" + POOL, ["1: '2024-01-01' reads as a date; put it in quotes"]),
    "a number of many digits": (
        GOOD + f"kv: {{block_size: {'9' * 5000}}}\n",
        ["4: '9999999999999999999999999999999999999999' cannot be read"],
    ),
    "texts where numbers belong": (
        GOOD + 'gateway: {port: "8000"}\nrouter: {wait_timeout: "1.5", retry_after: soon}\n',
        [
            "4: gateway.port must be a whole number, got '8000'; remove the quotes",
            "5: router.wait_timeout must be a number, got '1.5'; remove the quotes",
            "5: router.retry_after must be a number, got 'soon'",
        ],
    ),
    "numbers where texts belong": (
        "model: 7\npools:\n  - {name: no, role: colocated}\n",
        ["1: model must be text, got 7; put it in quotes", "3: pools[0].name must be text, got False; put it in quot"],
    ),
    "a word for a section": (GOOD + "kv: 96MiB\n", ["4: kv must hold keys of its own, indented below it, got '96Mi"]),
    "one pool and no list": (
        "model: m\npools:\n  name: a\n  role: colocated\n",
        ["2: pools must be a list, each item starting with `- `"],
    ),
    "pools that are none": (
        "model: m\npools:\n  - a\n  -\n",
        ["3: pools[0] must hold keys of its own, indented below it, got 'a'", "4: pools[1] must hold keys of its own"],
    ),
    "no pools": ("model: m\npools: []\n", ["2: pools is empty; give at least one"]),
    "no model": (POOL, ["1: 'model' is missing; add it"]),
    "an empty model": ("model: ''\n" + POOL, ["1: model is empty"]),
    "an endless name": (f"model: {'x' * 5000}\n" + POOL, ["1: model is too long; 4096 is the most"]),
    "counts below one": (
        "model: m\npools:\n  - {name: a, role: colocated, replicas: 0, max_num_seqs: -3, threads: 0}\n"
        "kv: {num_blocks: 0}\nlimits: {max_model_len: 0}\n",
        [
            "3: pools[0].replicas must be at least 1, got 0",
            "3: pools[0].max_num_seqs must be at least 1, got -3",
            "3: pools[0].threads must be at least 1, got 0",
            "4: kv.num_blocks must be at least 1, got 0",
            "5: limits.max_model_len must be at least 1, got 0",
        ],
    ),
    "counts beyond reason": (
        "model: m\npools:\n  - {name: a, role: colocated, replicas: 1001, threads: 1000000}\ngateway: {port: 65536}\n",
        [
            "3: pools[0].replicas must be at most 1,000, got 1001",
            "3: pools[0].threads must be at most 1,024",
            "4: gateway.port must be at most 65,535, got 65536",
        ],
    ),
    "CPUs that are no amount": (
        "model: m\npools:\n  - name: a\n    role: colocated\n    resources: {cpus: 0}\n"
        "gateway: {cpus: .nan}\nrouter: {cpus: .inf}\n",
        [
            "5: pools[0].resources.cpus must be more than 0, got 0",
            "6: gateway.cpus must be a finite number, got nan",
            "7: router.cpus must be a finite number, got inf",
        ],
    ),
    "half a worker": (
        "model: m\npools:\n  - {name: a, role: colocated, replicas: 1.5}\n",
        ["3: pools[0].replicas mus"],
    ),
    "sizes that are none": (
        GOOD + "kv: {memory: lots}\nlimits: {max_body_bytes: 8 XB}\n",
        [
            "4: kv.memory: 'lots' must be a size such as 256MiB or 2GiB",
            "5: limits.max_body_bytes: '8 XB' must be a size such as",
        ],
    ),
    "nowhere to swap to": (
        GOOD + "kv: {preemption: swap}\n",
        ["4: kv.preemption swap needs room to swap to; write kv.swap_space"],
    ),
    "no memory": (GOOD + "kv: {memory: 0MiB}\n", ["4: kv.memory must be more than 0, got '0MiB'"]),
    "less than no memory": (GOOD + "kv: {memory: -96MiB}\n", ["4: kv.memory: '-96MiB' must be a size such as"]),
    "a role that there is not": (
        "model: m\npools:\n  - {name: a, role: collocated}\n",
        ["3: pools[0].role must be prefill, decode or colocated, got 'collocated'"],
    ),
    "names that would not do": (
        "model: m\npools:\n  - {name: Pool A, role: colocated}\ncluster: {name: ../x}\n",
        [
            "3: pools[0].name must be a short name of lower-case letters, digits and dashes, such as prefill, got 'Po",
            "4: cluster.name must be a short name of lower-case letters",
        ],
    ),
    "a gateway open to every network": (
        GOOD + "gateway: {host: 0.0.0.0}\n",
        ["4: gateway.host: '0.0.0.0' would liste"],
    ),
    "a gateway open to every network of IPv6": (
        GOOD + "gateway: {host: '::'}\n",
        ["4: gateway.host: '::' would listen"],
    ),
    "a host that is none": (
        GOOD + "gateway: {host: a b}\n",
        ["4: gateway.host: 'a b' is no address or host name; wri"],
    ),
    "Ray Client": (
        GOOD + "cluster: {address: 'ray://a:1'}\n",
        ["4: cluster.address: 'ray://a:1' means Ray Client, whi"],
    ),
    "a Ray address that is none": (
        GOOD + "cluster: {address: here}\n",
        ["4: cluster.address: 'here' must be local (sta"],
    ),
    "a transport that there is not": (
        GOOD + "kv: {transport: rdma}\n",
        ["4: kv.transport must be auto, shm, nccl or zmq, g"],
    ),
    "prefill alone": ("model: m\npools:\n  - {name: a, role: prefill}\n", ["3: a prefill pool needs a decode pool"]),
    "decode alone": (
        "model: m\npools:\n  - {name: a, role: decode}\n",
        ["3: a decode pool needs a prefill pool; add one"],
    ),
    "colocated beside others": (
        "model: m\npools:\n  - {name: a, role: prefill}\n  - {name: b, role: decode}\n  - {name: c, role: colocated}\n",
        ["5: a colocated pool does prefill and decode itself; remove it"],
    ),
    "impossible together": (
        "model: m\ndevice: cuda\npools:\n"
        "  - {name: a, role: prefill, prefill_chunk: 4096}\n"
        "  - {name: a, role: decode, resources: {gpus: 1}}\n"
        "kv: {block_size: 12, memory: 1GiB, num_blocks: 5}\ngateway: {replicas: 2, port: 65535}\n",
        [
            "2: pools on GPUs come next; write cpu",
            "4: prefill_chunk 4096 can never fit max_num_batched_tokens 2048; lower it, or raise the other",
            "5: pool 'a' is there twice; give each pool a name of its own",
            "6: kv.block_size must be a power of two up to 1024, got 12",
            "6: kv.memory and kv.num_blocks say the same thing; keep one of them",
            "7: 2 ports from 65535 on are too many; write fewer",
        ],
    ),
    "ports of gRPC that meet others": (
        GOOD + "gateway: {replicas: 2, port: 65500, grpc_port: 65501}\n",
        ["4: gateway.grpc_port 65501 meets the ports of HTTP, 65500 ... 65501; write one that is 2 further"],
    ),
    "ports of gRPC that are too many": (
        GOOD + "gateway: {replicas: 2, grpc_port: 65535}\n",
        ["4: 2 ports from 65535 on are too many; write a lower one"],
    ),
    "GPUs without a GPU": (
        "model: m\npools:\n  - {name: a, role: colocated, resources: {gpus: 1}}\n",
        ["3: resources.gpus asks for GPUs, but device is cpu; write gpus: 0"],
    ),
    "a value that could not be read is complained of once": (
        "model: m\npools:\n  - {name: a, role: !x y}\n  - {name: b, role: colocated}\n",
        ["3: the tag !x is not allowed"],
    ),
}


def complaints(path: Path) -> list[str]:
    with pytest.raises(TopologyError) as caught:
        Topology.load(path)
    assert caught.value.exit_code == 2
    assert str(caught.value) == "\n".join(caught.value.lines)
    return [line.removeprefix(f"{path}:") for line in caught.value.lines]


@pytest.mark.parametrize("case", WRONG)
def test_every_mistake_is_named_with_its_line_and_what_to_do(tmp_path: Path, case: str) -> None:
    text, expected = WRONG[case]
    path = tmp_path / "t.yaml"
    path.write_text(text)
    found = complaints(path)
    assert len(found) == len(expected), found
    for complaint, beginning in zip(found, expected, strict=True):
        assert complaint.startswith(beginning)
        assert len(complaint) < 250


def test_aliases_that_would_fill_the_memory_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "bomb.yaml"
    levels = [f"  - &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 30)]
    path.write_text("model: m\npools:\n  - &l0 [x]\n" + "".join(levels))
    (complaint,) = complaints(path)
    assert "more than 10000 values" in complaint


@pytest.mark.parametrize("text", ["model: &a [*a]\n", "model: " + "[" * 100_000, "a: " + "{b: " * 30])
def test_endless_nesting_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "deep.yaml"
    path.write_text(text)
    (complaint,) = complaints(path)
    assert complaint.startswith("1: ")


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    binary, latin, large = tmp_path / "b.yaml", tmp_path / "u.yaml", tmp_path / "l.yaml"
    binary.write_bytes(bytes(range(256)))
    latin.write_bytes(b"model: caf\xe9\n")
    large.write_text("#" * 300_000)
    assert complaints(binary) == ["1: the file is not UTF-8 text (byte 128); save it as UTF-8"]
    assert complaints(latin) == ["1: the file is not UTF-8 text (byte 10); save it as UTF-8"]
    assert complaints(large) == ["1: the file is larger than 256 KiB; a topology is a small file"]


def test_a_path_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    for path, why in (
        (tmp_path / "nowhere.yaml", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
        (Path("a\0b"), "embedded null byte"),
    ):
        with pytest.raises(TopologyError, match=f"cannot be read: {why}; name an existing YAML file"):
            Topology.load(path)


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(GOOD, encoding="utf-8-sig")
    assert Topology.load(path).model == "m"


def test_a_section_without_values_is_the_sections_defaults(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(GOOD + "kv:\n  # memory: 1GiB\n")
    assert Topology.load(path).kv == Topology.parse({"model": "m", "pools": [{"name": "a", "role": "colocated"}]}).kv


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_topologies_are_right(path: Path) -> None:
    assert Topology.load(path).name == path.stem


def test_anchors_may_be_used_for_what_they_are_for(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(
        "model: m\npools:\n  - {name: a, role: prefill, resources: &r {cpus: 2}}\n"
        "  - {name: b, role: decode, resources: *r}\n"
    )
    assert [pool.resources.cpus for pool in Topology.load(path).pools] == [2.0, 2.0]


def test_what_needs_another_place_is_found_from_a_complaint_later(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(GOOD + "limits:\n  max_model_len: 5\n")
    topology = Topology.load(path)
    assert str(topology.error(("limits", "max_model_len"), "too short")) == f"{path}:5: too short"
    assert str(topology.error(("kv", "memory"), "too small")) == f"{path}:1: too small"


def test_overrides_are_checked_like_a_file(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(GOOD)
    topology = Topology.load(path)
    changed = topology.with_overrides({"gateway.port": 0, "pools.0.replicas": 3})
    assert (changed.gateway.port, changed.pools[0].replicas) == (0, 3)
    assert (topology.gateway.port, topology.pools[0].replicas) == (8000, 1)
    with pytest.raises(TopologyError, match=r"t\.yaml:3: pools\[0\]\.replicas must be at least 1, got 0"):
        topology.with_overrides({"pools.0.replicas": 0})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("256MiB", 256 << 20), ("1.5 GiB", 3 << 29), ("2g", 2 * 10**9), ("10kb", 10_000), ("7", 7), ("7B", 7),
        ("1TiB", 1 << 40), ("0.1KiB", 102), (12, 12),
    ],
)  # fmt: skip
def test_sizes_are_read_to_the_byte(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "1e3", "1..5G", "1 G B", "9" * 400 + "GiB", "-1", "0x10", "1PiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a size such as"):
        parse_size(text)


@pytest.mark.parametrize(
    ("file", "name"),
    [("local.yaml", "local"), ("My Test.yml", "my-test"), ("7b.yaml", "c-7b"), ("é.yaml", "c"), ("a" * 60, "a" * 40)],
)
def test_a_cluster_without_a_name_is_called_after_its_file(tmp_path: Path, file: str, name: str) -> None:
    path = tmp_path / file
    path.write_text(GOOD)
    assert Topology.load(path).name == name
    assert Topology.load(path).with_overrides({"cluster.name": name}).name == name
