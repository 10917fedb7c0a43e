"""Promise: the files for `ray up` are what this Ray's launcher takes, and open nothing to strangers."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.topology import Topology

CONFIGS = Path(__file__).parents[2] / "configs" / "ray"
FILES = ["on-premise.yaml", "aws.yaml", "gcp.yaml"]


def config(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CONFIGS / name).read_text())
    return loaded


def starts(name: str) -> list[str]:
    """The commands that start Ray, on the head and on a worker."""
    found = config(name)
    commands = [*found["head_start_ray_commands"], *found["worker_start_ray_commands"]]
    return [command for command in commands if "ray start" in command]


def options(command: str) -> dict[str, str]:
    words = shlex.split(command.partition("ray start")[2])
    return dict(word.removeprefix("--").partition("=")[::2] for word in words)  # type: ignore[misc]


@pytest.mark.parametrize("name", FILES)
def test_each_file_is_what_the_launcher_takes(name: str) -> None:
    validate_config(prepare_config(config(name)))  # by Ray's own schema


@pytest.mark.parametrize("name", FILES)
def test_nobody_comes_in_without_the_token(name: str) -> None:
    head, worker = starts(name)
    for command in (head, worker):
        assert "RAY_AUTH_MODE=token" in command.split()
        assert "RAY_enable_metrics_collection=false" in command.split(), "metrics ask for no token"
    assert options(head)["dashboard-host"] == "127.0.0.1"
    assert any(local == "~/.ray/auth_token" for local in config(name)["file_mounts"].values())
    assert not any("cluster.key" in each for mount in config(name)["file_mounts"].items() for each in mount)


@pytest.mark.parametrize("name", FILES)
def test_every_port_of_rays_is_declared(name: str) -> None:
    ports = ["node-manager-port", "object-manager-port", "runtime-env-agent-port", "dashboard-agent-grpc-port",
             "dashboard-agent-listen-port", "min-worker-port", "max-worker-port"]  # fmt: skip
    assert int(options(starts(name)[0])["ray-client-server-port"]) > 0
    head, worker = (options(command) for command in starts(name))
    anew = worker.pop("node-manager-port")
    assert anew == "$((11000+RANDOM%1000))", "a host that comes back at the port that it had is taken for lost again"
    assert all(int(head[port]) > 0 for port in ports)
    assert all(int(worker[port]) > 0 for port in ports[1:])


@pytest.mark.parametrize("name", FILES)
def test_the_wheel_is_installed_and_the_model_is_where_the_topology_says(name: str) -> None:
    found = config(name)
    assert any("baton_serve-*.whl" in command for command in found["setup_commands"])
    mounts = {Path(*Path(there).parts[3:]): here for there, here in found["file_mounts"].items()}  # below the home
    assert mounts[Path("baton/topology.yaml")] == "configs/ray/topology.yaml"
    model = Path("baton") / Topology.load(CONFIGS / "topology.yaml").model
    assert (CONFIGS.parents[1] / mounts[model] / "config.json").is_file()


@pytest.mark.parametrize("name", FILES)
def test_there_are_hosts_for_every_pool(name: str) -> None:
    least_hosts = Topology.load(CONFIGS / "topology.yaml").cluster.min_hosts
    wanted = {
        (pool.placement.labels["role"], pool.replicas)
        for pool in Topology.load(CONFIGS / "topology.yaml").pools
        if pool.placement is not None
    }
    assert len(wanted) == 2
    found = config(name)
    if "available_node_types" in found:
        types = found["available_node_types"].values()
        least = {each["labels"]["role"]: each.get("min_workers", 0) for each in types}
        assert all(least[role] >= replicas for role, replicas in wanted)
        assert 1 + sum(least.values()) == least_hosts
    else:
        (command,) = (each for each in found["worker_start_ray_commands"] if "ray start" in each)
        assert all(f"role={role}" in command for role, _ in wanted)
        assert len(found["provider"]["worker_ips"]) == sum(replicas for _, replicas in wanted)
        assert 1 + found["min_workers"] == least_hosts
