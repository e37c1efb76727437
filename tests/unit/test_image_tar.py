"""An image as one file: packed the same way each time, and unpacked with a hostile sender in mind."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import pytest

from node.inference import install as module
from node.inference.image import verify_image
from node.inference.image_tar import pack_image, unpack_image
from node.inference.install import install, main, switch
from node.inference.manifest import FILES, MANIFEST, WEIGHTS, image_id
from node.inference.slots import active_slot
from telemetry.errors import PenumbraError


@pytest.fixture
def images(tiny_images: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_images, tmp_path / "images"))


def write_tar(path: Path, *members: tuple[str, bytes | None]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_an_image_comes_out_as_it_went_in(tiny_image: Path, tmp_path: Path) -> None:
    one, two, out = tmp_path / "1.tar", tmp_path / "2.tar", tmp_path / "out"
    pack_image(tiny_image, one)
    pack_image(tiny_image, two)
    assert one.read_bytes() == two.read_bytes()
    out.mkdir()
    unpack_image(one, out)
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    assert verify_image(out) == verify_image(tiny_image)


@pytest.mark.parametrize(
    "members",
    [
        [("../evil", b"x")],
        [("/etc/evil", b"x")],
        [("sub/manifest.json", b"x")],
        [(MANIFEST, None)],
        [(MANIFEST, b"x"), (MANIFEST, b"y")],
        [("extra", b"x")],
    ],
)
def test_anything_but_the_files_of_an_image_is_refused(
    tmp_path: Path, members: list[tuple[str, bytes | None]]
) -> None:
    out = tmp_path / "in" / "out"
    out.mkdir(parents=True)
    with pytest.raises(PenumbraError, match="the archive holds"):
        unpack_image(write_tar(tmp_path / "x.tar", *members), out)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {"x.tar", MANIFEST}


def test_what_is_no_tar_or_lacks_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.tar").write_bytes(b"\x00\x01" * 600)
    with pytest.raises(PenumbraError, match="no tar"):
        unpack_image(tmp_path / "no.tar", tmp_path)
    with pytest.raises(PenumbraError, match=r"lacks .*weights\.bin"):
        unpack_image(write_tar(tmp_path / "x.tar", (MANIFEST, b"x")), tmp_path)
    with pytest.raises(PenumbraError, match="is not a model image"):
        pack_image(tmp_path / "nothing", tmp_path / "y.tar")


def test_a_sound_image_fills_the_slot_and_a_damaged_one_leaves_it(images: Path, tmp_path: Path) -> None:
    archive = tmp_path / "image.tar"
    pack_image(images / "a", archive)
    (images / "b" / WEIGHTS).write_bytes(b"what was there before")
    done = install(images, "b", archive)
    assert done.image_id == image_id(verify_image(images / "b"))
    before = (images / "b" / WEIGHTS).stat().st_ino
    content = bytearray(archive.read_bytes())
    at = content.index((images / "a" / WEIGHTS).read_bytes()[4096:4160])
    content[at] ^= 1
    archive.write_bytes(content)
    with pytest.raises(PenumbraError, match=r"the uplinked image: weights\.bin: page"):
        install(images, "b", archive)
    assert (images / "b" / WEIGHTS).stat().st_ino == before
    assert sorted(path.name for path in images.iterdir() if path.is_dir()) == ["a", "b"]


def test_a_switch_proves_the_image_first(images: Path) -> None:
    assert switch(images, "b").slot == "b"
    assert active_slot(images) == "b"
    (images / "a" / WEIGHTS).write_bytes(b"struck")
    with pytest.raises(PenumbraError):
        switch(images, "a")
    assert active_slot(images) == "b"


def test_the_process_answers_in_json(
    images: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The descriptor of stdout is turned to stderr for what libraries print.
    monkeypatch.setattr(module, "answer", lambda work, parent: 0 if work().slot == "b" else 1)
    assert main(["--images", str(images), "--slot", "b"]) == 0
    assert capfd.readouterr().out == ""
