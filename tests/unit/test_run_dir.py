"""The run directory: new each time, complete, and a configuration the node accepts."""

from __future__ import annotations

import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from hil.run_dir import constants, host_manifest, make_run_dir, scenario_text, to_toml, write_inputs
from hil.scenario import load_scenario, packaged_scenarios
from node.config import FdirSection, NodeConfig, WorkerSection
from telemetry.errors import PenumbraError
from telemetry.keys import KeyRing


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory with a short path: there is a Unix socket in a run directory."""
    with tempfile.TemporaryDirectory(prefix="pf-") as name:
        yield Path(name)


def test_two_flights_in_one_second_do_not_share_a_directory(folder: Path) -> None:
    first, second = make_run_dir(folder / "runs", "s"), make_run_dir(folder / "runs", "s")
    assert first.path != second.path
    assert first.path.is_dir()
    assert second.path.is_dir()


def test_unwritable_place_is_an_error_the_user_can_mend(folder: Path) -> None:
    (folder / "file").write_text("")
    with pytest.raises(PenumbraError, match="cannot be made") as caught:
        make_run_dir(folder / "file", "s")
    assert "--out" in caught.value.mend


def test_path_too_long_for_a_socket_is_refused_before_anything_is_made(folder: Path) -> None:
    deep = folder / ("d" * 80)
    with pytest.raises(PenumbraError, match="bytes too long for a Unix socket"):
        make_run_dir(deep, "s")
    assert not deep.exists()


@pytest.mark.parametrize("name", packaged_scenarios())
def test_node_takes_the_config(name: str, folder: Path) -> None:
    scenario = load_scenario(name)
    run = make_run_dir(folder, "s")
    write_inputs(
        run, scenario, scenario_text(name), images_dir=folder, bus_url="mqtt://h:1", link_url="mqtt://h:2"
    )
    config = NodeConfig.load(run.node_config)
    assert config.node.name == scenario.node.name
    assert config.state_dir == run.state
    assert (config.bus.url, config.link.url) == ("mqtt://h:1", "mqtt://h:2")
    assert config.worker.epoch_tokens == scenario.node.epoch_tokens
    assert config.worker.retries == scenario.node.retries
    worker, node = config.worker, scenario.node
    assert (worker.batch, worker.seats, worker.checked) == (node.batch, node.seats, node.checked)
    assert (worker.redundant_modes, worker.overhead_budget) == (node.redundant_modes, node.overhead_budget)
    assert config.telemetry.housekeeping_period_s == scenario.node.housekeeping_s
    assert config.power == scenario.node.governor
    assert config.board == scenario.board
    assert KeyRing.load(run.keys).signing_key()
    assert (run.path / "scenario.toml").read_text() == scenario_text(name)


def test_patience_stretches_what_the_node_takes_for_hung(folder: Path) -> None:
    scenario = load_scenario("default-short")
    scenario = msgspec.structs.replace(scenario, node=msgspec.structs.replace(scenario.node, patience=25.0))
    run = make_run_dir(folder, "s")
    write_inputs(run, scenario, "", images_dir=folder, bus_url="mqtt://h:1", link_url="mqtt://h:2")
    config, usual = NodeConfig.load(run.node_config), WorkerSection()
    worker, node = config.worker.ping_limits(), config.fdir.ping_limits()
    assert (worker.warn_s, worker.fatal_s) == (25 * usual.ping_warn_s, 25 * usual.ping_fatal_s)
    assert config.worker.restart_policy().start_timeout_s == 25 * usual.start_timeout_s
    assert (node.warn_s, node.fatal_s) == (25 * FdirSection().ping_warn_s, 25 * FdirSection().ping_fatal_s)
    assert config.fdir.lag_limit_s == 25 * FdirSection().lag_limit_s
    # How often it looks stays.
    assert (worker.period_s, node.period_s) == (usual.ping_period_s, FdirSection().ping_period_s)


def test_scenario_text_of_a_file(folder: Path) -> None:
    path = folder / "mine.toml"
    path.write_text("[scenario]\n")
    assert scenario_text(str(path)) == "[scenario]\n"


def test_toml_of_every_kind_of_value() -> None:
    table = {
        "text": 'a "b" \\ \u00e9',
        "count": 3,
        "share": 0.25,
        "small": 1e-17,
        "on": True,
        "off": None,
        "names": ["a"],
    }
    read = tomllib.loads(to_toml({"part": table}))
    assert read == {"part": {key: value for key, value in table.items() if value is not None}}


def test_constants_and_their_tags() -> None:
    text = """
[scenario]
speed = 60.0
[spacecraft.array]
area_m2 = 0.088
efficiency = 0.29   # measured: data sheet
[radiation]
proton_flux_cm2_s = 8.2   # estimated: AP8
[jobs]
count = 3
"""
    found = [(c.name, c.value, c.tag, c.note) for c in constants(text)]
    assert found == [
        ("spacecraft.array.area_m2", "0.088", "assumed", ""),
        ("spacecraft.array.efficiency", "0.29", "measured", "data sheet"),
        ("radiation.proton_flux_cm2_s", "8.2", "estimated", "AP8"),
    ]


@pytest.mark.parametrize("name", packaged_scenarios())
def test_packaged_scenarios_show_their_constants(name: str) -> None:
    found = {c.name for c in constants(scenario_text(name))}
    assert {"orbit.altitude_km", "spacecraft.battery.capacity_wh", "board.idle_w"} <= found


def test_manifest_names_versions_image_and_host() -> None:
    manifest = host_manifest("0123456789abcdef", 359.0)
    assert "0123456789abcdef" in manifest["image"]
    assert manifest["onnxruntime"][0].isdigit()
    assert manifest["cpu"]
