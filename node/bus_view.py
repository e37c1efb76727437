"""The spacecraft as the node knows it: the latest value of each bus channel, and the eclipse forecast."""

from __future__ import annotations

from node.power.ephemeris import PropagationError
from node.power.forecast import EclipseForecast, UmbraPass
from telemetry.bus import BusContact, BusEps, BusMessage, BusOrbit, BusThermal

STALE_S = 10.0
"""Age after which a value of the bus counts as unknown in telemetry, s of physical time (assumed)."""


class BusView:
    """Latest bus values with their ages in physical time."""

    def __init__(self) -> None:
        self.forecast: EclipseForecast | None = None
        """None until the bus has given orbital elements."""
        self.contact: BusContact | None = None
        self.eps: BusEps | None = None
        self._eps_s = 0.0
        self._thermal: tuple[BusThermal, float] | None = None
        self._orbit: BusOrbit | None = None

    def handle(self, message: BusMessage, now_s: float) -> None:
        """Take a message that came at `now_s` (monotonic, s).

        Raises
        ------
        PenumbraError
            Orbital elements that are malformed; the forecast stays as it was.
        """
        match message:
            case BusEps():
                self.eps, self._eps_s = message, now_s
            case BusThermal():
                self._thermal = (message, now_s)
            case BusContact():
                self.contact = message
            case BusOrbit() if message != self._orbit:
                self.forecast = EclipseForecast.from_tle(message.line1, message.line2)
                self._orbit = message

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
        """Return the forecast sunlit fraction at mission time `t_ns`, None without a forecast."""
        if self.forecast is None:
            return None
        try:
            return self.forecast.sunlit(t_ns)
        except PropagationError:
            return None

    def next_umbra(self, t_ns: int) -> UmbraPass | None:
        """Return the umbra pass under way or next, None when none comes or it is unknown."""
        if self.forecast is None:
            return None
        try:
            return self.forecast.next_umbra(t_ns)
        except PropagationError:
            return None
