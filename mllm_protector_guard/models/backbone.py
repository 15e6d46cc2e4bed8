"""Loads pretrained models and adapters, and nothing that cannot be trusted."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from mllm_protector_guard.errors import CheckpointError, ConfigError, MissingDependencyError
from mllm_protector_guard.models import catalog
from mllm_protector_guard.models.checkpoint import ADAPTER_FILE, BaseReference, require_safetensors
from mllm_protector_guard.models.device import resolve_device, resolve_dtype
from mllm_protector_guard.models.offline import offline
from mllm_protector_guard.models.placement import Placement
from mllm_protector_guard.models.pull import ensure_base, read_source
from mllm_protector_guard.models.sharing import HeldBackbone, merge_beside

__all__ = [
    "attach_adapter",
    "isolated",
    "load_model",
    "load_tokenizer",
    "max_tokens",
    "require_pad_token",
    "resolve_base",
    "resolve_folder",
    "tokenizer_home",
    "with_adapter",
]

_WANTED_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "longformer")
# What from_pretrained changes for the whole process while it runs, no two threads may change at once.
_load_lock = threading.RLock()


def resolve_folder(source: str, *, revision: str | None, local_files_only: bool | None) -> Path:
    """The local folder of a checkpoint: itself if it is a folder, else a snapshot of the hub repository.

    Only safetensors, tokenizer and configuration files are fetched.

    Raises:
        CheckpointError: It is neither a folder nor a repository that can be reached.
    """
    folder = Path(source).expanduser()
    if source and folder.is_dir():
        return folder
    try:
        return Path(
            snapshot_download(
                source,
                revision=revision,
                allow_patterns=_WANTED_FILES,
                local_files_only=offline(local_files_only),
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{source!r} is neither a catalog name ({', '.join(catalog.names())}), nor a folder, nor a hub repository "
            f"that can be reached ({type(error).__name__}). Check the spelling and the network, or give the path of a "
            "folder with the checkpoint.",
            source=source,
        ) from error


def resolve_base(base: BaseReference, *, local_files_only: bool | None) -> Path:
    """The local folder of the model under an adapter, with its sha256 checked where one is given.

    Raises:
        CheckpointError: It cannot be found, or it is another model than the adapter was trained on.
    """
    if base.name in catalog.names():
        folder = ensure_base(base.name, local_files_only=local_files_only)
        found: str | None = read_source(folder).sha256
    else:
        folder = resolve_folder(base.name, revision=base.revision, local_files_only=local_files_only)
        found = _sha256(folder / "model.safetensors") if base.sha256 else None
    if base.sha256 and found != base.sha256:
        raise CheckpointError(
            f"the base model {base.name!r} has sha256 {found}, and the adapter was trained on {base.sha256}. "
            "Point `base` in guard.json to the right model, or pull it again.",
            source=base.name,
        )
    return folder


def load_tokenizer(folder: Path, *, padding_side: str) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a folder, with a pad token.

    Raises:
        CheckpointError: There is no tokenizer that can report where its tokens stand in the text.
    """
    try:
        with isolated():
            tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=padding_side, trust_remote_code=False)
    except Exception as error:  # a damaged tokenizer.json surfaces as a bare Exception
        raise CheckpointError(
            f"no tokenizer could be loaded from {str(folder)!r} ({type(error).__name__}); "
            "copy tokenizer.json (or tokenizer.model) and tokenizer_config.json there.",
            source=folder,
        ) from error
    if not tokenizer.is_fast:
        raise CheckpointError(f"{str(folder)!r} has no fast tokenizer; save a tokenizer.json there.", source=folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise CheckpointError(
            f"the tokenizer in {str(folder)!r} has no pad, unknown or end token; name one in tokenizer_config.json.",
            source=folder,
        )
    # Callers cut texts into windows themselves; the tokenizer's own limit would only warn.
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def load_model(
    auto: Any, folder: Path, placement: Placement, *, held: HeldBackbone | None = None, **options: Any
) -> tuple[PreTrainedModel, set[str]]:
    """A model in eval mode on its device, and the names of weights that the checkpoint did not have.

    Args:
        auto: `AutoModel` or one of its siblings.
        folder: Local checkpoint with safetensors weights.
        placement: Device, dtype and quantization.
        held: A decoder in memory whose weights this model takes for its own, where it has them.
        options: More arguments of `from_pretrained`, e.g. `num_hidden_layers`.

    Raises:
        CheckpointError: The weights are missing, pickled, damaged, or of another shape.
        ConfigError: The placement does not work here.
    """
    require_safetensors(folder, "*.safetensors", source=str(folder))
    device = resolve_device(placement.device)
    arguments: dict[str, Any] = {
        "dtype": resolve_dtype(placement.dtype, device),
        "use_safetensors": True,
        "trust_remote_code": False,
        "output_loading_info": True,
        **options,
    }
    if placement.quantization is not None:
        arguments["quantization_config"] = _quantization(placement.quantization, device)
        arguments["device_map"] = placement.device_map or {"": device}
    elif placement.device_map is not None:
        arguments["device_map"] = placement.device_map
    if "device_map" in arguments and importlib.util.find_spec("accelerate") is None:
        raise MissingDependencyError("accelerate", "train")
    try:
        with isolated():
            read = auto.from_pretrained if held is None else _beside(auto, held)
            model, loading = read(folder, **arguments)
        if "device_map" not in arguments:
            model = model.to(device)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise CheckpointError(
            f"{str(folder)!r} does not fit into the memory of {str(device)!r}. Free some, choose another device=, "
            "or take less of it with dtype=, quantization= or device_map=.",
            source=folder,
        ) from error
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"{str(folder)!r} cannot be loaded as {auto.__name__} ({type(error).__name__}); "
            "the files are damaged or belong to another architecture. Copy or pull the checkpoint again.",
            source=folder,
        ) from error
    return model.eval(), set(loading["missing_keys"])


def with_adapter(
    model: PreTrainedModel, folder: Path, *, merge: bool, held: HeldBackbone | None = None
) -> PreTrainedModel:
    """The model with a LoRA adapter on it, merged into its weights if `merge`, but into none that are also `held`'s.

    Raises:
        CheckpointError: The adapter is pickled, damaged, or was trained on another architecture.
    """
    adapted = attach_adapter(model, folder)
    if not merge:
        return adapted.eval()  # type: ignore[no-any-return]
    result = adapted.merge_and_unload() if held is None else merge_beside(adapted, held)
    return result.eval()  # type: ignore[no-any-return]


def attach_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The model with a LoRA adapter on it that has all its weights.

    Raises:
        CheckpointError: The adapter is pickled, damaged, or was trained on another architecture.
    """
    require_safetensors(folder, ADAPTER_FILE, source=str(folder))
    mismatch = CheckpointError(
        f"the adapter in {str(folder)!r} does not fit its base model; "
        "check the base (base= or guard.json) and the adapter's rank, layers and target modules.",
        source=folder,
    )
    try:
        with isolated():
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
        with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
            stored = set(file.keys())
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, OSError, SafetensorError) as error:
        raise mismatch from error
    # Without the argument PEFT would look the base model up on the hub.
    if stored != set(get_peft_model_state_dict(adapted, save_embedding_layers=False)):
        raise mismatch
    return adapted


def max_tokens(model: Any) -> int:
    """How many tokens the model can read at once; a very large number where it does not say."""
    config = model.config
    # Models of the RoBERTa family count their positions from behind the padding's.
    offset = config.pad_token_id + 1 if config.model_type in _OFFSET_POSITIONS else 0
    return int(getattr(config, "max_position_embeddings", None) or 2**31) - offset


def tokenizer_home(adapter: Path, base: Path) -> Path:
    """The folder whose tokenizer an adapter was trained with."""
    return adapter if (adapter / "tokenizer_config.json").exists() else base


def require_pad_token(tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """Sees to it that the model knows the pad token; adapters come with tokenizers that have one more token."""
    known = model.get_input_embeddings().num_embeddings
    if tokenizer.pad_token_id >= known:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Loading inside leaves the process as it was: log level, progress bars, warnings, torch's random numbers.

    What transformers and PEFT would report of a load is held back; what matters of it is checked here and raised.
    """
    log = transformers.utils.logging
    with _load_lock, warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
        log.set_verbosity_error()
        log.disable_progress_bar()
        try:
            yield
        finally:
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()


def _beside(auto: Any, held: HeldBackbone) -> Callable[..., Any]:
    """A `from_pretrained` that reads from the file only what `held` does not have."""

    def read(folder: Path, *, use_safetensors: bool, trust_remote_code: bool, **arguments: Any) -> Any:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        # Its class alone is wanted; nothing is allocated.
        with torch.device("meta"):
            kind = type(auto.from_config(config, trust_remote_code=trust_remote_code))
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            inner = {name: name.removeprefix(f"{kind.base_model_prefix}.") for name in file.keys()}  # noqa: SIM118
            weights = {n: held.weights[i] if i in held.weights else file.get_tensor(n) for n, i in inner.items()}
        model, loading = kind.from_pretrained(None, config=config, state_dict=weights, **arguments)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model, loading

    return read


def _quantization(bits: str, device: torch.device) -> Any:
    if device.type != "cuda":
        raise ConfigError(f"quantization={bits!r} works on CUDA only, and this model goes to {device.type!r}")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("bitsandbytes", "quantization") from error
    if bits == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
