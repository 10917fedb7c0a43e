"""Promise (row 21): a prompt, an answer or a key is in no log, metric, status, trace or error of anybody else, and what
a client says cannot write lines of its own into a log."""

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest

from gateway.server import GatewayServer
from messages.codec import BadMessage, decoder_for
from messages.common import FailReason
from messages.gateway_to_router import PlacementWanted
from messages.gateway_to_worker import Abort, Prefill
from messages.worker_to_gateway import AttemptFailed
from tests.gateway.conftest import MODEL
from tests.gateway.fake_cluster import DECODE, FakeCluster
from tests.security.conftest import ADMIN, ALICE, BOB, bearer
from tests.security.samples import fields_of

CANARY = "canary-prompt-5f1e"
OTHERS = ("httpx", "httpcore", "uvicorn.access")
"""Loggers of the client; and one that is off in a gateway, but heard by pytest."""
NASTY = "x\r\n2026-01-01 CRITICAL root: all is lost\x1b[31m\x00"
PRIVATE = re.compile(r"0x[0-9a-f]{6,}|Traceback|/[a-z_]+/[a-z_]+\.py|File \"")
"""Addresses in memory, and where our code stands."""


@contextlib.contextmanager
def everything(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What is logged meanwhile, at any level, by anybody but the client, as a line each."""
    lines: list[str] = []
    with caplog.at_level(logging.DEBUG):
        yield lines
    formatter = logging.Formatter("%(levelname)s %(name)s %(message)s")
    lines += [formatter.format(record) for record in caplog.records if not record.name.startswith(OTHERS)]


def ask(http: httpx.Client, key: str = ALICE, path: str = "/v1/completions", **fields: Any) -> httpx.Response:
    return http.post(path, json={"model": MODEL, "prompt": CANARY, "max_tokens": 4, **fields}, headers=bearer(key))


def test_prompts_and_keys_are_seen_by_nobody_else(
    http: httpx.Client, server: GatewayServer, cluster: FakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    with everything(caplog) as logged:
        answers = [ask(http), ask(http, stream=True), ask(http, cache_salt=CANARY, user=CANARY)]
        assert [answer.status_code for answer in answers] == [200] * 3
        ask(http, key="wrong-" + CANARY)
        ask(http, temperature=-1)
        ask(http, **{CANARY: 1})
        ask(http, model=CANARY)
        http.get(f"/v1/{CANARY}", headers=bearer(ALICE))
        http.get(f"/traces/{CANARY}", headers=bearer(BOB))
        cluster.hold_after = 4
        with http.stream(
            "POST", "/v1/completions", json={"model": MODEL, "prompt": CANARY, "stream": True}, headers=bearer(ALICE)
        ) as dropped:
            next(dropped.iter_lines())
        cluster.wait_for(Abort)
        seen = [http.get(path, headers=bearer(ADMIN)).text for path in ("/metrics", "/status", "/version")]
    assert len(cluster.of(Prefill)) == 4
    assert server._http is not None and not server._http.config.access_log
    for text in (*logged, *seen, repr(server._config), repr(cluster.of(PlacementWanted))):
        for secret in (CANARY, ALICE, BOB, ADMIN):
            assert secret not in text, text[:500]


def test_a_worker_that_fails_tells_its_client_an_error_and_nothing_of_itself(
    http: httpx.Client, cluster: FakeCluster
) -> None:
    """Nor does one whose words were made to be told."""
    detail = f'Traceback (most recent call last): File "/srv/engine/runner.py" at 0x7f3a5c0de0f0 {CANARY}'

    def fail(wanted: PlacementWanted) -> Any:
        cluster.send(
            wanted.gateway,
            AttemptFailed(
                request=wanted.request, attempt=wanted.attempt, worker=DECODE, reason=FailReason.ENGINE, detail=detail
            ),
        )
        return cluster.placed(wanted)

    cluster.on_placement, cluster.hold_after = fail, 0
    answer = ask(http)
    assert answer.status_code >= 500
    error = answer.json()["error"]
    assert not PRIVATE.search(error["message"]) and CANARY not in error["message"]


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/models/" + "%0d%0a" * 3, "/traces/%1b"]
)
def test_an_error_is_one_line_without_control_characters(http: httpx.Client, path: str) -> None:
    bodies = [
        {"model": NASTY},
        {NASTY: 1},
        {"model": MODEL, "prompt": "x", "cache_salt": NASTY},
        {"model": NASTY * 9999},
    ]
    for body in bodies:
        answer = http.post(path, json=body, headers=bearer(ADMIN))
        if answer.status_code == 405:
            answer = http.get(path, headers=bearer(ADMIN))
        assert 400 <= answer.status_code < 500
        text = answer.content.decode()
        assert len(text) < 2000 and not [c for c in text if ord(c) < 32] and not PRIVATE.search(text)
        assert json.loads(text)["error"]["type"] == "invalid_request_error"
        assert all("\r" not in value and "\n" not in value for value in answer.headers.values())


def test_what_a_frame_says_is_one_line_of_a_log() -> None:
    fields = fields_of(Abort("r", 1))  # type: ignore[arg-type]
    for frame in ({**fields, NASTY: 1}, {**fields, "type": NASTY}, {**fields, NASTY * 10_000: 1}):
        with pytest.raises(BadMessage) as refused:
            decoder_for(Abort)(msgspec.msgpack.encode(frame))
        assert str(refused.value).isprintable() and len(str(refused.value)) < 2000
