"""Promise: a process whose loop has failed does not look alive."""

import subprocess
import sys
from pathlib import Path

import pytest

ROUTER = """
from cluster.host import ROUTER, Host
from router.actor import RouterConfig
from router.core.machine import RouterSettings

host = Host(ROUTER, "test")
host.start(RouterConfig(host="127.0.0.1", settings=RouterSettings(cluster_key=b"k" * 32)))
host._actor._loop.ask(lambda router: 1 / 0)
host.watch()
"""
GATEWAY = """
import sys
import zmq
from cluster.host import GATEWAY, Host
from gateway.config import GatewayConfig

host = Host(GATEWAY, "test")
router = "tcp://127.0.0.1:9"
started = host.start(GatewayConfig(model=sys.argv[1], served_model_name="m", router=router, host="127.0.0.1", port=0))
host._actor._server._hub._mailbox._decode = lambda frame: 1 / 0
push = zmq.Context().socket(zmq.PUSH)
push.connect(started["address"])
push.send(b"anything")
host.watch()
"""


@pytest.mark.parametrize("code", [ROUTER, GATEWAY])
def test_a_process_ends_when_its_loop_fails(code: str, tiny_llama: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", code, tiny_llama], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "this process ends" in ended.stderr
    assert "ZeroDivisionError" in ended.stderr
