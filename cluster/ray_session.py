"""A Ray to run on: one of our own on loopback, gone without a trace afterwards, or one that is there already.

Our own is closed to others: everything listens on 127.0.0.1, a fresh token is needed to speak to it, there is no
dashboard, nothing is reported home, and its files lie in a private folder. Of Ray's own processes those are started
that actors need.
"""

import contextlib
import importlib
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from cluster.errors import LaunchError
from kv_transfer.curve import is_loopback

OBJECT_STORE_BYTES = 80 << 20
"""The least that Ray takes; nothing of ours goes through the object store."""
TOKEN, ADDRESS, STORAGE = "token", "address", "gcs"
"""In the private folder."""
OPEN_WITHIN = 5.0
"""Seconds in which a head that asks for no token answers."""
GONE_WITHIN = 5.0
"""Seconds that Ray's processes get to end by themselves."""
_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # despite its name: bind to loopback, also on Linux
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # malloc_trim gives back all that is free only in the first arena of glibc's: of others it keeps the top.
    "MALLOC_ARENA_MAX": "1",
    "HF_HUB_OFFLINE": "1",  # the launcher has fetched what is needed
    # Seconds without Ray's head after which Ray ends its processes, ours among them. They need none, so: never.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "1000000",
    "RAY_gcs_storage": "rocksdb",  # so that a head that died can be started again, and knows what runs
}


class RaySession:
    """``start``, use ``ray``, ``stop``."""

    def __init__(self, address: str, namespace: str, private: Path | None = None, *, allow_open: bool = False) -> None:
        """``private``: the folder of a Ray that another process has started for itself alone; that one is joined.
        ``allow_open``: join also a Ray that is beyond loopback and asks for no token."""
        self._address = address
        self._allow_open = allow_open
        self._private = private
        self._namespace = namespace
        self._environment: dict[str, str | None] = {}
        self.ray: Any = None
        self.folder: Path | None = None
        """Our own Ray's files; None where we joined one."""
        self.joined: str | None = None
        """HOST:PORT of a Ray that was there."""

    @property
    def logs(self) -> Path | None:
        """What the processes wrote, while the session lasts."""
        return None if self.folder is None else self.folder / "ray" / "session_latest" / "logs"

    def start(self) -> None:
        if self._private is not None:
            self._join(self._private)
        elif self._address == "local":
            self._prepare()
        import ray

        self.ray = ray
        if ray.is_initialized():
            raise LaunchError("this process is connected to a Ray already; use a process of its own for each cluster")
        options: dict[str, Any] = {"address": self._address, "namespace": self._namespace}
        if self.folder is not None:
            _check_loopback()
            options.update(
                num_cpus=_cpus(),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(self.folder / "ray"),
            )
        with _own_signal_handlers(), _bare_head():
            try:
                ray.init(log_to_driver=False, logging_level="ERROR", **options)
            except Exception as error:  # a node that does not start in time is no more than that for Ray
                raise LaunchError(self._cannot(error)) from error
        address = ray.get_runtime_context().gcs_address
        if self.folder is not None:
            (self.folder / ADDRESS).write_text(address)
        elif self._private is None:
            self.joined = address
            if not self._allow_open and not is_loopback(address.rpartition(":")[0]) and _is_open(address):
                ray.shutdown()
                self.joined = None
                raise LaunchError(
                    f"the Ray at {address} asks for no token: whoever reaches it runs code on its hosts, and reads the"
                    " cluster's keys; start it with RAY_AUTH_MODE=token, as the files in configs/ray do, or say that"
                    " nobody else can reach it: cluster.allow_open_ray: true"
                )

    @property
    def head_pid(self) -> int | None:
        """Of our own Ray's head, the GCS, from which Ray starts processes; None where we joined one."""
        if self.folder is None:
            return None
        (gcs,) = self._node().all_processes["gcs_server"]
        pid: int = gcs.process.pid
        return pid

    def restart_head(self) -> Callable[[], object]:
        """Start the head of our own Ray again, at the same address, with what it had stored. The thread that does so
        has to call what is returned, which waits for the head's end: Ray has its processes die with their parent, and
        takes the thread for that (``PR_SET_PDEATHSIG``)."""
        node = self._node()
        node.kill_gcs_server(check_alive=False)  # bury what is dead
        node.start_gcs_server()
        (gcs,) = node.all_processes["gcs_server"]
        wait: Callable[[], object] = gcs.process.wait
        return wait

    def _node(self) -> Any:
        return self.ray._private.worker._global_node

    def stop(self) -> list[str]:
        """Leave Ray; end our own and remove what it left. Returns what is still there, which should be nothing."""
        mine = _processes_of(self.folder) if self.folder is not None else []
        if self.ray is not None:
            self.ray.shutdown()
        left = []
        if self.folder is not None:
            left = [f"process {process.pid}" for process in _end(mine)]
            shutil.rmtree(self.folder, ignore_errors=True)
            if self.folder.exists():
                left.append(str(self.folder))
        self._restore()
        return left

    def _prepare(self) -> None:
        # Paths of Unix sockets are short, so not in a long TMPDIR; Ray opens its folder to all, so ours is around it.
        parent = "/tmp" if os.access("/tmp", os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(prefix="baton-", dir=parent))
        token = self.folder / TOKEN
        with open(os.open(token, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        self._enter(token)

    def _join(self, folder: Path) -> None:
        try:
            self._address = (folder / ADDRESS).read_text()
        except OSError as error:
            raise LaunchError(f"the Ray in {folder} is still starting, or gone") from error
        self._enter(folder / TOKEN)

    def _enter(self, token: Path) -> None:
        """Have this process speak to a private Ray, by its token."""
        wanted = {
            **_ENVIRONMENT,
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_gcs_storage_path": str(token.with_name(STORAGE)),
        }
        self._environment = {name: os.environ.get(name) for name in (*wanted, "RAY_AUTH_TOKEN", "RAY_ADDRESS")}
        os.environ.pop("RAY_AUTH_TOKEN", None)  # would be taken before the file
        os.environ.pop("RAY_ADDRESS", None)
        os.environ.update(wanted)
        _forget_token()

    def _restore(self) -> None:
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._environment = {}

    def _cannot(self, error: Exception) -> str:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if self.folder is not None:
            advice = "this machine may be too busy or short of memory: look at `uptime` and `free`, and try again"
            return f"Ray did not start: {first}; {advice}"
        return f"there is no Ray to join at {self._address!r}: {first}; start one, or write `address: local`"


def _is_open(address: str) -> bool:
    """Whether Ray's head there tells somebody without a token what there is. One that speaks TLS does not."""
    import grpc

    with grpc.insecure_channel(address) as channel:
        ask: Any = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")
        try:
            ask(b"", timeout=OPEN_WITHIN)
        except grpc.RpcError:
            return False
    return True


def remove_remains(folder: Path) -> None:
    """End the Ray in ``folder``, whose launcher was killed, and remove the folder."""
    if folder.name.startswith("baton-") and folder.is_dir():
        _end(_processes_of(folder), grace=0)
        shutil.rmtree(folder, ignore_errors=True)


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


def _check_loopback() -> None:
    from ray._private import ray_constants

    if ray_constants.ENABLE_RAY_CLUSTER:
        raise LaunchError(
            "ray was imported before RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 was set: it would listen outside"
        )


def _forget_token() -> None:
    """Ray keeps a token in memory; an earlier session of this process had another one."""
    if "ray" in sys.modules:
        raylet = importlib.import_module("ray._raylet")
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Ray sets handlers of its own; the launcher's stay."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _bare_head() -> Iterator[None]:
    """A head that ``ray.init`` starts in here has no autoscaler, no reader of logs (``log_to_driver`` is off) and no
    API server (which runs without a dashboard too, to report usage): three Python processes, a sixth of all that a
    small cluster computes to start. ``ray.init`` has no options for them."""
    from ray._private import node, parameter

    params, start_api_server = parameter.RayParams, node.Node.start_api_server
    parameter.RayParams = partial(params, no_monitor=True, include_log_monitor=False)
    node.Node.start_api_server = lambda self, **options: None
    try:
        yield
    finally:
        parameter.RayParams, node.Node.start_api_server = params, start_api_server


def _processes_of(folder: Path) -> list[psutil.Process]:
    """Ray's processes, by a log in ``folder`` that they have open or by their command line, and all their descendants.

    Many give themselves a title instead of a command line, and have no parent any more when Ray's own was killed.
    """
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            named = [*process.cmdline(), *(file.path for file in process.open_files())]
            if process.pid != os.getpid() and any(str(folder) in name for name in named):
                for each in (process, *process.children(recursive=True)):
                    found[each.pid] = each
    return list(found.values())


def _end(processes: list[psutil.Process], grace: float = GONE_WITHIN) -> list[psutil.Process]:
    """Wait for them, then kill them; who is still there after that."""
    _, alive = psutil.wait_procs(processes, timeout=grace)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(alive, timeout=GONE_WITHIN)
    return alive
