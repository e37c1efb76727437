"""Slots by command: what is refused, and that nothing it meets on the disk ends the node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from node.image_slots import ImageSlots, SwitchError


class Config:
    """The sections that are read."""

    class model:
        images_dir = ""
        slot = "active"

    class fdir:
        repair_timeout_s = 5.0


def slots(images: Path, pinned: str = "active") -> ImageSlots:
    config: Any = Config()
    config.model.images_dir, config.model.slot = str(images), pinned
    nobody: Any = None
    return ImageSlots(config, "a", worker=nobody, database=nobody)


async def refused(of: ImageSlots, images: Path) -> dict[str, str]:
    """Return the codes by which each thing that can be asked is refused."""
    codes = {}
    for name, asked in (
        ("install", lambda: of.install(images / "x.tar")),
        ("switch", lambda: of.switch("a")),
    ):
        with pytest.raises(SwitchError) as caught:
            await asked()
        codes[name] = caught.value.code.value
    with pytest.raises(SwitchError) as caught:
        _ = of.before
    return {**codes, "before": caught.value.code.value}


async def test_a_damaged_file_of_the_active_slot_fails_the_command_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "active").write_bytes(b"\xff\x00")
    assert await refused(slots(tmp_path), tmp_path) == dict.fromkeys(
        ("install", "switch", "before"), "slot_unknown"
    )


async def test_what_cannot_be_done_now_is_told(tmp_path: Path) -> None:
    (tmp_path / "active").write_text("b\na\n", encoding="ascii")
    with pytest.raises(SwitchError, match="`switch_image` a first") as caught:
        await slots(tmp_path).install(tmp_path / "x.tar")
    assert caught.value.code == "slot_active"
    (tmp_path / "active").unlink()
    with pytest.raises(SwitchError, match="runs from slot a already") as caught:
        await slots(tmp_path).switch("a")
    assert caught.value.code == "slot_in_use"
    with pytest.raises(SwitchError, match="never switched"):
        _ = slots(tmp_path).before
    with pytest.raises(SwitchError, match=r"\[model\] slot = 'a'") as caught:
        await slots(tmp_path, "a").switch("b")
    assert caught.value.code == "slot_pinned"
