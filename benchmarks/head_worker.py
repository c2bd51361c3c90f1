"""Settings in a process of their own: a contestant that crashes it, or hangs, costs its own row and nobody else's."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.head_measure import OUT_OF_TIME, Effort, Record, cpu_peak, facts, measure, one_line
from benchmarks.head_problem import Setting

CONTEXT = multiprocessing.get_context("spawn")  # forked processes cannot use CUDA, and share the parent's peak memory
MEMORY_LIMIT = 600.0  # seconds for the memory of one contestant
LONGEST_START, LONGEST_END = 120.0, 10.0  # seconds, of the process itself


class Died(Exception):
    """The process ended or was ended; the message is why."""

    def __init__(self, reason: str, contestant: str | None) -> None:
        super().__init__(reason)
        self.contestant = contestant  # whose turn it was


def serve(connection: Connection) -> None:
    """The process: takes (function, arguments), sends (contestant, record) as it goes, and then None, or an error."""
    connection.send(None)  # everything is imported
    while (task := connection.recv()) is not None:
        function, arguments = task
        try:
            function(*arguments, lambda name, record: connection.send((name, record)))
        except Exception as error:  # a lost device, say: the next task gets another process
            connection.send(one_line(error))
            return
        connection.send(None)


def tell_facts(device: str, say: Callable[[str, Record], None]) -> None:
    """`facts`, as a task."""
    say("", facts(device))


def tell_peak(setting: Setting, name: str, say: Callable[[str, Record], None]) -> None:
    """`cpu_peak`, as a task."""
    say(name, cpu_peak(setting, name))


class Worker:
    """A process that takes one task after another, and is started anew where one ended it."""

    def __init__(self) -> None:
        self.process: Any = None
        self.connection: Any = None

    def start(self) -> None:
        """Start the process, where none runs."""
        if self.process is None:
            self.connection, theirs = CONTEXT.Pipe()
            self.process = CONTEXT.Process(target=serve, args=(theirs,))  # no daemon: peers may start processes
            self.process.start()
            theirs.close()
            with contextlib.suppress(EOFError, OSError):  # whoever uses it finds out
                if self.connection.poll(LONGEST_START):
                    self.connection.recv()

    def stop(self) -> None:
        """End the process, by force where it does not end by itself."""
        if self.process is not None:
            with contextlib.suppress(OSError):
                self.connection.send(None)
            self.process.join(LONGEST_END)
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None

    def run(self, function: Callable[..., None], *arguments: Any, seconds: float) -> dict[str, Record]:
        """Run a task; the records that it sent. `Died.contestant` had its turn when the process ended."""
        records: dict[str, Record] = {}
        return self.collect(records, function, arguments, seconds)

    def collect(
        self, records: dict[str, Record], function: Callable[..., None], arguments: Sequence[Any], seconds: float
    ) -> dict[str, Record]:
        """The same into `records`, which holds what came before the process died."""
        self.start()
        deadline = time.monotonic() + seconds
        turn = None
        try:
            self.connection.send((function, tuple(arguments)))
            while self.connection.poll(max(0.0, deadline - time.monotonic())):
                message = self.connection.recv()
                if message is None:
                    return records
                if isinstance(message, str):
                    raise self.died(message, turn)
                turn, record = message
                if record is not None:
                    records[turn] = record
        except (EOFError, OSError):
            self.process.join()
            raise self.died(exit_reason(self.process.exitcode), turn) from None
        raise self.died(f"had not ended after {seconds:.0f} s", turn)

    def died(self, reason: str, turn: str | None) -> Died:
        """Clear up after the process."""
        self.process.kill()
        self.stop()
        return Died(reason, turn)


def exit_reason(code: int | None) -> str:
    """Why a process ended, from its exit code."""
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"the process ended with exit code {code}"


def measure_isolated(worker: Worker, setting: Setting, names: Sequence[str], effort: Effort) -> dict[str, Record]:
    """`measure` in the worker; whoever's turn it was when that died is left out, and the others begin again."""
    left = list(names)
    lost: dict[str, Record] = {}
    records: dict[str, Record] = {}
    until = time.monotonic() + 2 * effort.limit
    while left:
        records = {}
        try:
            worker.collect(records, measure, (setting, left, effort), effort.limit)
            break
        except Died as death:
            if death.contestant is None:  # nobody had a turn: the inputs could not be made
                records = {name: {"status": f"failed: the whole setting: {death}"} for name in left}
                break
            lost[death.contestant] = {"status": f"failed: {death}"}
            left.remove(death.contestant)
            if time.monotonic() > until:
                break
    records = {name: {"status": OUT_OF_TIME} for name in left} | records | lost
    if setting.device == "cpu" and effort.memory and not effort.dry:
        for name in names:
            if "median_ms" in records[name]:
                records[name] |= peak_isolated(setting, name)
    return {name: records[name] for name in names}


def peak_isolated(setting: Setting, name: str) -> Record:
    """A contestant's peak on the CPU, in a process of its own."""
    alone = Worker()
    try:
        return alone.run(tell_peak, setting, name, seconds=MEMORY_LIMIT)[name]
    except Died as death:
        return {"peak_mb": None, "peak_note": f"failed: {death}"}
    finally:
        alone.stop()


def measure_here(setting: Setting, names: Sequence[str], effort: Effort) -> dict[str, Record]:
    """`measure` in this process: for debuggers, sanitizers and tests."""
    records: dict[str, Record] = {}

    def say(name: str, record: Record | None) -> None:
        if record is not None:
            records[name] = record

    measure(setting, names, effort, say)
    return records
