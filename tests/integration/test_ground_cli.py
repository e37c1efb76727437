"""`penumbra ground` and `penumbra products` as a user runs them, against a node with a scripted worker."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import msgspec
import pytest
from brokers import hardened, needs_mosquitto
from node_bench import NODE, open_bench

from fdir.table import PACKAGED
from hil.certificates import Authority
from telemetry.ground_report import GroundReport, ProductsReport
from telemetry.keys import generate_key_file


async def penumbra(
    directory: Path,
    *arguments: str,
    lines: str | bytes = "",
    environment: dict[str, str] | None = None,
    bound_s: float = 60.0,
) -> tuple[int, str]:
    """Run the command; return its exit code, and what it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hil.cli", *arguments),
        cwd=directory,
        env=environment,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(bound_s):
        said, _ = await process.communicate(lines.encode() if isinstance(lines, str) else lines)
    return process.returncode or 0, said.decode()


async def test_commands_uploads_and_products_from_the_command_line(tmp_path: Path) -> None:
    table = tmp_path / "my table.toml"
    table.write_text(PACKAGED.read_text(encoding="utf-8"), encoding="utf-8")
    async with open_bench(tmp_path) as bench:
        bench.ack = False
        await bench.start()
        station = (
            "ground",
            "--broker",
            bench.url,
            "--node",
            NODE,
            "--keys",
            "keys.toml",
            "--archive",
            "my.db",
        )
        lines = [
            "# a comment, and an empty line", "", "ping", 'dump_memory {"region": "config"}',
            "upload fdir_table 'my table.toml'", 'load_fdir {"source": "uplinked"}', "products dumps",
        ]  # fmt: skip
        code, said = await penumbra(tmp_path, *station, "--json", "ground.json", lines="\n".join(lines))
        assert code == 0, said
        for each in ("ping 1 completed ok", "product dump-1-1 of", "upload_commit", "load_fdir"):
            assert each in said
        told = msgspec.json.decode((tmp_path / "ground.json").read_bytes(), type=GroundReport)
        assert (told.failures, told.archived > 10, told.garbage) == (0, True, 0)
        assert [end.name for end in told.commands][:2] == ["ping", "dump_memory"]
        # Numbers go on where they were, and what is wrong is said and counted.
        wrong = [
            "ping", 'fire retire_key {"key": "nothing"}', "ping {", "sing", "upload image", "products",
            "upload image nowhere",
        ]  # fmt: skip
        code, said = await penumbra(tmp_path, *station, lines="\n".join(wrong))
        assert code == 1
        assert "retire_key" in said
        assert "key_unchanged" in said
        assert "its arguments are no JSON object" in said
        assert "no command 'sing'" in said
        assert "a kind (image, fdir_table) and a path are expected" in said
        assert "nowhere: No such file or directory" in said
        assert "Traceback" not in said
        assert "6 commands failed" in said
        code, said = await penumbra(
            tmp_path, "products", "my.db", "--node", NODE, "--out", "again", "--json", "products.json"
        )
        assert (code, "dump-1-1: config from byte 0" in said, said.count("whole")) == (0, True, 1), said
        report = msgspec.json.decode((tmp_path / "products.json").read_bytes(), type=ProductsReport)
        assert [(one.product, one.state, one.file) for one in report.products] == [
            ("dump-1-1", "whole", "again/dump-1-1.bin")
        ]
        assert (tmp_path / "again" / "dump-1-1.bin").stat().st_size > 100


async def test_what_cannot_be_used_is_one_message(tmp_path: Path) -> None:
    code, said = await penumbra(tmp_path, "ground", "--keys", "none.toml")
    assert (code, "none.toml" in said, "Traceback" in said) == (2, True, False), said
    code, said = await penumbra(tmp_path, "products", "none.db")
    assert (code, said.count("\n")) == (2, 2), said
    (tmp_path / "empty.db").touch()
    code, said = await penumbra(tmp_path, "products", "empty.db", "--out", "none")
    assert (code, "empty.db: it is empty" in said, "Traceback" in said) == (2, True, False), said
    assert _sizes(tmp_path) == {"empty.db": 0}


def _sizes(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in directory.iterdir()}


@pytest.mark.parametrize(
    "locale",
    [{"LC_ALL": "C.UTF-8"}, {"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["utf-8", "c", "ascii"],
)
async def test_lines_that_cannot_be_read_are_refused_and_the_next_go_on(
    tmp_path: Path, locale: dict[str, str]
) -> None:
    deep = b'ping {"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    lines = [b"\xef\xbb\xbfping", b"ping \xff\xfe", b"s\xc3\xbcng", deep, b"fire ping", b"report_ledger"]
    async with open_bench(tmp_path) as bench:
        await bench.start()
        code, said = await penumbra(
            *(tmp_path, "ground", "--broker", bench.url, "--node", NODE, "--keys", "keys.toml"),
            *("--archive", "my.db"),
            lines=b"\n".join(lines),
            environment=os.environ | locale,
        )
    assert code == 1, said
    for each in (
        *("ping 1 completed ok", "not UTF-8", "no command 's", "nested deeper than 32 levels"),
        *("fire ping: not sent", "report_ledger 2 completed ok", "4 commands failed"),
    ):
        assert each in said
    assert "Traceback" not in said


async def test_it_ends_on_interrupt_although_no_line_comes(tmp_path: Path) -> None:
    generate_key_file(tmp_path / "keys.toml")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hil.cli", "ground", "--keys", "keys.toml", "--broker", "mqtt://127.0.0.1:1"),
        cwd=tmp_path,
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    async with asyncio.timeout(30):
        # Nobody listens there: it says so, and goes on trying.
        assert b"no connection to the broker" in await process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130


@needs_mosquitto
async def test_it_speaks_tls_to_the_broker_as_shipped(tmp_path: Path) -> None:
    generate_key_file(tmp_path / "keys.toml")
    (tmp_path / "other").mkdir()
    authority, other = Authority(tmp_path), Authority(tmp_path / "other")
    mine, stranger = authority.issue("ground"), other.issue("ground")
    async with hardened(tmp_path, authority) as broker:
        for files, trusted in ((mine, True), (stranger, False)):
            arguments = (
                *("ground", "--keys", "keys.toml", "--broker", f"mqtts5://127.0.0.1:{broker.port}"),
                *("--tls-ca", str(authority.ca_file), "--tls-certificate", str(files.certificate)),
                *("--tls-key", str(files.key)),
            )
            code, said = await penumbra(tmp_path, *arguments)
            assert code == (0 if trusted else 1), said
            assert ("the broker was never reached" in said) is not trusted, said
