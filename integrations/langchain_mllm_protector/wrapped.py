"""A chat model around another one, which answers every question about the model with the other's words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.runnables import Runnable, RunnableBinding, RunnableParallel, RunnableSequence
from langchain_core.tools import BaseTool
from pydantic import BaseModel, ConfigDict, InstanceOf

from mllm_protector_guard import ConfigError

__all__ = ["WrappedChatModel"]

# How LangChain calls a model and labels its runs. Older releases know fewer of them.
_INHERITED: Final = {"disable_streaming", "output_version", "rate_limiter", "streaming", "tags", "metadata"}


class WrappedChatModel(BaseChatModel):
    """What `ProtectedChatModel` takes over from its model; its arguments are explained there."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    # The validators of older releases of langchain-core fail on objects of other kinds.
    model: InstanceOf[BaseChatModel]
    streaming: bool = False
    # With a cache, LangChain would take the answers of the wrapped model for those of this one, and unjudged.
    cache: Literal[False] = False

    if not TYPE_CHECKING:  # type checkers read the fields instead

        def __init__(self, **settings: Any) -> None:
            model = settings.get("model")
            given = model.model_fields_set if isinstance(model, BaseChatModel) else set()
            names = given & _INHERITED & type(self).model_fields.keys()
            super().__init__(**{name: getattr(model, name) for name in names} | settings)

    @property
    def model_name(self) -> str:
        """The name that the wrapped model gives its model, or else its kind."""
        names = (getattr(self.model, name, None) for name in ("model_name", "model", "model_id"))
        return next((name for name in names if isinstance(name, str) and name), self._llm_type)

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: Any = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """The guarded model with the wrapped model's way to offer it `tools`."""
        # Not every model knows tool_choice.
        choice = {} if tool_choice is None else {"tool_choice": tool_choice}
        return self._around(self.model.bind_tools(tools, **choice, **kwargs))

    def with_structured_output(
        self, schema: dict[str, Any] | type, **kwargs: Any
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """The guarded model with the wrapped model's way to make it answer in the form of `schema`."""
        return self._around(self.model.with_structured_output(schema, **kwargs))

    def get_token_ids(self, text: str) -> list[int]:
        """Those of the wrapped model."""
        return self.model.get_token_ids(text)

    def get_num_tokens(self, text: str) -> int:
        """That of the wrapped model."""
        return self.model.get_num_tokens(text)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], *args: Any, **kwargs: Any) -> int:
        """That of the wrapped model."""
        return self.model.get_num_tokens_from_messages(messages, *args, **kwargs)

    @property
    def _llm_type(self) -> str:
        return self.model._llm_type

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        return self.model._identifying_params

    def _get_invocation_params(self, stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        return self.model._get_invocation_params(stop=stop, **kwargs)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self.model._get_ls_params(stop=stop, **kwargs)

    def _combine_llm_outputs(self, llm_outputs: list[dict[str, Any] | None], /) -> dict[str, Any]:
        return self.model._combine_llm_outputs(llm_outputs)

    def _resolve_model_profile(self) -> Any:
        return getattr(self.model, "profile", None)

    def _around(self, runnable: Runnable[Any, Any]) -> Runnable[Any, Any]:
        """`runnable` with the model at its head guarded.

        Raises:
            ConfigError: No model is found there, so that nothing would be guarded.
        """
        if isinstance(runnable, BaseChatModel):
            return self if runnable is self.model else self.model_copy(update={"model": runnable})
        if isinstance(runnable, RunnableBinding):
            return runnable.model_copy(update={"bound": self._around(runnable.bound)})
        if isinstance(runnable, RunnableSequence):
            return runnable.model_copy(update={"first": self._around(runnable.first)})
        if isinstance(runnable, RunnableParallel):
            steps = {name: self._around(step) for name, step in runnable.steps__.items()}
            return runnable.model_copy(update={"steps__": steps})
        raise ConfigError(
            f"{type(self.model).__name__} gives a {type(runnable).__name__} in which no chat model is found to guard. "
            "Put a ProtectorGuard behind it instead."
        )
