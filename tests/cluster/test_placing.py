"""Promise: a worker runs on a host that its pool means, that has room, and that few of its pool's workers share."""

import subprocess
import sys
from pathlib import Path

import pytest

from cluster import marks
from cluster.core.placing import Node, choose, lacking, matches, total
from cluster.errors import LaunchError, TopologyError
from cluster.model_folder import ModelSource, fingerprint, locate
from cluster.topology import Topology
from cluster.validate import check_machine


def node(name: str, free: float = 4, **labels: str) -> Node:
    return Node(name, f"10.0.0.{name[1:]}", name, labels, {"CPU": free})


@pytest.mark.parametrize(
    ("selector", "meant"),
    [
        ({}, True),
        ({"role": "decode"}, True),
        ({"role": "prefill"}, False),
        ({"role": "!prefill"}, True),
        ({"role": "!decode"}, False),
        ({"role": "in(prefill, decode)"}, True),
        ({"role": "in(prefill)"}, False),
        ({"role": "!in(prefill, other)"}, True),
        ({"role": "!in(prefill,decode)"}, False),
        ({"zone": "a"}, False),
        ({"zone": "!a"}, True),
        ({"role": "decode", "zone": "a"}, False),
    ],
)
def test_a_host_is_meant_by_its_labels(selector: dict[str, str], meant: bool) -> None:
    assert matches({"role": "decode"}, selector) is meant


def test_workers_of_a_pool_are_spread_over_its_hosts() -> None:
    hosts = [node("h1", role="prefill"), node("h2", role="decode"), node("h3", role="decode")]
    there: dict[str, int] = {}
    for _ in range(4):
        chosen = choose(hosts, {"CPU": 0.25}, {"role": "decode"}, there)
        assert chosen is not None
        there[chosen.id] = there.get(chosen.id, 0) + 1
    assert there == {"h2": 2, "h3": 2}


def test_a_host_without_room_for_all_ranks_is_not_chosen() -> None:
    wanted = total([{"CPU": 1.0}, {"CPU": 1.0, "special": 1.0}])
    assert wanted == {"CPU": 2.0, "special": 1.0}
    small, plain = node("h1", free=1.5), node("h2")
    special = plain._replace(id="h3", free={"CPU": 2.0, "special": 1.0})
    assert choose([small, plain, special], wanted, {}, {"h3": 5}) == special
    assert choose([small, plain], wanted, {}, {}) is None
    assert lacking(small, wanted) == {"CPU": 1.5, "special": 0.0}
    assert not lacking(special, wanted)


def parse(placement: object, **sections: object) -> Topology:
    pools = [{"name": "a", "role": "colocated", "placement": placement}]
    return Topology.parse({"model": "m", "pools": pools, **sections})


@pytest.mark.parametrize(
    ("placement", "complaint"),
    [
        ({"labels": {"role": "-"}}, "selects nothing"),
        ({"labels": {"role": "in(a"}}, "selects nothing"),
        ({"labels": {"a b": "c"}}, "is no label"),
        ({"resources": {"CPU": 1}}, "belongs into resources"),
        ({"resources": {"special": 0}}, "must be more than 0"),
        ({"hosts": ["h1"]}, "hosts"),
    ],
)
def test_a_placement_that_means_nothing_is_refused(placement: object, complaint: str) -> None:
    with pytest.raises(TopologyError, match=complaint):
        parse(placement)


def test_a_placement_needs_a_ray_of_several_hosts() -> None:
    with pytest.raises(TopologyError, match=r"cluster\.address is local"):
        check_machine(parse({"labels": {"role": "decode"}}, gateway={"port": 0}))
    check_machine(parse({"labels": {"role": "decode"}}, gateway={"port": 0}, cluster={"address": "auto"}))


def test_a_host_without_the_model_or_with_another_one_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    source = ModelSource(folder=str(tiny_llama), fingerprint=fingerprint(tiny_llama))
    assert locate(source, "h1 (10.0.0.1)") == tiny_llama
    with pytest.raises(LaunchError, match=r"h1 \(10.0.0.1\) lacks the model: there is no folder /nowhere"):
        locate(ModelSource(folder="/nowhere", fingerprint=source.fingerprint), "h1 (10.0.0.1)")
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes() + b" ")
    with pytest.raises(LaunchError, match="h1 has another model"):
        locate(ModelSource(folder=str(tmp_path), fingerprint=source.fingerprint), "h1")


def test_what_is_marked_is_found_and_ended_and_nothing_else() -> None:
    code = "import sys; from cluster.marks import mark; mark(sys.argv[1]); print(flush=True); sys.stdin.read()"
    children = [
        subprocess.Popen([sys.executable, "-c", code, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for name in ("one@10.0.0.1:6379", "one@10.0.0.2:6379", "other@10.0.0.1:6379")
    ]
    try:
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()
        wanted = marks.name_of("one", "10.0.0.1:6379")
        assert list(marks.marked(wanted)) == [children[0].pid]
        assert marks.sweep(wanted) == ([children[0].pid], [])
        assert children[0].wait(5) == -9
        assert [child.poll() for child in children[1:]] == [None, None]
        assert marks.sweep(wanted) == ([], [])
    finally:
        for child in children:
            child.kill()
            child.communicate()
