"""Promise: a job finds the cluster of its Ray from any node, or says why not and what to do."""

import pytest

from cluster.discovery import FoundGateway, in_a_job, url_for
from cluster.errors import ClusterError


def gateway(url: str, node: str = "n1", host: str = "10.0.0.1", cluster: str = "local") -> FoundGateway:
    return FoundGateway(cluster, url, node, host)


@pytest.mark.parametrize(
    ("node", "found", "url"),
    [
        ("n1", [gateway("http://127.0.0.1:8000")], "http://127.0.0.1:8000"),
        ("n2", [gateway("http://10.0.0.1:8000")], "http://10.0.0.1:8000"),
        ("n2", [gateway("http://0.0.0.0:8000")], "http://10.0.0.1:8000"),
        ("n2", [gateway("https://[::]:8000", host="fd00::1")], "https://[fd00::1]:8000"),
        ("n2", [gateway("https://head.example:8000")], "https://head.example:8000"),
        ("n2", [gateway("http://127.0.0.1:8000"), gateway("http://10.0.0.1:8001")], "http://10.0.0.1:8001"),
        ("n2", [gateway("http://10.0.0.1:8000"), gateway("http://10.0.0.2:8000", "n2")], "http://10.0.0.2:8000"),
    ],
)
def test_the_nearest_gateway_that_can_be_reached_is_taken(node: str, found: list[FoundGateway], url: str) -> None:
    assert url_for(node, found, None, "10.0.0.1:6379") == url


@pytest.mark.parametrize(
    ("found", "cluster", "why"),
    [
        ([], None, "no cluster runs on the Ray at 10.0.0.1:6379; start one there"),
        ([], "mine", "no cluster named 'mine' runs"),
        ([gateway("http://a:1"), gateway("http://b:1", cluster="other")], None, r"\(local, other\); name the one with"),
        (
            [gateway("http://127.0.0.1:8000")],
            None,
            "8000 of 10.0.0.1 only; let gateway.host",
        ),
    ],
)
def test_what_cannot_be_asked_is_told(found: list[FoundGateway], cluster: str | None, why: str) -> None:
    with pytest.raises(ClusterError, match=why):
        url_for("n2", found, cluster, "10.0.0.1:6379")


def test_only_what_ray_has_started_as_a_job_is_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not in_a_job()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert in_a_job()
