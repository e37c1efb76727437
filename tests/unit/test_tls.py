"""TLS settings that are wrong are refused with the file and how to mend it."""

from __future__ import annotations

import shlex
import ssl
from pathlib import Path

import pytest

from hil.certificates import Authority
from telemetry.errors import PenumbraError
from telemetry.link import BrokerAddress, tls_context
from telemetry.tls import TlsFiles


def test_no_names_are_no_tls() -> None:
    assert TlsFiles.of("", "", "") is None


@pytest.mark.parametrize("names", [("", "c", "k"), ("a", "c", ""), ("a", "", "k"), ("", "c", "")])
def test_half_of_what_is_needed_is_refused(names: tuple[str, str, str]) -> None:
    with pytest.raises(PenumbraError, match="all three are allowed"):
        TlsFiles.of(*names)


def test_a_context_asks_for_tls_1_2_and_the_name_of_the_broker(tmp_path: Path) -> None:
    context = Authority(tmp_path).issue("ground").context()
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED


def test_files_that_are_wrong_are_named(tmp_path: Path) -> None:
    files = Authority(tmp_path).issue("ground")
    assert files.key is not None
    with pytest.raises(PenumbraError, match=r"tls_ca .*no such file"):
        TlsFiles(tmp_path / "none").context()
    with pytest.raises(PenumbraError, match="tls_ca"):
        TlsFiles(files.key).context()
    with pytest.raises(PenumbraError, match="tls_certificate"):
        TlsFiles(files.ca, files.ca, files.key).context()
    files.key.chmod(0o640)
    named = files.key.rename(tmp_path / "my $key.pem")
    with pytest.raises(PenumbraError, match="mode 0640") as caught:
        TlsFiles(files.ca, files.certificate, named).context()
    assert shlex.split(caught.value.mend) == ["chmod", "600", str(named)]


def test_tls_and_the_url_must_agree(tmp_path: Path) -> None:
    files = TlsFiles(Authority(tmp_path).ca_file)
    assert tls_context(BrokerAddress.parse("mqtt://h"), None) is None
    assert tls_context(BrokerAddress.parse("mqtts5://h"), files) is not None
    with pytest.raises(PenumbraError, match="needs tls_ca"):
        tls_context(BrokerAddress.parse("mqtts://h"), None)
    with pytest.raises(PenumbraError, match="without TLS"):
        tls_context(BrokerAddress.parse("mqtt5://h"), files)


def test_urls_of_tls() -> None:
    assert BrokerAddress.parse("mqtts://h") == BrokerAddress("h", 8883, False, tls=True)
    assert BrokerAddress.parse("mqtts5://h:1") == BrokerAddress("h", 1, True, tls=True)
