from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from node.config import NodeConfig
from telemetry.errors import PenumbraError

EXAMPLE = Path(__file__).parents[2] / "docs" / "node-example.toml"


def load(tmp_path: Path, old: str = "", new: str = "") -> NodeConfig:
    text = EXAMPLE.read_text()
    assert old in text
    path = tmp_path / "node.toml"
    path.write_text(text.replace(old, new, 1) if old else text)
    return NodeConfig.load(path)


def test_the_example_shows_every_key_with_its_default(tmp_path: Path) -> None:
    config = load(tmp_path)
    minimal = tmp_path / "minimal.toml"
    minimal.write_text(
        '[node]\nname = "penumbra-1"\nstate_dir = "state"\n[model]\nimages_dir = "images"\n'
        '[bus]\nurl = "mqtt://127.0.0.1:1883"\n[link]\nurl = "mqtt://127.0.0.1:1884"\n'
        '[keys]\nfile = "keys.toml"\n'
    )
    assert NodeConfig.load(minimal) == config
    assert NodeConfig.load(minimal).sha256 == config.sha256
    text = EXAMPLE.read_text()

    def shown(name: str, table: msgspec.Struct) -> None:
        assert f"[{name}]" in text
        for key in table.__struct_fields__:
            value = getattr(table, key)
            if isinstance(value, msgspec.Struct):
                shown(f"{name}.{key}", value)
            else:
                assert f"\n{key} = " in text, f"{name}.{key} is not in the example"

    for section in config.__struct_fields__:
        shown(section, getattr(config, section))


def test_paths_are_taken_from_the_directory_of_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, 'state_dir = "state"', 'state_dir = "x/../state"')
    assert config.state_dir == tmp_path / "state"
    assert config.image_dir == tmp_path / "images" / "a"
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "active").write_text("b\na\n")
    assert config.image_dir == tmp_path / "images" / "b"
    assert load(tmp_path, 'slot = "active"', 'slot = "a"').image_dir == tmp_path / "images" / "a"
    (tmp_path / "images" / "active").write_text("c\n")
    with pytest.raises(PenumbraError, match="names no slot"):
        _ = config.image_dir
    assert config.keys.file == str(tmp_path / "keys.toml")
    assert config.fdir.table == ""
    assert load(tmp_path, 'table = ""', 'table = "t.toml"').fdir.table == str(tmp_path / "t.toml")
    assert str(config.arena_path.parent) == "/dev/shm"  # noqa: S108
    assert config.arena_path.name.startswith("penumbra-penumbra-1-")


def test_nodes_with_other_state_directories_have_other_arenas_and_digests(tmp_path: Path) -> None:
    one, two = load(tmp_path), load(tmp_path, 'state_dir = "state"', 'state_dir = "other"')
    assert one.arena_path != two.arena_path
    assert one.sha256 != two.sha256


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("threads = 2", 'threads = "x"', ["model.threads", "'x'", "int"]),
        ("threads = 2", "thread = 2", ["thread", "model", "threads"]),
        ("retries = 6", "retries = -1", ["worker.retries", "-1", ">= 0"]),
        ("\nbatch = 8", "\nbatch = 0", ["worker.batch", "0", ">= 1"]),
        ("\nbatch = 8", "\nbatch = 65", ["worker.batch", "65", "<= 64"]),
        ("\nbatch = 8", "\nbatch = 11", ["worker", "seats 10", "batch 11"]),
        ("seats = 10", "seats = 129", ["worker.seats", "129", "<= 128"]),
        ("overhead_budget = 0.01", "overhead_budget = 0.0", ["worker.overhead_budget", "0.0", ">= 0.001"]),
        ("checked = false", "checked = 1", ["worker.checked", "1", "bool"]),
        ("redundant_modes = []", 'redundant_modes = ["safe"]', ["worker.redundant_modes", "safe"]),
        (
            "redundant_modes = []",
            'redundant_modes = ["eclipse", "eclipse"]',
            ["worker", "redundant_modes", "each mode once"],
        ),
        ("positions = 4096", "positions = 40000", ["worker.positions", "40000", "<= 32768"]),
        ("restart_limit = 5", "restart_limit = 0", ["worker.restart_limit", ">= 1"]),
        ("hot_c = 85.0", "hot_c = nan", ["power.hot_c", "nan"]),
        ("hot_c = 85.0", "hot_c = 60.0", ["power", "hot_c", "warm_c"]),
        ("ping_warn_s = 1.0", "ping_warn_s = 9.0", ["worker", "ping_warn_s 9", "ping_fatal_s 2.5"]),
        ("ping_period_s = 0.5", "ping_period_s = 2.0", ["worker", "ping_period_s 2"]),
        ("spool_max_bytes = 67108864", "spool_max_bytes = 200000000", ["telemetry", "database_max_bytes"]),
        ("spool_max_bytes = 67108864", "spool_max_bytes = 67108865", ["four times", "67108865"]),
        ('slot = "active"', 'slot = "c"', ["model.slot", "'c'"]),
        ('name = "penumbra-1"', 'name = "No Good"', ["No Good", "a-z"]),
        ('"mqtt://127.0.0.1:1883"', '"http://x"', ["bus.url", "http://x", "mqtt"]),
        ('"mqtt://127.0.0.1:1884"', '"mqtt://x:99999"', ["link.url", "port"]),
        ('state_dir = "state"', f'state_dir = "{"s" * 120}"', ["node.state_dir", "107"]),
        ("[keys]", "[key]", ["key"]),
        ("max_resets = 3", "max_resets = -1", ["fdir.max_resets", "-1", ">= 0"]),
        ("other_slot_after = 2", "other_slot_after = 5", ["fdir", "other_slot_after 5", "safe_after 4"]),
        ("scrub_budget_s = 0.01", "scrub_budget_s = 0.5", ["fdir", "scrub_budget_s 0.5"]),
        ("ping_fatal_s = 10.0", "ping_fatal_s = 3.0", ["fdir", "ping_warn_s 3", "ping_fatal_s 3"]),
        ("timeout_s = 15", "timeout_s = 1", ["watchdog.timeout_s", "1", ">= 2"]),
        ("[node]", "[node", ["TOML"]),
    ],
)
def test_what_is_not_allowed_is_named(tmp_path: Path, old: str, new: str, names: list[str]) -> None:
    with pytest.raises(PenumbraError) as caught:
        load(tmp_path, old, new)
    message = str(caught.value)
    assert "node.toml" in message
    assert "mend" in message
    for name in names:
        assert name in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PenumbraError, match=r"absent\.toml"):
        NodeConfig.load(tmp_path / "absent.toml")
