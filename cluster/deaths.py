"""Hears at once of the death of processes of this host, by pidfds, which need neither Ray nor to be their parent."""

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable

from cluster.state import started_at


class Pid:
    """One process that is watched; never another one that got its number."""

    def __init__(self, fd: int, on_death: Callable[[], None]) -> None:
        self.fd = fd
        self.on_death = on_death


class Deaths:
    """A thread that waits for deaths. ``watch`` and ``kill`` from any thread; ``close`` ends it."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self._epoll.register(self._end, select.EPOLLIN)
        self._watched: dict[int, Pid] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="deaths", daemon=True)
        self._thread.start()

    def watch(self, pid: int, started: int | None, on_death: Callable[[], None]) -> Pid | None:
        """Have ``on_death`` called, in the watching thread, when the process ends. None, and no call, if it is gone
        already or another one has its number: ``started`` is what its own ``state.started_at`` said."""
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return None
        if started_at(pid) != started:
            os.close(fd)
            return None
        watched = Pid(fd, on_death)
        with self._lock:
            self._watched[fd] = watched
            self._epoll.register(fd, select.EPOLLIN)
        return watched

    def kill(self, watched: Pid) -> None:
        """SIGKILL, unless it is dead already."""
        with self._lock:
            if self._watched.get(watched.fd) is watched:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(watched.fd, signal.SIGKILL)

    def close(self) -> None:
        """Watch no more; whoever still lives is let alone."""
        os.eventfd_write(self._end, 1)
        self._thread.join()
        for fd in (*self._watched, self._end):
            os.close(fd)
        self._epoll.close()

    def _run(self) -> None:
        while True:
            for fd, _ in self._epoll.poll():
                if fd == self._end:
                    return
                with self._lock:
                    watched = self._watched.pop(fd)
                    self._epoll.unregister(fd)
                    os.close(fd)
                watched.on_death()
