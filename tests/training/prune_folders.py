"""Tiny untrained models with a tokenizer of bytes, saved as this library and as transformers save them."""

import json
from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing

from pruning import load_pruned
from training.tokenizer import byte_tokenizer
from transformer import DenseConfig, MoEConfig, Transformer, TransformerConfig

HF = {
    "llama": ("Llama", "LlamaForCausalLM", {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
                                            "num_attention_heads": 4, "num_key_value_heads": 2}),
    "gpt2": ("GPT2", "GPT2LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 4}),
    "bert": ("Bert", "BertForMaskedLM", {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                                         "num_attention_heads": 4}),
    "minilm": ("Bert", "BertModel", {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                                     "num_attention_heads": 4}),
    "t5": ("T5", "T5ForConditionalGeneration", {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4,
                                                "decoder_start_token_id": 256}),
    "bloom": ("Bloom", "BloomForCausalLM", {"hidden_size": 16, "n_layer": 2, "n_head": 4}),
}  # fmt: skip
COMMON = {"vocab_size": 257, "max_position_embeddings": 32, "initializer_range": 0.3, "bos_token_id": 256,
          "eos_token_id": 256}  # fmt: skip


def own_folder(folder: Path, *, experts: int = 0, layers: int = 3, causal: bool = True) -> Path:
    """A dense model, or a mixture of experts; an encoder if not `causal`."""
    torch.manual_seed(0)
    feedforward = MoEConfig(hidden=16, num_experts=experts, k=2) if experts else DenseConfig(hidden=24)
    config = TransformerConfig.uniform(vocab_size=257, dim=16, num_layers=layers, num_heads=4, num_kv_heads=2,
                                       feedforward=feedforward, max_length=32, causal=causal)  # fmt: skip
    Transformer(config).save_pretrained(folder)
    byte_tokenizer().save(folder)
    return folder


def hf_folder(folder: Path, name: str) -> Path:
    """A model of transformers."""
    import transformers

    family, kind, sizes = HF[name]
    torch.manual_seed(0)
    getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**COMMON, **sizes)).save_pretrained(folder)
    backend = byte_tokenizer().backend
    if family == "Bert":
        end = "<|endoftext|>"
        backend.post_processor = TemplateProcessing(single=f"{end} $A {end}", special_tokens=[(end, 256)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


def texts_folder(folder: Path) -> Path:
    """Documents of words; any 12 bytes tell which document they are from."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(24):
        words = " ".join(f"{word}-{index:02d}" for word in "for while if else return".split())
        (folder / f"{index}.txt").write_text(f"{words}\n" * 4)
    return folder


def load(folder: Path) -> torch.nn.Module:
    """A model that was pruned into a folder, this library's or one of transformers."""
    own = json.loads((folder / "config.json").read_text())["model_type"] == "sparse-transformers"
    return Transformer.from_pretrained(folder) if own else load_pruned(folder, dtype=torch.float32)
