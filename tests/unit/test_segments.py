"""Code of a live process against its files: a struck page is found, and written anew in place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fdir.code_manifest import CodeManifest
from fdir.golden import PAGE_SIZE, read_golden, write_golden
from fdir.regions import Damage
from fdir.segments import CodeMapping, ProcessCode, code_mappings
from hil.memory import ProcessMemory

MAPS = """\
1000-3000 r--p 00000000 08:01 11                         /lib/a b.so
3000-8000 r-xp 00002000 08:01 11                         /lib/a b.so
8000-9000 r--p 00007000 08:01 11                         /lib/a b.so
9000-a000 rw-p 00008000 08:01 11                         /lib/a b.so
a000-b000 r--p 00000000 08:01 12                         /usr/lib/locale
b000-c000 r-xp 00000000 08:01 13                         /lib/old.so (deleted)
c000-d000 r-xs 00000000 08:01 14                         /lib/shared.so
d000-e000 r-xp 00000000 00:00 0
e000-f000 r-xp 00000000 00:00 0                          [vdso]
f000-10000 r-xp 00000000 08:01 15                        /lib/new\\012line.so
"""

CHILD = """
import sys, ctypes
library = ctypes.CDLL(sys.argv[1])
print(library.XXH_versionNumber() if hasattr(library, "XXH_versionNumber") else 0, flush=True)
sys.stdin.read()
"""


def test_only_code_of_files_is_looked_at():
    assert code_mappings(MAPS) == [
        CodeMapping(0x1000, 0x2000, 0, "/lib/a b.so", False, False),
        CodeMapping(0x3000, 0x5000, 0x2000, "/lib/a b.so", True, False),
        CodeMapping(0x8000, 0x1000, 0x7000, "/lib/a b.so", False, False),
        CodeMapping(0xB000, 0x1000, 0, "/lib/old.so", True, True),
        CodeMapping(0xF000, 0x1000, 0, "/lib/new\nline.so", True, False),
    ]


class Child:
    """A process that has loaded a library of its own, and the region of its code."""

    def __init__(self, folder: Path) -> None:
        import _ctypes

        self.library = Path(shutil.copy(_ctypes.__file__, folder / "library.so"))
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(self.library)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        self.process.stdout.readline()
        self.notes: list[str] = []
        self.manifest = CodeManifest(folder / "code.manifest", self.notes.append)
        self.region = ProcessCode("child.code", "child", self.process.pid, self.manifest)

    def scan(self) -> list[Damage]:
        return [damage for piece in range(self.region.refresh()) for damage in self.region.check(piece)]

    def mapping(self, *, executable: bool = True) -> CodeMapping:
        maps = Path(f"/proc/{self.process.pid}/maps").read_text()
        return next(
            found
            for found in code_mappings(maps)
            if found.path == str(self.library) and found.executable == executable
        )

    def flip(self, at: int, bit: int = 3, *, executable: bool = True) -> int:
        address = self.mapping(executable=executable).address + at
        with ProcessMemory(self.process.pid) as memory:
            memory.flip(address, bit)
        return address

    def bytes_at(self, address: int, length: int) -> bytes:
        with open(f"/proc/{self.process.pid}/mem", "rb", buffering=0) as file:
            file.seek(address)
            return file.read(length)

    def close(self) -> None:
        self.region.close()
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    child = Child(tmp_path)
    yield child
    child.close()


def test_sound_code_of_a_process_is_no_damage(child):
    assert child.scan() == []
    assert child.scan() == []
    assert 1 << 20 < child.region.size < child.region.mapped_bytes
    assert child.region.uncovered == {}
    assert child.notes == []


def test_own_code_is_sound_and_reading_it_brings_nothing_in(tmp_path):
    region = ProcessCode("own", "test", None, CodeManifest(tmp_path / "manifest"))
    try:
        for _ in range(2):
            assert [damage for piece in range(region.refresh()) for damage in region.check(piece)] == []
        before = _resident_file_kib()
        for piece in range(region.refresh()):
            region.check(piece)
        assert _resident_file_kib() - before < 1024
        assert region.mapped_bytes - region.size > 4 << 20
    finally:
        region.close()


def _resident_file_kib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssFile"):
            return int(line.split()[1])
    raise AssertionError("no RssFile")


@pytest.mark.parametrize("executable", [True, False])
def test_a_struck_page_is_found_and_written_anew_in_place(child, executable):
    child.scan()
    mapping = child.mapping(executable=executable)
    good = child.bytes_at(mapping.address, PAGE_SIZE)
    address = child.flip(1234, 5, executable=executable)
    (damage,) = child.scan()
    assert (damage.repaired, damage.method, damage.region) == (True, "file", "child.code")
    assert damage.evidence["process"] == "child"
    assert damage.evidence["file"] == str(child.library)
    assert damage.evidence["address"] == f"{mapping.address:#x}"
    assert (damage.evidence["bits"], damage.evidence["first_byte"]) == (1, 1234)
    assert address == mapping.address + 1234
    assert child.bytes_at(mapping.address, PAGE_SIZE) == good
    assert child.scan() == []


def test_several_pages_and_many_bits_come_back(child):
    child.scan()
    mapping = child.mapping()
    good = child.bytes_at(mapping.address, mapping.length)
    for at in (0, 1, 2, 77, PAGE_SIZE + 5, mapping.length - 1):
        child.flip(at, at % 8)
    assert len(child.scan()) == len({0, 1, (mapping.length - 1) // PAGE_SIZE})
    assert child.bytes_at(mapping.address, mapping.length) == good


def test_a_strike_before_the_first_look_is_found(child):
    child.flip(100)
    (damage,) = child.scan()
    assert damage.repaired


def test_a_file_that_is_damaged_too_is_not_believed(child):
    child.scan()
    found = os.stat(child.library)
    offset = child.mapping().offset
    with child.library.open("r+b") as file:
        file.seek(offset + 9)
        byte = file.read(1)[0]
        file.seek(offset + 9)
        file.write(bytes([byte ^ 4]))
        file.flush()
        os.fsync(file.fileno())
    os.utime(child.library, ns=(found.st_atime_ns, found.st_mtime_ns))
    child.flip(9, 7)  # written memory no longer follows the file
    for _ in range(2):
        (damage,) = child.scan()
        assert (damage.repaired, damage.method) == (False, "none")
        assert damage.evidence["reason"] == "the file on the disk is damaged, too"


def test_a_removed_file_leaves_what_was_seen_first_as_baseline(child):
    child.library.rename(child.library.with_name("gone"))
    child.library.with_name("gone").unlink()
    assert child.scan() == []
    maps = Path(f"/proc/{child.process.pid}/maps").read_text()
    mapping = next(m for m in code_mappings(maps) if m.deleted and m.executable)
    with ProcessMemory(child.process.pid) as memory:
        memory.flip(mapping.address + 8, 1)
    (damage,) = child.scan()
    assert (damage.repaired, damage.evidence["reason"]) == (False, "the file was removed or replaced")


def test_a_process_that_ended_cannot_be_read(child):
    pieces = child.region.refresh()
    child.process.kill()
    child.process.wait()
    with pytest.raises(ProcessLookupError, match="child has ended"):
        child.region.check(pieces - 1)
    with pytest.raises(ProcessLookupError, match="child has ended"):
        child.region.refresh()
    with pytest.raises(FileNotFoundError):
        ProcessCode("again", "child", child.process.pid, child.manifest)


def test_a_file_that_cannot_be_read_is_named(child, monkeypatch):
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(child.manifest, "digests", refuse)
    assert child.scan() == []
    assert child.region.uncovered[str(child.library)] == "Permission denied"


# The manifest.


def test_the_manifest_is_kept_and_read_again(tmp_path):
    file = tmp_path / "lib.so"
    file.write_bytes(np.random.default_rng(1).bytes(3 * PAGE_SIZE + 7))
    first = CodeManifest(tmp_path / "manifest")
    digests = first.digests(str(file))
    assert len(digests) == 4
    assert first.news
    first.save()
    assert not first.news
    notes: list[str] = []
    second = CodeManifest(tmp_path / "manifest", notes.append)
    assert len(second) == 1
    assert second.digests(str(file)) == digests
    assert not second.news
    assert notes == []


def test_a_strike_on_the_disk_does_not_change_the_manifest_but_new_software_does(tmp_path):
    file = tmp_path / "lib.so"
    file.write_bytes(np.random.default_rng(2).bytes(2 * PAGE_SIZE))
    manifest = CodeManifest(tmp_path / "manifest")
    digests = manifest.digests(str(file))
    manifest.save()
    stamp = file.stat().st_mtime_ns
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stamp, stamp))
    assert CodeManifest(tmp_path / "manifest").digests(str(file)) == digests
    os.utime(file, ns=(stamp, stamp + 1))
    notes: list[str] = []
    manifest = CodeManifest(tmp_path / "manifest", notes.append)
    assert [a == b for a, b in zip(manifest.digests(str(file)), digests, strict=True)] == [True, False]
    manifest.save()
    assert notes == ["software changed since the last start: lib.so"]


def test_a_damaged_manifest_is_told_and_made_anew(tmp_path):
    file = tmp_path / "lib.so"
    file.write_bytes(bytes(PAGE_SIZE))
    path = tmp_path / "manifest"
    manifest = CodeManifest(path)
    manifest.digests(str(file))
    manifest.save()
    raw = bytearray(path.read_bytes())
    for at in range(0, len(raw), 11):
        struck = bytearray(raw)
        struck[at] ^= 0x10
        path.write_bytes(struck)
        notes: list[str] = []
        assert len(CodeManifest(path, notes.append)) == 0
        assert [note.split(":")[0] for note in notes] == ["code manifest manifest is made anew"]
    again = CodeManifest(path)
    again.digests(str(file))
    again.save()
    assert len(CodeManifest(path)) == 1


def test_files_that_are_gone_leave_the_manifest(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(10))
    manifest = CodeManifest(tmp_path / "manifest")
    manifest.digests(str(tmp_path / "a"))
    manifest.digests(str(tmp_path / "b"))
    (tmp_path / "a").unlink()
    manifest.save()
    assert len(CodeManifest(tmp_path / "manifest")) == 1


# The disk.


def test_what_is_written_is_proven_on_the_disk(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(3 * PAGE_SIZE))
    page = np.random.default_rng(3).bytes(PAGE_SIZE)
    assert write_golden(file, PAGE_SIZE, page)
    assert read_golden(file, 0, 4 * PAGE_SIZE) == bytes(PAGE_SIZE) + page + bytes(2 * PAGE_SIZE)


def test_a_disk_that_does_not_keep_what_is_written_is_noticed(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(bytes(PAGE_SIZE))
    monkeypatch.setattr(os, "pwrite", lambda _fd, content, _at: len(content))
    assert not write_golden(file, 0, b"x" * PAGE_SIZE)
