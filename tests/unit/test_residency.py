"""Pages dropped and brought back by reading."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from fdir.pages import PAGE_SIZE
from fdir.residency import can_observe, drop_pages, present_pages

PAGES = 256


@pytest.mark.skipif(not can_observe(), reason="this kernel does not show a process its pages")
def test_only_what_is_read_comes_back(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGES * PAGE_SIZE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as mapping:
        memory = np.frombuffer(mapping, np.uint8)
        address = memory.ctypes.data
        assert memory.sum() == 0
        assert present_pages(address, PAGES).all()
        drop_pages(address, PAGES * PAGE_SIZE)
        assert not present_pages(address, PAGES).any()
        assert memory[200 * PAGE_SIZE] == 0
        present = present_pages(address, PAGES)
        assert present[200]
        assert not present[:128].any()
        del memory


def test_what_is_not_mapped_cannot_be_dropped():
    with pytest.raises(OSError, match="Cannot allocate memory"):
        drop_pages(PAGE_SIZE, PAGE_SIZE)
