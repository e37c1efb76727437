"""The flight as it happens: a terminal view of one screen, or log lines where there is no terminal.

Drawing is plain text, four times a second: it must not take from the model the processor it needs.
"""

from __future__ import annotations

import asyncio
import logging
import textwrap
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from hil.record import Window

_log = logging.getLogger(__name__)

FRAMES_PER_S = 4
LOG_EVERY_S = 3.0
"""Interval of the log lines where there is no live view, s."""
MIN_WIDTH, MIN_HEIGHT = 60, 20
SPARKS = "▁▂▃▄▅▆▇█"
_LABEL = 10
_SEVERITY_STYLE = {1: "", 2: "yellow", 3: "bold yellow", 4: "bold red"}


@dataclass
class LiveState:
    """What the view shows; the flight keeps it up to date. Unknown values are None."""

    scenario: str = ""
    speed: float = 1.0
    phase: str = "starting"
    t_s: float = 0.0
    """Mission time since the start, s."""
    duration_s: float = 1.0
    profile: Sequence[float] = ()
    """Sunlit share over the whole flight, evenly spaced, 0 to 1."""
    contacts: Sequence[Window] = ()
    soc: float | None = None
    soc_floor: float = 0.0
    battery_w: float | None = None
    """Power into the battery, negative when it discharges, W."""
    load_w: float | None = None
    ceiling_w: float | None = None
    board_max_w: float = 1.0
    duty: float | None = None
    plan: str = ""
    """Who decides the watts, and what binds."""
    mode: str = ""
    board_c: float | None = None
    token_rate_hz: float | None = None
    tokens_released: int = 0
    rates: deque[float] = field(default_factory=lambda: deque(maxlen=200))
    """Tokens/s of the last seconds, oldest first."""
    jobs_done: int = 0
    jobs_queued: int = 0
    jobs_active: int = 0
    flips_injected: int = 0
    flips_detected: int = 0
    flips_repaired: int = 0
    flips_planned: int = 0
    last_strike: str = ""
    backlog: int | None = None
    archived: int = 0
    in_contact: bool = False
    station: str = ""
    worker: str = ""
    restarts: int = 0
    job: str = ""
    """Job whose text is shown."""
    text: str = ""
    """End of its committed text."""
    events: deque[tuple[float, int, str]] = field(default_factory=lambda: deque(maxlen=50))
    """(mission time, severity, text), oldest first."""

    @property
    def sunlit(self) -> float | None:
        """Sunlit share now, from the profile."""
        if not self.profile:
            return None
        at = int(self.t_s / self.duration_s * len(self.profile))
        return self.profile[min(max(at, 0), len(self.profile) - 1)]

    def note(self, text: str, severity: int = 1) -> None:
        """Add a line to the events."""
        self.events.append((self.t_s, severity, text))


def clock(t_s: float) -> str:
    """Return a time as h:mm:ss."""
    whole = max(0, int(t_s))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def bar(width: int, share: float, mark: float | None, style: str) -> Text:
    """Return a horizontal bar filled to `share`, with a mark at another share; both 0 to 1."""
    filled = round(min(max(share, 0.0), 1.0) * width)
    text = Text("━" * filled, style)
    text.append("─" * (width - filled), "bright_black")
    if mark is not None and width > 0:
        at = min(int(min(max(mark, 0.0), 1.0) * width), width - 1)
        text = text[:at] + Text("┃", "bold red" if share < mark else "bold white") + text[at + 1 :]
    return text


def sparkline(values: Sequence[float], width: int, top: float) -> str:
    """Return the last `width` values as block characters, `top` being full height."""
    top = max(top, 1e-9)
    last = len(SPARKS) - 1
    return "".join(SPARKS[min(max(round(v / top * last), 0), last)] for v in list(values)[-width:])


def orbit_bar(state: LiveState, width: int) -> tuple[Text, Text]:
    """Return the orbit in two lines: light and shadow with the spacecraft's place, and the contacts."""
    here = min(int(state.t_s / state.duration_s * width), width - 1)
    light = Text()
    for column in range(width):
        at = column * len(state.profile) // width
        sunlit = state.profile[at] if state.profile else 1.0
        glyph, style = ("█", "blue") if sunlit <= 0.0 else ("▒", "cyan") if sunlit < 1.0 else ("━", "yellow")
        if column == here:
            glyph, style = "◆", "bold white"
        light.append(glyph, style)
    marks = [" "] * width
    ends = []
    for contact in state.contacts:
        first = min(max(int(contact.start_s / state.duration_s * width), 0), width - 1)
        last = min(max(first, int(contact.end_s / state.duration_s * width) - 1), width - 1)
        marks[first : last + 1] = "▔" * (last + 1 - first)
        ends.append((last, contact.name))
    for last, name in ends:
        room = range(last + 2, min(last + 3 + len(name), width))
        if len(room) > len(name) and all(marks[column] == " " for column in room):
            marks[last + 2 : last + 2 + len(name)] = name
    return light, Text("".join(marks), "green")


def _row(label: str, *parts: Text | str) -> Text:
    line = Text(f"{label:<{_LABEL}}", "bright_black", no_wrap=True, overflow="ellipsis", end="\n")
    for part in parts:
        line.append_text(part if isinstance(part, Text) else Text(part))
    return line


def _rule(title: str, width: int) -> Text:
    return Text(f"─ {title} " + "─" * max(0, width - len(title) - 3), "bright_black", no_wrap=True)


def _or(value: float | None, form: str) -> str:
    return "  --" if value is None else format(value, form)


def _percent(share: float | None, form: str) -> str:
    return _or(None if share is None else share * 100, form)


def _header(state: LiveState, width: int) -> Text:
    sunlit = state.sunlit
    light = "" if sunlit is None else "umbra" if sunlit <= 0 else "penumbra" if sunlit < 1 else "sunlight"
    left = Text.assemble(("PENUMBRA ", "bold"), (state.scenario, "cyan"), f"  {state.phase}")
    right = Text.assemble(
        (f"{light}  ", "yellow" if light == "sunlight" else "blue"),
        f"T+{clock(state.t_s)} of {clock(state.duration_s)}  x{state.speed:g}",
    )
    gap = max(1, width - left.cell_len - right.cell_len)
    return Text.assemble(left, " " * gap, right, no_wrap=True, overflow="ellipsis")


def _power(state: LiveState, meter: int) -> list[Text]:
    soc, top = state.soc, max(state.board_max_w, 1e-9)
    low = soc is not None and soc < state.soc_floor
    flow = state.battery_w
    arrow = "" if flow is None else f"   {'charging' if flow >= 0 else 'discharging'} {abs(flow):.1f} W"
    share = None if state.ceiling_w is None else state.ceiling_w / top
    return [
        _row(
            "battery",
            bar(meter, soc or 0.0, state.soc_floor, "bold red" if low else "green"),
            f" {_percent(soc, '5.1f')} %  floor {state.soc_floor * 100:.0f} %{arrow}",
        ),
        _row(
            "watts",
            bar(meter, (state.load_w or 0.0) / top, share, "magenta"),
            f" {_or(state.load_w, '5.2f')} W  ceiling {_or(state.ceiling_w, '.2f')} W"
            f"   duty {_percent(state.duty, '.0f')} %",
        ),
        _row("plan", Text(state.plan or "--", style="" if state.plan else "dim"), ""),
    ]


def _service(state: LiveState, meter: int) -> list[Text]:
    top = max([*state.rates, 1.0])
    all_in = state.flips_repaired == state.flips_injected
    restarts = f"   restarts {state.restarts}" if state.restarts else ""
    backlog = "  --" if state.backlog is None else f"{state.backlog}"
    link: tuple[str, str] = (f"in contact with {state.station}", "bold green")
    if not state.in_contact:
        coming = [c for c in state.contacts if c.start_s > state.t_s]
        words = f"no contact, {coming[0].name} in {clock(coming[0].start_s - state.t_s)}" if coming else ""
        link = (words or "no contact, none to come", "bright_black")
    return [
        _row(
            "tokens/s",
            Text(f"{sparkline(state.rates, meter, top):>{meter}}", "cyan"),
            f" {_or(state.token_rate_hz, '5.1f')}    {state.tokens_released} released"
            f"   jobs {state.jobs_done} done, {state.jobs_queued} open, {state.jobs_active} in the batch",
        ),
        _row("mode", f"{state.mode or '--'}   worker {state.worker or '--'}"
             f"   board {_or(state.board_c, '.1f')} degC{restarts}"),
        _row(
            "flips",
            f"{state.flips_injected} injected of {state.flips_planned}   ",
            Text(
                f"{state.flips_detected} detected   {state.flips_repaired} repaired",
                "green" if all_in else "yellow",
            ),
            Text(f"   {state.last_strike}", "bright_black"),
        ),
        _row("downlink", f"{backlog} records waiting, {state.archived} archived   ", Text(*link)),
    ]  # fmt: skip


def render(state: LiveState, width: int, height: int) -> Group:
    """Draw the state on a screen of `width` by `height` characters."""
    meter = max(12, width - _LABEL - 48)
    light, contacts = orbit_bar(state, width)
    lines = [
        _header(state, width),
        _rule("orbit", width),
        light,
        contacts,
        _rule("power", width),
        *_power(state, meter),
        _rule("service", width),
        *_service(state, meter),
    ]
    room = max(4, height - len(lines) - 2)
    text_lines = max(2, min(6, room // 2))
    lines.append(_rule(f"committed text of {state.job}" if state.job else "committed text", width))
    flat = " ".join(state.text.split())
    wrapped = textwrap.wrap(flat, width) if cell_len(flat) == len(flat) else [flat[-width // 2 :]]
    shown = wrapped[-text_lines:]
    lines += [Text(line, "italic", no_wrap=True) for line in [*shown, *[""] * (text_lines - len(shown))]]
    lines.append(_rule("events", width))
    for t_s, severity, what in list(state.events)[-max(1, height - len(lines)) :]:
        style = _SEVERITY_STYLE.get(severity, "")
        lines.append(_row(clock(t_s), Text(what.replace("\n", " "), style)))
    return Group(*lines[:height])


def log_line(state: LiveState) -> str:
    """Return the state as one line for a log."""
    contact = f"contact {state.station}" if state.in_contact else "no contact"
    sunlit = state.sunlit
    light = "--" if sunlit is None else "umbra" if sunlit <= 0 else "penumbra" if sunlit < 1 else "sun"
    flips = f"{state.flips_injected} injected {state.flips_detected} detected {state.flips_repaired} repaired"
    return (
        f"T+{clock(state.t_s)} {state.phase}: {light}, soc {_percent(state.soc, '.1f')} %, "
        f"{_or(state.load_w, '.2f')} W of {_or(state.ceiling_w, '.2f')} W, {state.mode or '--'}, "
        f"{_or(state.token_rate_hz, '.1f')} tok/s, {state.tokens_released} tokens, "
        f"flips {flips}, backlog {'--' if state.backlog is None else state.backlog}, {contact}"
    )


def can_draw(console: Console) -> bool:
    """Return True when the terminal can show the live view, and has the letters it is drawn with."""
    able = console.is_terminal and not console.is_dumb_terminal and console.width >= MIN_WIDTH
    return able and console.encoding.startswith("utf")


class LiveView:
    """Shows a `LiveState` until cancelled.

    Parameters
    ----------
    state
        Kept up to date by the flight.
    console
        Where to draw.
    live
        False for log lines; they are used anyway where the terminal cannot draw.
    """

    def __init__(self, state: LiveState, console: Console, *, live: bool) -> None:
        self._state = state
        self._console = console
        self.live = live and can_draw(console)
        self._shown = 0

    async def run(self) -> None:
        """Draw, or log, until cancelled; the terminal is left as it was found.

        Whatever fails in here ends the view, not the flight it shows.
        """
        try:
            await (self._draw() if self.live else self._log())
        except (Exception, SystemExit) as error:  # rich ends the process when a pipe is closed
            _log.warning("the view ended: %s: %s", type(error).__name__, error)

    async def _draw(self) -> None:
        with Live(console=self._console, screen=True, auto_refresh=False, transient=True) as live:
            while True:
                size = self._console.size
                live.update(render(self._state, size.width, max(size.height, MIN_HEIGHT)), refresh=True)
                await asyncio.sleep(1 / FRAMES_PER_S)

    async def _log(self) -> None:
        logged_s = 0.0
        seen: tuple[float, int, str] | None = None
        while True:
            events = list(self._state.events)
            fresh = events
            if seen is not None:
                known = [i for i, event in enumerate(events) if event is seen]
                fresh = events[known[-1] + 1 :] if known else events
            for t_s, _, what in fresh:
                self._say(f"T+{clock(t_s)} {what}")
            seen = events[-1] if events else None
            if time.monotonic() - logged_s >= LOG_EVERY_S:
                logged_s = time.monotonic()
                self._say(log_line(self._state))
            await asyncio.sleep(0.5)

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
