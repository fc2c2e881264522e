"""Where each architecture of transformers keeps its heads, neurons, experts, layers and embedding channels."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from pruning.held import held_by

_TASKS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
_GPT2 = ("Model", "LMHeadModel", "DoubleHeadsModel", *_TASKS[2:])
_BERT = ("Model", "LMHeadModel", "ForMaskedLM", "ForPreTraining", "ForNextSentencePrediction", "ForMultipleChoice",
         *_TASKS[2:])  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A projection whose outputs belong to units: the `index`-th of the equal parts that `module` fuses.

    grouped: laid out by key-value heads, not by heads."""

    module: str
    index: int = 0
    grouped: bool = False


@dataclass(frozen=True)
class Family:
    """One architecture. Names of modules are relative to a layer, `layers` and `embedding` to the base model.

    prefix and tasks: the classes are named prefix + task. projections: to heads; `attention` is the module that a
    layer without heads does without, `output` the projection after it. joined_heads: heads that share a normalisation,
    so that none can go without changing the others. inputs, hidden: the projections to and from the neurons.
    experts: the stacked experts ([E, 2·F, D] and [E, D, F]), whose router is `router`.
    transposed: weights lie [in, out] (Conv1D). flattened: the feed-forward sees [B·L, ...].
    norms: of a layer; with `embedding`, `positions` (tables that are added to it) and `norm` (after the last layer, or
    before the first) what carries the embedding width. entry, exit: projections from the embedding to the width and
    back, where a model has them (OPT-350M).
    hidden_key: what the config calls the neurons. heads_in_config: whether the config can say how many heads there are
    whatever the width is; width_in_config: whether it can say the width whatever the heads are. Where it can do neither
    it says both if heads and their size make up the width."""

    prefix: str
    tasks: tuple[str, ...] = _TASKS
    layers: str = "layers"
    attention: str = "self_attn"
    head_dim: str = "head_dim"
    projections: tuple[Part, ...] = (
        Part("self_attn.q_proj"), Part("self_attn.k_proj", grouped=True), Part("self_attn.v_proj", grouped=True),
    )  # fmt: skip
    output: str = "self_attn.o_proj"
    dropout: str | None = None
    joined_heads: bool = False
    inputs: tuple[Part, ...] = (Part("mlp.gate_proj"), Part("mlp.up_proj"))
    hidden: str = "mlp.down_proj"
    experts: str | None = None
    router: str = "mlp.gate"
    transposed: bool = False
    flattened: bool = False
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    embedding: str = "embed_tokens"
    positions: tuple[str, ...] = ()
    norm: str = "norm"
    entry: str | None = None
    exit: str | None = None
    hidden_key: str = "intermediate_size"
    heads_in_config: bool = True
    width_in_config: bool = True

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the supported classes."""
        return tuple(self.prefix + task for task in self.tasks)


_LINEAR = (Part("self_attn.q_proj"), Part("self_attn.k_proj"), Part("self_attn.v_proj"))
_FUSED = tuple(Part("attn.c_attn", index) for index in range(3))
FAMILIES = (
    Family("Llama"),
    Family("Mistral"),
    Family("Qwen2"),
    Family("Qwen3"),
    Family("Mixtral", inputs=(), hidden="", experts="mlp.experts"),
    Family("Olmoe", tasks=_TASKS[:2], joined_heads=True, inputs=(), hidden="", experts="mlp.experts",
           width_in_config=False),
    Family("GPT2", tasks=_GPT2, layers="h", attention="attn", projections=_FUSED, output="attn.c_proj",
           dropout="resid_dropout", inputs=(Part("mlp.c_fc"),), hidden="mlp.c_proj", transposed=True,
           norms=("ln_1", "ln_2"), embedding="wte", positions=("wpe",), norm="ln_f", hidden_key="n_inner",
           heads_in_config=False, width_in_config=False),
    Family("OPT", tasks=(*_TASKS[:3], _TASKS[4]), layers="decoder.layers", projections=_LINEAR,
           output="self_attn.out_proj", inputs=(Part("fc1"),), hidden="fc2", flattened=True,
           norms=("self_attn_layer_norm", "final_layer_norm"), embedding="decoder.embed_tokens",
           positions=("decoder.embed_positions",), norm="decoder.final_layer_norm", entry="decoder.project_in",
           exit="decoder.project_out", hidden_key="ffn_dim", heads_in_config=False, width_in_config=False),
    Family("Bert", tasks=_BERT, layers="encoder.layer", attention="attention.self", head_dim="attention_head_size",
           projections=tuple(Part(f"attention.self.{name}") for name in ("query", "key", "value")),
           output="attention.output.dense", inputs=(Part("intermediate.dense"),), hidden="output.dense",
           norms=("attention.output.LayerNorm", "output.LayerNorm"), embedding="embeddings.word_embeddings",
           positions=("embeddings.position_embeddings", "embeddings.token_type_embeddings"),
           norm="embeddings.LayerNorm", heads_in_config=False, width_in_config=False),
)  # fmt: skip
SUPPORTED: dict[str, Family] = {name: family for family in FAMILIES for name in family.classes}


def family_of(model: nn.Module) -> Family | None:
    """The family of a model of a supported class, or of a class derived from one; None for any other."""
    return next((SUPPORTED[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in SUPPORTED), None)


@dataclass(frozen=True)
class Place:
    """A model, its family, and the prefix of its base model's parameters."""

    model: Any
    family: Family

    @property
    def base(self) -> Any:
        """The model without its head: itself where it has none."""
        return getattr(self.model, self.model.base_model_prefix, self.model)

    @property
    def prefix(self) -> str:
        """What the base model's names begin with: "model.", or nothing."""
        return "" if self.base is self.model else f"{self.model.base_model_prefix}."

    @property
    def layers(self) -> nn.ModuleList:
        """The layers, in order."""
        return self.base.get_submodule(self.family.layers)

    def where(self, index: int) -> str:
        """The name of layer `index`."""
        return f"{self.prefix}{self.family.layers}.{index}"


def weight_of(layer: nn.Module, name: str, tensor: str = "weight") -> nn.Parameter:
    """Module `name` of a layer: its weight.

    Raises: ValueError unless it is a plain parameter in half, single or double precision."""
    module = layer.get_submodule(name)
    found = getattr(module, tensor, None)
    # quantised, sharded and reparametrised weights are other types, or hold scales that a cut would leave behind
    if type(found) is not nn.Parameter or not found.is_floating_point() or found.element_size() < 2:
        got = getattr(found, "dtype", None) if type(found) is nn.Parameter else type(found).__name__
        raise ValueError(
            f"{name}.{tensor} must be a plain parameter in float16, bfloat16, float32 or float64, got {got}: prune the "
            f"model before it is quantised, sharded or reparametrised{held_by(dict(module.named_parameters()), tensor)}"
        )
    return found


def row_multiple(place: Place) -> int:
    """What divides the length of a row of the stacked experts, where grouped products need rows of 16 bytes; else 1."""
    if place.family.experts is None or "grouped" not in str(place.model.config._experts_implementation):
        return 1
    return 16 // weight_of(place.layers[0], place.family.experts, "down_proj").element_size()


def neuron_multiple(place: Place) -> int:
    """What divides the neurons of stacked experts under grouped products: 8, so that a model that is cut in float32
    runs in bfloat16 too; else 1."""
    return 8 if row_multiple(place) > 1 else 1


def features(family: Family, layer: nn.Module, name: str) -> tuple[int, int]:
    """(inputs, outputs) of a projection, by its weight: attributes may be out of date."""
    first, second = weight_of(layer, name).shape
    return (first, second) if family.transposed else (second, first)


def set_attributes(layer: nn.Module, names: tuple[str, ...], value: int) -> None:
    """Wherever one of the layer's modules has such an attribute."""
    for module in layer.modules():
        for name in names:
            if hasattr(module, name):
                setattr(module, name, value)
