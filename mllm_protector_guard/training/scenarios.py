"""What generated questions are about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mllm_protector_guard.errors import ConfigError

__all__ = ["Scenario", "load_scenarios"]


class Scenario(BaseModel):
    """A field of harm.

    Attributes:
        name: Identifies it in files and on the command line.
        description: One sentence for the chat model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[\w-]+$")
    description: str = Field(min_length=1, pattern=r"\S")


_SHIPPED = Path(__file__).with_name("scenarios.yaml")
_SCENARIOS = TypeAdapter(list[Scenario])


def load_scenarios(path: Path | None = None, *, names: Sequence[str] = ()) -> list[Scenario]:
    """The package's scenarios and those of a file, of which one with a known name takes that one's place.

    Args:
        path: YAML or JSON: a list of `{name, description}`.
        names: Those to take; all when empty.

    Raises:
        ConfigError: The file does not fit, or a name is unknown.
        OSError: The file cannot be read.
    """
    found = {one.name: one for file in (_SHIPPED, path) if file is not None for one in _read(file)}
    if unknown := [name for name in names if name not in found]:
        raise ConfigError(f"no scenario is called {unknown[0]!r}; known are {', '.join(found)}")
    return [found[name] for name in dict.fromkeys(names)] if names else list(found.values())


def _read(path: Path) -> list[Scenario]:
    try:
        return _SCENARIOS.validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} is neither YAML nor JSON") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{str(path)!r}: {problems}; it is a list of name and description") from error
