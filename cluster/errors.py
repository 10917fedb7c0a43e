"""What the composition root raises on purpose; every message says what to do about it."""


class ClusterError(Exception):
    """Shown to the user as it is, without a traceback."""

    exit_code = 1


class TopologyError(ClusterError):
    """The topology cannot be run as it is written: one line for each thing that is wrong."""

    exit_code = 2

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class LaunchError(ClusterError):
    """The cluster did not come up, or could not go on."""


class NoAnswer(ClusterError):
    """A worker that was asked something gives no answer."""

    def __init__(self, cause: str, cure: str) -> None:
        super().__init__(f"{cause}; {cure}")
        self.cause, self.cure = cause, cure


class Interrupted(ClusterError):
    """Someone asked for an end in the middle of the start."""

    exit_code = 130
