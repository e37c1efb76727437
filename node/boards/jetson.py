"""A Jetson module: rails by INA3221, thermal zones, GPU clock, power modes, fan."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from node.boards.base import BoardReading, BoardSettings, Offer, State
from node.boards.ina3221 import Ina3221
from node.boards.metered import MeteredBoard
from node.boards.nvpmodel import NvPModel, Runner, run_command
from node.boards.sysfs import Sysfs
from node.boards.temperatures import ThermalZones
from node.power.operating_point import OperatingPoint
from telemetry.errors import PenumbraError

MODEL: Final = "/proc/device-tree/model"
GPU_NAMES: Final = ("ga10b", "gv11b", "gp10b", "gpu")


class Gpu:
    """Clocks of the GPU, through devfreq. Its path differs from release to release.

    Parameters
    ----------
    sysfs
        Where the files are.
    """

    def __init__(self, sysfs: Sysfs) -> None:
        self._sysfs = sysfs

    def path(self) -> Path | None:
        """Return the directory of the GPU, found by the name of its node, else by its own."""
        every = self._sysfs.glob("/sys/class/devfreq/*")
        for path in every:
            if (self._sysfs.text(path / "device" / "of_node" / "name") or "") in GPU_NAMES:
                return path
        return next((p for p in every if any(name in p.name for name in GPU_NAMES)), None)

    def max_hz(self) -> int | None:
        """Return the highest clock it may have now, Hz."""
        path = self.path()
        return None if path is None else self._sysfs.number(path / "max_freq")

    def now_hz(self) -> int | None:
        """Return its clock, Hz."""
        path = self.path()
        return None if path is None else self._sysfs.number(path / "cur_freq")

    def load(self) -> float | None:
        """Return its load, 0 to 1."""
        path = self.path()
        permille = None if path is None else self._sysfs.number(path / "device" / "load")
        return None if permille is None or not 0 <= permille <= 1000 else permille / 1000


class JetsonBoard(MeteredBoard):
    """Driver.

    Parameters
    ----------
    settings
        The `[board]` table.
    run
        Runs `nvpmodel`.
    clock
        Physical time, s, monotonic.

    Raises
    ------
    PenumbraError
        The power mode that is asked for cannot be put in force.
    """

    def __init__(
        self,
        settings: BoardSettings,
        *,
        run: Runner = run_command,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(settings, clock)
        self._rails = Ina3221(self._sysfs)
        self._zones = ThermalZones(self._sysfs)
        self.gpu = Gpu(self._sysfs)
        self.modes = NvPModel(self._sysfs, self.gpu.max_hz, run)
        if settings.power_mode and self.modes.current() != settings.power_mode:
            self.modes.set(settings.power_mode)

    @property
    def name(self) -> str:
        """`jetson`."""
        return "jetson"

    @property
    def identity(self) -> str:
        """Model of the module."""
        return self._sysfs.text(self._sysfs.path(MODEL)) or "Jetson of unknown model"

    def power_mode(self) -> str | None:
        """Return the name of the power mode in force; None when it cannot be told."""
        return self.modes.current()

    def require_meter(self) -> None:
        """Refuse to fly without a meter.

        Raises
        ------
        PenumbraError
            No rail stands for the whole module, or it cannot be read, or it does not measure.
        """
        if not self._rails.rails:
            raise PenumbraError(
                "[board] kind 'jetson': no INA3221 under /sys/class/hwmon, so the draw is unknown",
                "load the module ina3221, or use kind = 'sim' for a draw computed from CPU time",
            )
        if not self._rails.total_rails():
            labels = ", ".join(rail.label for rail in self._rails.rails)
            raise PenumbraError(
                f"[board] kind 'jetson': none of the rails {labels} is known to stand for the whole module",
                "add its rule to node/boards/ina3221.py",
            )
        if self._rails.read(self._clock()) is None:
            raise PenumbraError(
                f"[board] kind 'jetson': {self._silent_rails()}, so the draw of the module is unknown",
                "look at these files as root, or use kind = 'sim' for a draw computed from CPU time",
            )

    def _silent_rails(self) -> str:
        """Return what is wrong with the rails that stand for the module."""
        found = []
        for rail in self._rails.total_rails():
            for path, unit in ((rail.volts, "mV"), (rail.amps, "mA")):
                value = self._sysfs.number(path)
                why = self._sysfs.troubles[path].why if value is None else f"{value} {unit}"
                if value is None or value <= 0:
                    found.append(f"{path}: {why}")
        return ", ".join(found) or "the rails give no draw"

    def operate(self, point: OperatingPoint) -> None:
        """Put the power mode of the point in force, when it names one that is not.

        Raises
        ------
        PenumbraError
            It could not be put in force.
        """
        if point.power_mode is not None and point.power_mode != self.modes.current():
            self.modes.set(point.power_mode)

    def read(self) -> BoardReading:
        """Return the draw of the module and its junction temperature."""
        metered_w, die_c = self._rails.read(self._clock()), self._zones.die_c()
        return self._reading(
            metered_w, die_c, (*self._rails.still, *(f"zone {name}" for name in self._zones.still))
        )

    def fan_pwm(self) -> int | None:
        """Return the fan's duty, 0 to 255; None without one."""
        for path in self._sysfs.glob("/sys/class/hwmon/hwmon*/pwm1"):
            found = self._sysfs.number(path)
            if found is not None and 0 <= found <= 255:
                return found
        return None

    def probe(self) -> list[Offer]:
        """Return what this module offers."""
        return [
            *self._probe_rails(), *self._probe_zones(), self._probe_gpu(), self._probe_modes(),
            self._probe_fan(), *self._probe_common(),
        ]  # fmt: skip

    def _probe_rails(self) -> list[Offer]:
        if not self._rails.rails:
            mend = "modprobe ina3221"
            return [Offer(what="power rails", state="missing", detail="/sys/class/hwmon", mend=mend)]
        total = self._rails.total_rails()
        self._rails.read(self._clock())
        found = []
        for rail in self._rails.rails:
            power_w = self._rails.power_w(rail)
            part = ", counts" if rail in total else ""
            if power_w is None:
                trouble = self._sysfs.troubles.get(rail.volts) or self._sysfs.troubles[rail.amps]
                state: State = "denied" if trouble.denied else "bad"
                detail = f"{trouble.path}: {trouble.why}"
                found.append(Offer(what=f"rail {rail.label}", state=state, detail=detail, mend="run as root"))
            elif f"rail {rail.label}" in self._rails.still:
                detail, mend = f"{power_w:.3f} W{part}, but does not measure", "look at the monitor's driver"
                found.append(Offer(what=f"rail {rail.label}", state="bad", detail=detail, mend=mend))
            else:
                found.append(Offer(what=f"rail {rail.label}", state="ok", detail=f"{power_w:.3f} W{part}"))
        if not total:
            mend = "add the module's rule to node/boards/ina3221.py"
            found.append(Offer(what="module total", state="missing", detail="no rule", mend=mend))
        return found

    def _probe_zones(self) -> list[Offer]:
        zones = self._zones.read()
        if not zones:
            return [Offer(what="temperatures", state="missing", detail="/sys/class/thermal")]
        told = ", ".join(f"{name} {zone_c:.1f}" for name, zone_c in zones.items())
        return [Offer(what="temperatures", state="ok", detail=f"{told} degC; gated zones left out")]

    def _probe_gpu(self) -> Offer:
        most, now = self.gpu.max_hz(), self.gpu.now_hz()
        if most is None or now is None:
            return Offer(what="GPU clock", state="missing", detail="/sys/class/devfreq")
        load = self.gpu.load()
        busy = "" if load is None else f", load {load:.1%}"
        return Offer(what="GPU clock", state="ok", detail=f"{now / 1e6:g} MHz of {most / 1e6:g} MHz{busy}")

    def _probe_modes(self) -> Offer:
        try:
            modes = [mode.name for mode in self.modes.modes()]
        except PenumbraError as error:
            return Offer(what="power modes", state="bad", detail=error.what, mend=error.mend or "")
        if not modes:
            mend = "install nvpmodel"
            return Offer(what="power modes", state="missing", detail="/etc/nvpmodel.conf", mend=mend)
        current = self.modes.current()
        detail = f"{', '.join(modes)}; in force: {current or 'cannot be told'}"
        state: State = "ok" if current is not None else "denied"
        mend = "" if current else "look at what `nvpmodel -q` says as root: it must give a name"
        return Offer(what="power modes", state=state, detail=detail, mend=mend)

    def _probe_fan(self) -> Offer:
        pwm = self.fan_pwm()
        if pwm is None:
            return Offer(what="fan", state="missing", detail="/sys/class/hwmon/hwmon*/pwm1")
        return Offer(what="fan", state="ok", detail=f"duty {pwm} of 255")
