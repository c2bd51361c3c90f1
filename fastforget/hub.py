"""Names of the hub where it cannot be reached: known in seconds, and what its cache holds is used without asking."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator

from fastforget.errors import FastforgetError

NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # that a model of the hub can have
PATIENCE = 4.0  # seconds; the hub's own client tries for half a minute, file by file


@contextlib.contextmanager
def hub_or_cache(name: str | os.PathLike[str]) -> Iterator[None]:
    """Load a model, an adapter or a tokenizer inside: where the hub cannot be reached, from its cache alone.

    Raises:
        FastforgetError: the name is no folder, the hub cannot be reached, and its cache holds too little of it.
    """
    from huggingface_hub import constants

    if os.path.exists(name):
        yield
        return
    if not NAME.fullmatch(os.fspath(name)):
        raise FastforgetError(f"there is no folder {name}, and the hub has no such names")
    unreachable = not constants.HF_HUB_OFFLINE and not reachable(constants.ENDPOINT)
    if unreachable:
        constants.HF_HUB_OFFLINE = True
    offline = constants.HF_HUB_OFFLINE
    try:
        yield
    except OSError as error:
        if not offline:
            raise
        state = "cannot be reached" if unreachable else "is switched off (HF_HUB_OFFLINE)"
        raise FastforgetError(
            f"there is no folder {name}, the hub ({constants.ENDPOINT}) {state}, and its cache does not hold this: "
            "check the name, or the network"
        ) from error
    finally:
        if unreachable:
            constants.HF_HUB_OFFLINE = False


@functools.cache
def reachable(endpoint: str) -> bool:
    """Tell, once in a process, whether the hub's host answers; where there is a proxy it is taken to."""
    address = urllib.parse.urlsplit(endpoint)
    if {"all", address.scheme} & {*urllib.request.getproxies()}:
        return True
    answers: list[bool] = []

    def connect() -> None:
        with contextlib.suppress(OSError):
            port = address.port or (80 if address.scheme == "http" else 443)
            socket.create_connection((address.hostname, port), timeout=PATIENCE).close()
            answers.append(True)

    asked = threading.Thread(target=connect, daemon=True)  # the name alone may take long to look up
    asked.start()
    asked.join(PATIENCE)
    return bool(answers)
