from __future__ import annotations

import sqlite3

from fdir.table import Table, decode_table, load_table
from node import state
from node.runtime import _table_in_force
from node.state import BootState


def test_state_is_remembered_from_boot_to_boot() -> None:
    connection = sqlite3.connect(":memory:")
    state.create(connection)
    assert state.begin_boot(connection) == BootState(1, True, False, (), None)
    state.set_safe(connection, True)
    state.set_restarts(connection, [1.5, 2.5])
    state.set_cap(connection, 7.5)
    assert state.begin_boot(connection) == BootState(2, False, True, (1.5, 2.5), 7.5)
    state.set_safe(connection, False)
    state.set_restarts(connection, [])
    state.set_cap(connection, None)
    state.end_boot(connection)
    assert state.begin_boot(connection) == BootState(3, True, False, (), None)
    connection.close()


def test_after_a_lost_database_no_boot_number_is_used_twice_and_the_stop_was_not_clean() -> None:
    connection = sqlite3.connect(":memory:")
    state.create(connection)
    assert state.begin_boot(connection, 1_800_000_000) == BootState(1_800_000_000, False, False, (), None)
    state.end_boot(connection)
    assert state.begin_boot(connection).boot == 1_800_000_001
    connection.close()


def test_a_struck_copy_is_outvoted_mended_and_named_and_a_lost_value_has_the_cautious_default() -> None:
    connection = sqlite3.connect(":memory:")
    state.create(connection)
    state.begin_boot(connection)
    state.request_restart(connection, "loop.lag", 2)

    def strike(key: str, *places: int) -> None:
        (blob,) = connection.execute("SELECT value FROM node_values WHERE key = ?", (key,)).fetchone()
        struck = bytearray(blob)
        for place in places:
            struck[place * len(blob) // 3 + 1] ^= 4
        connection.execute("UPDATE node_values SET value = ? WHERE key = ?", (bytes(struck), key))

    strike("resets", 1)
    state.set_safe(connection, False)
    strike("safe", 0, 1, 2)
    found = state.begin_boot(connection)
    assert (found.resets, found.restart_requested, found.safe) == (2, "loop.lag", True)
    assert (found.repaired, found.lost) == (("resets",), ("safe",))
    again = state.begin_boot(connection)
    assert (again.resets, again.restart_requested, again.safe) == (2, "", True)
    assert (again.repaired, again.lost) == ((), ())
    connection.close()


def test_a_table_in_force_by_command_outlives_a_boot_and_gives_way_when_it_is_lost() -> None:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    state.create(connection)
    configured = load_table()
    commanded = Table(configured.rows[:3])
    assert _table_in_force(connection, configured, None) is configured
    state.change_table(connection, commanded.encode(), state.TableSource.UPLINKED)
    assert _table_in_force(connection, configured, None).sha256 == commanded.sha256
    assert decode_table(state.other_table(connection, state.TableSource.PREVIOUS)).sha256 == configured.sha256
    connection.execute("UPDATE node_values SET value = 'struck' WHERE key = 'fdir_table'")
    assert _table_in_force(connection, configured, None) is configured
    assert state.kept_source(connection) is state.TableSource.CONFIGURED
    assert state.kept_table(connection) == configured.encode()
    connection.close()
