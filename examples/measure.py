"""Time and peak memory of calls that compete, taking turns: each in a process of its own, or all in this one."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Call = Callable[[], object]
Prepare = Callable[[], Call]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Sample:
    """One call: its time, and how far memory in use rose above what it was before (None where unknown)."""

    seconds: float
    extra_bytes: int | None


@dataclass(frozen=True)
class Measurement:
    """The calls of one rival; sample i of every rival belongs to the same round."""

    samples: list[Sample] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        return [sample.seconds for sample in self.samples]

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def extra_bytes(self) -> int | None:
        """The largest of all rounds."""
        return max((sample.extra_bytes for sample in self.samples if sample.extra_bytes is not None), default=None)

    def time_ratios(self, other: Measurement) -> list[float]:
        """This rival's time over the other's, round by round."""
        return [mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True)]


def measure_in_turns(
    rivals: Mapping[str, Prepare],
    rounds: int,
    deadline: float,
    progress: Callable[[], object],
    device: str = "cpu",
    clock: Clock = time.perf_counter,
) -> dict[str, Measurement]:
    """Times every rival once per round, in turn, so that a slow spell of the machine meets them all.

    Args:
        rivals: for each name a picklable function, run in the rival's own process, that loads, compiles and warms up,
            and returns the call to be measured. The rivals do so side by side, as compiling keeps one core busy each.
        rounds: how often each is called at most.
        deadline: no second or further round is begun that would end after this time of `time.perf_counter`.
        progress: is called whenever a rival has been prepared or measured.
        device: where the calls run.
        clock: by which they are timed, a function of the module time.
    """
    measurements = {name: Measurement() for name in rivals}
    with contextlib.ExitStack() as stack:
        measure = functools.partial(measure_call, device=device, clock=clock)
        workers = {name: stack.enter_context(_worker(name, prepare, measure)) for name, prepare in rivals.items()}
        for name, worker in workers.items():
            _ask(name, worker)
            progress()
        for _ in range(rounds):
            start = time.perf_counter()
            for name, worker in workers.items():
                measurements[name].samples.append(_ask(name, worker))
                progress()
            if 2 * time.perf_counter() - start > deadline:
                break
    return measurements


def measure_in_process(
    calls: Mapping[str, Call], rounds: int, threads: int, before: Call = lambda: None
) -> dict[str, Measurement]:
    """Times every call once per round, in turn, in this process.

    With one thread the clock is the process's CPU time, which other processes disturb least; with more it is the wall.
    Memory is that of a call that is not timed, as freeing memory before a call would make it slower.

    Args:
        calls: for each name what is measured, compiled and called once already.
        rounds: how often each is called.
        threads: how many the calls use.
        before: runs before each call and is not timed.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    extra_bytes = {name: measure_call(call).extra_bytes for name, call in calls.items()}
    measurements = {name: Measurement() for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            before()
            start = clock()
            call()
            measurements[name].samples.append(Sample(clock() - start, extra_bytes[name]))
    return measurements


@contextlib.contextmanager
def _worker(name: str, prepare: Prepare, measure: Callable[[Call], Sample]) -> Iterator[Connection]:
    # Threads that wait should sleep, not spin: the others need the cores while all prepare. Read when OpenMP is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Large tensors in huge pages: with small ones, page faults would be half of the time of eager attention.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    # Spawned, not forked: a process with OpenMP threads must not be forked.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, prepare, measure), name=name)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join()


def _ask(name: str, worker: Connection) -> Any:
    """What a rival's process answers: None to the first request, once it is prepared, and a sample to every other."""
    try:
        worker.send("next")
        answer = worker.recv()
    except (EOFError, ConnectionError):
        raise RuntimeError(f"the process of {name!r} ended early; was there too little memory?") from None
    if isinstance(answer, str):
        raise RuntimeError(f"{name!r} failed:\n{answer}")
    return answer


def _serve(connection: Connection, prepare: Prepare, measure: Callable[[Call], Sample]) -> None:
    """Prepares, then answers each request, with the traceback if something fails, until the other end is closed."""
    with contextlib.suppress(EOFError, ConnectionError):
        try:
            call = prepare()
            connection.recv()
            connection.send(None)
            while connection.recv():
                connection.send(measure(call))
        except Exception:
            connection.send(traceback.format_exc())


def measure_call(call: Call, device: str = "cpu", clock: Clock = time.perf_counter) -> Sample:
    """Calls once. Memory is what is resident in this process or, on a GPU, what torch's allocator has given out."""
    gc.collect()
    if device != "cpu":
        return _measure_on_gpu(call, device, clock)
    _return_freed_memory()
    before = _reset_peak_memory()
    start = clock()
    call()
    seconds = clock() - start
    return Sample(seconds, None if before is None else _memory("VmHWM") - before)


def _measure_on_gpu(call: Call, device: str, clock: Clock) -> Sample:
    import torch

    memory, synchronize = torch.get_device_module(device), torch.accelerator.synchronize
    synchronize()
    memory.reset_peak_memory_stats()
    before = memory.memory_allocated()
    start = clock()
    call()
    synchronize()
    return Sample(clock() - start, memory.max_memory_allocated() - before)


def _return_freed_memory() -> None:
    """Hands the heap's free pages back, so that memory the call takes from them shows as a rise."""
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _reset_peak_memory() -> int | None:
    """Sets this process's peak resident memory to what is resident now and returns that; None outside Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _memory("VmRSS")


def _memory(entry: str) -> int:
    """VmRSS, this process's resident memory, or VmHWM, its peak; in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {entry}")
