"""Promise: the row of the failure table about gateways that die."""

from dataclasses import replace

import pytest

from simulator.history import Attached, Got
from tests.simulator.rows import Story, colocated, kill, topology, wish


@pytest.mark.parametrize("of", [topology(gateways=2), colocated(gateways=2)], ids=["prefill and decode", "colocated"])
@pytest.mark.parametrize("token", [2, 4, 8, 12])
def test_c1_a_client_reads_on_at_another_gateway_and_gets_exactly_what_it_lacks(token: int, of) -> None:  # type: ignore[no-untyped-def]
    story = Story([wish(tokens=12, resumable=True)], [kill("gateway-0", "TokenBatch", token, after=0.002)], of).clean()
    assert story.ended() == 1
    attached = story.all(Attached)
    if attached:
        after = [record for record in story.all(Got) if record.at >= attached[0].at]
        assert story.killed_at() + 2.0 >= (after[0].at if after else attached[0].at)


def test_c1_without_its_client_all_that_a_dead_gateway_left_is_freed() -> None:
    story = Story([wish(tokens=12)], [kill("gateway-0", "TokenBatch", 3)], topology(gateways=2)).clean()
    (failed,) = story.failures()
    assert failed.status == 0
    assert all(story.held(name, story.killed_at() + 12.0) == 0 for name in story.names("worker"))


def test_c1_half_of_all_streams_lose_their_gateway_and_none_loses_a_token() -> None:
    wishes = [wish(n, at=1.5 + n / 40, tokens=12, resumable=True, gateway=f"gateway-{n % 2}") for n in range(12)]
    story = Story(wishes, [replace(kill("gateway-0"), at=1.7)], topology(gateways=2)).clean()
    # One of which no worker has made anything yet may be gone with its gateway: its client has nothing either.
    begun = {record.request for record in story.all(Got)}
    assert story.ended() >= len(begun) >= 10 and story.verdict.repeated == 0
