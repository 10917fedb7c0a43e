"""What the composition root tells a gateway."""

from dataclasses import dataclass, field

from gateway.auth import Tenant
from gateway.core.limits import Limits
from gateway.core.session import SessionTimeouts
from kv_transfer.curve import CurveKeys


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files of this machine."""

    cert: str
    """The certificate, and those between it and a root that clients know."""
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    model: str
    """Folder with config.json and the tokenizer."""
    served_model_name: str
    router: str
    """The router's mailbox."""
    host: str = "127.0.0.1"
    """Address that HTTP and gRPC bind to; anything but loopback needs ``tenants``."""
    port: int = 8000
    """0: a free one."""
    grpc_port: int | None = None
    """0: a free one; None: no gRPC."""
    reuse_port: bool = False
    """Whether another gateway of this user may listen there too: one that is about to be replaced by this one."""
    tenants: tuple[Tenant, ...] | None = None
    """Whose API keys are good here; None: nobody needs one."""
    tls: Tls | None = None
    """None: what clients say can be read on its way."""
    mailbox_host: str = "127.0.0.1"
    """Address of this machine that the mailbox binds to; workers and router reach it."""
    curve: CurveKeys | None = None
    """Of the cluster; the mailbox needs it to bind to anything but loopback."""
    max_model_len: int | None = None
    """Tokens of prompt and output together; None: the model's own."""
    max_attempts: int = 4
    limits: Limits = field(default_factory=Limits)
    timeouts: SessionTimeouts = field(default_factory=SessionTimeouts)
    max_connections: int = 4096
    """Open HTTP connections; further ones hear 503. At most half of the process's file descriptors are used. As many
    of gRPC, of a quarter of the descriptors, and as many calls."""
    headers_timeout: float = 30.0
    """Seconds that a client may take from connecting, or from beginning its next request, to the end of the headers; of
    gRPC to the end of the handshake."""
    keep_alive: int = 75
    """Seconds that a connection may be idle between an answer and the next request."""
    body_timeout: float = 10.0
    """Seconds that a client may take to send its request's body; in gRPC the message of a call that has one."""
    client_stall: float = 60.0
    """Seconds that a client may take to read nothing before it is dropped."""
    resume_grace: float = 10.0
    """Seconds that a resumable stream is kept without its client."""
    drain: float = 5.0
    """Seconds that requests in flight get to finish when the gateway stops."""
    record: str = ""
    """Folder in which everything that happens to the sessions is written down; empty for none."""
    state_every: float = 0.5
    """Seconds between two questions to the router for the cluster's state."""
