import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.typecheck import unchecked
from transformer import AttentionConfig, DenseConfig, LayerConfig, MoEConfig, TransformerConfig

attentions = st.builds(
    lambda groups, size, dim, pattern: AttentionConfig(groups * size, groups, 2 * dim, pattern),
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 8),
    st.sampled_from(["causal()", "causal() & (sliding_window(7) | sinks(2))"]),
)  # fmt: skip
denses = st.builds(DenseConfig, st.integers(1, 99), st.sampled_from(["swiglu", "gelu", "relu2"]))
moes = st.builds(
    lambda e, hidden, factor, shared: MoEConfig(
        hidden, e, k=min(2, e), capacity_factor=factor, shared_hidden=shared, renormalize=False
    ),
    st.integers(1, 8), st.integers(1, 99), st.none() | st.floats(0.5, 2), st.integers(0, 3),
)  # fmt: skip
layers = st.builds(LayerConfig, st.none() | attentions, st.none() | denses | moes)
configs = st.builds(
    TransformerConfig,
    vocab_size=st.integers(1, 999), dim=st.integers(1, 64), layers=st.lists(layers, max_size=4).map(tuple),
    max_length=st.integers(1, 4096), tied=st.booleans(), dropout=st.floats(0, 0.9), causal=st.booleans(),
)  # fmt: skip


@given(configs)
def test_json_round_trip(config):
    assert TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def small(**options):
    return TransformerConfig.uniform(**{"vocab_size": 11, "dim": 8, "num_layers": 2, "num_heads": 2, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be >= 1, got 0"),
        ({"num_heads": 3}, "num_heads must divide dim=8"),
        ({"num_heads": 0}, "num_heads must be >= 1, got 0"),
        ({"num_kv_heads": 0}, "num_kv_heads must be >= 1, got 0"),
        ({"num_heads": 4, "head_dim": 2, "num_kv_heads": 3}, "num_kv_heads must divide num_heads=4, got 3"),
        ({"head_dim": 3}, "head_dim must be even for rotary embeddings, got 3"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"pattern": "sliding_window(4)"}, "sees the future"),
        ({"pattern": "causal() & sliding_window(0)"}, "window must be >= 1, got 0"),
        ({"pattern": "causal() & sliding_windw(4)"}, "sliding_window"),
    ],
)
def test_bad_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 5}, r"k must be in \[1, num_experts=4\], got 5"),
        ({"k": 2, "router": "switch"}, "k must be 1, got 2"),
        ({"capacity_factor": 0.0}, "capacity_factor must be a finite number > 0, or None, got 0.0"),
        ({"jitter": 0.1}, "jitter belongs to the switch router"),
        ({"router": "sigmoid", "route_scale": -1.0}, r"^route_scale must be a finite number > 0, got -1\.0"),
        ({"router": "sigmoid", "route_scale": float("inf")}, r"^route_scale must be a finite number > 0, got inf"),
        (
            {"renormalize": False, "router": "hash"},
            "renormalize belongs to the top_k or sigmoid router, got renormalize=False with 'hash'",
        ),
        ({"drop_priority": "gate"}, "drop_priority needs a capacity_factor, got 'gate' with None"),
        (
            {"router": "expert_choice", "capacity_factor": 0.5},
            r"capacity_factor must be None under expert_choice, whose experts take T·k/E .*, got 0\.5: set k",
        ),
        ({"activation": "tanh"}, "activation must be one of swiglu, gelu, relu, silu, relu2, got 'tanh'"),
        ({"router": "topk"}, "router must be one of top_k, switch"),
    ],
)
def test_bad_experts(options, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**{"hidden": 8, "num_experts": 4, **options})


def change(record, *path, value):
    for key in path[:-1]:
        record = record[key]
    record[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("max_lenght",), 5, "unknown key 'max_lenght' in config; did you mean 'max_length'"),
        (("layers", 0, "attention", "heads"), 5, r"unknown key 'heads' in layers\[0\].attention"),
        (("layers", 1, "feedforward", "kind"), "mo", r"kind must be one of \['dense', 'moe', .*\], got 'mo'"),
        (("layers", 1, "feedforward", "kind"), [], r"feedforward.kind must be one of \['dense', .*got \[\]"),
        (("layers", 1, "feedforward", "kind"), {}, r"feedforward.kind must be one of \['dense', .*got {}"),
        (("layers", 0, "attention", "selection"), {"kind": []}, r"selection.kind must be one of \['dsa', .*got \[\]"),
        (("dim",), "8", "dim must be int, got '8'"),
        (("tied",), 1, "tied must be bool, got 1"),
        (("layers",), None, "layers must be a list"),
        (("layers", 0), 1, r"layers\[0\] must be a table, got 1"),
        (("layers", 0, "attention"), "x", r"layers\[0\].attention must be a table"),
        (("layers", 0, "feedforward"), 5, r"layers\[0\].feedforward must be a table"),
        (("layers", 0, "attention", "num_heads"), 2.0, "num_heads must be int, got 2.0"),
        (("rope_theta",), float("nan"), "rope_theta and norm_eps must be > 0"),
    ],
)
def test_bad_records(path, value, message):
    record = small().to_dict()
    change(record, *path, value=value)
    with unchecked(), pytest.raises(ValueError, match=message):
        TransformerConfig.from_dict(record)


def test_a_cut_config_file_says_so(tmp_path):
    small().save(tmp_path / "config.json")
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        TransformerConfig.load(tmp_path / "config.json")
