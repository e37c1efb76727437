"""Mean elements of an orbit for SGP4, out of a TLE or an Orbit Mean-elements Message (CCSDS 502.0).

All is read and checked here, by form and range, before a propagator sees it. A field that moves the
satellite, or says what the others mean, is refused when it is not what SGP4 takes: TEME about the Earth,
times in UTC. Nothing is converted: TAI and GPS time would need each leap second to come. All other fields may
hold anything: catalogue numbers, counters and derivatives of the mean motion do not move an SGP4 satellite.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from typing import Final

import msgspec

from telemetry.errors import PenumbraError

MU_KM3_S2: Final = 398_600.8
"""WGS 72, as SGP4 uses."""
EARTH_RADIUS_KM: Final = 6378.135
"""WGS 72, equatorial."""
TLE_LENGTH: Final = 69
NS_PER_S: Final = 1_000_000_000
NS_PER_DAY: Final = 86_400 * NS_PER_S
YEARS: Final = (1957, 2199)
"""Of an epoch, by its calendar: the first satellite, and well before ns since 1970 leave 64 bits."""

RANGES: Final[dict[str, tuple[float, float, str]]] = {
    "mean_motion_rev_day": (0.01, 17.1, " revolutions a day"),
    "eccentricity": (0.0, 0.999_999_9, ""),
    "inclination_deg": (0.0, 180.0, " deg"),
    "raan_deg": (-360.0, 360.0, " deg"),
    "arg_perigee_deg": (-360.0, 360.0, " deg"),
    "mean_anomaly_deg": (-360.0, 360.0, " deg"),
    "bstar": (-10.0, 10.0, " / Earth radii"),
}
"""Lowest and highest value of each element, and its unit. At 17.1 revolutions a day an orbit is below ground,
at 0.01 it is 900,000 km out; a drag of 10 is beyond any satellite that lasts a revolution (both assumed)."""

OMM_NEEDED: Final = {
    "MEAN_MOTION": "mean_motion_rev_day",
    "ECCENTRICITY": "eccentricity",
    "INCLINATION": "inclination_deg",
    "RA_OF_ASC_NODE": "raan_deg",
    "ARG_OF_PERICENTER": "arg_perigee_deg",
    "MEAN_ANOMALY": "mean_anomaly_deg",
}
OMM_MEANING: Final = {
    "CENTER_NAME": ("EARTH",),
    "REF_FRAME": ("TEME", "TEMEOFDATE", "TEME OF DATE"),
    "REF_FRAME_EPOCH": (),
    "TIME_SYSTEM": ("UTC",),
    "MEAN_ELEMENT_THEORY": ("SGP4", "SGP/SGP4"),
}
"""Fields that say what the elements mean, and the values under which they are SGP4's. Left out, they are."""
OMM_OTHER_THEORY: Final = ("BTERM", "AGOM")
"""Drag and radiation pressure of SGP4-XP: only 0 can be left out of account."""
SGP4_TYPES: Final = (0, 2)
"""Ephemeris types of SGP4: 0 as catalogues give it, 2 by number. 4 is SGP4-XP, others are other theories."""
OMM_READ: Final = frozenset(
    ("EPOCH", "BSTAR", "EPHEMERIS_TYPE", *OMM_NEEDED, *OMM_MEANING, *OMM_OTHER_THEORY)
)
OMM_MEND: Final = "take the message as its source gives it, for SGP4, in the names of CCSDS 502.0"
TLE_MEND: Final = "copy both lines again, all 69 characters of each, from the source of the TLE"

TLE_ELEMENTS: Final = (
    (8, 16, "inclination", "inclination_deg"),
    (17, 25, "right ascension of the node", "raan_deg"),
    (34, 42, "argument of perigee", "arg_perigee_deg"),
    (43, 51, "mean anomaly", "mean_anomaly_deg"),
    (52, 63, "mean motion", "mean_motion_rev_day"),
)
"""Decimals of line 2: columns from the blank before each, what they hold."""

_NUMBER: Final = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_DECIMAL: Final = re.compile(r" +\d+\.\d+", re.ASCII)
_EPOCH: Final = re.compile(
    r"(\d{4})-(?:(\d\d)-(\d\d)|(\d{3}))T(\d\d):(\d\d):(\d\d)(?:\.(\d*))?(?:Z|\+00:00)?", re.ASCII
)


class Elements(msgspec.Struct, frozen=True, kw_only=True):
    """Mean elements as SGP4 understands them (TEME of date), each within `RANGES`."""

    epoch_ns: int
    """UTC, ns since 1970."""
    mean_motion_rev_day: float
    """Kozai's mean motion, as both sources give it."""
    eccentricity: float
    inclination_deg: float
    raan_deg: float
    arg_perigee_deg: float
    mean_anomaly_deg: float
    bstar: float
    """Drag, 1 / Earth radii."""

    @property
    def altitude_km(self) -> float:
        """Mean semi-major axis less the equatorial radius, km."""
        return altitude_km(self.mean_motion_rev_day)

    @property
    def perigee_km(self) -> float:
        """Height of the mean perigee above the equatorial radius, km."""
        return (EARTH_RADIUS_KM + self.altitude_km) * (1.0 - self.eccentricity) - EARTH_RADIUS_KM

    @classmethod
    def from_tle(cls, line1: str, line2: str) -> Elements:
        """Return the elements of a TLE.

        Raises
        ------
        PenumbraError
            Names the line, the field with its columns and value, and what is allowed.
        """
        for number, line in ((1, line1), (2, line2)):
            _check_line(number, line)
        if line1[2:7] != line2[2:7]:
            raise PenumbraError(
                f"TLE: line 1 is of satellite {line1[2:7]!r}, line 2 of {line2[2:7]!r}; "
                "one satellite is allowed",
                "take both lines from the same TLE",
            )
        epoch = _columns(line1, 18, 32, "epoch", re.compile(r" \d\d[ \d]{2}\d\.\d{8}", re.ASCII))
        drag = _columns(line1, 53, 61, "drag", re.compile(r" [ +-][ \d]{4}\d[ +-]\d", re.ASCII))
        kind = _columns(line1, 62, 63, "ephemeris type", re.compile(" [ 0-9]"))
        if int(kind.strip() or 0) not in SGP4_TYPES:
            raise PenumbraError(
                f"TLE line 1, column 63: ephemeris type {kind.strip()} is of another theory; "
                f"{_listed(SGP4_TYPES)} or a blank, SGP4, is allowed",
                "take elements for SGP4 from the source of the TLE",
            )
        ellipse = _columns(line2, 26, 33, "eccentricity", re.compile(r" [ \d]{6}\d", re.ASCII))
        values = {
            "eccentricity": float("0." + ellipse[1:].replace(" ", "0")),
            "bstar": float(f"{drag[1].strip()}.{drag[2:7].replace(' ', '0')}e{drag[7:].strip()}"),
        }
        for first, last, name, element in TLE_ELEMENTS:
            values[element] = float(_columns(line2, first, last, name, _DECIMAL))
            where = f"TLE line 2, columns {first + 1} to {last}: {name}"
            _check_range(where, line2[first:last].strip(), values[element], element, TLE_MEND)
        _check_range("TLE line 1, columns 54 to 61: drag", drag[1:], values["bstar"], "bstar", TLE_MEND)
        return cls(epoch_ns=_tle_epoch_ns(epoch[1:]), **values)._above_ground("TLE", TLE_MEND)

    @classmethod
    def from_omm(cls, fields: Mapping[str, object]) -> Elements:
        """Return the elements of an Orbit Mean-elements Message.

        Parameters
        ----------
        fields
            By their names in the standard (`MEAN_MOTION`, revolutions a day; angles in deg); numbers may come
            as text. Null and blank text are no value: the field counts as left out.

        Raises
        ------
        PenumbraError
            Names the field, its value and what is allowed.
        """
        for name in fields:
            if name not in OMM_READ and name.strip().upper() in OMM_READ:
                raise PenumbraError(
                    f"OMM: field {name!r}; {name.strip().upper()!r} is how the standard writes it", OMM_MEND
                )
        given = {
            name: value
            for name, value in fields.items()
            if name in OMM_READ and value is not None and not (isinstance(value, str) and not value.strip())
        }
        missing = [name for name in ("EPOCH", *OMM_NEEDED) if name not in given]
        if missing:
            raise PenumbraError(f"OMM: {', '.join(missing)} is missing", OMM_MEND)
        for name, allowed in OMM_MEANING.items():
            text = given.get(name)
            if text is not None and not (isinstance(text, str) and text.strip().upper() in allowed):
                right = f"{_listed(allowed)} is allowed" if allowed else "it must be left out"
                raise PenumbraError(f"OMM: {name} = {reprlib.repr(text)}; {right}", OMM_MEND)
        if _number(given, "EPHEMERIS_TYPE") not in SGP4_TYPES:
            shown = reprlib.repr(given["EPHEMERIS_TYPE"])
            raise PenumbraError(
                f"OMM: EPHEMERIS_TYPE = {shown}; {_listed(SGP4_TYPES)}, SGP4, is allowed", OMM_MEND
            )
        for name in OMM_OTHER_THEORY:
            if _number(given, name) != 0:
                shown = reprlib.repr(given[name])
                raise PenumbraError(
                    f"OMM: {name} = {shown} is of SGP4-XP; 0 is allowed, with BSTAR for the drag", OMM_MEND
                )
        values: dict[str, float] = {}
        for name, element in {**OMM_NEEDED, "BSTAR": "bstar"}.items():
            value = _number(given, name)
            _check_range(f"OMM: {name} =", given.get(name), value, element, OMM_MEND)
            values[element] = float(value)
        return cls(epoch_ns=_omm_epoch_ns(given["EPOCH"]), **values)._above_ground("OMM", OMM_MEND)

    def _above_ground(self, source: str, mend: str) -> Elements:
        if self.perigee_km <= 0:
            raise PenumbraError(
                f"{source}: mean motion {self.mean_motion_rev_day:g} revolutions a day with eccentricity "
                f"{self.eccentricity:g} has its perigee at {self.perigee_km:.0f} km; above 0 km is allowed",
                mend,
            )
        return self


def altitude_km(mean_motion_rev_day: float) -> float:
    """Return the mean semi-major axis less the equatorial radius, km."""
    n = mean_motion_rev_day * 2 * math.pi / 86_400.0
    return float((MU_KM3_S2 / n**2) ** (1.0 / 3.0)) - EARTH_RADIUS_KM


def tle_checksum(line: str) -> int:
    """Return the last digit of a line of ASCII: the sum of its digits, a minus counted as 1, modulo 10."""
    return sum(int(c) if c in "0123456789" else c == "-" for c in line[: TLE_LENGTH - 1]) % 10


def _check_line(number: int, line: str) -> None:
    foreign = next((column for column, c in enumerate(line, 1) if not " " <= c <= "~"), None)
    if foreign is not None:
        raise PenumbraError(
            f"TLE line {number}: {line!r} has U+{ord(line[foreign - 1]):04X} in column {foreign}; "
            "digits, letters, signs and blanks of ASCII are allowed",
            "copy the line as plain text from the source of the TLE, or type it",
        )
    if len(line) != TLE_LENGTH:
        raise PenumbraError(
            f"TLE line {number}: {line!r} has {len(line)} characters, {TLE_LENGTH} are allowed", TLE_MEND
        )
    if not line.startswith(f"{number} "):
        raise PenumbraError(f"TLE line {number}: {line!r} does not begin with '{number} '", TLE_MEND)
    expected = str(tle_checksum(line))
    if line[-1] != expected:
        raise PenumbraError(
            f"TLE line {number}: checksum {line[-1]!r} in {line!r}, {expected!r} is right for it", TLE_MEND
        )


def _columns(line: str, first: int, last: int, name: str, form: re.Pattern[str]) -> str:
    """Return the characters of a field and the blank in column `first` that sets it apart."""
    text = line[first - 1 : last]
    if not form.fullmatch(text):
        raise PenumbraError(
            f"TLE line {line[0]}, columns {first} to {last}: {text!r} is not a blank and a number "
            f"in the form of a TLE's {name}",
            TLE_MEND,
        )
    return text


def _check_range(what: str, shown: object, value: float, element: str, mend: str) -> None:
    low, high, unit = RANGES[element]
    # Not the other way round: NaN is in no range.
    if not low <= value <= high:
        text = shown if what.startswith("TLE") else reprlib.repr(shown)
        raise PenumbraError(f"{what} {text}; {low:g} to {high:.7g}{unit} is allowed", mend)


def _number(given: Mapping[str, object], name: str) -> float:
    """Return a field's number, 0 when it is left out; of any size."""
    value = given.get(name, 0)
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return float(value)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise PenumbraError(f"OMM: {name} = {reprlib.repr(value)} is no number", OMM_MEND)
    return value


def _tle_epoch_ns(text: str) -> int:
    """Return the epoch of `YYDDD.DDDDDDDD`, with 57 to 99 in the twentieth century."""
    year = int(text[:2]) + (1900 if int(text[:2]) >= YEARS[0] % 100 else 2000)
    try:
        day_ns = _day_of_year_ns(year, int(text[2:5]))
    except ValueError as error:
        raise PenumbraError(f"TLE line 1, columns 21 to 23: {error}", TLE_MEND) from None
    return day_ns + int(text[6:]) * (NS_PER_DAY // 10**8)


def _omm_epoch_ns(value: object) -> int:
    """Return the epoch of `2026-06-01T10:00:00.5` or `2026-152T10:00:00.5`, with or without `Z`.

    Second 60, a leap second or one that was rounded up, is the first of the next minute.
    """
    shown = f"OMM: EPOCH = {reprlib.repr(value)}"
    found = _EPOCH.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        raise PenumbraError(
            f"{shown}; a time such as '2026-06-01T10:00:00.5' or '2026-152T10:00:00.5' is allowed", OMM_MEND
        )
    year, month, day, day_of_year, hour, minute, second = (int(x or 0) for x in found.groups()[:7])
    try:
        if not YEARS[0] <= year <= YEARS[1]:
            raise ValueError(f"year {year}, {YEARS[0]} to {YEARS[1]} is allowed")
        if hour > 23 or minute > 59 or second > 60:
            raise ValueError("23:59:60 is the last second of a day")
        if found[4] is None:
            day_of_year = _day_of_year(year, month, day)
        day_ns = _day_of_year_ns(year, day_of_year)
    except ValueError as error:
        raise PenumbraError(f"{shown}: {error}", OMM_MEND) from None
    fraction_ns = int(((found[8] or "") + "0" * 9)[:9])
    return day_ns + (hour * 3_600 + minute * 60 + second) * NS_PER_S + fraction_ns


def _day_of_year_ns(year: int, day: int) -> int:
    """Return the beginning of a day of the year, 1 for 1 January, ns since 1970."""
    days = 366 if _is_leap(year) else 365
    if not 1 <= day <= days:
        raise ValueError(f"day {day} of the year {year}, 1 to {days} is allowed")
    leap_days = sum(map(_is_leap, range(1970, year))) - sum(map(_is_leap, range(year, 1970)))
    return ((year - 1970) * 365 + leap_days + day - 1) * NS_PER_DAY


def _day_of_year(year: int, month: int, day: int) -> int:
    lengths = (31, 29 if _is_leap(year) else 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
    if not 1 <= month <= 12:
        raise ValueError(f"month {month}, 1 to 12 is allowed")
    if not 1 <= day <= lengths[month - 1]:
        raise ValueError(f"day {day} of month {month} of {year}, 1 to {lengths[month - 1]} is allowed")
    return sum(lengths[: month - 1]) + day


def _is_leap(year: int) -> bool:
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


def _listed(values: tuple[object, ...]) -> str:
    return " or ".join(map(str, values))
