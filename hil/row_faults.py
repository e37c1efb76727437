"""Injectors of the rows of the FDIR table: each makes a fault happen that its row is to find.

Most strike from outside: a signal, a bit in `/proc/PID/mem`, a byte on the disk, a message of the bus. Some
faults begin inside a process. For those a node is started through `run_node`, or its worker as
`faulty_worker`; both are sound until `trigger` tells them to go wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import os
import signal
import socket
import sqlite3
import struct
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from fdir.monitors import Monitors
from fdir.segments import code_mappings
from hil.faults import Strike, Target
from hil.injector import inject_once
from hil.memory import NotThere, ProcessMemory
from node import runtime
from node.boards.base import BoardReading
from node.boards.sim import SimBoard
from node.housekeeping import HousekeepingService
from node.inference import protocol
from node.modes import ModeMachine
from telemetry import bus
from telemetry.commands import Ping
from telemetry.envelope import encode_command, make_command
from telemetry.keys import KeyRing

_PR_SET_PDEATHSIG: Final = 1
_CHUNK: Final = 1 << 20
_IMAGE_ID: Final = "0000000000000000"
LATCHUP_W: Final = 2.0
"""Step of draw that `latch_up` adds, W: 0.4 A at 5 V, far above the 0.07 A the detector is made for."""


def flip_weight(config: Path, seed: int | None = None) -> Strike:
    """Flip one bit of the weights in the worker of a running node."""
    return inject_once(config, Target.WEIGHTS, seed)


def flip_kv(config: Path, seed: int | None = None) -> Strike:
    """Flip one bit of a KV row in use; a job must be under way."""
    return inject_once(config, Target.KV, seed)


def kill_process(pid: int) -> None:
    """SIGKILL: an SEFI or a driver takes the process away."""
    os.kill(pid, signal.SIGKILL)


def stop_process(pid: int) -> None:
    """SIGSTOP: the process hangs, and goes on existing."""
    os.kill(pid, signal.SIGSTOP)


def trigger(pid: int) -> None:
    """Let the fault of a process begin that was started to have one."""
    os.kill(pid, signal.SIGUSR1)


def flip_code(pid: int, library: str = "libcrypto") -> int:
    """Flip a bit in the executable pages of a library of a process; return its address.

    Raises
    ------
    NotThere
        The process has no such library.
    """
    for mapping in code_mappings(Path(f"/proc/{pid}/maps").read_text()):
        if mapping.executable and library in mapping.path:
            address = mapping.address + mapping.length // 2
            with ProcessMemory(pid) as memory:
                memory.flip(address, 3)
            return address
    raise NotThere(f"process {pid} has no code of {library}")


def find_text(pid: int, text: bytes) -> list[int]:
    """Return the addresses at which a text lies in what a process may write."""
    found: list[int] = []
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
        for line in maps:
            fields = line.split(maxsplit=5)
            if fields[1] != "rw-p":
                continue
            start, end = (int(part, 16) for part in fields[0].split("-"))
            for at in range(start, end, _CHUNK):
                try:
                    data = os.pread(file.fileno(), min(_CHUNK + len(text), end - at), at)
                except OSError:
                    break
                place = data.find(text)
                while place >= 0:
                    if at + place not in found:
                        found.append(at + place)
                    place = data.find(text, place + 1)
    return found


def flip_table(pid: int, address: int) -> None:
    """Flip a bit of a table in memory, at one of the addresses `find_text` gives for a text of it."""
    with ProcessMemory(pid) as memory:
        memory.flip(address, 1)


def flip_state(database: Path, key: str) -> None:
    """Flip a bit in one of the three copies of a value of the node's state, on the disk."""
    with contextlib.closing(sqlite3.connect(database, timeout=10)) as connection, connection:
        (value,) = connection.execute("SELECT value FROM node_values WHERE key = ?", (key,)).fetchone()
        struck = bytes([value[0] ^ 4, *value[1:]])
        connection.execute("UPDATE node_values SET value = ? WHERE key = ?", (struck, key))


def flip_spool(database: Path) -> int:
    """Flip a bit in the oldest frame stored; return its row."""
    with contextlib.closing(sqlite3.connect(database, timeout=10)) as connection, connection:
        query = "SELECT rowid, frame FROM spool_record ORDER BY priority, boot, seq LIMIT 1"
        row, frame = connection.execute(query).fetchone()
        struck = bytearray(frame)
        struck[len(struck) // 2] ^= 4
        connection.execute("UPDATE spool_record SET frame = ? WHERE rowid = ?", (bytes(struck), row))
    return int(row)


def damage_image(slot: Path) -> None:
    """Overwrite the graph of an image slot; its length stays, by which the boot manager would find it."""
    graph = slot / "trunk.onnx"
    graph.write_bytes(bytes(graph.stat().st_size))


def forge_commands(node: str, ring: KeyRing, count: int) -> list[bytes]:
    """Return telecommands that are authentic but for one bit of their signature."""
    now_ns = time.time_ns()
    forged = []
    for seq in range(count):
        command = make_command(
            Ping(),
            key_id=ring.signing_key().id,
            seq=seq,
            t_issue_ns=now_ns,
            t_expire_ns=now_ns + 100_000_000_000,
            node=node,
        )
        payload = bytearray(encode_command(command, ring))
        payload[-1] ^= 1
        forged.append(bytes(payload))
    return forged


def spoil_sensor(message: bus.BusEps, battery_v: float) -> bus.BusEps:
    """Return bus values of which the second of three sensor sets has another battery voltage, V."""
    sets = [
        bus.EpsSensors(
            battery_soc=message.battery_soc, battery_v=v, battery_a=message.battery_a, array_w=message.array_w
        )
        for v in (battery_v, message.battery_v)
    ]
    return _changed(message, redundant=sets)


def drain_battery(message: bus.BusEps, battery_soc: float) -> bus.BusEps:
    """Return bus values with a nearly empty battery."""
    return _changed(message, battery_soc=battery_soc, redundant=[])


def stop_meter(monitor: Path) -> None:
    """Let the first rail of an INA3221 read no current, by its directory in hwmon."""
    (monitor / "curr1_input").write_text("0\n")


def heat_board(board_c: float) -> bus.BusThermal:
    """Return bus temperatures with a board that hot, degC."""
    return bus.BusThermal(t_ns=time.time_ns(), board_c=board_c, radiator_c=20.0)


def silence_bus(speaking: asyncio.Task[None]) -> None:
    """End the task that publishes the values of the bus."""
    speaking.cancel()


def _changed(message: bus.BusEps, **values: object) -> bus.BusEps:
    fields = {name: getattr(message, name) for name in message.__struct_fields__} | values
    return bus.BusEps(**{**fields, "t_ns": time.time_ns()})


def hold_loop() -> None:
    """Hold the event loop up, again and again: 30 times for 0.3 s, with single turns between."""
    loop, left = asyncio.get_running_loop(), 30

    def hold() -> None:
        nonlocal left
        left -= 1
        time.sleep(0.3)
        if left:
            loop.call_soon(hold)

    loop.call_soon(hold)


def hold_for_ever() -> None:
    """Hold the event loop up, and never let it go."""
    time.sleep(3600)


def hang_task() -> None:
    """Let the task that samples housekeeping wait for ever."""

    async def wait(_: HousekeepingService) -> None:
        await asyncio.Event().wait()

    HousekeepingService.sample = wait  # type: ignore[method-assign,assignment]


def flip_mode() -> None:
    """Flip a bit in one of the copies of the node's mode."""
    (machine,) = [found for found in gc.get_objects() if isinstance(found, ModeMachine)]
    machine.copies()[1][-1] ^= 4


def spoil_row() -> None:
    """Change a limit of the FDIR table in use, as a struck object on the heap would be."""
    (monitors,) = [found for found in gc.get_objects() if isinstance(found, Monitors)]
    msgspec.structs.force_setattr(monitors.table.row("board.hot"), "max_events", 77_777)


_GROWN: list[bytearray] = []


def grow() -> None:
    """Use 300 MB more memory, and never give them back."""
    _GROWN.append(bytearray(b"\1") * 300_000_000)


def latch_up() -> None:
    """Let the simulated board draw more by `LATCHUP_W`, whatever its load."""
    sound = SimBoard.read

    def read(board: SimBoard) -> BoardReading:
        reading = sound(board)
        drawn_w = 0.0 if reading.power_w is None else reading.power_w
        return BoardReading(power_w=drawn_w + LATCHUP_W, board_c=reading.board_c)

    SimBoard.read = read  # type: ignore[method-assign,assignment]


NODE_FAULTS: Final[dict[str, Callable[[], None]]] = {
    "hold_loop": hold_loop,
    "hold_for_ever": hold_for_ever,
    "hang_task": hang_task,
    "grow": grow,
    "flip_mode": flip_mode,
    "spoil_row": spoil_row,
    "latch_up": latch_up,
}
WORKER_FAULTS: Final = ("never_ready", "fatal", "garbage", "trip", "grow")


def run_node(fault: str, config: Path, command: Sequence[str] | None = None) -> int:
    """Run the node as `node.runtime.main` does, with a fault of `NODE_FAULTS` that `trigger` begins."""
    signal.signal(signal.SIGUSR1, lambda *_: NODE_FAULTS[fault]())
    return runtime.main(config, command)


def faulty_worker(fault: str) -> list[str]:
    """Return the command line of a worker that does no jobs, and has a fault of `WORKER_FAULTS`.

    `never_ready` begins by itself; the others when `trigger` tells: `fatal` reports damage that cannot be
    mended, `garbage` sends what is no message, `trip` reports a compute check that found an epoch wrong,
    `grow` uses 300 MB more memory.
    """
    if fault not in WORKER_FAULTS:
        raise ValueError(f"fault {fault!r}: {', '.join(WORKER_FAULTS)} allowed")
    return [sys.executable, "-m", "hil.row_faults", "--fault", fault]


def _serve(path: str, generation: int, fault: str) -> int:
    due: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _: due.append(number))
    if fault == "never_ready":
        time.sleep(600)
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(path)
        link.settimeout(0.05)

        def send(message: protocol.Message) -> None:
            link.sendall(protocol.encode(message))

        send(
            protocol.Ready(
                generation=generation, pid=os.getpid(), image_id=_IMAGE_ID, onnxruntime="none", resumed=[],
                load_s=0.0,
            )
        )  # fmt: skip
        reader: protocol.Reader[protocol.FromSupervisor] = protocol.Reader(protocol.FromSupervisor)
        while True:
            if due:
                due.clear()
                _misbehave(link, send, fault)
            try:
                data = link.recv(1 << 16)
            except TimeoutError:
                continue
            if not data:
                return 0
            for message in reader.feed(data):
                if isinstance(message, protocol.Ping):
                    send(protocol.Pong(key=message.key))
                elif isinstance(message, protocol.Shutdown):
                    return 0


def _misbehave(link: socket.socket, send: Callable[[protocol.Message], None], fault: str) -> None:
    now_ns = time.time_ns()
    if fault == "fatal":
        send(protocol.Fatal(reason="damage beyond repair"))
        time.sleep(600)
    elif fault == "garbage":
        link.sendall(struct.pack(">I", 3) + b"\xc1\xc1\xc1")
    elif fault == "trip":
        send(
            protocol.Strike(
                region="compute",
                page=0,
                role="matmul",
                detected_ns=now_ns,
                recovered_ns=now_ns,
                method="redo",
                evidence={"residual": 9.0},
            )
        )
    elif fault == "grow":
        grow()


def _main() -> int:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parser = argparse.ArgumentParser(description="A worker with a fault, for tests of the FDIR.")
    parser.add_argument("--fault", choices=WORKER_FAULTS, required=True)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--generation", type=int, required=True)
    args, _ = parser.parse_known_args()
    return _serve(args.socket, args.generation, args.fault)


if __name__ == "__main__":
    sys.exit(_main())
