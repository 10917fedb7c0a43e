"""What rank 0 of a worker has other ranks do with their KV, and what they report: the values that a ``RankPort`` takes
and gives, so that a command is performed elsewhere just as it is here."""

from kv_transfer.core.events import Cancelled, Landed, Pushed, PushFailed
from kv_transfer.core.fanout import DigestLane, LaneDigested, OpenLanes, PushLane
from kv_transfer.core.session import CancelPushes, CloseLanding, LandingOpened
from runtime.core.actions import ForgetPeer
from runtime.core.wire import Wire

RANK_COMMANDS = Wire(PushLane, CancelPushes, OpenLanes, CloseLanding, DigestLane, ForgetPeer)
RANK_EVENTS = Wire(Pushed, PushFailed, Cancelled, Landed, LandingOpened, LaneDigested)
