"""CURVE for every ZeroMQ socket between processes: encrypted, and for processes of the same cluster only.

A cluster has one key pair. Each listening socket is a CURVE server with it, and each connecting socket presents it as
its own. Who does not know the public key cannot begin a handshake; who does not hold the secret one cannot end it: the
server asks ZAP (RFC 27) about the client, and that admits this one public key, whose secret the client has proved to
hold. Sockets of one process that meet over ``inproc`` know no CURVE and need none.

Without keys there is only loopback: nothing else is bound to, and nothing else is connected to.
"""

import ipaddress
import logging
import re
import socket as sockets
import threading
from dataclasses import dataclass, field
from typing import Any, Self

import zmq
import zmq.utils.z85

log = logging.getLogger(__name__)

LEAST_LIBZMQ = (4, 3, 3)
"""Before it, whoever connects without a word could starve a CURVE server (CVE-2020-15166)."""
if zmq.zmq_version_info() < LEAST_LIBZMQ or not zmq.has("curve"):
    raise ImportError(f"libzmq {zmq.zmq_version()} is older than 4.3.3, or built without CURVE; install pyzmq>=27")

OVERHEAD = 64
"""Bytes by which CURVE makes a frame larger at most: 33 in libzmq 4.3."""
HANDSHAKE_MS = 5_000
"""That a peer has for its handshake, before its connection is closed."""
_ZAP = "inproc://zeromq.zap.01"
_DOMAIN = b"baton"
_ADDRESS = re.compile(r"tcp://(?:\[([0-9A-Fa-f:.]{2,45})\]|([0-9.]{7,15})):[1-9][0-9]{0,4}")


class Exposed(ValueError):
    """Others could listen in, or come in, there, and there are no keys that keep them out."""


class Unreachable(ValueError):
    """No address that a process of the cluster can have."""


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """The key pair of a cluster, Z85-encoded."""

    public: bytes = field(repr=False)
    secret: bytes = field(repr=False)

    @classmethod
    def make(cls) -> Self:
        return cls(*zmq.curve_keypair())

    @classmethod
    def of(cls, secret: bytes) -> Self:
        """The pair of a secret key; ``ValueError`` where it is none."""
        if len(secret) != 40:
            raise ValueError(f"a CURVE key has 40 characters, not {len(secret)}")
        try:
            return cls(zmq.curve_public(secret), secret)
        except zmq.ZMQError as error:
            raise ValueError("is no CURVE key") from error


def bind(context: Any, socket: Any, host: str, curve: CurveKeys | None, port: int = 0) -> str:
    """Have ``socket``, of ``context``, listen on ``port`` (0: a free one) of ``host``; its address. Raises ``Exposed``,
    and ``ZMQError`` where it cannot."""
    check_host(host, curve)
    socket.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    if curve is not None:
        _admit(zmq.Context(context), curve)
        socket.set(zmq.CURVE_SERVER, 1)
        socket.set(zmq.CURVE_SECRETKEY, curve.secret)
        socket.set(zmq.ZAP_DOMAIN, _DOMAIN)
        socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)  # nobody comes in where nobody answers for ZAP
    if ":" in host:
        socket.set(zmq.IPV6, 1)
        host = f"[{host}]"
    socket.bind(f"tcp://{host}:{port or '*'}")  # libzmq sets SO_REUSEADDR: connections in TIME_WAIT keep nobody off
    return str(socket.get_string(zmq.LAST_ENDPOINT))


def connect(socket: Any, address: str, curve: CurveKeys | None) -> None:
    """Connect to a process of the cluster. Raises ``Unreachable``, and ``ZMQError`` where it cannot."""
    check_address(address, curve)
    if curve is not None:
        socket.set(zmq.CURVE_SERVERKEY, curve.public)
        socket.set(zmq.CURVE_PUBLICKEY, curve.public)
        socket.set(zmq.CURVE_SECRETKEY, curve.secret)
    socket.set(zmq.IPV6, int("[" in address))
    socket.connect(address)


def check_host(host: str, curve: object | None) -> None:
    """Raises ``Exposed`` where to listen on ``host`` needs ``curve``, and there is none."""
    if curve is None and not is_loopback(host):
        raise Exposed(
            f"will not listen on {host}, where others can connect, without keys; run `baton keys`, and name its file in"
            " the topology as security.keys"
        )


def check_address(address: str, curve: object | None) -> None:
    """Raises ``Unreachable`` for what is no numeric TCP address, which messages may name; and for others than loopback
    where there is no ``curve``: nobody of ours can be there."""
    match = _ADDRESS.fullmatch(address)
    try:
        host = ipaddress.ip_address((match[1] or match[2]) if match else "")
    except ValueError:
        raise Unreachable("it is no tcp://IP:PORT") from None
    if curve is None and not host.is_loopback:
        raise Unreachable("without keys (`security.keys` in the topology) all processes are on loopback")


def is_loopback(host: str) -> bool:
    """Of an IP address, or a name all of whose addresses are; one that cannot be looked up is not."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = {str(entry[4][0]) for entry in sockets.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return False
    return all(ipaddress.ip_address(address).is_loopback for address in found)


def _admit(context: "zmq.Context[zmq.Socket[bytes]]", curve: CurveKeys) -> None:
    """Answer ZAP in ``context`` until it is terminated: once for each handshake, in a thread of its own, so that a
    process that computes keeps nobody waiting."""
    socket = context.socket(zmq.REP)
    try:
        socket.set(zmq.LINGER, 0)
        socket.bind(_ZAP)
        expected = zmq.utils.z85.decode(curve.public)
        threading.Thread(target=_answer, args=(socket, expected), name="zmq-zap", daemon=True).start()
    except BaseException:  # whoever terminates the context would wait for it
        socket.close()
        raise


def _answer(socket: "zmq.Socket[bytes]", expected: bytes) -> None:
    refused = 0
    with socket:
        while True:
            try:
                version, request, domain, address, _, mechanism, *credentials = socket.recv_multipart()
                admitted = (domain, mechanism, credentials) == (_DOMAIN, b"CURVE", [expected])
                status = [b"200", b"OK"] if admitted else [b"400", b"not of this cluster"]
                socket.send_multipart([version, request, *status, b"", b""])
            except zmq.ContextTerminated:
                return
            if not admitted:
                refused += 1
                if refused & (refused - 1) == 0:  # who knocks all day shall not fill the log
                    log.warning("refused %s, which has not the cluster's key (%d so far)", address.decode(), refused)
