"""Finds the cluster that runs on the Ray of a job: by its gateways, which are named actors in a namespace of the
cluster's own. It works on every node of that Ray; the launcher's notes (``state.py``) are on one host.
"""

import contextlib
import ipaddress
import os
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

from cluster.errors import ClusterError

NAMESPACE = "baton-"
"""Before the cluster's name."""
IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets this variable, and RAY_ADDRESS, for what `ray job submit` runs."""
ANSWER_WITHIN = 10.0


class FoundGateway(NamedTuple):
    """A gateway that runs on this Ray."""

    cluster: str
    url: str
    node: str
    """The id of its node."""
    host: str
    """That node's address."""


def in_a_job() -> bool:
    """Whether `ray job submit` has started this process."""
    return IN_A_JOB in os.environ and "RAY_ADDRESS" in os.environ


def url_on_this_ray(cluster: str | None) -> str:
    """The gateway of ``cluster``, or of the only one on the Ray whose job this process is."""
    with connected() as ray:
        found = [gateway for gateway in _gateways(ray) if cluster is None or gateway.cluster == cluster]
        return url_for(ray.get_runtime_context().get_node_id(), found, cluster, os.environ["RAY_ADDRESS"])


@contextlib.contextmanager
def connected() -> Iterator[Any]:
    """Be a driver of this Ray for a while."""
    import ray

    try:
        ray.init(os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # whatever Ray raises there
        raise ClusterError(f"the Ray at {os.environ['RAY_ADDRESS']} does not answer: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def url_for(node: str, found: list[FoundGateway], cluster: str | None, ray: str) -> str:
    """What a process on ``node`` asks."""
    names = sorted({gateway.cluster for gateway in found})
    if not names:
        wanted = "no cluster" if cluster is None else f"no cluster named {cluster!r}"
        raise ClusterError(f"{wanted} runs on the Ray at {ray}; start one there with `baton up TOPOLOGY`")
    if len(names) > 1:
        raise ClusterError(f"several clusters run on this Ray ({', '.join(names)}); name the one with --cluster")
    here = [gateway for gateway in found if gateway.node == node]
    if here:
        return here[0].url
    for gateway in found:
        url = urlsplit(gateway.url)
        address = _address(url.hostname or "")
        if address is not None and address.is_unspecified:  # every address of its host
            host = f"[{gateway.host}]" if ":" in gateway.host else gateway.host
            return urlunsplit(url._replace(netloc=f"{host}:{url.port}"))
        if address is None or not address.is_loopback:
            return gateway.url
    gateway = found[0]
    advice = "let gateway.host in its topology name an address that other hosts reach, or run the job on that host"
    raise ClusterError(f"the gateway of {gateway.cluster} listens on {gateway.url} of {gateway.host} only; {advice}")


def _gateways(ray: Any) -> list[FoundGateway]:
    """Those that answer; one that is being stopped or started does not, and need not."""
    from ray.exceptions import RayError
    from ray.util import list_named_actors

    found = []
    for actor in sorted(list_named_actors(all_namespaces=True), key=lambda actor: str(actor["name"])):
        name, namespace = actor["name"], actor["namespace"]
        if not (namespace.startswith(NAMESPACE) and name.startswith("gateway")):
            continue
        try:
            handle = ray.get_actor(name, namespace=namespace)
            url = ray.get(handle.call.remote("url"), timeout=ANSWER_WITHIN)
        except (RayError, ValueError):
            continue
        place = ray._private.state.actors(handle._actor_id.hex())["Address"]
        found.append(FoundGateway(namespace.removeprefix(NAMESPACE), url, place["NodeID"], place["IPAddress"]))
    return found


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
