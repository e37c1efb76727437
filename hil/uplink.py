"""The uplink: authenticated telecommands, one at a time, until the node verifies each. Pure.

Stop and wait: a command is sent, and sent again unchanged while it goes unanswered, until its `accepted`
verification comes down; only then the next one is issued. A node that takes no more commands in the time is
asked again. The node answers a command it has executed
already with the verification it stored, so a lost answer costs a repeat and nothing else.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from telemetry.authenticator import RejectCode
from telemetry.commands import ActivateKey, Arguments, CommandError, Resync, RetireKey
from telemetry.envelope import encode_command, make_command
from telemetry.keys import KeyRing, KeyState, KeyUse
from telemetry.packets import Stage, Verification

RETRY_S = 1.0
"""Physical time without an answer after which a command is sent again, s (assumed: several round trips)."""
LIFETIME_S = 86_400.0
"""Mission time from issue to expiry of a command, s (assumed: a day, to last over missed contacts)."""


@dataclass(frozen=True)
class Send:
    """Action: publish these bytes on the telecommand topic."""

    payload: bytes
    name: str
    seq: int
    again: bool


@dataclass
class UplinkCounts:
    """Telecommands so far."""

    issued: int = 0
    accepted: int = 0
    refused: int = 0
    """Answered, but not accepted."""
    expired: int = 0
    """Never answered within their lifetime."""
    repeats: int = 0
    """Times a command was sent again."""


@dataclass
class Ticket:
    """A command, from its place in the queue to its completion."""

    arguments: Arguments
    not_sent: str = ""
    """Why it was never sent: the dictionary refuses it; empty otherwise."""
    expired: bool = False
    """True when it was not accepted within its lifetime."""
    reports: list[Verification] = field(default_factory=list)
    """What the node said about it, in order of arrival."""

    @property
    def outcome(self) -> Verification | None:
        """The report that ends it: the completion, or the first stage that failed; None while it goes on."""
        ends = (r for r in self.reports if r.stage is Stage.COMPLETED or not r.ok)
        return next((r for r in ends if r.code != RejectCode.RATE_LIMITED), None)


@dataclass(frozen=True)
class _Outstanding:
    payload: bytes
    ticket: Ticket
    name: str
    key_id: str
    seq: int
    expire_ns: int


class Uplink:
    """Decides what to send and when.

    Parameters
    ----------
    node
        Node the commands are for.
    ring
        Keys; its first active one signs.
    next_seq
        Returns the sequence number for the next command of a key, by its id, never the same twice, also over
        restarts of the ground. By default it counts from 1, in memory.
    sealed
        Whether commands are encrypted.
    """

    def __init__(
        self,
        node: str,
        ring: KeyRing,
        next_seq: Callable[[str], int] | None = None,
        *,
        sealed: bool = False,
    ) -> None:
        self.counts = UplinkCounts()
        self._node = node
        self._ring = ring
        self._next_seq = next_seq if next_seq is not None else _counter()
        self._sealed = sealed
        self._key_changes: dict[tuple[str, int], ActivateKey | RetireKey] = {}
        self._waiting: deque[Ticket] = deque()
        self._tickets: dict[tuple[str, int], Ticket] = {}
        """Of commands that were sent and are not over, by key and number."""
        self._outstanding: _Outstanding | None = None
        self._sent_s: float | None = None

    @property
    def pending(self) -> int:
        """Commands queued or not answered yet."""
        return len(self._waiting) + (self._outstanding is not None)

    def queue(self, commands: Sequence[Arguments]) -> list[Ticket]:
        """Add commands to be sent, in order; return what will tell of each."""
        tickets = [Ticket(arguments) for arguments in commands]
        self._waiting.extend(tickets)
        return tickets

    def tick(self, now_s: float, t_ns: int, *, in_contact: bool) -> list[Send]:
        """Return what to send now.

        Parameters
        ----------
        now_s
            Monotonic clock, s.
        t_ns
            Mission time, UTC ns.
        in_contact
            True in a contact window: nothing is sent outside.

        Raises
        ------
        Exception
            Whatever `next_seq` raises; the command waits, and is numbered at the next call.
        """
        if not in_contact:
            self._sent_s = None  # the next contact begins with a repeat at once
            return []
        out = self._outstanding
        if out is not None and t_ns >= out.expire_ns:
            self.counts.expired += 1
            out.ticket.expired = True
            self._tickets.pop((out.key_id, out.seq), None)
            out = self._outstanding = None
        if out is None:
            out = self._outstanding = self._issue_next(t_ns)
            if out is None:
                return []
            self._sent_s = now_s
            return [Send(out.payload, out.name, out.seq, again=False)]
        if self._sent_s is None or now_s - self._sent_s >= RETRY_S:
            self._sent_s = now_s
            self.counts.repeats += 1
            return [Send(out.payload, out.name, out.seq, again=True)]
        return []

    def on_verification(self, report: Verification) -> bool:
        """Take a verification; return True when it settles the command under way."""
        self._follow_keys(report)
        self._note(report)
        out = self._outstanding
        if (
            out is None
            or report.stage is not Stage.ACCEPTED
            or (report.key_id, report.command_seq) != (out.key_id, out.seq)
            or report.code == RejectCode.RATE_LIMITED
        ):
            return False
        self._outstanding = None
        if report.ok:
            self.counts.accepted += 1
        else:
            self.counts.refused += 1
        return True

    def _note(self, report: Verification) -> None:
        key = (report.key_id, report.command_seq)
        ticket = self._tickets.get(key)
        if ticket is None or report.entry is not None or report in ticket.reports:
            return
        ticket.reports.append(report)
        if ticket.outcome is not None:
            del self._tickets[key]

    def _issue_next(self, t_ns: int) -> _Outstanding | None:
        """Return the next command that the dictionary takes, numbered and signed; None if none waits."""
        while self._waiting:
            ticket = self._waiting[0]
            try:
                out = self._issue(ticket, t_ns)
            except CommandError as error:
                ticket.not_sent = str(error)
                self._waiting.popleft()
                continue
            self._waiting.popleft()
            self._tickets[out.key_id, out.seq] = ticket
            return out
        return None

    def _follow_keys(self, report: Verification) -> None:
        """Use the keys as the node does, once it has carried out a change of them."""
        if report.stage is not Stage.COMPLETED:
            return
        change = self._key_changes.pop((report.key_id, report.command_seq), None)
        key = None if change is None else self._ring.get(change.key)
        if key is not None and report.ok:
            key.state = KeyState.ACTIVE if isinstance(change, ActivateKey) else KeyState.RETIRED

    def _signer(self, arguments: Arguments) -> str:
        """Return the id of the key to sign with: none may retire itself, and one for recovery gives `resync`.

        Raises
        ------
        CommandError
            `resync` without such a key in the ring.
        """
        if isinstance(arguments, Resync):
            recovery = [k.id for k in self._ring if k.use is KeyUse.RECOVERY and k.state is KeyState.ACTIVE]
            if not recovery:
                raise CommandError("resync needs a recovery key, and the station's key file has none")
            return recovery[0]
        leaving = arguments.key if isinstance(arguments, RetireKey) else None
        others = [key.id for key in self._ring.active() if key.id != leaving]
        return others[0] if others else self._ring.signing_key().id

    def _issue(self, ticket: Ticket, t_ns: int) -> _Outstanding:
        arguments = ticket.arguments
        expire_ns = t_ns + round(LIFETIME_S * 1e9)
        key_id = self._signer(arguments)
        command = make_command(
            arguments,
            key_id=key_id,
            seq=self._next_seq(key_id),
            t_issue_ns=t_ns,
            t_expire_ns=expire_ns,
            node=self._node,
        )
        self.counts.issued += 1
        if isinstance(arguments, (ActivateKey, RetireKey)):
            self._key_changes[key_id, command.seq] = arguments
        payload = encode_command(command, self._ring, sealed=self._sealed)
        return _Outstanding(payload, ticket, arguments.name, key_id, command.seq, expire_ns)


def _counter() -> Callable[[str], int]:
    last: Counter[str] = Counter()

    def next_seq(key_id: str) -> int:
        last[key_id] += 1
        return last[key_id]

    return next_seq
