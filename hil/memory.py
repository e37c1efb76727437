"""A worker's memory seen from outside: `/proc/PID/mem`, the weights it has mapped, its KV arena.

Nothing here talks to the flight code. The image manifest says which bytes of `weights.bin` are weights, the
kernel says where the worker has them, and the arena (a file on shared memory) describes itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fdir.pages import MappedTensor, Span, live_mappings
from hil.faults import Commit, Fault, Strike, Target
from node.inference.arena_layout import (
    BANKS,
    PAGE,
    ArenaShape,
    Bank,
    SeatState,
    newest_state,
    read_record,
)
from node.inference.manifest import WEIGHTS, load_manifest
from telemetry.errors import PenumbraError


class NotThere(Exception):
    """The memory to strike does not exist now: no worker, not mapped yet, no KV row in use."""


class ProcessMemory:
    """Memory of another process.

    Parameters
    ----------
    pid
        The process.

    Raises
    ------
    PenumbraError
        We may not write its memory.
    NotThere
        There is no such process.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._file = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        except PermissionError:
            raise PenumbraError(
                f"memory of process {pid} (/proc/{pid}/mem) may not be written by this user",
                "run the bench as the user that runs the node, with kernel.yama.ptrace_scope at most 1"
                " (sysctl), or give it CAP_SYS_PTRACE",
            ) from None
        except (FileNotFoundError, ProcessLookupError):
            raise NotThere(f"process {pid} is gone") from None

    def close(self) -> None:
        """Let go of the process."""
        os.close(self._file)

    def __enter__(self) -> ProcessMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, address: int) -> int:
        """Return one byte.

        Raises
        ------
        NotThere
            Nothing is mapped at the address.
        """
        try:
            found = os.pread(self._file, 1, address)
        except OSError as error:
            raise NotThere(f"{address:#x} of process {self.pid}: {error.strerror}") from None
        if len(found) != 1:
            raise NotThere(f"nothing at {address:#x} of process {self.pid}")
        return found[0]

    def flip(self, address: int, bit: int) -> tuple[int, int]:
        """Flip one bit and read it back.

        Returns
        -------
        (int, int)
            The byte before and after.

        Raises
        ------
        NotThere
            Nothing is mapped at the address, or the flip did not stay.
        """
        try:
            before = os.pread(self._file, 1, address)
            if len(before) != 1:
                raise NotThere(f"nothing at {address:#x} of process {self.pid}")
            after = bytes([before[0] ^ (1 << bit)])
            os.pwrite(self._file, after, address)
            found = os.pread(self._file, 1, address)
        except OSError as error:
            raise NotThere(f"{address:#x} of process {self.pid}: {error.strerror}") from None
        if found != after:
            raise NotThere(f"flip at {address:#x} of process {self.pid} did not stay")
        return before[0], after[0]


@dataclass(frozen=True)
class WeightSite:
    """One bit of `weights.bin`."""

    tensor: MappedTensor
    offset: int
    """Byte in the file."""
    bit: int


class WeightSites:
    """The protected bits of an image: every tensor a step reads whole, without the padding of its last page.

    Tensors a step reads some rows of (`rows`) are left out: most of their rows are never read. So is what
    the session reads while loading only.
    """

    def __init__(self, tensors: Sequence[MappedTensor]) -> None:
        self._tensors = [tensor for tensor in tensors if tensor.read and not tensor.rows]
        self._ends = np.cumsum([tensor.length * 8 for tensor in self._tensors], dtype=np.int64)
        if not self._tensors:
            raise ValueError("the image has no protected weights")

    @property
    def bits(self) -> int:
        """Number of protected bits."""
        return int(self._ends[-1])

    def locate(self, where: float) -> WeightSite:
        """Return the bit at a fraction, 0 to 1 (1 excluded), of all protected bits."""
        at = min(int(where * self.bits), self.bits - 1)
        index = int(np.searchsorted(self._ends, at, side="right"))
        tensor = self._tensors[index]
        byte, bit = divmod(at - (int(self._ends[index]) - tensor.length * 8), 8)
        return WeightSite(tensor, tensor.offset + byte, bit)


@dataclass(frozen=True)
class RowSite:
    """One bit of a KV row in use."""

    seat: int
    job: str
    bank: Bank
    plane: int
    """Of the bank, see `node.inference.arena_layout`."""
    position: int
    """Absolute."""
    row: int
    """In the bank."""
    byte: int
    """Offset in the row."""
    bit: int


class RowSites:
    """The bits of all rows that the committed epochs of jobs under way have written.

    Seats that are free, parked or finished are left out: no proof looks at them now.

    Parameters
    ----------
    shape, states
        What an arena tells about itself; one state a seat.
    """

    def __init__(self, shape: ArenaShape, states: Sequence[SeatState]) -> None:
        self._shape = shape
        self._areas: list[tuple[int, SeatState, Bank, int]] = []
        for seat, state in enumerate(states):
            if state.phase == "active":
                for bank in BANKS:
                    base = state.base if bank == "window" else 0
                    self._areas.append((seat, state, bank, base))
        rows = [shape.planes_of(bank) * (state.positions - base) for _, state, bank, base in self._areas]
        self._ends = np.cumsum(rows, dtype=np.int64)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, where: float) -> RowSite:
        """Return the bit at a fraction, 0 to 1 (1 excluded), of all bits.

        Raises
        ------
        NotThere
            There is no row.
        """
        if not self.rows:
            raise NotThere("no KV row in use")
        row_bits = self._shape.head_dim * 32
        bits = self.rows * row_bits
        at, in_row = divmod(min(int(where * bits), bits - 1), row_bits)
        area = int(np.searchsorted(self._ends, at, side="right"))
        seat, state, bank, base = self._areas[area]
        first = int(self._ends[area - 1]) if area else 0
        plane, row = divmod(at - first, state.positions - base)
        byte, bit = divmod(in_row, 8)
        return RowSite(seat, state.job, bank, plane, base + row, row, byte, bit)


class ArenaView:
    """The KV arena read from outside, through its file. Layout: `node.inference.arena_layout`.

    Parameters
    ----------
    path
        The arena's file on shared memory; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> tuple[ArenaShape, list[SeatState]] | None:
        """Return shape and state of each seat, None while there is no arena or its records are not whole."""
        try:
            with self.path.open("rb", buffering=0) as file:
                head = file.read(PAGE)
                shape = read_record(head, 0, ArenaShape)
                if shape is None:
                    return None
                head += file.read((shape.state_pages - 1) * PAGE)
        except OSError:
            return None
        states = [state for seat in range(shape.seats) if (state := newest_state(head, seat)) is not None]
        return (shape, states) if len(states) == shape.seats else None

    def commits(self) -> list[Commit]:
        """Return the committed state of each seat, seen now; none as in `read`."""
        found, now_ns = self.read(), time.time_ns()
        return [
            Commit(
                t_ns=now_ns, serial=state.serial, job=state.job, generated=state.generated,
                finish=state.finish, seat=seat, base=state.base, parked=state.parked,
            )
            for seat, state in enumerate(found[1] if found else ())
        ]  # fmt: skip


class WorkerMemory:
    """What of a worker's memory can be struck, and the strike itself.

    Parameters
    ----------
    image_dir
        The image slot the worker runs.
    arena_path
        Its KV arena.

    Raises
    ------
    PenumbraError
        The image's manifest cannot be read.
    """

    def __init__(self, image_dir: Path, arena_path: Path) -> None:
        self._weights_path = image_dir / WEIGHTS
        manifest = load_manifest(image_dir)
        self._page_size = manifest.page_size
        self.sites = WeightSites(manifest.tensors)
        self.arena = ArenaView(arena_path)

    def strike(self, pid: int, fault: Fault, deferred_s: float = 0.0) -> Strike:
        """Let a fault land in process `pid`.

        Raises
        ------
        NotThere
            There is nothing to strike now; the same fault may be tried again.
        PenumbraError
            We may not write the worker's memory.
        """
        with ProcessMemory(pid) as memory:
            if fault.target is Target.WEIGHTS:
                return self._strike_weights(memory, fault, deferred_s)
            return self._strike_kv(memory, fault, deferred_s)

    def _strike_weights(self, memory: ProcessMemory, fault: Fault, deferred_s: float) -> Strike:
        site = self.sites.locate(fault.where)
        address = _address(memory.pid, self._weights_path, site.offset)
        t_ns = time.time_ns()
        before, after = memory.flip(address, site.bit)
        return Strike(
            index=fault.index,
            target=fault.target,
            pid=memory.pid,
            t_ns=t_ns,
            address=address,
            page=site.offset // self._page_size,
            role=site.tensor.role,
            tensor=site.tensor.name,
            byte=site.offset % self._page_size,
            bit=site.bit,
            before=before,
            after=after,
            deferred_s=deferred_s,
        )

    def _strike_kv(self, memory: ProcessMemory, fault: Fault, deferred_s: float) -> Strike:
        found = self.arena.read()
        if found is None:
            raise NotThere("no KV arena yet")
        shape, states = found
        site = RowSites(shape, states).locate(fault.where)
        offset = shape.row_offset(site.bank, site.plane, site.seat, site.row) + site.byte
        address = _address(memory.pid, self.arena.path, offset)
        t_ns = time.time_ns()
        before, after = memory.flip(address, site.bit)
        layer_kv, head = divmod(site.plane, shape.kv_heads)
        layer = shape.layers_of(site.bank)[layer_kv // 2]
        role = "v" if layer_kv % 2 else "k"
        return Strike(
            index=fault.index,
            target=fault.target,
            pid=memory.pid,
            t_ns=t_ns,
            address=address,
            page=site.position,
            role=role,
            tensor=f"{role} of layer {layer}, head {head}, position {site.position}",
            byte=site.byte,
            bit=site.bit,
            before=before,
            after=after,
            deferred_s=deferred_s,
            job=site.job,
            seat=site.seat,
            bank=site.bank,
            layer=layer,
            head=head,
            moved=self._moved(site.seat, states[site.seat]),
        )

    def _moved(self, seat: int, before: SeatState) -> bool:
        """Tell whether a seat was given to another job, or its window slid, since a state was read."""
        found = self.arena.read()
        now = found[1][seat] if found else SeatState()
        return (now.job, now.base) != (before.job, before.base)


def _address(pid: int, path: Path, offset: int) -> int:
    """Return where a process has byte `offset` of a file mapped."""
    try:
        spans: list[Span] = live_mappings(path, pid)
    except PermissionError:
        raise PenumbraError(
            f"mappings of process {pid} may not be read by this user",
            "run the bench as the user that runs the node, or give it CAP_SYS_PTRACE",
        ) from None
    except OSError:
        raise NotThere(f"process {pid} is gone") from None
    for span in spans:
        if span.file_offset <= offset < span.file_offset + span.length:
            return span.address + offset - span.file_offset
    raise NotThere(f"{path.name} is not mapped at byte {offset} in process {pid}")
