"""Level 3 on a tiny model: pages, files, slots; what is damaged where, and what then runs."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fdir.golden import PAGE_SIZE
from node import image_process
from node.image_repair import ImageRepair, refill_slot, repair_image
from node.inference import mending
from node.inference.image import verify_image
from node.inference.manifest import DIGESTS, FILES, MANIFEST, PARITY, TOKENIZER, TRUNK, WEIGHTS, load_manifest
from node.inference.mending import refill, repair_slots
from node.inference.slots import ACTIVE, active_slot, switch_slot
from telemetry.errors import PenumbraError


@pytest.fixture
def images(tiny_images: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_images, tmp_path / "images"))


def strike(path: Path, *offsets: int) -> None:
    with path.open("r+b") as file:
        for offset in offsets:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 0x20]))
        file.flush()
        os.fsync(file.fileno())


def group(images: Path, count: int, slot: str = "a") -> list[int]:
    """Return so many pages of the first parity group."""
    pages = load_manifest(images / slot).weight_pages
    return list(range(0, pages, -(-pages // 16)))[:count]


def strike_pages(images: Path, slot: str, pages: list[int], name: str = WEIGHTS) -> None:
    strike(images / slot / name, *(page * PAGE_SIZE + 5 for page in pages))


def no_build(*_: object, **__: object) -> None:
    raise PenumbraError("no model file")


@pytest.fixture
def unbuildable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mending, "_rebuild", no_build)


def test_a_whole_slot_is_left_alone(images, unbuildable):
    before = {path: path.stat().st_mtime_ns for path in (images / "a").iterdir()}
    done = repair_slots(images, "a", None)
    assert (done.method, done.slot, done.files, done.notes) == ("whole", "a", (), ())
    assert {path: path.stat().st_mtime_ns for path in (images / "a").iterdir()} == before


def test_pages_come_from_parity_as_far_as_it_goes(images, unbuildable):
    shutil.rmtree(images / "b")
    strike_pages(images, "a", group(images, 2))
    done = repair_slots(images, "a", None)
    assert (done.method, done.pages_from_parity, done.pages_from_other_slot) == ("page_copy", 2, 0)
    verify_image(images / "a")


def test_more_pages_come_from_the_other_slot(images, unbuildable):
    pages = group(images, 5)
    strike_pages(images, "a", pages)
    done = repair_slots(images, "a", None)
    assert done.method == "page_copy"
    assert done.pages_from_other_slot == 5
    verify_image(images / "a")
    assert active_slot(images) == "a"


def test_pages_both_slots_lost_come_from_parity_once_the_others_are_back(images, unbuildable):
    pages = group(images, 5)
    strike_pages(images, "a", pages)
    strike_pages(images, "b", pages[:2])
    strike_pages(images, "b", [0], PARITY)
    done = repair_slots(images, "a", None)
    assert (done.pages_from_other_slot, done.pages_from_parity) == (3, 2)
    verify_image(images / "a")


@pytest.mark.parametrize("with_other", [True, False])
def test_parity_is_made_whole_too(images, unbuildable, with_other):
    if not with_other:
        shutil.rmtree(images / "b")
    manifest = load_manifest(images / "a")
    strike_pages(images, "a", [0, manifest.parity_pages - 1], PARITY)
    done = repair_slots(images, "a", None)
    assert (done.method, done.parity_pages) == ("page_copy", 2)
    verify_image(images / "a")


@pytest.mark.parametrize("name", [MANIFEST, DIGESTS, TRUNK, TOKENIZER])
@pytest.mark.parametrize("harm", ["struck", "cut", "gone"])
def test_files_come_from_the_other_slot(images, unbuildable, name, harm):
    path = images / "a" / name
    if harm == "struck":
        strike(path, path.stat().st_size // 2)
    elif harm == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    done = repair_slots(images, "a", None)
    assert (done.method, done.files) == ("page_copy", (name,))
    verify_image(images / "a")


@pytest.mark.parametrize("name", [WEIGHTS, PARITY])
@pytest.mark.parametrize("harm", ["cut", "long", "gone"])
def test_a_paged_file_of_another_length_is_made_whole(images, unbuildable, name, harm):
    path = images / "a" / name
    if harm == "gone":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size + (4097 if harm == "long" else -4097))
    done = repair_slots(images, "a", None)
    assert done.method == ("whole" if harm == "long" else "page_copy")
    verify_image(images / "a")


def test_a_slot_that_is_gone_is_filled_from_the_other(images, unbuildable):
    shutil.rmtree(images / "a")
    done = repair_slots(images, "a", None)
    assert (done.method, done.slot) == ("page_copy", "a")
    assert {*done.files} == {*FILES} - {WEIGHTS, PARITY}
    verify_image(images / "a")


def test_a_slot_whose_replacement_was_interrupted_comes_back(images, unbuildable):
    (images / "a").rename(images / ".a.old")
    shutil.rmtree(images / "b")
    assert repair_slots(images, "a", None).method == "whole"
    verify_image(images / "a")


def another_model(images: Path, slot: str, tmp_path: Path) -> None:
    """Put an image of other contents in a slot."""
    from tiny_gemma import write_tiny_gguf

    from node.inference.builder import build_image

    build_image(write_tiny_gguf(tmp_path / "other.gguf", seed=8), images, slot, force=True)  # type: ignore[arg-type]


def test_a_slot_of_another_model_gives_no_pages_but_runs_instead(images, tmp_path, unbuildable):
    another_model(images, "b", tmp_path)
    strike_pages(images, "a", group(images, 16))  # some hold the same in both: rotary tables
    done = repair_slots(images, "a", None)
    assert (done.method, done.slot) == ("other_slot", "b")
    assert "are damaged beyond parity, and the other slot does not have them" in done.notes[0]
    assert active_slot(images) == "b"
    with pytest.raises(PenumbraError):
        verify_image(images / "a")


def test_the_other_slot_is_mended_before_it_runs(images, tmp_path, unbuildable):
    another_model(images, "b", tmp_path)
    strike_pages(images, "a", group(images, 16))  # some hold the same in both: rotary tables
    strike_pages(images, "b", group(images, 2, "b"))
    done = repair_slots(images, "a", None)
    assert (done.method, done.pages_from_parity) == ("other_slot", 2)
    verify_image(images / "b")


def ruin(images: Path) -> None:
    pages = group(images, 3)
    for slot in "ab":
        strike_pages(images, slot, pages)


def test_with_both_beyond_repair_the_slot_is_built_from_the_model_file(images, tiny_gguf):
    before = load_manifest(images / "a")
    ruin(images)
    done = repair_slots(images, "a", tiny_gguf)
    assert (done.method, done.slot, len(done.notes)) == ("rebuilt", "a", 2)
    assert verify_image(images / "a") == before
    # ... and the other slot can be filled from it again.
    assert refill(images, "b").pages_from_other_slot == 3
    verify_image(images / "b")


def test_another_model_file_is_not_built_in_place_of_the_one_that_was_flown(images, tmp_path):
    from tiny_gemma import write_tiny_gguf

    ruin(images)
    with pytest.raises(PenumbraError, match=r"other\.gguf: is not the model file the image was built from"):
        repair_slots(images, "a", write_tiny_gguf(tmp_path / "other.gguf", seed=8))


def test_when_nothing_works_every_step_is_named(images, tmp_path):
    ruin(images)
    with pytest.raises(PenumbraError) as caught:
        repair_slots(images, "a", tmp_path / "none.gguf")
    for text in (
        "slot a cannot be mended",
        "slot b cannot be mended",
        "slot a cannot be built anew",
        "none.gguf",
    ):
        assert text in caught.value.what
    assert caught.value.mend


def test_an_image_for_another_machine_is_not_mended(images, unbuildable, monkeypatch):
    monkeypatch.setattr("onnxruntime.__version__", "0.1")
    with pytest.raises(PenumbraError, match=r"slot a cannot be mended.*built for onnxruntime"):
        repair_slots(images, "a", None)


def test_a_damaged_pointer_is_written_anew(images, unbuildable):
    switch_slot(images, "b")
    (images / ACTIVE).write_text("q\n")
    assert repair_slots(images, "b", None).slot == "b"
    assert active_slot(images) == "b"


def test_a_slot_pinned_by_configuration_leaves_the_pointer(images, unbuildable):
    assert repair_slots(images, "b", None).slot == "b"
    assert active_slot(images) == "a"


def test_a_slot_that_cannot_be_mended_is_filled_as_a_copy(images, tmp_path):
    another_model(images, "b", tmp_path)
    strike_pages(images, "b", group(images, 16, "b"))
    assert refill(images, "b").files == FILES
    assert verify_image(images / "b") == load_manifest(images / "a")


def test_a_page_bad_in_the_cache_only_is_written_from_the_disk(images, unbuildable, monkeypatch):
    real = os.pread
    page = 3

    def struck(descriptor: int, length: int, offset: int) -> bytes:
        content = bytearray(real(descriptor, length, offset))
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.endswith(f"a/{WEIGHTS}") and offset <= page * PAGE_SIZE < offset + length and not healed:
            content[page * PAGE_SIZE - offset] ^= 1
        return bytes(content)

    healed: list[bool] = []
    real_write = os.pwrite

    def write(descriptor: int, content: bytes, offset: int) -> int:
        healed.append(True)
        return real_write(descriptor, content, offset)

    monkeypatch.setattr(os, "pread", struck)
    monkeypatch.setattr(os, "pwrite", write)
    done = repair_slots(images, "a", None)
    assert (done.method, done.pages_from_own_file, healed) == ("page_copy", 1, [True])


# The process.


def test_the_supervisor_gets_the_outcome_of_a_process(images):
    strike_pages(images, "a", group(images, 3))
    done = repair_image(images, "a")
    assert (done.method, done.slot, done.pages_from_other_slot) == ("page_copy", "a", 3)
    assert done.took_s > 0
    assert refill_slot(images, "b").method == "whole"


def test_the_supervisor_gets_the_reason_of_a_failure(images, tmp_path):
    ruin(images)
    with pytest.raises(PenumbraError, match="no image can be made whole") as caught:
        repair_image(images, "a", gguf=tmp_path / "none.gguf")
    assert "model build" in caught.value.mend


def test_the_supervisor_does_not_load_the_inference_stack():
    code = (
        "import sys, node.image_repair, node.scrubber;"
        "heavy = ('onnxruntime', 'onnx', 'numpy');"
        "print([name for name in sys.modules if name.split('.')[0] in heavy or"
        " name.startswith('node.inference')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _python(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Have other code run in place of the mending."""
    real = subprocess.Popen

    def start(command: list[str], **kwargs: object) -> subprocess.Popen[bytes]:
        return real([command[0], "-c", code], **kwargs)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(image_process.subprocess, "Popen", start)


def test_a_process_that_crashes_is_told_with_its_last_words(tmp_path, monkeypatch):
    _python(monkeypatch, "import sys; sys.stderr.write('one\\ntwo\\n'); sys.exit(9)")
    with pytest.raises(PenumbraError, match="ended with code 9: two"):
        repair_image(tmp_path, "a")


def test_a_process_that_takes_too_long_is_killed(tmp_path, monkeypatch):
    _python(monkeypatch, "import time; time.sleep(60)")
    with pytest.raises(PenumbraError, match=r"more than 0\.2 s"):
        repair_image(tmp_path, "a", timeout_s=0.2)


def test_a_process_that_is_no_longer_wanted_is_killed(tmp_path, monkeypatch):
    _python(monkeypatch, "import time; time.sleep(60)")
    cancel = threading.Event()
    threading.Timer(0.2, cancel.set).start()
    with pytest.raises(PenumbraError, match="cancelled"):
        repair_image(tmp_path, "a", cancel=cancel)


def _kill_while_writing(images: Path, after_s: float) -> bool:
    """Kill a mending so long after it has written its first file; tell whether it was still running."""
    command = [sys.executable, "-m", "node.inference.mending", "--images", str(images), "--slot", "a"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (images / "a" / DIGESTS).exists() and process.poll() is None:
        time.sleep(0.0005)
    time.sleep(after_s)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return running


def test_killed_at_any_moment_it_leaves_slots_that_the_next_run_makes_whole(images):
    pages = load_manifest(images / "a").weight_pages
    killed = 0
    for moment in range(4):
        shutil.rmtree(images / "a")
        shutil.copytree(images / "b", images / "a")
        strike_pages(images, "a", list(range(0, pages, 2)))
        (images / "a" / DIGESTS).unlink()
        killed += _kill_while_writing(images, 0.003 * moment)
    assert killed
    done = repair_slots(images, "a", None)
    assert isinstance(done, ImageRepair)
    verify_image(images / "a")
    verify_image(images / "b")


@pytest.mark.parametrize("step", range(6))
def test_stopped_between_any_two_writes_a_slot_is_whole_or_found_damaged(
    images, unbuildable, monkeypatch, step
):
    strike_pages(images, "a", group(images, 3))
    strike_pages(images, "a", [1], PARITY)
    (images / "a" / MANIFEST).unlink()
    (images / "a" / TOKENIZER).unlink()
    _stop_at(monkeypatch, step)
    with contextlib.suppress(Stopped):
        repair_slots(images, "a", None)
    monkeypatch.undo()
    with contextlib.suppress(PenumbraError):
        verify_image(images / "a")  # what is not whole is found
    assert mending.mend_slot(images, "a")
    verify_image(images / "a")


class Stopped(BaseException):
    """The process is gone."""


def _stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    left = [step]

    def limited(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **kwargs: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise Stopped
            return real(*arguments, **kwargs)

        return call

    monkeypatch.setattr(os, "pwrite", limited(os.pwrite))
    monkeypatch.setattr(Path, "replace", limited(Path.replace))


def test_it_ends_with_its_parent(images):
    """Its parent is a process that starts it and is killed."""
    code = (
        "import subprocess, sys, os;"
        "p = subprocess.Popen([sys.executable, '-c', 'import time, os;"
        " from node.inference.image_process_main import die_with_parent;"
        ' die_with_parent(int(os.environ["P"])); print(1, flush=True); time.sleep(60)\'],'
        " env=os.environ | {'P': str(os.getpid())}, stdout=subprocess.PIPE);"
        "p.stdout.readline(); print(p.pid, flush=True); import time; time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"
