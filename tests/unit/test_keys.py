"""Key files: private or refused, checked field by field, and no secret ever shown."""

from __future__ import annotations

import hashlib
import hmac
import os
import shlex
import stat
from pathlib import Path

import pytest

from telemetry.errors import PenumbraError
from telemetry.keys import MIN_SECRET_BYTES, Domain, Key, KeyRing, KeyState, generate_key_file

SECRET = "ab" * 32


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_generated_file_loads_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    old = os.umask(0)
    try:
        generate_key_file(path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = KeyRing.load(path).signing_key()
    assert key.id == "ground-1"
    assert len(key.secret) == MIN_SECRET_BYTES
    generate_key_file(tmp_path / "other.toml")
    assert KeyRing.load(tmp_path / "other.toml").signing_key().secret != key.secret


def test_a_key_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    generate_key_file(path)
    before = path.read_bytes()
    with pytest.raises(PenumbraError, match="exists already"):
        generate_key_file(path)
    assert path.read_bytes() == before


def test_generating_in_a_missing_directory_or_with_a_bad_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PenumbraError, match="No such file"):
        generate_key_file(tmp_path / "no" / "keys.toml")
    with pytest.raises(PenumbraError, match="is not allowed"):
        generate_key_file(tmp_path / "keys.toml", 'a"b')


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602, 0o644])
def test_a_file_others_can_touch_is_refused(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "k.toml", f'[[key]]\nid = "a"\nsecret = "{SECRET}"\n', mode)
    with pytest.raises(PenumbraError, match="0600 is needed") as caught:
        KeyRing.load(path)
    assert "chmod 600" in caught.value.mend


def test_the_command_that_is_suggested_names_the_file_to_a_shell(tmp_path: Path) -> None:
    path = tmp_path / "my $keys & 'others'.toml"
    path.touch(0o644)
    with pytest.raises(PenumbraError) as caught:
        KeyRing.load(path)
    assert shlex.split(caught.value.mend) == ["chmod", "600", str(path)]


def test_active_and_retired_keys(tmp_path: Path) -> None:
    text = f'[[key]]\nid="old"\nsecret="{SECRET}"\nstate="retired"\n[[key]]\nid="new"\nsecret="{"cd" * 40}"\n'
    ring = KeyRing.load(write(tmp_path / "k.toml", text))
    old = ring.get("old")
    assert old is not None
    assert old.state is KeyState.RETIRED
    assert ring.signing_key().id == "new"
    assert ring.get("none") is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "key"),
        ("key = []", "key"),
        ("[[key]", "key file"),
        ('[[key]]\nid = "a"\n', "secret"),
        (f'[[key]]\nid = "a"\nsecret = "{SECRET}"\nstat = "active"\n', "stat"),
        (f'[[key]]\nid = "a"\nsecret = "{SECRET}"\nstate = "lost"\n', "lost"),
        (f'[[key]]\nid = "a b"\nsecret = "{SECRET}"\n', "not allowed"),
        (f'[[key]]\nid = "a"\nsecret = "{SECRET[:-2]}"\n', "31 bytes"),
        (f'[[key]]\nid = "a"\nsecret = "{SECRET}"\nstate = "retired"\n', "no key for commands is active"),
        (f'[[key]]\nid = "a"\nsecret = "{SECRET}"\n' * 2, "twice"),
        (f'[[key]]\nid = "a"\nsecret = "x{SECRET}"\n', "secret"),
    ],
)
def test_a_wrong_file_is_refused_without_showing_a_secret(tmp_path: Path, text: str, why: str) -> None:
    path = write(tmp_path / "k.toml", text)
    with pytest.raises(PenumbraError, match=why) as caught:
        KeyRing.load(path)
    assert str(path) in str(caught.value)
    assert "abab" not in str(caught.value)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PenumbraError, match="No such file"):
        KeyRing.load(tmp_path / "none.toml")
    path = tmp_path / "k.toml"
    path.write_bytes(b"\xff\xfe")
    path.chmod(0o600)
    with pytest.raises(PenumbraError, match="UTF-8"):
        KeyRing.load(path)


def test_no_secret_in_repr() -> None:
    key = Key("a", b"topsecret" * 4)
    for shown in (repr(key), str(key), repr(KeyRing([key])), f"{key}"):
        assert "topsecret" not in shown
        assert "'a'" in shown


def test_a_ring_without_an_active_key_cannot_sign() -> None:
    with pytest.raises(ValueError, match="no key"):
        KeyRing([Key("a", b"x" * 32, KeyState.RETIRED)]).signing_key()
    with pytest.raises(ValueError, match="twice"):
        KeyRing([Key("a", b"x" * 32), Key("a", b"y" * 32)])


def test_the_mac_is_hmac_sha256_over_domain_zero_and_message() -> None:
    key = Key("a", b"k" * 32)
    for domain in Domain:
        expected = hmac.new(b"k" * 32, domain.value.encode() + b"\x00body", hashlib.sha256).digest()
        assert key.mac(domain, b"body") == expected
        assert key.verify(domain, b"body", expected)
        assert not key.verify(domain, b"body", expected[:-1])
    assert key.mac(Domain.ACK, b"body") != key.mac(Domain.COMMAND, b"body")


@pytest.mark.parametrize("copy", range(3))
def test_a_struck_copy_of_a_secret_is_outvoted_and_written_anew(copy: int) -> None:
    ring = KeyRing([Key("a", b"k" * 32)])
    key = ring.signing_key()
    right = key.mac(Domain.COMMAND, b"x")
    key._copies[copy][7] ^= 16
    assert key.mac(Domain.COMMAND, b"x") == right
    assert ring.repairs == 1
    assert key._copies[0] == key._copies[1] == key._copies[2]
    assert key.verify(Domain.COMMAND, b"x", right)
    assert ring.repairs == 1


def test_with_a_secret_beyond_a_vote_nothing_is_authentic() -> None:
    key = Key("a", b"k" * 32)
    right = key.mac(Domain.COMMAND, b"x")
    for copy in key._copies:
        copy[7] ^= 16
    assert not key.verify(Domain.COMMAND, b"x", right)
