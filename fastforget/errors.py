"""Errors that a person can act on: what was wrong, where, and what to do."""


class FastforgetError(ValueError):
    """Bad input or an unsupported set-up. The command line prints its one line and exits with code 2."""


class NonFiniteLossError(FastforgetError):
    """The loss or its gradient became NaN or infinite; the message says at which step."""
