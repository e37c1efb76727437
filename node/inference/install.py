"""Put an uplinked image into a slot, or make a slot the active one; in a process of its own.

    python -m node.inference.install --images DIR --slot b --archive FILE
    python -m node.inference.install --images DIR --slot b

It writes one JSON object to stdout, see `node.image_process`; `node.image_slots` starts it. A slot is
replaced as a whole, once every byte of the new image is proven and on the disk: an interruption leaves the
old one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from node.image_slots import Installed
from node.inference import manifest as m
from node.inference.image import verify_image
from node.inference.image_process_main import answer
from node.inference.image_tar import unpack_image
from node.inference.slot_files import exclusive, flush, new_slot
from node.inference.slots import switch_slot
from telemetry.errors import PenumbraError


def install(images: Path, slot: m.Slot, archive: Path) -> Installed:
    """Replace a slot by the image in an archive, once it is proven whole and built for this machine.

    Raises
    ------
    PenumbraError
        It is no image, damaged, or for another machine; or there is no room. The slot is as it was.
    """
    with exclusive(images), new_slot(images / slot) as work:
        unpack_image(archive, work)
        try:
            manifest = verify_image(work)
        except PenumbraError as error:
            told = error.what.replace(f"{work}/", "")
            raise PenumbraError(
                f"the uplinked image: {told}", "build it for the machine that flies"
            ) from None
        flush(work)
    return Installed(slot=slot, image_id=m.image_id(manifest), model=manifest.model)


def switch(images: Path, slot: m.Slot) -> Installed:
    """Make a slot the active one, once its image is proven. Raises `PenumbraError`, with nothing changed."""
    switch_slot(images, slot)
    manifest = m.load_manifest(images / slot)
    return Installed(slot=slot, image_id=m.image_id(manifest), model=manifest.model)


def main(argv: list[str] | None = None) -> int:
    """Run; return the exit code."""
    parser = argparse.ArgumentParser(prog="penumbra-install", description="Fill or switch an image slot.")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--slot", choices=m.SLOTS, required=True)
    parser.add_argument("--archive", type=Path, help="tar to fill the slot from; without: make it active")
    parser.add_argument("--parent", type=int, help="end when this process does")
    args = parser.parse_args(argv)
    return answer(
        lambda: (
            switch(args.images, args.slot)
            if args.archive is None
            else install(args.images, args.slot, args.archive)
        ),
        args.parent,
    )


if __name__ == "__main__":
    sys.exit(main())
