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
from node.inference.arena import PAGE, ArenaShape, ArenaState, newest_state, read_record
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

    Embedding rows (`sparse`) are left out: only those of the tokens in use are ever read. So is what the
    session reads while loading only.
    """

    def __init__(self, tensors: Sequence[MappedTensor]) -> None:
        self._tensors = [tensor for tensor in tensors if tensor.read and not tensor.sparse]
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


class ArenaView:
    """The KV arena read from outside, through its file. Layout: `node.inference.arena`.

    Parameters
    ----------
    path
        The arena's file on shared memory; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> tuple[ArenaShape, ArenaState] | None:
        """Return shape and committed state, None while there is no arena or its records are not whole."""
        try:
            with self.path.open("rb", buffering=0) as file:
                head = file.read(3 * PAGE)
        except OSError:
            return None
        shape, state = read_record(head, 0, ArenaShape), newest_state(head)
        return None if shape is None or state is None else (shape, state)

    def commit(self) -> Commit | None:
        """Return the committed state as a `Commit` seen now, None as in `read`."""
        found = self.read()
        if found is None:
            return None
        state = found[1]
        return Commit(
            t_ns=time.time_ns(),
            serial=state.serial,
            job=state.job,
            generated=state.generated,
            finish=state.finish,
        )


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
        shape, state = found
        if not state.job or state.finish is not None or state.positions == 0:
            raise NotThere("no KV row in use")
        row_bits = shape.head_dim * 32
        bits = shape.planes * state.positions * row_bits
        row, at = divmod(min(int(fault.where * bits), bits - 1), row_bits)
        plane, position = divmod(row, state.positions)
        byte, bit = divmod(at, 8)
        page = plane * shape.positions + position
        offset = shape.offsets()["kv"] + page * shape.head_dim * 4 + byte
        address = _address(memory.pid, self.arena.path, offset)
        t_ns = time.time_ns()
        before, after = memory.flip(address, bit)
        # plane = (layer * 2 + (0 for K, 1 for V)) * kv_heads + head
        layer, is_v = divmod(plane // shape.kv_heads, 2)
        return Strike(
            index=fault.index,
            target=fault.target,
            pid=memory.pid,
            t_ns=t_ns,
            address=address,
            page=page,
            role="v" if is_v else "k",
            tensor=f"layer {layer}, position {position}",
            byte=byte,
            bit=bit,
            before=before,
            after=after,
            deferred_s=deferred_s,
            job=state.job,
        )


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
