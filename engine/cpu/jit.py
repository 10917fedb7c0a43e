"""Compiles kernels and runs them on torch's own threads.

A kernel is a function of one argument, the address of its int64 arguments, compiled by numba to machine code that needs
neither Python nor its lock. It runs as a parallel region of the OpenMP library that torch has loaded: the same threads
compute torch's operators and ours, so they neither compete for the processors nor wake each other up. Each thread of a
region runs the whole function, and takes its share of the work by ``thread()`` and ``threads()``.

What is compiled is kept in a folder of its own, named after these sources: numba looks at the file of a kernel only,
not at what the kernel calls.
"""

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import llvmlite.binding as llvm
import numba
import torch
from numba import types

log = logging.getLogger(__name__)

_ARGUMENTS = types.CPointer(types.int64)
_SIGNATURE = types.void(_ARGUMENTS)

thread = types.ExternalFunction("baton_thread", types.int32())
"""Within a kernel: which of the region's threads this is."""
threads = types.ExternalFunction("baton_threads", types.int32())
"""Within a kernel: how many threads the region has."""
barrier = types.ExternalFunction("baton_barrier", types.void())
"""Within a kernel: wait until all of the region's threads have come here."""


def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch computes with; None where it is none that can run our regions."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split()[-1] for line in maps if "libgomp" in line}
    except FileNotFoundError:  # not Linux
        return None
    for path in sorted(paths, key=lambda path: "torch" not in path):
        return ctypes.CDLL(path)
    return None


_SYMBOLS = {
    "baton_thread": "omp_get_thread_num",
    "baton_threads": "omp_get_num_threads",
    "baton_barrier": "GOMP_barrier",
}
_library = _openmp()
available = _library is not None
"""Whether kernels can run here at all: elsewhere torch's operators do the work."""
if _library is not None:
    for _name, _symbol in _SYMBOLS.items():
        llvm.add_symbol(_name, ctypes.cast(getattr(_library, _symbol), ctypes.c_void_p).value)
    _parallel = _library.GOMP_parallel
    _parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    _parallel.restype = None


@functools.cache
def cache_folder() -> Path:
    """Where compiled kernels are kept: under ``BATON_CACHE_DIR``, or the user's cache, or else a temporary folder."""
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    home = os.environ.get("BATON_CACHE_DIR")
    home = home or os.path.join(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "baton")
    for folder in (Path(home), Path(tempfile.gettempdir()) / f"baton-{os.getuid()}"):
        made = folder / "kernels" / digest.hexdigest()[:16]
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            for each in (folder, made.parent, made):
                each.mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            log.warning("compiled kernels cannot be kept in %s: %s", made, error)
            continue
        if all(_only_ours(each) for each in (folder, made.parent, made)):
            return made
        log.warning("compiled kernels cannot be kept in %s: others can write there", made)
    raise OSError("no folder to keep compiled kernels in: set BATON_CACHE_DIR to one that can be written")


def _only_ours(folder: Path) -> bool:
    """Whether nobody else can put files there: what numba keeps is code, and pickles."""
    status = folder.lstat()
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    return ours and os.access(folder, os.W_OK)


@contextmanager
def _numba_cache() -> Iterator[None]:
    """Numba's cache in our folder, for as long as a kernel is made; others in the process keep theirs."""
    with open(cache_folder() / "lock", "w") as lock:
        _hold(lock)
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(cache_folder())
        try:
            yield
        finally:
            numba.config.CACHE_DIR = before


def _hold(lock: IO[str]) -> None:
    """Until it is closed. Of workers that start together the first compiles, and the others load what it has made."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:  # a file system without locks
        log.warning("kernels may be compiled by several processes at once: %s cannot be locked: %s", lock.name, error)


class Kernel:
    """A compiled function, to be called with integers and addresses."""

    __slots__ = ("_address", "_compiled", "_pack", "_single")

    def __init__(self, function: Callable[[Any], None], num_arguments: int) -> None:
        start = time.perf_counter()
        with _numba_cache():
            self._compiled = numba.cfunc(_SIGNATURE, cache=True, fastmath={"contract"})(function)
        seconds = time.perf_counter() - start
        if self._compiled.cache_hits:
            log.debug("kernel %s loaded in %.2f s", function.__name__, seconds)
        else:
            log.info("kernel %s compiled in %.2f s, kept in %s", function.__name__, seconds, cache_folder())
        self._address: int = self._compiled.address
        self._pack = ctypes.c_int64 * num_arguments
        self._single = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._address)

    def __call__(self, *arguments: int, alone: bool = False) -> None:
        """Run it on as many threads as torch computes with, or on this one alone; returns when all are done."""
        packed = self._pack(*arguments)
        if alone:
            self._single(ctypes.addressof(packed))
        else:
            self.launch(ctypes.addressof(packed))

    def launch(self, arguments: int) -> None:
        """The same with the address of the int64 arguments."""
        count = torch.get_num_threads()
        if count == 1:
            self._single(arguments)
        else:
            _parallel(self._address, arguments, count, 0)


def kernel(num_arguments: int) -> Callable[[Callable[[Any], None]], Callable[[], Kernel]]:
    """Makes a function a kernel that is compiled when it is first asked for."""

    def decorate(function: Callable[[Any], None]) -> Callable[[], Kernel]:
        @functools.cache
        def compiled() -> Kernel:
            return Kernel(function, num_arguments)

        return compiled

    return decorate
