"""Many requests at a time: how many, until when, and all of them waiting together where the server limits the rate."""

import asyncio
import contextlib
import math
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from alpaca.common.errors import UserError

Result = TypeVar("Result")

RATE_LIMIT_PATIENCE = 1800.0  # seconds without any reply because of rate limits, after which the run gives up
SAY_AFTER = 10.0  # seconds of waiting for a rate limit after which the user is told
LONGEST_WAIT = 60.0  # seconds between two tries where the server does not say how long to wait


def run_async(job: Coroutine[Any, Any, Result]) -> Result:
    """asyncio.run, also where an event loop runs already, as in a notebook; then in a thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(job)
    thread = ThreadPoolExecutor(1)
    running = thread.submit(asyncio.run, job)
    try:
        return running.result()
    except KeyboardInterrupt:  # it reaches the main thread alone
        for loop, stop in _in_threads:
            loop.call_soon_threadsafe(stop)
        return running.result()
    finally:
        thread.shutdown(wait=False)


_in_threads: list[tuple[asyncio.AbstractEventLoop, Callable[[], None]]] = []  # what `on_interrupt` calls there


class RequestFailed(Exception):
    """This request failed for good, others may go on. `kind` is a short name for the summary; `sent` is the JSON that
    the server sent, where it sent any."""

    def __init__(self, kind: str, reason: str, sent: Any = None):
        super().__init__(reason)
        self.kind, self.sent = kind, sent


class RequestSlots:
    """At most `count` requests at a time: `async with slots` around each, in jobs that `run` runs.

    After an error (other than RequestFailed) or a first Ctrl-C no further request starts. Those under way finish,
    because they are paid for.
    """

    def __init__(self, count: int):
        self._free, self._error = asyncio.Semaphore(count), None

    async def __aenter__(self) -> None:
        await self._free.acquire()
        if self._error:
            self._free.release()
            # Not the error itself: a KeyboardInterrupt in a task would end the event loop, and the requests under way.
            raise asyncio.CancelledError

    async def __aexit__(self, kind, error, trace) -> None:
        self._free.release()
        if isinstance(error, Exception) and not isinstance(error, RequestFailed):
            self.stop(error)

    def stop(self, error: BaseException) -> None:
        """Lets no further request start; `run` raises the first such error."""
        self._error = self._error or error

    def _interrupt(self) -> None:
        self.stop(KeyboardInterrupt())
        print("\ninterrupted: waiting for the replies under way. Ctrl-C again leaves at once.", flush=True)

    async def run(self, jobs: Iterable[Awaitable]) -> list[Any]:
        """The results of all jobs, in order. Raises the first error when all are done."""
        with on_interrupt(self._interrupt):
            results = await asyncio.gather(*jobs, return_exceptions=True)
        for result in (self._error, *results):
            if isinstance(result, BaseException):
                raise result
        return results


@contextlib.contextmanager
def on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM within the block calls `stop`; the second raises KeyboardInterrupt."""
    loop, signals = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def first() -> None:
        for number in signals:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.default_int_handler)
        stop()

    here = (loop, stop)
    try:
        for number in signals:
            loop.add_signal_handler(number, first)
    except (ValueError, RuntimeError):  # not the main thread
        _in_threads.append(here)
    try:
        yield
    finally:
        if here in _in_threads:
            _in_threads.remove(here)
        with contextlib.suppress(ValueError, RuntimeError):
            for number in signals:
                loop.remove_signal_handler(number)
                signal.signal(number, before[number])


class RateLimitGate:
    """Closed while the server asks to wait; every request passes it before it is sent."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._opens_at = 0.0
        self._wait = 0.0  # seconds of the last closing
        self._limited_since: float | None = None  # no reply has come since
        self._closings = 0  # in that time
        self._said_at = -math.inf

    def close(self, seconds: float | None, message: str) -> None:
        """Holds all requests back for `seconds` (None: the server does not say how long).

        Raises UserError where no reply has come, or would come, for RATE_LIMIT_PATIENCE.
        """
        now = time.monotonic()
        if self._limited_since is None:
            self._limited_since, self._closings = now, 0
        if now >= self._opens_at:
            self._closings += 1
        if seconds is None:
            seconds = min(2.0 ** (self._closings - 1), LONGEST_WAIT)
        waited = now - self._limited_since
        if waited + seconds > RATE_LIMIT_PATIENCE:
            raise UserError(
                f"{self.url} limits the rate; no reply came for {waited:.0f} s, and it asks to wait {seconds:.0f} s "
                f"more: {message}\nWhat was answered is kept; run the same command later, or with a lower "
                "--max_concurrency."
            )
        if waited + seconds > SAY_AFTER and now - self._said_at > LONGEST_WAIT:
            self._said_at = now
            waiting = f"no reply for {waited:.0f} s; next try in {seconds:.0f} s"
            print(f"note: {self.url} limits the rate, {waiting}: {message}", file=sys.stderr)
        if now + seconds > self._opens_at:
            self._opens_at, self._wait = now + seconds, seconds

    def reply_came(self) -> None:
        self._limited_since = None

    async def wait(self) -> None:
        was_closed = False
        while (delay := self._opens_at - time.monotonic()) > 0:
            was_closed = True
            await asyncio.sleep(delay)
        if was_closed:  # not all at once: the next limit would be hit at the same moment
            await asyncio.sleep(random.uniform(0, min(1.0, self._wait / 10)))
