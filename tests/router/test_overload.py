"""Promise: overload is queued, then turned away before the first token; what was accepted is computed once, to its end.

Sessions, router, a prefill and a decode worker are the real cores; the network, the steps and the clock are simulated.
"""

from gateway.core import session as gateway
from gateway.core.errors import Overloaded
from runtime.core.disaggregation import Policy
from tests.router.relay_world import BLOCK, PROMPT, RelayWorld


def test_four_times_as_many_requests_as_slots_all_end_complete_and_no_prompt_is_computed_twice() -> None:
    world = RelayWorld(policy=Policy.ALWAYS, slots=4)
    requests = world.ask(16, max_tokens=150)
    world.run()
    assert all(isinstance(end, gateway.Ended) for end in world.ended.values()), world.ended
    assert [world.sessions[request].num_generated for request in requests] == [150] * 16
    assert [world.sessions[request].attempt for request in requests] == [1] * 16
    assert world.prefilled_tokens == 16 * PROMPT
    assert world.most_placed == 4


def test_requests_for_more_memory_than_there_is_wait_for_it_and_none_is_computed_twice() -> None:
    """Slots for all of them, blocks for three."""
    world = RelayWorld(policy=Policy.ALWAYS, slots=16, blocks=3 * -(-(PROMPT + 150) // BLOCK))
    requests = world.ask(12, max_tokens=150)
    world.run()
    assert [world.sessions[request].num_generated for request in requests] == [150] * 12
    assert [world.sessions[request].attempt for request in requests] == [1] * 12
    assert world.prefilled_tokens == 12 * PROMPT
    assert world.most_placed == 3


def test_answers_of_minutes_in_front_turn_the_rest_away_in_time_and_without_a_token() -> None:
    """Steps of 30 ms and 3000 tokens: the second four would begin after 90 s."""
    world = RelayWorld(policy=Policy.ALWAYS, slots=4)
    requests = world.ask(8, max_tokens=3000)
    world.run()
    ends = [world.ended[request] for request in requests]
    assert [type(end) for end in ends] == [gateway.Ended] * 4 + [gateway.Failed] * 4
    assert [world.sessions[request].num_generated for request in requests] == [3000] * 4 + [0] * 4
    assert world.prefilled_tokens == 4 * PROMPT


def test_a_queue_beyond_its_limit_is_turned_away_before_any_token() -> None:
    world = RelayWorld(policy=Policy.ALWAYS, slots=4, max_waiting=6, retry_after=2.5)
    requests = world.ask(16, max_tokens=50)
    world.run()
    accepted, rejected = requests[:10], requests[10:]
    assert all(isinstance(world.ended[request], gateway.Ended) for request in accepted)
    assert [world.sessions[request].num_generated for request in accepted] == [50] * 10
    for request in rejected:
        end = world.ended[request]
        assert isinstance(end, gateway.Failed) and isinstance(end.error, Overloaded)
        assert (end.error.status, end.error.retry_after) == (429, 2.5)
        assert world.sessions[request].num_generated == 0
    assert world.prefilled_tokens == 10 * PROMPT
