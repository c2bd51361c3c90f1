"""Errors that a person can act on: what was wrong, where, and what to do."""


class FastforgetError(ValueError):
    """Bad input or an unsupported set-up. The command line prints its one line and exits with code 2."""


class NonFiniteLossError(FastforgetError):
    """The loss or its gradient became NaN or infinite; the message says at which step.

    `good_steps` is how many steps the adapter in memory has taken: the last one whose loss was finite.
    """

    def __init__(self, message: str, good_steps: int = 0) -> None:
        super().__init__(message)
        self.good_steps = good_steps
