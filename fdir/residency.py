"""Which pages of its own memory a process really reads.

Clean pages of a file mapping can be dropped from a process at any time: the next access brings them back
from the page cache. So: drop them, let the program run, and see which came back.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fdir.pages import PAGE_SIZE

_PAGEMAP = Path("/proc/self/pagemap")
_PRESENT = np.uint64(1 << 63)
"""Bit of a page that is in memory. Source: Linux, ``Documentation/admin-guide/mm/pagemap.rst``."""
_MADV_DONTNEED = 4
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def can_observe() -> bool:
    """Tell whether this kernel shows a process its own pages (``CONFIG_PROC_PAGE_MONITOR``)."""
    return os.access(_PAGEMAP, os.R_OK)


def drop_pages(address: int, length: int) -> None:
    """Take pages of a file mapping out of this process; private changes to them are lost.

    Parameters
    ----------
    address
        Where they begin, at a page boundary.
    length
        Bytes.

    Raises
    ------
    OSError
        The range is not mapped.
    """
    if _libc.madvise(address, length, _MADV_DONTNEED):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def present_pages(address: int, pages: int) -> NDArray[np.bool_]:
    """Tell which pages are in this process.

    The kernel brings clean pages in by small groups, so the neighbours of a page that was read may be
    present too; a page that is absent was not read.

    Parameters
    ----------
    address
        Where they begin, at a page boundary.
    pages
        Number of pages.

    Returns
    -------
    bool, shape ``(pages,)``.

    Raises
    ------
    OSError
        The kernel does not tell, see `can_observe`.
    """
    with _PAGEMAP.open("rb", buffering=0) as file:
        file.seek(address // PAGE_SIZE * 8)
        entries = np.frombuffer(file.read(pages * 8), np.uint64)
    present: NDArray[np.bool_] = (entries & _PRESENT) != 0
    return present
