"""Whether somebody is expected at the far end of the space link, from what the bus says of contacts."""

from __future__ import annotations

from telemetry.bus import BusContact

LEAD_NS = 5_000_000_000
"""Mission time by which a window is expected early: orbits are known to a second or two (assumed)."""
FRESH_S = 15.0
"""Physical time for which the bus is believed to be still right about being out of contact, s (assumed)."""


def is_expected(contact: BusContact | None, heard_s: float, now_ns: int, now_s: float) -> bool:
    """Tell whether a contact is to be expected now.

    Where the bus says nothing, or has fallen silent, one may come at any time.

    Parameters
    ----------
    contact
        What the bus said last, at `heard_s` of the monotonic clock; None if it never did.
    now_ns
        Mission time, UTC ns.
    now_s
        Monotonic clock, s.
    """
    if contact is None or now_s - heard_s > FRESH_S or contact.in_contact:
        return True
    windows = [(span.start_ns, span.end_ns) for span in contact.windows]
    if contact.next_start_ns is not None:
        windows.append((contact.next_start_ns, contact.next_end_ns or contact.next_start_ns))
    return any(start - LEAD_NS <= now_ns <= end for start, end in windows)
