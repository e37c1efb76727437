"""The live view: says what the state says, on any terminal, and falls back to lines where there is none."""

from __future__ import annotations

import asyncio
import io
import sys

import pytest
from rich.console import Console

from hil.live import LiveState, LiveView, bar, clock, log_line, orbit_bar, render, sparkline
from hil.record import Window


def state() -> LiveState:
    s = LiveState(scenario="default", speed=60, phase="flying", t_s=2800.0, duration_s=5600.0)
    s.profile = [1.0] * 40 + [0.5] + [0.0] * 39 + [1.0] * 20
    s.contacts = [
        Window(start_s=140.0, end_s=700.0, name="Svalbard"),
        Window(start_s=4200, end_s=4800, name="Troll"),
    ]
    s.soc, s.soc_floor, s.battery_w = 0.71, 0.6, -4.2
    s.load_w, s.ceiling_w, s.board_max_w, s.duty = 5.25, 7.5, 12.0, 0.6
    s.mode, s.worker, s.board_c = "eclipse", "running", 31.5
    s.token_rate_hz, s.tokens_released = 42.3, 1234
    s.rates.extend([1.0, 40.0, 80.0])
    s.flips_planned, s.flips_injected, s.flips_detected, s.flips_repaired = 60, 9, 8, 7
    s.last_strike, s.backlog, s.archived = "head page 77: 212 ms", 55, 999
    s.jobs_done, s.jobs_queued, s.text = 3, 5, "the last committed words"
    s.note("worker restarted", 3)
    return s


def draw(s: LiveState, width: int = 80, height: int = 24) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(render(s, width, height))
    return capture.get().splitlines()


@pytest.mark.parametrize(("width", "height"), [(60, 20), (80, 24), (132, 50), (200, 60)])
def test_every_figure_is_on_every_screen_and_nothing_overflows(width: int, height: int) -> None:
    lines = draw(state(), width, height)
    screen = "\n".join(lines)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    always = "default|T+0:46:40|71.0 %|5.25 W|eclipse|9 injected|8 detected|7 repaired|55 records waiting"
    for part in [*always.split("|"), "the last committed words", "worker restarted", "42.3", "umbra"]:
        assert part in screen, part
    if width >= 80:
        for part in (
            "floor 60 %",
            "discharging 4.2 W",
            "ceiling 7.50 W",
            "Troll in 0:23:20",
            "1234 released",
        ):
            assert part in screen, part


def test_unknown_values_are_shown_as_unknown() -> None:
    screen = "\n".join(draw(LiveState()))
    assert "--" in screen
    assert "None" not in screen


def test_contact_in_progress_names_the_station() -> None:
    s = state()
    s.in_contact, s.station = True, "Svalbard"
    assert "in contact with Svalbard" in "\n".join(draw(s))
    s.in_contact, s.contacts = False, []
    assert "none to come" in "\n".join(draw(s))


def test_orbit_bar_shows_shadow_place_and_contacts() -> None:
    light, contacts = orbit_bar(state(), 100)
    assert len(light) == len(contacts) == 100
    assert light.plain[50] == "◆"
    assert light.plain[45] == "█"
    assert light.plain[40] == "▒"
    assert light.plain[10] == "━"
    assert contacts.plain[3] == "▔"
    assert "Svalbard" in contacts.plain
    crowded = state()
    crowded.contacts = [
        Window(start_s=0.0, end_s=1000.0, name="Santiago"),
        Window(start_s=1100.0, end_s=2000.0, name="Kourou"),
    ]
    marks = orbit_bar(crowded, 100)[1].plain
    assert "Kourou" in marks
    assert "Sant" not in marks  # no room before the next contact
    at_the_end = state()
    at_the_end.t_s = at_the_end.duration_s * 2
    assert orbit_bar(at_the_end, 100)[0].plain[99] == "◆"


@pytest.mark.parametrize("share", [-1.0, 0.0, 0.37, 1.0, 9.0])
def test_bar_has_its_width_and_its_mark(share: float) -> None:
    drawn = bar(20, share, 0.5, "green")
    assert len(drawn) == 20
    assert drawn.plain[10] == "┃"
    assert drawn.plain.count("━") == min(max(round(share * 20), 0), 20) - (share * 20 > 10)


def test_sparkline_spans_its_range() -> None:
    assert sparkline([0.0, 50.0, 100.0, 900.0], 4, 100.0) == "▁▅██"
    assert sparkline([1.0] * 50, 8, 1.0) == "█" * 8
    assert sparkline([], 8, 0.0) == ""


def test_clock() -> None:
    assert [clock(t) for t in (-5, 0, 59.9, 3661, 90000)] == [
        "0:00:00",
        "0:00:00",
        "0:00:59",
        "1:01:01",
        "25:00:00",
    ]


def test_log_line_says_the_same() -> None:
    line = log_line(state())
    for part in (
        "T+0:46:40",
        "umbra",
        "soc 71.0 %",
        "5.25 W of 7.50 W",
        "9 injected 8 detected 7 repaired",
        "backlog 55",
    ):
        assert part in line
    assert "\n" not in line
    assert "--" in log_line(LiveState())


async def run_briefly(view: LiveView, seconds: float) -> None:
    running = asyncio.create_task(view.run())
    await asyncio.sleep(seconds)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_without_a_terminal_it_logs_each_event_once() -> None:
    out = io.StringIO()
    s = state()
    view = LiveView(s, Console(file=out, width=80), live=True)
    assert not view.live
    running = asyncio.create_task(run_briefly(view, 1.3))
    await asyncio.sleep(0.2)
    s.note("second event")
    await running
    text = out.getvalue()
    assert text.count("worker restarted") == 1
    assert text.count("second event") == 1
    assert "soc 71.0 %" in text
    assert "\x1b" not in text


async def test_on_a_terminal_it_draws_and_leaves_the_screen_as_it_was() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, height=24, _environ={"TERM": "xterm-256color"})
    view = LiveView(state(), console, live=True)
    assert view.live
    await run_briefly(view, 0.4)
    assert out.getvalue().startswith("\x1b[?1049h")
    assert "\x1b[?1049l" in out.getvalue()
    assert not LiveView(state(), console, live=False).live


def test_a_narrow_or_dumb_terminal_gets_lines() -> None:
    narrow = Console(file=io.StringIO(), force_terminal=True, width=40)
    dumb = Console(file=io.StringIO(), force_terminal=True, width=80, _environ={"TERM": "dumb"})
    assert not LiveView(LiveState(), narrow, live=True).live
    assert not LiveView(LiveState(), dumb, live=True).live


def test_a_terminal_without_the_letters_gets_lines() -> None:
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=plain, force_terminal=True, width=80, _environ={"TERM": "xterm-256color"})
    assert not LiveView(LiveState(), console, live=True).live


class Gone(io.StringIO):
    """An output whose reader went away."""

    def write(self, _text: str, /) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("terminal", [True, False])
async def test_an_error_of_the_view_ends_the_view_alone(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Console, "on_broken_pipe", lambda _: sys.exit(1))  # as rich does, but for `dup2`
    environment = {"TERM": "xterm-256color"}
    console = Console(file=Gone(), force_terminal=terminal, width=80, height=24, _environ=environment)
    view = LiveView(state(), console, live=True)
    assert view.live == terminal
    await asyncio.wait_for(view.run(), 30)
    assert "the view ended" in caplog.text
