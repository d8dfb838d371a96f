"""Every error that p2pkv raises on purpose, grouped by what the caller can do about it.

An error carries its context as keyword arguments (shown behind the message) and a ``hint`` that says what to do
next. Nothing here imports anything else of the project.
"""

from __future__ import annotations


class P2PKVError(Exception):
    """Base of all errors of this project.

    Args:
        message: what went wrong, in one sentence.
        hint: what to do about it; printed by the CLI on a line of its own.
        context: names and values that a reader of a log needs. Never secrets, never block contents.
    """

    def __init__(self, message: str, *, hint: str = "", **context: object) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.context = context

    @property
    def problem(self) -> str:
        """Message and context, for whoever shows the hint in a place of its own."""
        shown = ", ".join(f"{k}={v}" for k, v in self.context.items())
        return f"{self.message} ({shown})" if shown else self.message

    def __str__(self) -> str:
        return f"{self.problem}. {self.hint}" if self.hint else self.problem


class ConfigError(P2PKVError):
    """A setting is unknown, malformed or impossible on this host. Fix the configuration."""


class LayoutMismatch(P2PKVError):
    """Two layouts that should be interchangeable differ; ``fields`` names where."""

    def __init__(self, message: str, *, fields: tuple[str, ...] = (), hint: str = "", **context: object) -> None:
        super().__init__(message, hint=hint, **context)
        self.fields = fields


class Unavailable(P2PKVError):
    """Something that may be back later is not there now. Retry later or do without."""


class AgentUnavailable(Unavailable):
    """The local agent does not answer on its Unix socket."""


class PeerUnavailable(Unavailable):
    """A peer cannot be reached, went away, or is past its deadline."""


class TransportUnavailable(Unavailable):
    """This host cannot run the asked-for transport (library, device or right missing)."""


class Busy(Unavailable):
    """A bounded queue is full. Back off; nothing was queued."""


class OutOfSpace(Unavailable):
    """No slot can be freed: every block is pinned, or the arena is too small."""


class DeadlineExceeded(P2PKVError):
    """The answer did not come in time. The operation has no effect that the caller can see."""


class LeaseExpired(P2PKVError):
    """The blocks were no longer held when they were read; what was read does not count."""


class IntegrityError(P2PKVError):
    """Bytes failed their checksum and were discarded."""


class RemoteProtocolError(P2PKVError):
    """The other side sent something that this version's protocol does not allow. The connection is closed."""


class LocalProtocolError(P2PKVError):
    """This process tried something that the protocol does not allow in this state: a bug here, or in a caller."""


class InvalidArgument(P2PKVError, ValueError):
    """A caller passed something that can never work (a wrong size, an empty key, a closed region)."""
