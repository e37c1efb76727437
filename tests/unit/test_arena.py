"""The KV arena: commits survive a kill at any instant, one process holds it at a time, and full shared memory
is an error where memory is asked for."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from node.inference import arena as arena_module
from node.inference.arena import (
    ARENA_VERSION,
    BANKS,
    KV_PAGE,
    PAGE,
    SHARED_MEMORY,
    ArenaFull,
    ArenaShape,
    KvArena,
    Seat,
    SeatState,
    arena_path,
)
from telemetry.errors import PenumbraError
from telemetry.sampling import Sampling

SHAPE = ArenaShape(
    version=ARENA_VERSION, image_id="0123456789abcdef", layers=3, kv_heads=2, head_dim=16, positions=700,
    window=32, window_step=8, global_every=3, seats=3,
)  # fmt: skip


gives_memory_back = pytest.mark.skipif(
    "PENUMBRA_PYTHON" in os.environ, reason="the emulator of tests/aarch64.py ignores MADV_REMOVE"
)


@pytest.fixture
def path() -> Iterator[Path]:
    """A file on shared memory, as in flight: a disk counts its blocks in another way."""
    with tempfile.TemporaryDirectory(prefix="penumbra-test-", dir=SHARED_MEMORY) as folder:
        yield Path(folder) / "arena"


@pytest.fixture
def arena(path: Path) -> Iterator[KvArena]:
    arena = KvArena(path, SHAPE)
    yield arena
    arena.close()


def fill(arena: KvArena, index: int, job: str, tokens: tuple[int, int], seed: int = 1) -> Seat:
    """Put a job in a seat as the engine does: rows of random numbers, proven and committed."""
    seat, rng = arena.seats[index], np.random.default_rng(seed)
    prompt, generated = tokens
    count = prompt + generated
    arena.reserve(index, count)
    seat.tokens[:count] = rng.integers(0, 1000, count)
    seat.logprobs[:count] = rng.random(count)
    seat.blocks[:2] = np.frombuffer(rng.bytes(2 * seat.blocks.itemsize), seat.blocks.dtype)
    positions = count - 1
    while (start := seat.global_rows.written) < positions:
        stop = min(start + 256, positions)
        if stop - start > seat.window_rows.free:
            assert seat.slide() == []
        for bank in BANKS:
            rows, base = arena.kv[bank][:, index], seat.banks[bank].base
            at = rows[:, :, start - base : stop - base]
            at[:] = rng.random(at.shape)
            seat.banks[bank].record(start, stop)
            assert seat.banks[bank].prove()
            seat.banks[bank].commit()
        seat.commit(
            SeatState(
                job=job, prompt_tokens=prompt, generated=generated, positions=stop, blocks=2, max_tokens=99,
                base=seat.window_rows.base, sampling=Sampling(seed=seed, stop=("end",)),
            )
        )  # fmt: skip
    return seat


def contents(arena: KvArena, index: int) -> tuple[object, ...]:
    """All that makes a job, without its serial."""
    seat = arena.seats[index]
    state = msgspec.structs.replace(seat.state, serial=0)
    count = state.prompt_tokens + state.generated
    return (
        state,
        seat.tokens[:count].tolist(),
        seat.logprobs[:count].tolist(),
        seat.blocks[: state.blocks].tobytes(),
        *(
            arena.kv[bank][:, index, :, : rows.proven - rows.base].tobytes()
            for bank, rows in seat.banks.items()
        ),
        *(rows.digest(0, rows.proven) for rows in seat.banks.values()),
    )


def held_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_views_lie_where_the_layout_says_and_survive_reopening(path: Path) -> None:
    first = KvArena(path, SHAPE)
    assert SHAPE.rooms == {"global": 704, "window": 576}
    assert (SHAPE.layers_of("global"), SHAPE.layers_of("window")) == ((2,), (0, 1))
    first.reserve(1, 8)
    first.seats[1].tokens[:3] = [7, 8, 9]
    _, v = first.planes(1)
    assert v.shape == (3, 2, 576, 16)
    assert v.flags.c_contiguous
    assert v[:2].ctypes.data % PAGE == 0
    v[1, 1, 5, 3] = 1.5
    # Layer 1 is the second of its bank: plane (1 * 2 + V) * heads + head.
    at = SHAPE.row_offset("window", (1 * 2 + 1) * 2 + 1, 1, 5) + 4 * 3
    first.seats[1].commit(SeatState(job="j", prompt_tokens=3))
    size = first.size_bytes
    first.close()
    raw = path.read_bytes()
    assert len(raw) == size
    assert np.frombuffer(raw, "<f4", 1, at)[0] == 1.5
    second = KvArena(path, SHAPE)
    assert second.planes(1)[1][1, 1, 5, 3] == 1.5
    assert second.seats[1].tokens[:3].tolist() == [7, 8, 9]
    state = msgspec.structs.replace(second.seats[1].state, text_digest=0)
    assert state == SeatState(serial=1, job="j", prompt_tokens=3)
    assert second.seats[1].state.phase == "active"
    assert [seat.state.phase for seat in second.seats] == ["free", "active", "free"]
    second.close()


def test_phases_and_rows_of_prefill() -> None:
    state = SeatState(job="j", prompt_tokens=10, positions=7)
    assert (state.phase, state.prefill_rows) == ("active", 7)
    later = msgspec.structs.replace(state, positions=12, generated=3, parked=True)
    assert (later.phase, later.prefill_rows) == ("parked", 10)
    assert msgspec.structs.replace(later, finish="eos").phase == "resident"
    assert SeatState().phase == "free"


@pytest.mark.parametrize("field", ["image_id", "positions", "layers", "head_dim", "window", "seats"])
def test_another_shape_starts_empty(path: Path, field: str) -> None:
    first = KvArena(path, SHAPE)
    first.seats[0].commit(SeatState(job="old"))
    first.close()
    value = "fedcba9876543210" if field == "image_id" else getattr(SHAPE, field) * 2
    other = KvArena(path, msgspec.structs.replace(SHAPE, **{field: value}))
    assert {seat.state.job for seat in other.seats} == {""}
    other.close()


@pytest.mark.parametrize("field", ["head_dim", "seats", "global_every"])
def test_an_impossible_shape_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=r"rows of 17|at least 1"):
        msgspec.structs.replace(SHAPE, **{field: 17 if field == "head_dim" else 0})


def test_a_torn_state_record_leaves_the_one_before(path: Path) -> None:
    arena = KvArena(path, SHAPE)
    for count in (1, 2, 3):
        arena.seats[2].commit(SeatState(job="j", generated=count))
    newest = 5 + arena.seats[2].state.serial % 2
    arena.close()
    with path.open("r+b") as file:
        file.seek(newest * PAGE + 12)
        byte = file.read(1)[0]
        file.seek(newest * PAGE + 12)
        file.write(bytes([byte ^ 4]))
    again = KvArena(path, SHAPE)
    assert again.seats[2].state.generated == 2
    again.close()


def test_both_state_records_gone_means_no_job(path: Path) -> None:
    arena = KvArena(path, SHAPE)
    arena.seats[0].commit(SeatState(job="j"))
    arena.close()
    with path.open("r+b") as file:
        for page in (1, 2):
            file.seek(page * PAGE)
            file.write(b"\xff" * 16)
    again = KvArena(path, SHAPE)
    assert again.seats[0].state == SeatState()
    again.close()


def test_a_record_that_does_not_fit_its_page_is_refused(arena: KvArena) -> None:
    before = arena.seats[0].state
    with pytest.raises(ValueError, match="a page holds"):
        arena.seats[0].commit(SeatState(job="j" * PAGE))
    assert arena.seats[0].state == before


def test_a_seat_is_taken_over_and_damage_in_it_found(path: Path) -> None:
    arena = KvArena(path, SHAPE)
    fill(arena, 1, "a", (40, 5))
    whole = contents(arena, 1)
    arena.close()
    again = KvArena(path, SHAPE)
    again.kv["window"][2, 1, 0, 9, 3] += 1
    bad = again.seats[1].attach()
    assert bad["global"] == []
    assert [(row.position, row.method, row.planes) for row in bad["window"]] == [(9, "parity", (4,))]
    assert contents(again, 1) == whole
    again.close()


@pytest.mark.parametrize("what", ["tokens", "logprobs"])
@pytest.mark.parametrize("moved", [False, True])
def test_a_struck_token_is_never_taken_over(path: Path, what: str, moved: bool) -> None:
    arena = KvArena(path, SHAPE)
    seat = fill(arena, 0, "a", (40, 5))
    fill(arena, 1, "b", (40, 5), seed=3)
    getattr(seat, what).view(np.uint32)[7] ^= 2
    # A later commit of the job, or its move, must not take the strike for the truth.
    seat.tokens[45] = 9
    seat.commit(msgspec.structs.replace(seat.state, generated=6))
    if moved:
        arena.swap(0, 2)
    arena.close()
    again = KvArena(path, SHAPE)
    assert [s.state.job for s in again.seats] == ["", "b", ""]
    assert again.seats[0].state.serial > seat.state.serial - 1
    fill(again, 0, "a", (40, 5))
    again.close()
    third = KvArena(path, SHAPE)
    assert [s.state.job for s in third.seats] == ["a", "b", ""]
    third.close()


@gives_memory_back
def test_memory_is_held_as_positions_are_reserved_and_given_back(path: Path) -> None:
    arena = KvArena(path, SHAPE)
    empty = held_bytes(path)
    arena.reserve(0, 1)
    assert arena.seats[0].reserved == KV_PAGE
    one = held_bytes(path) - empty
    rows = (SHAPE.planes_of("global") + SHAPE.planes_of("window")) * KV_PAGE * 64
    assert rows <= one <= rows + rows // 8 + 12 * PAGE
    arena.reserve(0, 30)
    assert held_bytes(path) - empty == one
    arena.reserve(0, 700)
    assert arena.seats[0].reserved == 704
    with pytest.raises(ValueError, match="705 positions of 704"):
        arena.reserve(0, 705)
    fill(arena, 1, "a", (40, 5))
    with pytest.raises(ValueError, match="seat 1 is not free: a"):
        arena.release(1)
    assert arena.trim() == 0
    arena.seats[1].clear()
    arena.release(0)
    arena.release(1)
    assert [(seat.reserved, seat.held) for seat in arena.seats] == [(0, 704), (0, 64), (0, 0)]
    held = held_bytes(path)
    arena.reserve(0, 200)
    assert held_bytes(path) == held
    arena.release(0)
    assert arena.trim() == 704 + 64
    assert held_bytes(path) == empty
    assert not arena.kv["global"].any()
    arena.close()


@gives_memory_back
def test_spare_memory_is_given_back_when_there_is_too_little(
    arena: KvArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena.reserve(0, 700)
    fill(arena, 2, "a", (40, 5))
    whole = contents(arena, 2)
    arena.release(0)
    bound, allocate = held_bytes(arena.path) + PAGE, os.posix_fallocate

    def bounded(file: int, offset: int, length: int) -> None:
        if held_bytes(arena.path) + length > bound:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(file, offset, length)

    monkeypatch.setattr(arena_module.os, "posix_fallocate", bounded)
    arena.reserve(1, 500)
    assert [(seat.reserved, seat.held) for seat in arena.seats] == [(0, 0), (512, 512), (64, 64)]
    assert contents(arena, 2) == whole
    with pytest.raises(ArenaFull):
        arena.reserve(0, 500)


@gives_memory_back
def test_seats_without_a_job_give_their_memory_back_when_the_arena_is_taken_over(path: Path) -> None:
    arena = KvArena(path, SHAPE)
    empty = held_bytes(path)
    arena.reserve(0, 700)
    fill(arena, 1, "a", (40, 5))
    arena.close()
    again = KvArena(path, SHAPE)
    assert [(seat.reserved, seat.held) for seat in again.seats] == [(0, 0), (KV_PAGE, KV_PAGE), (0, 0)]
    assert 0 < held_bytes(path) - empty < 100 * PAGE
    again.close()


@gives_memory_back
def test_full_shared_memory_is_an_error_where_it_is_asked_for(
    arena: KvArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(arena, 0, "a", (40, 5))
    before, held = contents(arena, 0), held_bytes(arena.path)
    left, allocate = [5], os.posix_fallocate

    def full(file: int, offset: int, length: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(file, offset, length)

    with monkeypatch.context() as patch:
        patch.setattr(arena_module.os, "posix_fallocate", full)
        with pytest.raises(
            ArenaFull, match=r"\d+ bytes of shared memory for 704 positions of seat 0"
        ) as caught:
            arena.reserve(0, 700)
        assert str(arena.path) in caught.value.what
        assert "[worker] seats or positions" in caught.value.mend
    assert arena.seats[0].reserved == KV_PAGE
    assert held_bytes(arena.path) == held
    assert contents(arena, 0) == before
    arena.reserve(0, 700)


@gives_memory_back
def test_a_full_tmpfs_is_an_error_and_no_signal(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(
        ["/usr/bin/mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(mount)],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("may not mount a tmpfs here")
    try:
        arena = KvArena(mount / "arena", SHAPE)
        seat = fill(arena, 0, "a", (40, 5))
        with pytest.raises(ArenaFull, match="704 positions of seat 1"):
            arena.reserve(1, 700)
        assert all(rows.prove() for rows in seat.banks.values())
        arena.reserve(1, 64)
        arena.close()
        tiny = msgspec.structs.replace(SHAPE, seats=200)
        with pytest.raises(ArenaFull, match="200 seats"):
            KvArena(mount / "other", tiny)
        del arena, seat
    finally:
        subprocess.run(["/usr/bin/umount", "--lazy", str(mount)], check=True)


@pytest.mark.parametrize(
    "sizes", [((40, 5), (100, 60)), ((100, 60), (40, 5)), ((40, 5), None), ((650, 49), (9, 1))]
)
def test_seats_change_places(path: Path, sizes: tuple[tuple[int, int], tuple[int, int] | None]) -> None:
    arena = KvArena(path, SHAPE)
    fill(arena, 0, "a", sizes[0], seed=1)
    if sizes[1]:
        fill(arena, 2, "b", sizes[1], seed=2)
    one, other = contents(arena, 0), contents(arena, 2)
    reserved = arena.seats[0].reserved, arena.seats[2].reserved
    arena.swap(0, 2)
    assert (contents(arena, 0), contents(arena, 2)) == (other, one)
    assert (arena.seats[2].reserved, arena.seats[0].reserved) == reserved
    arena.trim()
    assert all(rows.prove() for seat in arena.seats for rows in seat.banks.values())
    arena.close()
    again = KvArena(path, SHAPE)
    assert not any(bad for seat in again.seats for bad in seat.attach().values())
    assert (contents(again, 0), contents(again, 2)) == (other, one)
    again.swap(1, 1)
    again.close()


def test_a_strike_while_seats_change_places_is_found_by_the_next_proof(
    arena: KvArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(arena, 0, "a", (40, 5))
    whole = contents(arena, 0)
    trade = arena_module.RowBank.trade

    def struck(one: arena_module.RowBank, other: arena_module.RowBank) -> None:
        arena.kv["global"][1, 0, 1, 17, 4] += 1  # before the copy, in the old place
        trade(one, other)

    monkeypatch.setattr(arena_module.RowBank, "trade", struck)
    arena.swap(0, 1)
    seat = arena.seats[1]
    assert not seat.global_rows.prove()
    assert [row.method for row in seat.global_rows.rewind()] == ["parity"]
    assert contents(arena, 1) == whole


def test_seats_with_an_open_epoch_stay(arena: KvArena) -> None:
    fill(arena, 0, "a", (40, 5))
    arena.seats[0].window_rows.record(44, 45)
    with pytest.raises(ValueError, match="seat 0 has an open epoch"):
        arena.swap(0, 1)


def test_slide_keeps_what_the_next_position_attends_to(path: Path) -> None:
    arena = KvArena(path, SHAPE)
    seat = fill(arena, 0, "a", (300, 1))
    assert seat.can_share(256)
    assert seat.slide() == []
    assert seat.state.base == seat.window_rows.base == 264  # 300 - 32 + 1, down to a group
    assert (seat.global_rows.base, seat.window_rows.free) == (0, 400)
    assert not seat.can_share(256)
    whole = contents(arena, 0)
    arena.close()
    again = KvArena(path, SHAPE)
    assert again.seats[0].attach() == {"global": [], "window": []}
    assert contents(again, 0) == whole
    again.close()


def test_a_kill_while_rows_slide_is_found_when_the_seat_is_taken_over(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = KvArena(path, SHAPE)
    seat = fill(arena, 0, "a", (300, 1))
    monkeypatch.setattr(
        arena_module.RowBank, "_settle", lambda self: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        seat.slide()
    monkeypatch.undo()
    arena.close()
    again = KvArena(path, SHAPE)
    bad = again.seats[0].attach()
    assert bad["global"] == []
    assert not all(row.repaired for row in bad["window"])
    assert [rows.proven for rows in again.seats[0].banks.values()] == [300, 0]
    again.close()


def test_a_prefix_is_copied_with_its_proof(arena: KvArena) -> None:
    source = fill(arena, 0, "a", (200, 9))
    assert not source.can_share(201)
    assert arena.copy_prefix(0, 2, 192)
    target = arena.seats[2]
    for bank in BANKS:
        assert target.banks[bank].proven == 192
        np.testing.assert_array_equal(arena.kv[bank][:, 2, :, :192], arena.kv[bank][:, 0, :, :192])
        assert target.banks[bank].digest(0, 192) == source.banks[bank].digest(0, 192)
    target.commit(SeatState(job="b", prompt_tokens=250, positions=192))
    for src, dst, positions in ((0, 2, 192), (0, 1, 100), (0, 1, 256)):
        with pytest.raises(ValueError, match="cannot be shared"):
            arena.copy_prefix(src, dst, positions)


@pytest.mark.parametrize("bank", BANKS)
def test_a_struck_prefix_is_not_copied(arena: KvArena, bank: arena_module.Bank) -> None:
    fill(arena, 0, "a", (200, 9))
    arena.kv[bank][0, 0, 0, 100, 0] += 1
    assert not arena.copy_prefix(0, 1, 128)
    assert [rows.proven for rows in arena.seats[1].banks.values()] == [0, 0]
    assert not arena.seats[0].banks[bank].prove()


HOLDER = """
import sys, pathlib, msgspec
from node.inference.arena import *
shape = msgspec.msgpack.decode(bytes.fromhex(sys.argv[2]), type=ArenaShape)
arena = KvArena(pathlib.Path(sys.argv[1]), shape)
print('held', flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_gone(path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), msgspec.msgpack.encode(SHAPE).hex()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(PenumbraError, match="held by another process"):
            KvArena(path, SHAPE, lock_timeout_s=0.1)
        os.kill(holder.pid, signal.SIGKILL)
        KvArena(path, SHAPE, lock_timeout_s=5.0).close()
    finally:
        holder.kill()
        holder.communicate()


# Takes over the arena and exchanges two seats; the process ends, as if killed, before the n-th of the writes
# and copies of the exchange.
KILLED = """
import os, sys, pathlib, msgspec
import fdir.rows as rows
from node.inference import arena as module
shape = msgspec.msgpack.decode(bytes.fromhex(sys.argv[2]), type=module.ArenaShape)
arena = module.KvArena(pathlib.Path(sys.argv[1]), shape)
for seat in arena.seats:
    assert not any(seat.attach().values())
left = [int(sys.argv[3])]
def dying(call):
    def counted(*args):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), 9)
        return call(*args)
    return counted
rows.exchange = dying(rows.exchange)
module.exchange = dying(module.exchange)
module.KvArena.write_record = dying(module.KvArena.write_record)
arena.swap(0, 1)
"""


@pytest.mark.parametrize("occupied", [False, True])
def test_a_kill_while_seats_change_places_never_leaves_a_wrong_row(path: Path, occupied: bool) -> None:
    shape = msgspec.structs.replace(SHAPE, kv_heads=1, seats=2)
    moments = [0, 1, 2, 4, 7, 9, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23]
    ended_whole = 0
    for moment in moments:
        arena = KvArena(path, shape)
        fill(arena, 0, "a", (40, 5), seed=1)
        if occupied:
            fill(arena, 1, "b", (80, 5), seed=2)
        known = {seat.state.job: contents(arena, seat.index) for seat in arena.seats if seat.state.job}
        arena.close()
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(path), msgspec.msgpack.encode(shape).hex(), str(moment)],
            check=False,
        )
        assert done.returncode in {0, -signal.SIGKILL}
        ended_whole += done.returncode == 0
        again = KvArena(path, shape)
        jobs = [seat.state.job for seat in again.seats if seat.state.job]
        assert len(jobs) == len(set(jobs))
        for seat in again.seats:
            if seat.state.job:
                assert not any(seat.attach().values())
                assert contents(again, seat.index) == known[seat.state.job]
        if not occupied:
            assert jobs == ["a"]  # a job that moves to a free seat is never lost
        again.close()
        path.unlink()
        if ended_whole:
            break
    assert ended_whole == 1


def test_a_directory_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(PenumbraError, match="shared memory"):
        KvArena(tmp_path / "no" / "arena", SHAPE)


def test_the_name_is_a_function_of_node_and_state_directory(tmp_path: Path) -> None:
    assert arena_path("sim-1", tmp_path) == arena_path("sim-1", tmp_path / "x" / "..")
    assert arena_path("sim-1", tmp_path) != arena_path("sim-1", tmp_path / "x")
    assert arena_path("sim-1", tmp_path).name.startswith("penumbra-sim-1-")
    assert arena_path("sim-1", tmp_path).parent == SHARED_MEMORY
