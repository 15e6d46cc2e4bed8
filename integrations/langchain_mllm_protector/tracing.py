"""What a LangChain run shows of a check, and the handler that records it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Final
from uuid import UUID

from langchain_core.callbacks import (
    AsyncCallbackManagerForChainRun,
    BaseCallbackHandler,
    BaseRunManager,
    CallbackManagerForChainRun,
)

from langchain_mllm_protector.capture import PromptCapture
from mllm_protector_guard import GuardRecord, RecordSink

__all__ = ["CHECK_EVENT", "ProtectorCallbackHandler", "areport", "report"]

logger = logging.getLogger(__name__)

CHECK_EVENT: Final = "mllm_protector.check"
"""Name of the custom event that a guard sends for every check; its value is the record as a dict."""


class ProtectorCallbackHandler(BaseCallbackHandler):
    """Writes the record of every check under a run to a sink: all scores and rewrites, passes included.

    It looks at the guard's own events only and keeps nothing. Whether records hold texts is the guard's
    decision (`trace_content`); by default they hold lengths and hashes. A check of a whole answer
    that raises `InferenceError` sends no record: its run ends with the error.

    Args:
        sink: Takes the records, for example a `JsonlSink`.

    Example:
        >>> from langchain_mllm_protector import ProtectorCallbackHandler, ProtectorGuard
        >>> from mllm_protector_guard.fakes import KeywordDetector
        >>> class PrintSink:
        ...     def emit(self, record):
        ...         print(record.outcome, record.harm_score)
        >>> guard = ProtectorGuard(detector=KeywordDetector({"bomb"}), on_harm="withhold")
        >>> guard.invoke("Plant roses.", {"callbacks": [ProtectorCallbackHandler(sink=PrintSink())]})
        passed 0.01
        'Plant roses.'
    """

    def __init__(self, *, sink: RecordSink) -> None:
        self.sink = sink

    def on_custom_event(self, name: str, data: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Emits the record if the event is a guard's; an error of the sink is logged and goes no further."""
        if name != CHECK_EVENT:
            return
        try:
            self.sink.emit(GuardRecord.model_validate(data))
        except Exception as error:
            logger.warning("%s lost the record of run %s: %s", type(self.sink).__name__, run_id, type(error).__name__)


def report(record: GuardRecord, run_manager: CallbackManagerForChainRun) -> None:
    """Sends the event of a check and shows its scores and rewrites as child runs, if there is anybody to see them."""
    if not _watched(run_manager):
        return
    children = run_manager.get_child()
    children.on_custom_event(CHECK_EVENT, record.model_dump(mode="json"), run_id=run_manager.run_id)
    for name, inputs, outputs in _steps(record):
        children.on_chain_start({}, inputs, name=name).on_chain_end(outputs)


async def areport(record: GuardRecord, run_manager: AsyncCallbackManagerForChainRun) -> None:
    """`report` for asynchronous runs."""
    if not _watched(run_manager):
        return
    children = run_manager.get_child()
    await children.on_custom_event(CHECK_EVENT, record.model_dump(mode="json"), run_id=run_manager.run_id)
    for name, inputs, outputs in _steps(record):
        child = await children.on_chain_start({}, inputs, name=name)
        await child.on_chain_end(outputs)


def _watched(run_manager: BaseRunManager) -> bool:
    # The capture is in every run, and learns nothing from these.
    return any(not isinstance(handler, PromptCapture) for handler in run_manager.inheritable_handlers)


def _steps(record: GuardRecord) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, inputs and outputs of each model call; numbers only.

    The runs are written after the check, because a batch makes one call for many runs: the time that
    a model took is in `duration_ms`, not in the run's own clock.
    """
    if record.reason == "blank":
        return
    sizes = {name: getattr(record, name) for name in ("question_chars", "answer_chars", "images")}
    verdict = {name: getattr(record, name) for name in ("harm_score", "threshold", "outcome", "reason", "error")}
    yield "harm_detector", sizes, {**verdict, "duration_ms": record.detector_ms}
    for attempt, rewrite in enumerate(record.rewrites):
        yield "detoxifier", {**sizes, "attempt": attempt}, rewrite.model_dump()
