"""Everything the node raises on purpose, by who can mend it.

Law: whoever decides about a retry reads `error.retry` and nothing else. Messages say what, which, got, expected.
"""

from __future__ import annotations

import traceback

_LONGEST_GOT = 160


class NodeError(Exception):
    """Abstract base; children set `retry` and say who can mend the trouble."""

    retry: bool = False

    def __init__(self, message: str) -> None:
        if type(self) is NodeError:
            raise TypeError("NodeError is abstract: raise one of its children")
        super().__init__(message)


class ConfigError(NodeError):
    """The configuration or rules cannot be used; at start only, exit status 2.

    Parameters
    ----------
    file, key, got, expected
        Where it stands and what was wrong with it.
    """

    def __init__(self, file: str, key: str, got: object, expected: str) -> None:
        told = repr(got)
        told = told if len(told) <= _LONGEST_GOT else f"{told[:_LONGEST_GOT]}…"
        super().__init__(f"{file}: {key}: got {told}, expected {expected}")
        self.file, self.key, self.got, self.expected = file, key, got, expected


class LocalError(NodeError):
    """Our disk, database or memory failed; answered with 0xA700 to a sender, retried by a worker."""

    retry = True


class RemoteError(NodeError):
    """The peer is unreachable, rejected for now, aborted, or is out of resources; retried with back-off."""

    retry = True


class RefusedError(RemoteError):
    """The peer understood and said no for good."""

    retry = False


class StudyError(NodeError):
    """These images cannot be registered; a person sees the reason."""


class IncompleteSeriesError(StudyError):
    """Instances are missing or doubled."""


class InconsistentGeometryError(StudyError):
    """Positions, orientations or spacings do not form one regular volume."""


class UnsupportedImageError(StudyError):
    """A kind of image this version cannot read or write."""


class RegistrationRejectedError(StudyError):
    """The registration ran and its result was not good enough to send."""


def stack(error: BaseException) -> str:
    """Where an error arose, without its text, which may quote a data set (and so a patient)."""
    return "".join(traceback.format_tb(error.__traceback__))
