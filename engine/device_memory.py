"""GPU memory that processes of one user on one host share, by CUDA's IPC.

The handle that CUDA makes of an allocation stands in a page of ``engine.shared_memory``. That page's address is the
memory's address: so what it names is checked before CUDA sees it, no peer on a network can pass a handle of its own,
and the end of the owner can be seen.

The driver is called as it is, not through torch's sharing of tensors: that counts readers in a file under ``/dev/shm``,
which a killed process leaves behind; it counts one reader an export; and it can share only some of what its allocator
hands out. The memory stays its process's until that ends: CUDA leaves undefined what becomes of a peer that has open
what is freed.
"""

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from functools import lru_cache

import torch

from engine.shared_memory import Shared, SharedMemoryError, attach

HANDLE_BYTES = 64
_PAGE = struct.Struct(f"<16sQ{HANDLE_BYTES}s")
"""What it is, the size of the memory, its handle."""
_MAGIC = b"baton cuda ipc 1"
_LAZY_PEER_ACCESS = 1
"""CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS: the memory may be another GPU's that this one reaches."""


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


_ARGUMENTS = {
    "cuInit": (c_uint,),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuIpcGetMemHandle": (POINTER(_Handle), c_uint64),
    "cuIpcOpenMemHandle_v2": (POINTER(c_uint64), _Handle, c_uint),
    "cuIpcCloseMemHandle": (c_uint64,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
}


class DeviceMemory:
    """``size`` bytes of a GPU's memory, zeroed, as ``tensor [size]``; others open them by ``address`` until ``close``.

    Raises ``SharedMemoryError`` where there is no such GPU, no room in it, or no sharing of its memory.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        device = _numbered(device)
        pointer, handle = _driver(device.index).allocate(size)
        self.tensor = _tensor(pointer, size, device)
        self.tensor.zero_()
        torch.cuda.synchronize(device)
        self._page = publish(handle, size)
        self.address = self._page.address

    def close(self) -> None:
        """No other process can open it from now on. Those that did may use it until this process ends."""
        self._page.close()


class PeerDeviceMemory:
    """Another process's ``DeviceMemory`` of ``size`` bytes, as GPU ``device`` of this one sees it: ``tensor [size]``.

    Raises ``SharedMemoryError``; also for memory of this same process, which CUDA does not open a second time.
    """

    def __init__(self, address: str, size: int, device: torch.device) -> None:
        device = _numbered(device)
        handle, self._process = look_up(address, size)
        try:
            self._driver = _driver(device.index)
            self._pointer = self._driver.open(handle)
        except SharedMemoryError:
            os.close(self._process)
            raise
        self.tensor = _tensor(self._pointer, size, device)

    @property
    def process(self) -> int:
        """A pidfd; readable when the owner has died."""
        return self._process

    def close(self) -> None:
        """Nothing may use ``tensor`` any more, and nothing on the GPU may be using it; harmless twice."""
        if self._process >= 0:
            os.close(self._process)
            self._process = -1
            self.tensor = torch.empty(0, dtype=torch.uint8)
            self._driver.close(self._pointer)


def publish(handle: bytes, size: int) -> Shared:
    """A page that tells other processes of memory of ``size`` bytes; the caller closes it."""
    page = Shared(mmap.PAGESIZE)
    with page.map() as mapping:
        mapping[: _PAGE.size] = _PAGE.pack(_MAGIC, size, handle)
    return page


def look_up(address: str, size: int) -> tuple[bytes, int]:
    """The handle of the memory at ``address``, and a pidfd of its owner, which the caller closes. Raises
    ``SharedMemoryError`` where there is no such memory, or it has another size."""
    mapping, process = attach(address, mmap.PAGESIZE)
    with mapping:
        magic, there, handle = _PAGE.unpack(mapping[: _PAGE.size])
    if magic != _MAGIC or there != size:
        os.close(process)
        what = f"is {there} bytes, not {size}" if magic == _MAGIC else "is none of a GPU"
        raise SharedMemoryError(f"the memory at {address} {what}")
    return handle, process


class _Driver:
    """What is needed of CUDA's driver, in the context that torch uses; any thread."""

    def __init__(self, device: int) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise SharedMemoryError(f"there is no CUDA driver here: {error}") from error
        for name, arguments in _ARGUMENTS.items():
            getattr(self._library, name).argtypes = arguments
        ordinal, self._context = c_int(), c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", byref(ordinal), device)
        self._call("cuDevicePrimaryCtxRetain", byref(self._context), ordinal)

    def allocate(self, size: int) -> tuple[int, bytes]:
        """Address and handle of ``size`` new bytes."""
        pointer, handle = c_uint64(), _Handle()
        with self._current():
            self._call("cuMemAlloc_v2", byref(pointer), size)
            self._call("cuIpcGetMemHandle", byref(handle), pointer)
        return pointer.value, bytes(handle)

    def open(self, handle: bytes) -> int:
        """Where the memory of another process's handle is in this one."""
        pointer = c_uint64()
        with self._current():
            self._call("cuIpcOpenMemHandle_v2", byref(pointer), _Handle.from_buffer_copy(handle), _LAZY_PEER_ACCESS)
        return pointer.value

    def close(self, pointer: int) -> None:
        with self._current():
            self._call("cuIpcCloseMemHandle", pointer)

    @contextmanager
    def _current(self) -> Iterator[None]:
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def _call(self, name: str, *arguments: object) -> None:
        result = getattr(self._library, name)(*arguments)
        if result:
            text = c_char_p()
            self._library.cuGetErrorName(result, byref(text))
            raise SharedMemoryError(f"{name}: {(text.value or b'error %d' % result).decode()}")


@lru_cache
def _driver(device: int) -> _Driver:
    return _Driver(device)


def _numbered(device: torch.device) -> torch.device:
    if device.type != "cuda":
        raise SharedMemoryError(f"{device} is no GPU of CUDA")
    if not torch.cuda.is_available():
        raise SharedMemoryError("torch sees no GPU here")
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device


def _tensor(pointer: int, size: int, device: torch.device) -> torch.Tensor:
    """``size`` bytes as a tensor that does not own them. It counts as ``device``'s also where the memory is another
    GPU's that ``device`` reaches."""
    storage = torch._C._construct_storage_from_data_pointer(pointer, device, size)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
