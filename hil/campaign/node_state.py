"""What a component knows, as bytes that can be compared: whether a message has changed it."""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection


def state_of(component: object, *, without: Collection[str] = ()) -> bytes:
    """Return all attributes of a component by value, deep, but for those named; NaN equals NaN."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, pickle.HIGHEST_PROTOCOL)
    # Without a memo: equal values give equal bytes, also where one object was two before.
    pickler.fast = True
    pickler.dump({name: value for name, value in vars(component).items() if name not in without})
    return buffer.getvalue()
