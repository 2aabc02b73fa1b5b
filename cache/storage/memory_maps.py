"""Files in memory that keep no descriptor open, however many there are.

`mmap.mmap` holds a copy of the descriptor for as long as the map lives (from Python 3.13 on not with trackfd=False), so
a process could look at no more files than it may have open. Windows has no such limit to run into, nor the calls of
POSIX that are used elsewhere: there it is the map.
"""

import ctypes
import mmap
import os
import weakref
from functools import cache

import numpy as np
from numpy.typing import NDArray

_FAILED = ctypes.c_void_p(-1).value
_HAS_POSIX = hasattr(mmap, "PROT_READ")


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    address, size, flag = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype, libc.mmap.argtypes = address, (address, size, flag, flag, flag, ctypes.c_long)
    libc.munmap.argtypes = (address, size)
    libc.madvise.argtypes = (address, size, flag)
    return libc


def map_file(descriptor: int, size: int) -> NDArray[np.uint8]:
    """The first `size` bytes of a file, (size,) uint8, read-only; the descriptor may be closed at once.

    The map ends with the last array that is a view of it.

    Raises:
        OSError: the system has no room for another map, or this file cannot be mapped.
    """
    if not size:
        return np.empty(0, np.uint8)
    if not _HAS_POSIX:
        return np.frombuffer(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ), np.uint8)
    address = _libc().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == _FAILED:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    mapped = (ctypes.c_char * size).from_address(address)
    # Not at the interpreter's end, when arrays may still be in use: the system takes the map back by itself.
    weakref.finalize(mapped, _libc().munmap, address, size).atexit = False
    # Nobody can make an array writable again that numpy was given to read only; a write would end the process.
    return np.frombuffer(memoryview(mapped).toreadonly(), np.uint8)


def will_need(data: NDArray[np.uint8], first: int, length: int) -> None:
    """Ask the system to read a range of a mapped file from the disk; `first` is the start of a page. Only a hint."""
    if _HAS_POSIX:
        _libc().madvise(data.ctypes.data + first, length, mmap.MADV_WILLNEED)
