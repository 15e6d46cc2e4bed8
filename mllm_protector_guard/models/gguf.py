"""Turns a GGUF file of the Llama family into a folder that transformers loads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from mllm_protector_guard.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from numpy.typing import NDArray

__all__ = ["CONVERTER", "convert"]

CONVERTER = 1
"""Version of what `convert` writes; a folder of another version is made anew."""

_CONTROL = 3  # the token type of special tokens

_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(gguf_file: Path, folder: Path, show_progress: bool) -> None:
    """Writes config, tokenizer, chat template and float16 safetensors weights into `folder`.

    Raises:
        CheckpointError: The file is not a Llama model with a byte-level BPE tokenizer in GGUF.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf_file)
    except ValueError as error:
        raise CheckpointError(f"{gguf_file.name!r} is not a GGUF file that can be read.", source=gguf_file) from error
    kind = _field(reader, "general.architecture"), _field(reader, "tokenizer.ggml.model")
    if kind != ("llama", "gpt2"):
        raise CheckpointError(
            f"{gguf_file.name!r} holds no Llama model with a byte-level BPE, the only kind known here.",
            source=gguf_file,
        )
    _write_config(reader, folder)
    _write_tokenizer(reader, folder)
    _write_weights(reader, folder, show_progress)


def _field(reader: GGUFReader, key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _write_config(reader: GGUFReader, folder: Path) -> None:
    from transformers import GenerationConfig, LlamaConfig

    heads = _field(reader, "llama.attention.head_count")
    special = {
        f"{ours}_token_id": _field(reader, f"tokenizer.ggml.{theirs}_token_id")
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float16",
        vocab_size=len(_field(reader, "tokenizer.ggml.tokens")),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv", heads),
        max_position_embeddings=_field(reader, "llama.context_length"),
        rms_norm_eps=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _field(reader, "llama.rope.freq_base", 10000.0)},
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        **special,
    )
    config.save_pretrained(folder)
    GenerationConfig(**special).save_pretrained(folder)


def _write_weights(reader: GGUFReader, folder: Path, show_progress: bool) -> None:
    import numpy as np
    from gguf import dequantize
    from safetensors.numpy import save_file

    heads = _field(reader, "llama.attention.head_count")
    rotated = {"attn_q": heads, "attn_k": _field(reader, "llama.attention.head_count_kv", heads)}
    weights: dict[str, NDArray[np.float16]] = {}
    for tensor in tqdm(reader.tensors, desc="convert", unit="tensor", disable=not show_progress, mininterval=0.25):
        values = dequantize(tensor.data, tensor.tensor_type)
        part = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if part is not None and part[2] in _IN_LAYER:
            name = f"model.layers.{part[1]}.{_IN_LAYER[part[2]]}.weight"
            if part[2] in rotated:
                values = _to_half_rotation(values, rotated[part[2]])
        elif tensor.name in _OUTSIDE:
            name = _OUTSIDE[tensor.name]
        else:
            raise CheckpointError(f"the GGUF file has the unknown tensor {tensor.name!r}.", source=folder)
        weights[name] = np.ascontiguousarray(values, dtype=np.float16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _to_half_rotation(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorders the rows of each head from GGUF's rotary layout (pairs side by side) to transformers' (two halves).

    Args:
        values: float32 [rows, columns], rows = heads x head size.
        heads: How many heads the rows belong to.
    """
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # The original also splits numbers into digits. No token or merge holds two digits, so the ids are the same.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = _field(reader, "tokenizer.ggml.token_type")
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL
        ]
    )
    named = {
        f"{ours}_token": tokens[_field(reader, f"tokenizer.ggml.{theirs}_token_id")]
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if _field(reader, f"tokenizer.ggml.{theirs}_token_id") is not None
    }
    chat_template = _field(reader, "tokenizer.chat_template")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **named).save_pretrained(folder)
