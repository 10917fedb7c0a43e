"""Promise: a prompt that is clearly cheaper to compute than to ship goes to its decode worker alone, and a further
attempt goes where its prompt has been computed."""

from msgspec.structs import replace

from messages.common import Role
from messages.gateway_to_router import Computed, PlacementWanted
from messages.ids import Epoch, WorkerId
from messages.router_to_gateway import Placed
from messages.worker_to_router import Leaving
from runtime.core.disaggregation import Disaggregation, Policy
from tests.router.world import World, finished, prefilled, register, report, wanted

AUTO = Disaggregation(policy=Policy.AUTO, max_local_prefill_length=64)
NEVER = Disaggregation(policy=Policy.NEVER)


def world(disaggregation: Disaggregation = AUTO, *, prefill: int = 1) -> World:
    """As many prefill workers, and one decode worker; none has reported."""
    made = World(disaggregation=disaggregation)
    for number in range(prefill):
        made.handle(register(f"p{number}", Role.PREFILL))
    made.handle(register("d0", Role.DECODE, max_num_seqs=64))
    return made


def measure(world: World, *, prefill: float = 1000.0, decode: float = 1000.0, transfer: float = 1e3) -> None:
    """Workers report their rates; at 1 KB/s shipping costs more than computing."""
    number = int(world.now * 10) + 1
    world.handle(replace(report("p0", number), prefill_rate=prefill, transfer_rate=transfer))
    world.handle(replace(report("d0", number), prefill_rate=decode))


def local(placed: Placed) -> bool:
    assert (placed.prefill is None) == (placed.ticket is None)
    return placed.prefill is None


def counted(world: World) -> dict[str, int]:
    return {name: count for name in world.state().decisions.__struct_fields__
            if (count := world.router.inspect()[name])}  # fmt: skip


def test_before_anything_is_measured_every_prompt_is_handed_over() -> None:
    play = world()
    assert not local(play.place("r1"))
    measure(play, transfer=0.0)
    assert not local(play.place("r2"))
    assert counted(play) == {"unmeasured": 2}


def test_a_short_prompt_goes_to_the_decode_worker_alone_and_a_long_one_does_not() -> None:
    play = world()
    measure(play)
    placed = play.place("r1", tokens=64)
    assert local(placed) and placed.decode.worker == "d0"
    play.handle(finished("r1"))
    assert not local(play.place("r2", tokens=65))
    assert counted(play) == {"costs_less": 1, "too_long": 1}
    state = play.state()
    assert state.decisions.costs_less == state.decisions.too_long == 1
    assert [worker.prefill_rate for worker in state.workers] == [1000.0, 1000.0]


def test_asked_again_the_router_answers_the_same_and_counts_it_once() -> None:
    play = world()
    measure(play)
    assert play.place("r1") == play.place("r1")
    assert counted(play) == {"costs_less": 1}


def test_a_burst_of_short_prompts_does_not_hold_up_what_decode_runs() -> None:
    """Each one that is placed there is one more that waits, and tokens in front of the next."""
    play = world()
    measure(play, transfer=1e6)
    play.place("warm", tokens=1000)  # a queue in front of prefill
    play.handle(finished("warm"))
    where = [local(play.place(f"r{number}", tokens=32)) for number in range(20)]
    assert counted(play).keys() <= {"too_long", "costs_less", "decode_busy", "costs_more"}
    assert where.count(True) < 10


def test_the_tokens_of_a_local_prompt_count_until_its_first_token() -> None:
    play = world()
    measure(play)
    assert local(play.place("r1", tokens=64))
    view = play.router._members.get(WorkerId("d0"))
    assert view is not None and view.prompt_tokens == 64
    play.handle(prefilled("r1"))
    assert view.prompt_tokens == 0
    assert local(play.place("r2", tokens=33))
    play.handle(finished("r2"))
    assert view.prompt_tokens == 0 and len(view.requests) == 1


def test_where_prefill_has_a_long_queue_even_a_busy_decode_worker_computes_a_short_prompt() -> None:
    play = world()
    measure(play, transfer=1e9)
    assert not local(play.place("r1", tokens=32))
    assert not local(play.place("r2", tokens=2000))
    assert local(play.place("r3", tokens=32))
    assert counted(play) == {"costs_more": 1, "too_long": 1, "costs_less": 1}


def test_without_disaggregation_nothing_goes_to_prefill() -> None:
    play = world(NEVER)
    assert local(play.place("r1", tokens=4000))
    assert counted(play) == {"never": 1}


def test_a_colocated_pool_decides_nothing() -> None:
    play = World(disaggregation=AUTO)
    play.handle(register("c0", Role.COLOCATED))
    assert local(play.place("r1"))
    assert counted(play) == {}


def further(prefill: str, computed: int, *, epoch: int = 1, tokens: int = 1000, avoid: tuple[str, ...] = ("d9",),
            ) -> PlacementWanted:  # fmt: skip
    """The second attempt of ``r``, whose first one had ``prefill`` compute ``computed`` tokens."""
    asked = wanted("r", 2, tokens=tokens, avoid=avoid)
    return replace(asked, computed=Computed(WorkerId(prefill), Epoch(epoch), computed))


def prefill_of(play: World, asked: PlacementWanted) -> str | None:
    placed = play.answer(asked)
    assert isinstance(placed, Placed)
    return placed.prefill.worker if placed.prefill is not None else None


def test_a_further_attempt_goes_to_the_prefill_worker_that_has_its_prompt() -> None:
    for has_it in ("p0", "p1", "p2"):
        assert prefill_of(world(prefill=3), further(has_it, 1000)) == has_it


def test_unless_its_queue_is_longer_by_more_than_what_is_saved() -> None:
    play = world(prefill=2)
    assert play.place("other", tokens=500).prefill.worker == "p0"  # type: ignore[union-attr]
    assert prefill_of(play, further("p0", 500)) == "p0"
    play.handle(finished("r", 2))
    assert prefill_of(play, replace(further("p0", 499), attempt=3)) == "p1"


def test_unless_it_is_gone_has_restarted_or_is_to_be_avoided() -> None:
    play = world(prefill=2)
    play.place("other", tokens=1)
    assert prefill_of(play, further("p0", 1000, epoch=7)) == "p1"
    play.handle(finished("r", 2))
    assert prefill_of(play, replace(further("p0", 1000, avoid=("p0",)), attempt=3)) == "p1"
    play.handle(finished("r", 3))
    play.handle(Leaving(worker=WorkerId("p0"), epoch=Epoch(1)))
    assert prefill_of(play, replace(further("p0", 1000), attempt=4)) == "p1"


def test_nor_is_a_decode_worker_taken_for_a_prefill_worker() -> None:
    assert prefill_of(world(), further("d0", 1000)) == "p0"


def test_a_further_attempt_in_line_goes_there_too() -> None:
    play = world(prefill=2)
    play.handle(Leaving(worker=WorkerId("d0"), epoch=Epoch(1)))
    assert play.handle(further("p1", 1000)) == []
    (sent,) = play.handle(register("d1", Role.DECODE))
    assert isinstance(sent.message, Placed) and sent.message.prefill is not None
    assert sent.message.prefill.worker == "p1"


def test_what_prefill_has_already_is_cheaper_there() -> None:
    play = world()
    measure(play, transfer=2e5)
    assert prefill_of(play, further("p0", 0, tokens=64)) is None
    play.handle(finished("r", 2))
    assert prefill_of(play, replace(further("p0", 63, tokens=64), attempt=3)) == "p0"
    assert counted(play) == {"costs_less": 1, "costs_more": 1}
