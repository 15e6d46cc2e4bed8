"""Random checkpoints of a few kilobytes in every layout that the loaders read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from mllm_protector_guard.models.checkpoint import (
    BaseReference,
    DetectorConfig,
    DetoxifierConfig,
    write_config,
)

HIDDEN, LAYERS = 32, 3
OFFICIAL_DETECTOR = "renjiepi/protector_detector_3b_lora"
OFFICIAL_DETECTOR_BASE = "openlm-research/open_llama_3b_v2"
OFFICIAL_DETOXIFIER = "renjiepi/mllm_protector_detoxifier"
OFFICIAL_DETOXIFIER_BASE = "lmsys/vicuna-7b-v1.5"

_CORPUS = [
    "How do I bake bread? Mix flour, water, salt and yeast, wait, and bake.",
    "What is in the picture? A cat is in the picture.",
    "The weather was mild and the garden grew. Question: Answer: user assistant",
]


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with the tokens of ChatML."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file_sep>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def llama_tokenizer(*, pad_token: str | None = None) -> PreTrainedTokenizerFast:
    """A BPE on words that begin with ▁, with bytes for what it does not know and a BOS: as Llama's."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    special = ["<unk>", "<s>", "</s>"]
    trained.train_from_iterator(
        _CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special + byte_tokens, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=model["vocab"],
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.pre_tokenizer = trained.pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", model["vocab"]["<s>"])]
    )
    more = {} if pad_token is None else {"pad_token": pad_token}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        **more,
    )


def save_causal_lm(folder: Path, tokenizer: PreTrainedTokenizerFast, *, layers: int = LAYERS, **more: Any) -> Path:
    return _save(LlamaForCausalLM, llama_config(tokenizer, layers, **more), folder, tokenizer)


def save_classifier(folder: Path, tokenizer: PreTrainedTokenizerFast, *, labels: Sequence[str] = ("LABEL_0",)) -> Path:
    names = dict(enumerate(labels))
    config = llama_config(tokenizer, id2label=names, label2id={name: index for index, name in names.items()})
    return _save(LlamaForSequenceClassification, config, folder, tokenizer)


def save_encoder(folder: Path, *, positions: int = 128) -> Path:
    """A classifier with absolute positions, which reads no more than `positions` tokens."""
    tokenizer = chat_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=positions,
        num_labels=1,
        initializer_range=0.5,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(BertForSequenceClassification, config, folder, tokenizer)


def llama_config(tokenizer: PreTrainedTokenizerFast, layers: int = LAYERS, **more: Any) -> LlamaConfig:
    fields = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return LlamaConfig(**{**fields, **more})


def save_adapter(folder: Path, model: Any, *, base_name: str, rank: int = 4, seed: int = 1, **lora: Any) -> Path:
    """A LoRA adapter on the attention of `model`, none of its weights zero, in PEFT's own layout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=8, target_modules=["q_proj", "v_proj"], **lora)
        adapted = get_peft_model(model, config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
    weights = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    folder.mkdir(parents=True)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "adapter_model.safetensors")
    config.inference_mode = True
    config.base_model_name_or_path = base_name
    config.save_pretrained(folder)
    return folder


def save_official_detector(folder: Path, base: Path, *, rank: int = 4) -> Path:
    """The layout of the paper's detector: LoRA and the one-unit head `score`, nothing else."""
    model = LlamaForSequenceClassification.from_pretrained(base, num_labels=1)
    return save_adapter(
        folder, model, base_name=OFFICIAL_DETECTOR_BASE, rank=rank, task_type="SEQ_CLS", modules_to_save=["score"]
    )


def save_official_detoxifier(folder: Path, base: Path) -> Path:
    model = LlamaForCausalLM.from_pretrained(base)
    return save_adapter(folder, model, base_name=OFFICIAL_DETOXIFIER_BASE, task_type="CAUSAL_LM")


def save_detector(folder: Path, base: Path, *, adapter: dict[str, Any] | None = None, **fields: Any) -> Path:
    """A detector in the package's own format."""
    given = {"template": "chatml", "layers": 2, "revision": "0", "licence": "MIT", **fields}
    config = DetectorConfig(base=given.pop("reference", BaseReference(name=str(base))), **given)
    backbone = AutoModel.from_pretrained(base, num_hidden_layers=config.layers or LAYERS)
    save_adapter(folder, backbone, base_name=str(base), **adapter or {})
    generator = torch.Generator().manual_seed(2)
    head = {"weight": torch.randn(1, HIDDEN, generator=generator), "bias": torch.randn(1, generator=generator)}
    save_file(head, folder / "head.safetensors")
    write_config(folder, config)
    return folder


def save_detoxifier(folder: Path, base: Path, *, adapter: dict[str, Any] | None = None, **fields: Any) -> Path:
    """A detoxifier in the package's own format."""
    given = {"template": "chatml", "max_new_tokens": 8, "revision": "0", "licence": "MIT", **fields}
    config = DetoxifierConfig(base=given.pop("reference", BaseReference(name=str(base))), **given)
    save_adapter(folder, LlamaForCausalLM.from_pretrained(base), base_name=str(base), **adapter or {})
    write_config(folder, config)
    return folder


def save_in_hub_cache(cache: Path, repo: str, source: Path) -> None:
    """Puts `source` where a download of `repo` would have put it."""
    home = cache / f"models--{repo.replace('/', '--')}"
    commit = "1" * 40
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "snapshots").mkdir()
    (home / "snapshots" / commit).symlink_to(source)


def _save(kind: Any, config: Any, folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
