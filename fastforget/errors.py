"""Errors that a person can act on: what was wrong, where, and what to do."""


class FastforgetError(ValueError):
    """Bad input or an unsupported set-up. The command line prints its one line and exits with code 2."""


class BrokenFileError(FastforgetError):
    """A file of ours is missing, or not as it was written."""


class DivergenceError(FastforgetError):
    """Training was stopped because it broke the model.

    `good_steps` is how many steps the adapter in memory has taken: the last good one.
    """

    def __init__(self, message: str, good_steps: int = 0) -> None:
        super().__init__(message)
        self.good_steps = good_steps


class NonFiniteLossError(DivergenceError):
    """The loss, its gradient or a weight became NaN or infinite; the message says at which step."""


class RetainNLLError(DivergenceError):
    """The NLL of the retain set rose above the bound that the user gave."""
