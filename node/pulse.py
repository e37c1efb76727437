"""A task's end of its health pings: answered on its own turn, so an answer proves that the task itself lives.

A ping that were answered by a callback of the event loop would prove only that the loop lives
(`node.loop_lag` tells that). Each service holds a `Pulse`, and calls `beat` once a turn of its loop.
"""

from __future__ import annotations

from collections.abc import Callable


class Pulse:
    """Holds a ping until the task answers it.

    Parameters
    ----------
    name
        Of the task.
    wake
        Called when a ping came, for a task that waits for something else meanwhile. Must not block.
    """

    def __init__(self, name: str, wake: Callable[[], None] = lambda: None) -> None:
        self.name = name
        self.on_answer: Callable[[str, int], None] = lambda _name, _key: None
        """Called with name and key in the task's own turn."""
        self._wake = wake
        self._key: int | None = None

    def ask(self, key: int) -> None:
        """Take a ping; a later one takes the place of one not answered."""
        self._key = key
        self._wake()

    def beat(self) -> None:
        """Answer the ping that waits, if one does. Called by the task, once a turn."""
        if self._key is not None:
            key, self._key = self._key, None
            self.on_answer(self.name, key)
