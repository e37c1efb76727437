"""The report: one file that needs nothing else, with every section, whatever a flight was like."""

from __future__ import annotations

import html.parser
from pathlib import Path

import pytest

from hil.faults import Fate, Target
from hil.record import FlightRecord, Happening
from hil.report import render, write_report
from hil.report_plots import fault_figure, orbit_figure, token_rate
from hil.verdict import summarize
from telemetry.errors import PenumbraError
from tests.flight_records import fate, fates, job, ledger, record

SECTIONS = (
    "Verdict", "The orbit", "Power: the plan and its reasons", "Bit flips, from strike to repair",
    "Texts", "Telemetry ledger", "Events",
    "Constants of the scenario", "What flew",
)  # fmt: skip


class Page(html.parser.HTMLParser):
    """Collects headings and everything that could make a browser ask for something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.scripts = 0
        self._in_heading = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_heading = tag == "h2"
        self.scripts += tag == "script"
        if tag in {"link", "iframe", "img", "object", "embed"}:
            self.references.append(tag)
        for name, value in attrs:
            if name in {"href", "src", "xlink:href", "data", "srcset"} and not (value or "").startswith("#"):
                self.references.append(f"{tag} {name}={value}")
            if name == "id" and value:
                self.ids.append(value)

    def handle_data(self, data: str) -> None:
        if self._in_heading:
            self.headings.append(data)
            self._in_heading = False


def page(rec: FlightRecord) -> tuple[str, Page]:
    text = render(rec, summarize(rec))
    return text, Page(text)


def test_every_section_and_nothing_from_outside() -> None:
    text, parsed = page(record())
    assert tuple(parsed.headings) == SECTIONS
    assert parsed.references == []
    assert parsed.scripts == 0
    assert "@import" not in text
    assert "url(http" not in text
    assert text.count("<svg") == text.count("</svg>") == 2
    assert len(parsed.ids) == len(set(parsed.ids))  # two figures on one page share no id


def test_every_check_flip_stream_and_constant_is_in_it() -> None:
    rec = record()
    text, _ = page(rec)
    for check in summarize(rec).verdict:
        assert check.name in text
    for each in rec.fates:
        assert f">{each.strike.page}<" in text
    for stream in rec.ledger.streams:
        assert f"<td>{stream.stream.value}</td>" in text
    for constant in rec.constants:
        assert constant.name in text
        assert constant.tag in text
    for key, value in rec.manifest.items():
        assert key in text
        assert value in text
    assert "Svalbard" in text
    assert "1,200,000 flips were planned" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ">PASS</div>"),
        ({"ledger": ledger(lost=1, problems=["boot 1 hk: 1 lost"])}, ">FAIL</div>"),
        ({"overhead": None}, ">INCONCLUSIVE</div>"),
        ({"fates": []}, "No flip landed"),
        ({"jobs": []}, "No text came down"),
        ({"interrupted": True}, "interrupted"),
        ({"flips_not_injected": 3}, "3 flips of the list found nothing to strike"),
        ({"acceleration": None}, "2 constants"),
        ({"jobs": [job(reference=[1], reference_text=b"")]}, "DIFFERS"),
        ({"jobs": [job(f"job-{n}") for n in range(9)]}, "3 more"),
        ({"plant": [], "housekeeping": [], "umbrae": [], "contacts": [], "flown_s": 0.0}, "The orbit"),
        ({"fates": [fate(1, fate=Fate.MASKED, detect_ms=None, repair_ms=None)]}, "masked"),
        ({"fates": [fate(1, fate=Fate.MISSED, detect_ms=None, repair_ms=None)]}, 'class="fail">missed'),
        ({"process_faults": [Happening(t_s=9, source="bench", name="kill_node", text="")]}, "kill_node"),
    ],
)
def test_every_kind_of_flight_can_be_reported(changes: dict[str, object], words: str) -> None:
    text, parsed = page(record(**changes))
    assert words in text
    assert tuple(parsed.headings) == SECTIONS


def test_text_of_the_model_cannot_break_out() -> None:
    hostile = b"</td><script>alert(1)</script>"
    text, parsed = page(record(jobs=[job(text=hostile, prompt="<b>&", reference_text=hostile)]))
    assert parsed.scripts == 0
    assert "&lt;script&gt;" in text


def test_numbers_keep_their_zeros() -> None:
    text, _ = page(record(fates=[fate(0, repair_ms=970.0), fate(1, repair_ms=100.0)]))
    assert "100 / 970 ms" in text


def test_token_rate_is_of_physical_time_and_smooth() -> None:
    # 12 tokens every 12 s of mission time at x60: 60 tokens a physical second, at the ends as well.
    times, rates = token_rate(record())
    assert len(times) == len(rates) == len(record().housekeeping)
    assert all(rate == pytest.approx(60.0) for rate in rates)
    assert token_rate(record(housekeeping=record().housekeeping[:1])) == ([0.0], [0.0])


def test_figures_stand_alone() -> None:
    for svg in (orbit_figure(record()), fault_figure(record())):
        assert svg.startswith("<svg")
        assert "<metadata>" not in svg
        assert "viewBox" in svg


def test_faults_of_one_region_only() -> None:
    assert fault_figure(record(fates=[f for f in fates() if f.strike.target is Target.WEIGHTS]))


def test_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, record(), summarize(record()))
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(PenumbraError, match="cannot be written"):
        write_report(tmp_path / "none" / "report.html", record(), summarize(record()))
