"""Errors a user can cause, and can mend."""

from __future__ import annotations


class PenumbraError(Exception):
    """A fault in what the user gave us: shown as one message, never as a traceback.

    Parameters
    ----------
    what
        What is wrong: names the file, the field, the value, and what is allowed.
    mend
        What to do about it. May be empty where ``what`` says it all.
    """

    exit_code = 2

    def __init__(self, what: str, mend: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.mend = mend

    def __str__(self) -> str:
        return f"{self.what}\n  mend: {self.mend}" if self.mend else self.what
