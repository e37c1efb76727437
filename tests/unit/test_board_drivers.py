"""Drivers of real boards, on trees of files as those boards have them, and on hostile ones."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from board_trees import CONF, TREES, ina, write, zones
from typer.testing import CliRunner

from hil.cli import app
from node.boards import BoardReading, BoardSettings, open_board
from node.boards.cpu import CpuQuota
from node.boards.edac import EccCounts, Edac
from node.boards.ina3221 import Ina3221
from node.boards.jetson import JetsonBoard
from node.boards.nvpmodel import NvPModel, parse_modes, run_command
from node.boards.rapl import Rapl
from node.boards.sysfs import Sysfs
from node.boards.temperatures import ThermalZones
from node.boards.x86 import X86Board
from node.power.operating_point import OperatingPoint
from telemetry.errors import PenumbraError


class Tool:
    """Stands for `nvpmodel`: keeps a mode, and may refuse to change it."""

    def __init__(self, mode: str = "25W", *, obeys: bool = True) -> None:
        self.mode, self.obeys = mode, obeys
        self.calls: list[Sequence[str]] = []

    def __call__(self, argv: Sequence[str]) -> tuple[int, str]:
        self.calls.append(argv)
        modes = {str(mode.number): mode.name for mode in parse_modes(CONF)}
        if argv[1] == "-m":
            if self.obeys:
                self.mode = modes[argv[2]]
                return 0, ""
            return (
                0,
                "NVPM WARN: Reboot required for changing to this power mode\nDO YOU WANT TO REBOOT?",
            )
        return 0, f"NV Power Mode: {self.mode}\n1\n"


def board_settings(kind: str, root: Path, **more: object) -> BoardSettings:
    return BoardSettings(kind=kind, sysfs_root=str(root), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tree", "power_w", "die_c"),
    [
        ("orin-nano-jp6", 5.160 * 1.010, 47.0),
        ("orin-nano-jp7", 5.120 * 0.676, 47.0),
        ("orin-nx", 5.024 * 6.020, 89.0),
        ("agx-orin", 20.0 * 0.117 + 20.0 * 0.020 + 5.0 * 0.805, 44.343),
        ("xavier-nx", 5.000 * 1.016, 39.5),
        ("nano", 5.120 * 0.500, 39.5),
        ("tx2", 19.0 * 0.150, 37.5),
    ],
)
def test_a_jetson_tells_the_draw_of_the_module_by_its_rule_and_its_junction(
    tmp_path: Path, tree: str, power_w: float, die_c: float
) -> None:
    root = write(tmp_path, TREES[tree])
    board = JetsonBoard(board_settings("jetson", root, other_w=1.0), run=Tool())
    board.require_meter()
    reading = board.read()
    assert reading.power_w == pytest.approx(power_w + 1.0)
    assert reading.board_c == pytest.approx(die_c)
    assert (reading.ecc_corrected, reading.ecc_uncorrected) == (None, None), "absent is unknown, not 0"
    assert board.gpu.load() == pytest.approx(0.842)
    assert board.power_mode() == "25W"
    assert "\0" not in board.identity
    assert {offer.what for offer in board.probe() if offer.state == "bad"} == set()


def test_older_jetpack_has_rails_of_another_kind(tmp_path: Path) -> None:
    here = "/sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"
    write(tmp_path, {f"{here}/rail_name_0": "POM_5V_IN", f"{here}/in_voltage0_input": 5_000,
                     f"{here}/in_current0_input": 681, f"{here}/rail_name_1": "POM_5V_GPU"})  # fmt: skip
    assert Ina3221(Sysfs(tmp_path)).read(0.0) == pytest.approx(3.405)


def test_a_rail_that_is_switched_off_or_not_connected_is_none(tmp_path: Path) -> None:
    files = ina(0, {"VDD_IN": (5_000, 1_000), "VDD_SOC": (5_000, 1_000)})
    write(tmp_path, {**files, "/sys/class/hwmon/hwmon0/in2_enable": 0})
    assert [rail.label for rail in Ina3221(Sysfs(tmp_path)).rails] == ["VDD_IN"]


def test_a_module_of_unknown_rails_is_refused_for_flight(tmp_path: Path) -> None:
    write(tmp_path, ina(0, {"VDD_NEW": (5_000, 1_000)}))
    with pytest.raises(PenumbraError, match="VDD_NEW"):
        open_board(board_settings("jetson", tmp_path))
    offers = open_board(board_settings("jetson", tmp_path), for_flight=False).probe()
    assert ("module total", "missing") in {(offer.what, offer.state) for offer in offers}


def test_a_monitor_that_vanishes_and_comes_back_under_another_number_is_found(tmp_path: Path) -> None:
    write(tmp_path, ina(1, {"VDD_IN": (5_000, 1_000)}))
    rails = Ina3221(Sysfs(tmp_path))
    assert rails.read(0.0) == pytest.approx(5.0)
    shutil.rmtree(tmp_path / "sys/class/hwmon/hwmon1")
    assert rails.read(0.0) is None
    write(tmp_path, ina(7, {"VDD_IN": (5_000, 2_000)}))
    rails.discover()
    assert rails.read(0.0) == pytest.approx(10.0)
    shutil.move(tmp_path / "sys/class/hwmon/hwmon7", tmp_path / "sys/class/hwmon/hwmon2")
    assert rails.read(0.0) == pytest.approx(10.0)


def test_gated_and_impossible_zones_are_absent(tmp_path: Path) -> None:
    write(tmp_path, zones({"cpu-thermal": -256_000, "gpu-thermal": 900_000, "PMIC-Die": 100_000}))
    assert ThermalZones(Sysfs(tmp_path)).die_c() is None


def test_a_zone_that_stands_still_while_others_move_is_told_and_left_out(tmp_path: Path) -> None:
    kinds = {"CPU-therm": 31_000, "GPU-therm": 30_000, "dummy-of-a-new-module": 100_000}
    write(tmp_path, zones(kinds) | ina(0, {"VDD_IN": (5_000, 1_000)}))
    board = JetsonBoard(board_settings("jetson", tmp_path), run=Tool())
    assert board.read().board_c == 100.0, "nothing shows yet that it is no sensor"
    for step in range(6):
        assert not board.read().still
        write(tmp_path, zones(kinds | {"CPU-therm": 31_000 + 1_000 * step, "GPU-therm": 30_000 + 500 * step}))
    reading = board.read()
    assert (reading.board_c, reading.still) == (36.0, ("zone dummy-of-a-new-module",))
    write(
        tmp_path, zones(kinds | {"CPU-therm": 36_000, "GPU-therm": 33_000, "dummy-of-a-new-module": 99_500})
    )
    reading = board.read()
    assert (reading.board_c, reading.still) == (99.5, ()), "it moves: it is a sensor after all"


def test_a_board_of_constant_temperature_has_no_dead_zone(tmp_path: Path) -> None:
    write(tmp_path, TREES["nano"])
    board = JetsonBoard(board_settings("jetson", tmp_path), run=Tool())
    assert {board.read().still for _ in range(100)} == {()}


@pytest.mark.parametrize(
    ("rails", "silent"),
    [
        ({"VDD_IN": (5_000, 0)}, "curr1_input: 0 mA"),
        ({"VDD_IN": (0, 1_000)}, "in1_input: 0 mV"),
        ({"VDD_IN": (5_000, -8)}, "curr1_input: -8 mA"),
        (
            {"VDD_GPU_SOC": (20_000, 117), "VDD_CPU_CV": (0, 20), "VIN_SYS_5V0": (5_000, 805)},
            "in2_input: 0 mV",
        ),
    ],
)
def test_a_rail_that_reads_nothing_is_unknown_told_and_refused(
    tmp_path: Path, rails: dict[str, tuple[int, int]], silent: str
) -> None:
    write(tmp_path, ina(0, rails))
    reading = JetsonBoard(board_settings("jetson", tmp_path, other_w=3.0), run=Tool()).read()
    dead = next(label for n, label in enumerate(rails, 1) if f"{n}_input" in silent)
    assert (reading.power_w, reading.still) == (None, (f"rail {dead}",))
    with pytest.raises(PenumbraError, match=silent):
        open_board(board_settings("jetson", tmp_path))
    offers = open_board(board_settings("jetson", tmp_path), for_flight=False).probe()
    assert next(offer for offer in offers if offer.what == f"rail {dead}").state == "bad"


def test_a_part_of_the_module_may_draw_nothing(tmp_path: Path) -> None:
    rails = {"VDD_GPU_SOC": (20_000, 117), "VDD_CPU_CV": (20_000, 0), "VIN_SYS_5V0": (5_000, 805)}
    write(tmp_path, ina(0, rails))
    reading = JetsonBoard(board_settings("jetson", tmp_path), run=Tool()).read()
    assert (reading.power_w, reading.still) == (pytest.approx(6.365), ())


def test_a_meter_that_freezes_is_unknown_until_it_moves(tmp_path: Path) -> None:
    write(tmp_path, ina(0, {"VDD_IN": (5_000, 1_000), "VDD_SOC": (5_000, 300)}))
    now = [0.0]
    board = JetsonBoard(board_settings("jetson", tmp_path), run=Tool(), clock=lambda: now[0])
    board.require_meter()
    for now_s in (0.25, 30.0, 60.0):
        now[0] = now_s
        assert board.read().power_w == pytest.approx(5.0)
    now[0] = 60.5
    assert (board.read().power_w, board.read().still) == (None, ("rail VDD_IN",))
    write(tmp_path, ina(0, {"VDD_IN": (5_000, 1_000), "VDD_SOC": (5_000, 308)}))
    assert (board.read().power_w, board.read().still) == (pytest.approx(5.0), ())


@pytest.mark.parametrize("garbage", ["", "nonsense", "12 34", "9" * 30, "\0"])
def test_garbage_in_a_rail_is_unknown_and_no_zero(tmp_path: Path, garbage: str) -> None:
    write(tmp_path, ina(0, {"VDD_IN": (5_000, 1_000)}))
    (tmp_path / "sys/class/hwmon/hwmon0/curr1_input").write_text(garbage)
    reading = JetsonBoard(board_settings("jetson", tmp_path), run=Tool()).read()
    assert reading.power_w is None or garbage == "9" * 30


# Power modes.


def test_modes_are_found_by_name_and_read_back() -> None:
    modes = {mode.name: mode for mode in parse_modes(CONF)}
    assert {name: mode.number for name, mode in modes.items()} == {
        "15W": 0, "25W": 1, "MAXN_SUPER": 2, "10W": 3,
    }  # fmt: skip
    assert modes["25W"].gpu_max_hz == 918_000_000
    assert modes["MAXN_SUPER"].gpu_max_hz is None
    assert (modes["15W"].cores, modes["10W"].cores) == (2, 1)


def test_a_mode_is_set_by_name_at_the_start_and_by_an_operating_point(tmp_path: Path) -> None:
    root = write(tmp_path, TREES["orin-nano-jp6"])
    (root / "sys/class/devfreq/17000000.gpu/max_freq").write_text("612000000\n")
    tool = Tool()
    board = JetsonBoard(board_settings("jetson", root, power_mode="15W"), run=tool)
    assert (tool.mode, ["nvpmodel", "-m", "0"] in tool.calls) == ("15W", True)
    board.operate(OperatingPoint(threads=2, batch=8, duty=1.0, power_mode="15W"))
    (root / "sys/class/devfreq/17000000.gpu/max_freq").write_text("1020000000\n")
    board.operate(OperatingPoint(threads=2, batch=8, duty=1.0, power_mode="MAXN_SUPER"))
    assert tool.mode == "MAXN_SUPER"
    with pytest.raises(PenumbraError, match="may still run at 1020000000 Hz"):
        board.operate(OperatingPoint(threads=2, batch=8, duty=1.0, power_mode="25W"))


def test_a_mode_that_is_silently_not_set_is_an_error(tmp_path: Path) -> None:
    root = write(tmp_path, TREES["orin-nx"])
    with pytest.raises(PenumbraError, match=r"'10W' is not in force.*tells 25W") as caught:
        JetsonBoard(board_settings("jetson", root, power_mode="10W"), run=Tool(obeys=False))
    assert "reboot" in str(caught.value)
    with pytest.raises(PenumbraError, match="'30W': unknown, 15W, 25W, MAXN_SUPER, 10W are allowed"):
        JetsonBoard(board_settings("jetson", root, power_mode="30W"), run=Tool())


@pytest.mark.parametrize(
    ("text", "why"),
    [("", "no < POWER_MODEL"), ("< POWER_MODEL ID=0 NAME=A >\n< POWER_MODEL ID=1 NAME=A >", "one name")],
)
def test_a_file_of_modes_that_is_none_is_refused_and_probed_as_bad(
    tmp_path: Path, text: str, why: str
) -> None:
    write(tmp_path, {"/etc/nvpmodel.conf": text})
    with pytest.raises(PenumbraError, match=why):
        NvPModel(Sysfs(tmp_path), lambda: None, Tool()).modes()
    offers = JetsonBoard(board_settings("jetson", tmp_path), run=Tool()).probe()
    assert next(offer for offer in offers if offer.what == "power modes").state == "bad"


def test_a_tool_that_is_missing_hangs_or_asks_is_told_as_no_mode(tmp_path: Path) -> None:
    assert run_command(["/nowhere/nvpmodel", "-q"])[0] == 127
    # A prompt gets no answer, and an end of file at once.
    code, output = run_command([sys.executable, "-c", "print('reboot?'); input()"])
    assert code != 0
    assert "reboot?" in output
    assert NvPModel(Sysfs(tmp_path), lambda: None, lambda argv: (1, "")).current() is None


@pytest.mark.parametrize("answer", ["NV Power Mode:\n2\n", "NV Power Mode: \n2\n", "NV Power Mode:", ""])
def test_an_answer_without_a_name_is_no_mode(tmp_path: Path, answer: str) -> None:
    root = write(tmp_path, TREES["orin-nano-jp6"])
    board = JetsonBoard(board_settings("jetson", root), run=lambda _: (0, answer))
    assert board.power_mode() is None
    offer = next(offer for offer in board.probe() if offer.what == "power modes")
    assert "in force: cannot be told" in offer.detail
    with pytest.raises(PenumbraError, match="tells no mode"):
        JetsonBoard(board_settings("jetson", root, power_mode="15W"), run=lambda _: (0, answer))


# x86.


def test_an_intel_package_is_metered_over_a_wrap_and_parts_of_it_are_not_added(tmp_path: Path) -> None:
    root, now = write(tmp_path, TREES["intel"]), [100.0]
    board = X86Board(board_settings("x86", root, other_w=20.0), clock=lambda: now[0])
    energy = root / "sys/class/powercap/intel-rapl:0/energy_uj"
    assert board.read().power_w is None, "one reading is no power"
    now[0] += 2.0
    energy.write_text(str(65_997_277_274 + 130_000_000))
    assert board.read().power_w == pytest.approx(85.0)
    now[0] += 1.0
    energy.write_text("262143328850")
    assert board.read().power_w is None, "no processor draws that much: the counter began anew"
    now[0] += 1.0
    energy.write_text("64000000")
    assert board.read().power_w == pytest.approx(84.0), "wrapped"
    assert board.read().board_c == 61.0
    assert board.identity == "13th Gen Intel(R) Core(TM) i5-13500, 2 threads"


def test_both_packages_of_an_amd_server_count(tmp_path: Path) -> None:
    rapl = Rapl(Sysfs(write(tmp_path, TREES["amd"])))
    assert rapl.read(0.0) is None
    for name, energy in (("intel-rapl:0", 65_532_610_987 - 1), ("intel-rapl:1", 90_000_000)):
        (tmp_path / "sys/class/powercap" / name / "energy_uj").write_text(str(energy))
    assert rapl.read(1.0) == pytest.approx(90.61, abs=0.01)
    assert rapl.read(1.01) == pytest.approx(90.61, abs=0.01), "too soon: the last one again"
    (tmp_path / "sys/class/powercap/intel-rapl:1/energy_uj").unlink()
    assert rapl.read(2.0) is None, "half a draw is no draw"
    reading = X86Board(board_settings("x86", tmp_path)).read()
    assert (reading.board_c, reading.ecc_corrected) == (55.125, None)


class Meter:
    """An x86 board of which each second some energy is used, or none, by package."""

    def __init__(self, root: Path) -> None:
        self.root, self.now_s = root, 100.0
        self.watts: dict[str, float] = {}
        self.board = X86Board(board_settings("x86", root), clock=lambda: self.now_s, wait=self.wait)

    def wait(self, for_s: float) -> None:
        self.now_s += for_s
        for name, watts in self.watts.items():
            energy = self.root / "sys/class/powercap" / name / "energy_uj"
            energy.write_text(str(int(energy.read_text()) + round(1e6 * watts * for_s)))

    def read(self, after_s: float = 0.25) -> BoardReading:
        self.wait(after_s)
        return self.board.read()


@pytest.mark.parametrize("start", [0, 65_997_277_274])
def test_an_energy_counter_that_stands_still_is_unknown_told_and_refused(tmp_path: Path, start: int) -> None:
    root = write(tmp_path, TREES["intel"])
    (root / "sys/class/powercap/intel-rapl:0/energy_uj").write_text(str(start))
    meter = Meter(root)
    readings = [meter.read() for _ in range(8)]
    assert {reading.power_w for reading in readings} == {None}
    assert readings[-1].still == ("intel-rapl:0",)
    with pytest.raises(PenumbraError, match=r"intel-rapl:0/energy_uj: no count within 1\.2 s") as caught:
        meter.board.require_meter()
    assert "kind = 'sim'" in str(caught.value)
    offer = next(offer for offer in meter.board.probe() if offer.what == "package energy")
    assert offer.state == "bad"
    meter.watts["intel-rapl:0"] = 60.0
    assert meter.read().power_w is None, "it has not counted all of this interval"
    reading = meter.read()
    assert reading.power_w == pytest.approx(60.0)
    assert "intel-rapl:0" not in reading.still
    meter.board.require_meter()


def test_a_counter_that_stops_has_its_last_power_for_a_few_readings_only(tmp_path: Path) -> None:
    meter = Meter(write(tmp_path, TREES["intel"]))
    meter.watts["intel-rapl:0"] = 60.0
    assert [meter.read().power_w for _ in range(3)] == [None, pytest.approx(60.0), pytest.approx(60.0)]
    meter.watts.clear()
    told = [meter.read().power_w for _ in range(6)]
    assert told == [pytest.approx(60.0)] * 4 + [None] * 2
    assert 0.0 not in told


def test_a_counter_that_moves_seldom_is_metered_from_move_to_move(tmp_path: Path) -> None:
    meter = Meter(write(tmp_path, TREES["intel"]))
    told = []
    for turn in range(17):
        meter.watts = {"intel-rapl:0": 160.0} if turn % 4 == 0 else {}
        told.append(meter.read().power_w)
    assert told[5:] == [pytest.approx(40.0)] * 12


def test_one_package_of_two_that_stands_still_makes_the_draw_unknown(tmp_path: Path) -> None:
    meter = Meter(write(tmp_path, TREES["amd"]))
    meter.watts["intel-rapl:0"] = 1e-3
    readings = [meter.read() for _ in range(8)]
    assert {reading.power_w for reading in readings} == {None}
    assert readings[-1].still == ("intel-rapl:1",)
    with pytest.raises(PenumbraError, match="intel-rapl:1"):
        meter.board.require_meter()


def hwmon(number: int, name: str, sensors: dict[str, int]) -> dict[str, object]:
    """Return the files of a chip: milli-degC by label, which may be empty for none."""
    here = f"/sys/class/hwmon/hwmon{number}"
    files: dict[str, object] = {f"{here}/name": name}
    for n, (label, milli_c) in enumerate(sensors.items(), 1):
        files[f"{here}/temp{n}_input"] = milli_c
        if label:
            files[f"{here}/temp{n}_label"] = label
    return files


@pytest.mark.parametrize(
    ("chips", "die_c"),
    [
        ([("coretemp", {"Package id 0": 45_000}), ("coretemp", {"Package id 1": 95_000})], 95.0),
        ([("coretemp", {"Package id 0": 95_000}), ("coretemp", {"Package id 1": 45_000})], 95.0),
        ([("k10temp", {"Tctl": 82_000, "Tdie": 55_000})], 55.0),
        ([("k10temp", {"Tdie": 55_000, "Tctl": 82_000, "Tccd1": 54_000})], 55.0),
        ([("zenpower", {"Tdie": 55_000, "Tctl": 82_000})], 55.0),
        ([("k10temp", {"Tctl": 61_000, "Tccd1": 54_000})], 61.0),
        ([("k10temp", {"": 47_000})], 47.0),
        ([("k10temp", {"": 47_000}), ("k10temp", {"": 71_000})], 71.0),
        ([("coretemp", {"Core 0": 50_000, "Core 1": 58_000})], 58.0),
        ([("acpitz", {"": 99_000}), ("k10temp", {"Tctl": 61_000})], 61.0),
        ([("coretemp", {"Package id 0": 45_000}), ("coretemp", {"Package id 1": -128_000})], 45.0),
        ([("acpitz", {"": 99_000})], None),
    ],
)
def test_the_die_of_a_processor_is_its_hottest_package(
    tmp_path: Path, chips: list[tuple[str, dict[str, int]]], die_c: float | None
) -> None:
    for number, (name, sensors) in enumerate(chips):
        write(tmp_path, hwmon(number, name, sensors))
    assert X86Board(board_settings("x86", tmp_path)).read().board_c == die_c


def test_a_package_that_vanishes_is_looked_for_and_one_that_stands_still_is_told(tmp_path: Path) -> None:
    root = write(tmp_path, hwmon(0, "coretemp", {"Package id 0": 45_000}))
    write(root, hwmon(1, "coretemp", {"Package id 1": 95_000}))
    board = X86Board(board_settings("x86", root))
    shutil.move(root / "sys/class/hwmon/hwmon1", root / "sys/class/hwmon/hwmon7")
    assert board.read().board_c == 95.0
    write(root, hwmon(0, "coretemp", {"Package id 0": 51_000}))
    reading = board.read()
    assert (reading.board_c, reading.still) == (51.0, ("hwmon7 temp1_input",))


def test_a_denied_file_is_told_apart_from_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write(tmp_path, TREES["intel"])
    energy = root / "sys/class/powercap/intel-rapl:0/energy_uj"
    real = Path.open

    def deny(path: Path, *args: object, **kwargs: object) -> object:
        if path == energy:
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(PenumbraError, match="denied"):
        open_board(board_settings("x86", root))
    board = open_board(board_settings("x86", root), for_flight=False)
    offer = next(offer for offer in board.probe() if offer.what == "package energy")
    assert (offer.state, "chmod" in offer.mend) == ("denied", True)


def test_a_machine_without_any_of_it_is_refused_for_flight_and_probed(tmp_path: Path) -> None:
    for kind in ("x86", "jetson"):
        with pytest.raises(PenumbraError, match="so the draw is unknown"):
            open_board(board_settings(kind, tmp_path))
    x86 = open_board(board_settings("x86", tmp_path), for_flight=False)
    assert {offer.state for offer in x86.probe()} == {"missing"}
    assert x86.read() == BoardReading(power_w=None, board_c=None)
    assert all(offer.mend for offer in x86.probe())


def test_ecc_counts_are_deltas_with_resets_and_unknown_without_controllers(tmp_path: Path) -> None:
    assert Edac(Sysfs(tmp_path)).read(0.0) == EccCounts(None, None)
    root = write(tmp_path, TREES["intel"])
    edac, counter = Edac(Sysfs(root)), root / "sys/devices/system/edac/mc/mc0/ce_count"
    assert edac.read(0.0) == EccCounts(0, 0), "what was before we came is not ours"
    counter.write_text("10")
    assert edac.read(0.0).corrected == 3
    counter.write_text("2")
    assert edac.read(0.0).corrected == 5, "reset, then two more"
    counter.write_text("-4")
    assert edac.read(0.0).corrected is None


def test_ecc_counts_of_a_controller_that_nobody_updates_are_unknown(tmp_path: Path) -> None:
    mc0 = "/sys/devices/system/edac/mc/mc0"
    files = {name: content for name, content in TREES["intel"].items() if name.startswith(mc0)}
    root, now = write(tmp_path, files), [0.0]
    board = X86Board(board_settings("x86", root), clock=lambda: now[0])
    for now_s in (0.0, 2.5, 5.0):
        now[0] = now_s
        assert (board.read().ecc_corrected, board.read().still) == (0, ()), "a few readings may be the same"
    now[0] = 5.25
    reading = board.read()
    assert (reading.ecc_corrected, reading.ecc_uncorrected, reading.still) == (None, None, ("EDAC mc0",))
    write(root, {f"{mc0}/seconds_since_reset": 1_001})
    assert board.read().ecc_corrected == 0, "it lives, and has found nothing"
    for now_s in range(6, 60):
        now[0] = now_s
        write(root, {f"{mc0}/seconds_since_reset": 1_000 + now_s})
        assert (board.read().ecc_corrected, board.read().still) == (0, ())


def test_ecc_counts_of_one_controller_are_not_those_of_the_board(tmp_path: Path) -> None:
    mc = "/sys/devices/system/edac/mc/mc"
    root = write(tmp_path, {**TREES["intel"], f"{mc}1/ce_count": "garbage", f"{mc}1/ue_count": 0})
    assert Edac(Sysfs(root)).read(0.0) == EccCounts(None, 0)


def test_the_control_group_is_held_at_the_threads_and_read_back(tmp_path: Path) -> None:
    root = write(tmp_path, TREES["intel"])
    board = X86Board(board_settings("x86", root, cgroup="/sys/fs/cgroup/penumbra"))
    quota = root / "sys/fs/cgroup/penumbra/cpu.max"
    board.operate(OperatingPoint(threads=1, batch=8, duty=0.5))
    assert quota.read_text() == "100000 100000"
    board.operate(OperatingPoint(threads=2, batch=8, duty=0.5))
    assert quota.read_text() == "200000 100000"
    held = CpuQuota(Sysfs(root), "/sys/fs/cgroup/penumbra")
    assert held.cores() == 2.0
    assert held.set(float("inf")) is None
    assert held.cores() == float("inf")
    trouble = CpuQuota(Sysfs(root), "/sys/fs/cgroup/nowhere").set(1.0)
    assert trouble is not None
    assert trouble.why == "missing"
    quota.write_text("garbage")
    assert held.cores() is None


def test_a_board_without_power_modes_refuses_a_point_that_names_one(tmp_path: Path) -> None:
    root = write(tmp_path, TREES["intel"])
    for board in (X86Board(board_settings("x86", root)), open_board(BoardSettings())):
        assert board.power_mode() is None
        with pytest.raises(PenumbraError, match=r"'25W': board '.*' has no power modes"):
            board.operate(OperatingPoint(threads=1, batch=1, duty=1.0, power_mode="25W"))


def test_the_clock_is_the_mean_of_the_cores_that_are_online(tmp_path: Path) -> None:
    root = write(tmp_path, TREES["intel"])
    assert X86Board(board_settings("x86", root)).read().clock_ghz == pytest.approx(2.4)
    write(root, {"/sys/devices/system/cpu/cpu2/cpufreq/scaling_cur_freq": 3_400_000})
    assert X86Board(board_settings("x86", root)).read().clock_ghz == pytest.approx(2.9)


def test_probe_on_the_command_line_shows_what_is_missing_and_how_to_get_it(tmp_path: Path) -> None:
    root = write(tmp_path / "root", TREES["intel"])
    text = (Path(__file__).parents[2] / "docs/node-example.toml").read_text()
    config = tmp_path / "node.toml"
    config.write_text(
        text.replace('kind = "sim"', 'kind = "x86"').replace('sysfs_root = "/"', f'sysfs_root = "{root}"')
    )
    done = CliRunner().invoke(
        app, ["node", str(config), "--probe"], catch_exceptions=False, env={"COLUMNS": "200"}
    )
    assert done.exit_code == 0
    for expected in ("i5-13500", "intel-rapl:0, long-term limit 65 W", "61.0 degC", "1 cores, 2.40 GHz",
                     "Delegate=cpu", "corrected 0"):  # fmt: skip
        assert expected in done.stdout
