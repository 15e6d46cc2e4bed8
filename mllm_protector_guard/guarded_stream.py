"""A guarded answer while it streams: the state machine of `streaming`, as something to loop over."""

from __future__ import annotations

from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
)
from functools import partial

from mllm_protector_guard.stream_check import END, StreamCheck
from mllm_protector_guard.streaming import Done, Hold, Release
from mllm_protector_guard.types import GuardResult, Outcome

__all__ = ["AsyncGuardedStream", "GuardedStream"]

_InThread = Callable[[Callable[[], None]], Awaitable[None]]


class _Checked:
    """What both kinds of stream tell of their check."""

    _check: StreamCheck

    @property
    def result(self) -> GuardResult:
        """The verdict on the answer, with all that left as its text.

        Raises:
            RuntimeError: The stream has not ended, or broke off before anything had left.
        """
        if self._check.result is None:
            raise RuntimeError(
                "a stream has a result once it has ended; this goes on, or broke off before any text left"
            )
        return self._check.result

    @property
    def replaced(self) -> bool:
        """Whether a rewrite or a refusal takes the place of the rest: what leaves from now on is not of the answer."""
        result = self._check.result
        return result is not None and result.outcome in (Outcome.DETOXIFIED, Outcome.WITHHELD)


class GuardedStream(_Checked, Iterator[str]):
    """The texts of one answer that may leave, in order; `Guard.stream` makes it.

    Joined they are the answer byte for byte, if it is harmless. A stream that is not read to its end should be
    closed, or used in a `with` statement: then what had left is on record.

    Example:
        >>> from mllm_protector_guard import Guard, GuardPolicy
        >>> from mllm_protector_guard.fakes import KeywordDetector
        >>> guard = Guard(detector=KeywordDetector({"bomb"}), policy=GuardPolicy(on_harm="withhold"))
        >>> with guard.stream(["Water the ro", "ses. Then rest."], question="What now?") as stream:
        ...     "".join(stream)
        'Water the roses. Then rest.'
        >>> stream.result.outcome.value, stream.result.released_chars
        ('passed', 27)
    """

    def __init__(self, check: StreamCheck, pieces: Iterable[str]) -> None:
        self._check = check
        self._texts = _texts(check, pieces)

    def __next__(self) -> str:
        """The next text that may leave.

        Raises:
            HarmfulAnswerError: The answer is harmful and the policy says `on_harm="raise"`.
            InferenceError: A model failed and the policy says `on_error="raise"`.
            CheckpointError: A model cannot be loaded.
        """
        return next(self._texts)

    def close(self) -> None:
        """Ends the stream where it is; what had left is recorded."""
        self._texts.close()

    def __enter__(self) -> GuardedStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class AsyncGuardedStream(_Checked, AsyncIterator[str]):
    """`GuardedStream` for an event loop; `Guard.astream` makes it. Models run in worker threads."""

    def __init__(self, check: StreamCheck, pieces: AsyncIterable[str], in_thread: _InThread) -> None:
        self._check = check
        self._texts = _atexts(check, pieces, in_thread)

    async def __anext__(self) -> str:
        """The next text that may leave; raises as `GuardedStream` does."""
        return await anext(self._texts)

    async def aclose(self) -> None:
        """Ends the stream where it is; what had left is recorded."""
        await self._texts.aclose()

    async def __aenter__(self) -> AsyncGuardedStream:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()


# Functions, not methods: a stream that nobody holds any more is then closed, and recorded, at once.
def _texts(check: StreamCheck, pieces: Iterable[str]) -> Generator[str]:
    try:
        check.prepare()
        source = iter(pieces)
        while not isinstance(event := check.poll(), Done):
            if isinstance(event, Release):
                yield event.text
            elif isinstance(event, Hold):
                check.take(next(source, END))
            else:
                check.respond(event)
        check.finish()
    except BaseException as error:
        check.break_off(error)
        raise
    finally:
        if isinstance(pieces, Generator):
            pieces.close()


async def _atexts(check: StreamCheck, pieces: AsyncIterable[str], in_thread: _InThread) -> AsyncGenerator[str]:
    try:
        await in_thread(check.prepare)
        source = aiter(pieces)
        while not isinstance(event := check.poll(), Done):
            if isinstance(event, Release):
                yield event.text
            elif isinstance(event, Hold):
                check.take(await anext(source, END))
            else:
                await in_thread(partial(check.respond, event))
        await in_thread(check.finish)
    except BaseException as error:
        check.break_off(error)
        raise
    finally:
        if isinstance(pieces, AsyncGenerator):
            await pieces.aclose()
