"""Small random models of every supported architecture, and what the tests know of each without asking the adapters."""

from dataclasses import dataclass

import pytest
import torch

transformers = pytest.importorskip("transformers")


@dataclass(frozen=True)
class Known:
    """base: prefix of the base model; layers, output, hidden: paths; options: of the config, beside the common ones.

    heads: whether a head can go alone; grouped: 2 key-value heads for 4 heads."""

    name: str
    task: str
    base: str
    layers: str = "layers"
    output: str = "self_attn.o_proj"
    hidden: str = "mlp.down_proj"
    heads: bool = True
    grouped: bool = True
    experts: bool = False
    options: tuple[tuple[str, object], ...] = ()

    def layer(self, index):
        return f"{self.base}{self.layers}.{index}"


_HF = (("intermediate_size", 24), ("num_key_value_heads", 2))
_MOE = (*_HF, ("num_local_experts", 5), ("num_experts_per_tok", 2))
KNOWN = {
    known.name: known
    for known in (
        Known("Llama", "ForCausalLM", "model.", options=(*_HF, ("attention_bias", True), ("mlp_bias", True))),
        Known("Mistral", "ForCausalLM", "model.", options=(*_HF, ("sliding_window", 4))),
        Known("Qwen2", "ForCausalLM", "model.",
              options=(*_HF, ("use_sliding_window", True), ("sliding_window", 3), ("max_window_layers", 1))),
        Known("Qwen3", "ForCausalLM", "model.", options=(*_HF, ("head_dim", 6), ("tie_word_embeddings", True))),
        Known("Mixtral", "ForCausalLM", "model.", experts=True, options=_MOE),
        Known("Olmoe", "ForCausalLM", "model.", experts=True, heads=False, options=_MOE),
        Known("GPT2", "LMHeadModel", "transformer.", "h", "attn.c_proj", "mlp.c_proj", grouped=False,
              options=(("scale_attn_by_inverse_layer_idx", True), ("n_inner", 24))),
        Known("OPT", "ForCausalLM", "model.", "decoder.layers", "self_attn.out_proj", "fc2", grouped=False,
              options=(("ffn_dim", 24), ("word_embed_proj_dim", 12))),
        Known("Bert", "ForMaskedLM", "bert.", "encoder.layer", "attention.output.dense", "output.dense", grouped=False,
              options=(("intermediate_size", 24),)),
    )
}  # fmt: skip
DENSE = [name for name, known in KNOWN.items() if not known.experts]
MIXTURES = [name for name, known in KNOWN.items() if known.experts]
LAYERS, HEADS, VOCABULARY = 3, 4, 31


def peer(name, *, task=None, attention="sdpa", **options):
    """A model in float32 and evaluation mode, with weights and biases so large that every unit matters."""
    known = KNOWN[name]
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": None,
        "eos_token_id": None, "attn_implementation": attention,
    } | dict(known.options)  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**{**settings, **options})
    model = getattr(transformers, f"{name}{task or known.task}")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_()
            elif parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return model


def ids(batch=3, length=7, seed=1):
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def answer(model, tokens, **options):
    """Logits, or the hidden states of a model without a head."""
    with torch.no_grad():
        output = model(tokens, **options)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def silence(model, module, gone, width):
    """From now on the units `gone` of this module's input are zero."""

    def hook(_, arguments):
        x = arguments[0].clone()
        for unit in gone:
            x[..., unit * width : (unit + 1) * width] = 0
        return (x, *arguments[1:])

    model.get_submodule(module).register_forward_pre_hook(hook)
