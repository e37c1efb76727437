"""The spacecraft as the node knows it: the latest value of each bus channel, and the eclipse forecast.

What sensors of the power unit say is voted on (`fdir.sensors`) before anything plans with it. What no sensor
tells is bridged for a stated time: the state of charge by counting energy, the array by the forecast, voltage
and current by their last value. When that ends, `eps` is None, as if the bus were silent.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

from fdir.sensors import (
    ChannelSpec,
    Reading,
    Rejected,
    SensorAction,
    SensorVoter,
    Source,
    Tick,
    Why,
)
from node.power.elements import NS_PER_DAY, Elements
from node.power.ephemeris import Ephemeris, PropagationError
from node.power.estimator import EnergyReading, EstimatorSettings, SocEstimate, SocEstimator
from node.power.forecast import EclipseForecast, UmbraPass
from node.power.sensed import EDGE_MARGIN_S, SensedEclipses
from telemetry.bus import (
    SENSOR_RANGES,
    BusContact,
    BusEps,
    BusMessage,
    BusOrbit,
    BusThermal,
    EpsReading,
)

R = TypeVar("R")

STALE_S = 10.0
"""Age after which a value of the bus counts as unknown in telemetry, s of physical time (assumed)."""
MAX_FINDINGS = 64
"""Findings kept for the next report; more are counted in `rejections` only (assumed)."""
NS_PER_S: Final = 1e9

EPS_CHANNELS: Final = (
    ChannelSpec("battery_soc", *SENSOR_RANGES["battery_soc"], tolerance=0.02, max_rate_per_s=1 / 300),
    ChannelSpec("battery_v", *SENSOR_RANGES["battery_v"], tolerance=0.1, relative=0.02),
    ChannelSpec("battery_a", *SENSOR_RANGES["battery_a"], tolerance=0.2, relative=0.05),
    ChannelSpec("array_w", *SENSOR_RANGES["array_w"], tolerance=0.5, relative=0.05),
)
"""Voted quantities. Tolerances are assumed: some times the error of common sensors. The state of charge moves
slowly (a full charge within 300 s is beyond any battery here), the others may jump with load and shadow."""


_OF_READINGS: Final = (
    *("eps", "eps_source", "soc", "rejections"),
    *("_voter", "_estimator", "_findings", "_stamps", "_held", "_eps_s", "_sensed"),
)
"""Attributes of a view that a reading of the power unit changes."""


@dataclass(frozen=True)
class Eclipses:
    """Umbra passes under way and ahead."""

    passes: tuple[UmbraPass, ...]
    period_s: float | None
    """Of the orbit; None when it is not known."""
    edge_margin_s: float
    """Error to reckon with of an edge."""
    source: Literal["forecast", "sensed", "unknown"]
    """Orbital elements; the array's own darkness, when there are none young enough; or neither."""


class BusView:
    """Latest bus values with their ages in physical time.

    Parameters
    ----------
    estimator
        Tuning of the bridge over lost sensors of the state of charge.
    """

    def __init__(self, estimator: EstimatorSettings | None = None) -> None:
        self.forecast: EclipseForecast | None = None
        """None until the bus has given orbital elements."""
        self.forecast_fault = ""
        """Why the last elements were dropped: the forecast failed on them."""
        self.contact: BusContact | None = None
        self.contact_heard_s = 0.0
        """When it came, monotonic, s."""
        self.eps: BusEps | None = None
        """Made of voted values; None before the first, and when sensors are lost for longer than bridged."""
        self.eps_source = Source.NONE
        """The weakest source of what `eps` is made of."""
        self.soc: SocEstimate | None = None
        """State of charge with its error, and how long it has been bridged (mission time)."""
        self.load_w: float | None = None
        """Draw of the board, as the power loop knows it: for the energy balance."""
        self.rejections = 0
        """Sensors rejected since boot."""
        self._voter = SensorVoter(EPS_CHANNELS)
        self._estimator = SocEstimator(estimator)
        self._bridge_s = self._estimator.settings.max_bridge_s
        self._findings: list[SensorAction] = []
        self._stamps: dict[int, int] = {}
        self._held: dict[str, tuple[float, float]] = {}
        """Last voted value of a channel, and its mission time, s."""
        self._eps_s = 0.0
        self._thermal: tuple[BusThermal, float] | None = None
        self._elements: Elements | None = None
        """As they came last: the same again cost no new forecast, whatever else the message holds."""
        self._sensed = SensedEclipses()

    def handle(self, message: BusMessage, now_s: float) -> None:
        """Take a message that came at `now_s` (monotonic, s).

        Raises
        ------
        PenumbraError
            Orbital elements that are malformed or not for SGP4. Whatever is raised, all is as it was before.
        """
        match message:
            case BusEps():
                self._take_reading(EpsReading.of(message), now_s)
            case EpsReading():
                self._take_reading(message, now_s)
            case BusThermal():
                self._thermal = (message, now_s)
            case BusContact():
                self.contact, self.contact_heard_s = message, now_s
            case BusOrbit():
                self._take_elements(_elements_of(message))

    def _take_elements(self, elements: Elements) -> None:
        if elements != self._elements:
            self.forecast = EclipseForecast(Ephemeris(elements))
            self._elements, self.forecast_fault = elements, ""

    def forget(self) -> None:
        """Know nothing of the spacecraft, as before the first message; counts and findings stay."""
        fresh = BusView(self._estimator.settings)
        kept = ("_findings", "rejections", "load_w")
        vars(self).update({name: value for name, value in vars(fresh).items() if name not in kept})

    def handle_retained(
        self, message: BusMessage, now_s: float, mission_ns: int | None, rate: float
    ) -> str | None:
        """Take a message that the broker had kept, if by its own stamp it is as good as live (ADR 0021).

        Parameters
        ----------
        now_s
            Monotonic clock, s.
        mission_ns
            Mission time, UTC ns; None while it is not known.
        rate
            Mission seconds a second of physical time.

        Returns
        -------
        str or None
            Why it is not taken; None if it is, or says nothing new.

        Raises
        ------
        PenumbraError
            As `handle`.
        """
        match message:
            case BusOrbit():
                return self._take_retained_elements(_elements_of(message), mission_ns)
            case BusContact() if mission_ns is not None:
                age_s = (mission_ns - message.t_ns) / NS_PER_S / rate
                if abs(age_s) > STALE_S:
                    return f"it is {age_s:.0f} s old"
                heard_s = now_s - max(age_s, 0.0)
                if self.contact is None or heard_s > self.contact_heard_s:
                    self.handle(message, heard_s)
                return None
            case BusContact():
                return "its age is not known before mission time is"
            case _:
                return "a live one is needed"

    def _take_retained_elements(self, elements: Elements, mission_ns: int | None) -> str | None:
        if self.forecast is not None and elements != self._elements:
            if mission_ns is None:
                return "its age is not known before mission time is"
            if abs(mission_ns - elements.epoch_ns) / NS_PER_DAY >= self.forecast.tle_age_days(mission_ns):
                return "the elements in use are as near to mission time"
        self._take_elements(elements)
        return None

    def tick(self, now_s: float) -> None:
        """Notice channels of a silent bus; about once a second."""
        self._note(self._voter.handle(Tick(), now_s))

    def take_findings(self) -> list[SensorAction]:
        """Return what the voter found since the last call, oldest first."""
        found, self._findings = self._findings, []
        return found

    def rejected_sensors(self) -> dict[str, dict[int, Why]]:
        """Return the sets that do not vote now, and why, by channel; channels without any are left out."""
        by_channel = {spec.name: self._voter.rejected(spec.name) for spec in EPS_CHANNELS}
        return {name: sets for name, sets in by_channel.items() if sets}

    def eps_age_s(self, now_s: float) -> float:
        """Return the age of `eps`, s of physical time; 0 while there is none."""
        return 0.0 if self.eps is None else now_s - self._eps_s

    def fresh_eps(self, now_s: float) -> BusEps | None:
        """Return `eps`, None when it is old or unknown."""
        return self.eps if self.eps_age_s(now_s) <= STALE_S else None

    def board_c(self, now_s: float) -> float | None:
        """Return the board's temperature as the bus sees it, None when that is old or unknown."""
        if self._thermal is None or now_s - self._thermal[1] > STALE_S:
            return None
        return self._thermal[0].board_c

    def sunlit(self, t_ns: int) -> float | None:
        """Return the sunlit fraction at mission time `t_ns`: forecast, else sensed; None when unknown."""
        forecast = self._ask(lambda f: f.sunlit(t_ns) if f.is_usable(t_ns) else None)
        if forecast is not None:
            return forecast
        return None if self._sensed.dark is None else 0.0 if self._sensed.dark else 1.0

    def next_umbra(self, t_ns: int) -> UmbraPass | None:
        """Return the umbra pass under way or next, None when none comes or it is unknown."""
        return next(iter(self.eclipses(t_ns).passes), None)

    def eclipses(self, t_ns: int) -> Eclipses:
        """Return what is known of the eclipses from mission time `t_ns` on."""
        forecast = self._ask(
            lambda f: (
                Eclipses(f.passes(t_ns), f.period_s, f.edge_margin_s(t_ns), "forecast")
                if f.is_usable(t_ns)
                else None
            )
        )
        if forecast is not None:
            return forecast
        passes, period_s = self._sensed.passes(t_ns), self._sensed.period_s
        return Eclipses(passes, period_s, EDGE_MARGIN_S, "unknown" if period_s is None else "sensed")

    def _ask(self, question: Callable[[EclipseForecast], R | None]) -> R | None:
        """Return what the forecast says, None where it says nothing.

        Elements on which it fails in a way nobody foresaw are dropped.
        """
        if self.forecast is None:
            return None
        try:
            return question(self.forecast)
        except PropagationError:
            return None
        except Exception as error:
            self.forecast, self.forecast_fault = None, f"{type(error).__name__}: {error}"
            return None

    def _note(self, actions: list[SensorAction]) -> None:
        self.rejections += sum(isinstance(action, Rejected) for action in actions)
        self._findings += actions[: MAX_FINDINGS - len(self._findings)]

    def _take_reading(self, reading: EpsReading, now_s: float) -> None:
        """Take a reading as a whole, or not at all."""
        kept = copy.deepcopy({name: getattr(self, name) for name in _OF_READINGS})
        try:
            self._vote(reading, now_s)
        except Exception:
            vars(self).update(kept)
            raise

    def _vote(self, reading: EpsReading, now_s: float) -> None:
        t_s = reading.t_ns / NS_PER_S
        stamps = {
            number: reading.t_ns if each.t_ns is None else each.t_ns
            for number, each in enumerate(reading.sets)
        }
        fresh = tuple(self._stamps.get(number) != stamp for number, stamp in stamps.items())
        self._stamps = stamps
        why = {(each.sensor_set, each.field): Why(each.why) for each in reading.refused}
        for spec in EPS_CHANNELS:
            event = Reading(
                spec.name,
                tuple(getattr(each, spec.name) for each in reading.sets),
                t_s=t_s,
                fresh=fresh,
                refused=tuple(why.get((number, spec.name)) for number in stamps),
            )
            self._note(self._voter.handle(event, now_s))
        self._eps_s = now_s
        self.eps = self._compose(reading, t_s, now_s)

    def _compose(self, reading: EpsReading, t_s: float, now_s: float) -> BusEps | None:
        """Return the message of voted and bridged values, None when one of them is neither."""
        votes = {spec.name: self._voter.value(spec.name, now_s) for spec in EPS_CHANNELS}
        known = {name: vote.value for name, vote in votes.items()}
        sources = {vote.source for vote in votes.values() if vote.value is not None}
        self.soc = self._estimator.handle(
            EnergyReading(
                t_s=t_s,
                soc=known["battery_soc"],
                battery_v=known["battery_v"],
                battery_a=known["battery_a"],
                array_w=known["array_w"],
                platform_w=reading.platform_w,
                load_w=self.load_w,
                battery_wh=reading.battery_wh,
            )
        )
        values: dict[str, float] = {}
        for name, value in known.items():
            if value is not None:
                self._held[name] = (value, t_s)
                values[name] = value
                continue
            bridged = self._bridge(name, reading, t_s)
            if bridged is None:
                self.eps_source = Source.NONE
                return None
            sources.add(Source.ESTIMATED)
            values[name] = bridged
        order = (Source.ESTIMATED, Source.SINGLE, Source.VOTED)
        self.eps_source = next(source for source in order if source in sources)
        if known["array_w"] is not None:
            self._sensed.handle(reading.t_ns, known["array_w"], reading.array_sun_w)
        return BusEps(
            t_ns=reading.t_ns,
            battery_soc=values["battery_soc"],
            battery_v=values["battery_v"],
            battery_a=values["battery_a"],
            battery_wh=reading.battery_wh,
            array_w=values["array_w"],
            array_sun_w=reading.array_sun_w,
            platform_w=reading.platform_w,
            soc_floor=reading.soc_floor,
        )

    def _bridge(self, name: str, reading: EpsReading, t_s: float) -> float | None:
        """Return what stands for a quantity that no sensor tells."""
        if name == "battery_soc":
            return None if self.soc is None else self.soc.soc
        if name == "array_w":
            sunlit = self.sunlit(reading.t_ns)
            return None if sunlit is None else reading.array_sun_w * sunlit
        value, at_s = self._held.get(name, (0.0, -math.inf))
        return value if 0 <= t_s - at_s <= self._bridge_s else None


def _elements_of(orbit: BusOrbit) -> Elements:
    if orbit.omm is not None:
        return Elements.from_omm(orbit.omm)
    # One of the two forms is there, as the message's own check has seen.
    return Elements.from_tle(orbit.line1 or "", orbit.line2 or "")
