"""Every learned selection as a layer choice: trained, counted, decoded, saved; refused where it does not fit."""

import dataclasses
import json

import pytest
import torch

from tests.tolerances import close
from tests.typecheck import unchecked
from training.data import Batch
from training.step import SideLosses, forward
from transformer import (
    AttentionConfig,
    DenseConfig,
    DepthConfig,
    DSAConfig,
    KMeansConfig,
    LayerConfig,
    LSHConfig,
    MoBAConfig,
    NSAConfig,
    SinkhornConfig,
    TopKKeysConfig,
    Transformer,
    TransformerConfig,
    generate,
)
from transformer.accounting import flops_per_token
from transformer.selection_config import SELECTIONS
from transformer.selection_cost import selection_flops

LENGTH = 21
CHOICES = {
    "moba": MoBAConfig(block=4, top_k=2),
    "top_k": TopKKeysConfig(5),
    "nsa": NSAConfig(compress=4, stride=2, block=4, top_n=3, initial=1, local=1, window=5),
    "dsa": DSAConfig(top_k=5, heads=2, head_dim=4),
    "lsh": LSHConfig(num_buckets=4, rounds=2, chunk=3),
    "kmeans": KMeansConfig(num_clusters=3, window=4),
    "sinkhorn": SinkhornConfig(block=4, max_blocks=6),
}
VARIANTS = CHOICES | {
    "nsa narrow": dataclasses.replace(CHOICES["nsa"], mlp_hidden=3, initial=0, local=2),
    "dsa turned": dataclasses.replace(CHOICES["dsa"], rope_dim=2, rope_theta=50.0),
    "lsh shared": dataclasses.replace(CHOICES["lsh"], shared_qk=True),
    "kmeans shared": dataclasses.replace(CHOICES["kmeans"], shared_qk=True),
}
PAIRS = ("moba", "top_k", "dsa")  # those whose record says which keys every query sees


def config(selection, **options):
    options = {"max_length": LENGTH, **options}
    kv_heads = 4 if getattr(selection, "shared_qk", False) else 2
    layer = LayerConfig(AttentionConfig(4, kv_heads, 8, selection=selection), DenseConfig(16))
    return TransformerConfig(vocab_size=19, dim=16, layers=(layer,) * 2, **options)


def model(selection):
    return Transformer(config(selection), generator=torch.Generator().manual_seed(0))


def ids(rows=2):
    return torch.randint(19, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


def loss_of(built):
    out = built(ids(), labels=ids())
    return out.loss + sum(sum(losses.values()) for losses in out.selection_losses)


def chosen(built, tokens):
    """What the first layer chose, by a hook on its selection."""
    found = []
    handle = built.layers[0].attention.selection.register_forward_hook(lambda module, args, out: found.append(out))
    built(tokens)
    handle.remove()
    return found[0].chosen


def test_every_kind_is_here():
    assert CHOICES.keys() == SELECTIONS.keys()
    assert all(isinstance(choice, SELECTIONS[kind]) for kind, choice in CHOICES.items())


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_step_reaches_every_parameter_and_the_config_survives(kind, tmp_path):
    built = model(VARIANTS[kind])
    loss_of(built).backward()
    assert [name for name, p in built.named_parameters() if p.grad is None] == []
    built.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert again.config == built.config
    assert TransformerConfig.from_dict(json.loads(json.dumps(built.config.to_dict()))) == built.config
    close(again(ids()).logits, built.eval()(ids()).logits)


@pytest.mark.parametrize("kind", CHOICES)
def test_it_trains(kind):
    built = model(CHOICES[kind]).train()
    optimizer = torch.optim.Adam(built.parameters(), lr=2e-2)
    losses = []
    for _ in range(8):
        loss = loss_of(built)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("kind", VARIANTS)
def test_no_token_sees_a_later_one(kind):
    built, one, other = model(VARIANTS[kind]).eval(), ids(), ids()
    other[:, 13:] = (other[:, 13:] + 7) % 19
    with torch.no_grad():
        close(built(other).logits[:, :13], built(one).logits[:, :13])


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("kind", VARIANTS)
def test_cached_decoding_equals_the_full_forward(kind, chunk):
    # float64: in float32 a near tie between two blocks may fall either way
    built = model(VARIANTS[kind]).eval().double()
    with torch.no_grad():
        whole = built(ids()).logits
        cache = built.new_cache()
        parts = [built(part, cache=cache).logits for part in ids().split(chunk, 1)]
    close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("kind", VARIANTS)
def test_padding_on_the_right_changes_nothing_before_it(kind):
    built = model(VARIANTS[kind]).eval()
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1, 14:] = False
    with torch.no_grad():
        close(built(ids(), attention_mask=mask).logits[1, :14], built(ids()[1:, :14]).logits[0])


@pytest.mark.parametrize("kind", VARIANTS)
def test_checkpointing_chooses_nothing_anew(kind):
    losses, gradients = [], []
    for checkpointing in (False, True):
        built = model(VARIANTS[kind]).train()
        built.gradient_checkpointing(checkpointing)
        loss = loss_of(built)
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in built.parameters()])
    close(losses[1], losses[0])
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        close(found, expected)


@pytest.mark.parametrize("length", [1, 4, 7, LENGTH])
@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_are_those_of_the_mask(kind, length):
    pairs = int(chosen(model(CHOICES[kind]).eval(), ids(1)[:, :length]).to_mask()[0, 0].sum())
    earlier = [(i, j) for i in range(length) for j in range(i + 1)]
    choosing = {
        "moba": 2 * 2 * 8 * len({(i, j // 4) for i, j in earlier}),
        "top_k": 2 * 4 * 8 * len(earlier),
        # the indexer's two heads of 4 and their weights, then its scores and their weighted sum
        "dsa": 2 * length * (16 * 2 * 4 + 16 * 4 + 16 * 2) + 2 * 2 * (4 + 1) * len(earlier),
    }[kind]
    attention = config(CHOICES[kind]).layers[0].attention
    assert selection_flops(16, attention, length) == choosing + 4 * 4 * 8 * pairs


def test_pairs_of_the_three_branches_of_nsa():
    attention = config(CHOICES["nsa"]).layers[0].attention
    behind = sum(2 * c + 4 <= i + 1 for i in range(LENGTH) for c in range(LENGTH))
    blocks = sum(j // 4 >= i // 4 or j // 4 < 2 for i in range(LENGTH) for j in range(i + 1) if i < 12)
    blocks += sum(i % 4 + 1 + 8 for i in range(12, LENGTH))
    window = sum(i - j < 5 for i in range(LENGTH) for j in range(i + 1))
    compressing = 2 * 2 * 9 * 2 * (4 * 8 * 16 + 16 * 8)
    expected = compressing + 2 * 16 * 3 * 4 * LENGTH + 4 * 4 * 8 * (behind + blocks + window)
    assert selection_flops(16, attention, LENGTH) == expected


@pytest.mark.parametrize("kind", CHOICES)
def test_flops_grow_with_the_length_and_stay_below_dense_for_long_texts(kind):
    attention = config(CHOICES[kind]).layers[0].attention
    counts = [selection_flops(16, attention, length) for length in (1, 16, 256, 1024)]
    assert counts == sorted(counts) and counts[0] > 0
    assert counts[-1] < 4 * 4 * 8 * 1024 * 1025 / 2


@pytest.mark.parametrize(("kind", "name"), [("dsa", "indexer_kl"), ("kmeans", "kmeans_commitment")])
def test_side_losses_reach_the_training_loss(kind, name):
    built = model(CHOICES[kind]).train()
    batch = Batch(ids()[:, :-1], ids()[:, 1:])
    found = forward(built, batch, side=SideLosses(**{name: 0.5}))
    assert found.side.keys() == {name} and found.side[name].shape == (2,) and (found.side[name] > 0).all()
    close(found.loss, found.ce + 0.5 * found.side[name].sum())
    made = built(batch.inputs).selection_losses
    close(torch.stack([losses[name] for losses in made]), found.side[name])
    assert built.eval()(batch.inputs).selection_losses == ({}, {})
    assert forward(model(CHOICES["moba"]), batch).side == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": {"kind": "moba"}}, "selection must be None or one of MoBAConfig, TopKKeysConfig"),
        (
            {"selection": CHOICES["moba"], "pattern": "causal() & sinks(2)"},
            r"MoBAConfig chooses among all earlier keys: pattern must be causal\(\), got 'causal\(\) & sinks\(2\)'",
        ),
        (
            {"selection": CHOICES["top_k"], "pattern": "sliding_window(3)"},
            r"pattern must be causal\(\) & ... with a selection, got 'sliding_window\(3\)'",
        ),
        (
            {"selection": CHOICES["dsa"], "pattern": "causal() & per_head(sinks(1), sinks(2))"},
            "per_head must hold a pattern for each of num_heads=4 query heads, got 2",
        ),
        (
            {"selection": CHOICES["dsa"], "pattern": "causal() & per_head(sinks(1), sinks(2), sinks(1), sinks(2))"},
            "pattern must be one for all heads, whose choice DSA shares, got 'causal",
        ),
    ],
)
def test_what_an_attention_refuses(options, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        AttentionConfig(4, 2, 8, **options)


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        (MoBAConfig, {"block": 0}, "block must be >= 1, got 0"),
        (MoBAConfig, {"top_k": 0}, "top_k must be >= 1, got 0"),
        (TopKKeysConfig, {"k": 0}, "k must be >= 1, got 0"),
        (NSAConfig, {"stride": 12}, "stride must divide compress=32, got 12"),
        (NSAConfig, {"top_n": 2}, "top_n must be >= initial \\+ local = 3, got 2"),
        (NSAConfig, {"window": 0}, "window must be >= 1, got 0"),
        (NSAConfig, {"mlp_hidden": 0}, "mlp_hidden must be >= 1, got 0"),
        (DSAConfig, {"heads": 0}, "heads must be >= 1, got 0"),
        (DSAConfig, {"rope_dim": 3}, r"rope_dim must be even and in \[0, head_dim=32\], got 3"),
        (DSAConfig, {"rope_theta": 0.0}, "rope_theta must be > 0, got 0.0"),
        (LSHConfig, {"num_buckets": 5}, "num_buckets must be even, got 5"),
        (KMeansConfig, {"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        (SinkhornConfig, {"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        (SinkhornConfig, {"seed": 2**64}, r"seed must be in \[-2\*\*63, 2\*\*64\), got 18446744073709551616"),
        (KMeansConfig, {"seed": -(10**30)}, r"seed must be in \[-2\*\*63, 2\*\*64\), got -10{30}"),
        (LSHConfig, {"seed": -(2**63) - 1}, r"seed must be in \[-2\*\*63, 2\*\*64\), got -9223372036854775809"),
    ],
)
def test_sizes_of_selections_are_checked(record, options, message):
    with pytest.raises(ValueError, match=message):
        record(**options)


def test_a_sinkhorn_layer_has_room_for_every_block():
    with pytest.raises(ValueError, match="layer 0: max_blocks must be >= 7 for max_length=25 in blocks of 4, got 6"):
        config(CHOICES["sinkhorn"], max_length=25)


def test_an_unknown_kind_or_key_of_a_selection_is_named():
    record = config(CHOICES["moba"]).to_dict()
    record["layers"][0]["attention"]["selection"]["kind"] = "mobb"
    with pytest.raises(ValueError, match=r"layers\[0\].attention.selection.kind must be one of .*'mobb'"):
        TransformerConfig.from_dict(record)
    record["layers"][0]["attention"]["selection"] = {"kind": "moba", "blok": 3}
    with pytest.raises(ValueError, match=r"unknown key 'blok' in .*; did you mean 'block'\?"):
        TransformerConfig.from_dict(record)


def test_an_encoder_and_a_layer_with_depth_take_no_selection():
    with pytest.raises(ValueError, match="layer 0: a selection never looks ahead: set causal=True, or selection=None"):
        config(CHOICES["moba"], causal=False)
    layer = config(CHOICES["moba"]).layers[0]
    with pytest.raises(ValueError, match="selection must be None in a layer with depth"):
        dataclasses.replace(layer, depth=DepthConfig())


@pytest.mark.parametrize("kind", VARIANTS)
def test_prompts_of_unequal_length_are_each_as_if_alone(kind):
    built, lengths = model(VARIANTS[kind]).eval().double(), [3, 9, 6, 9]
    tokens = torch.randint(19, (4, 14), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(9) >= 9 - torch.tensor(lengths)[:, None]
    cache = built.new_cache(unequal_rows=4)
    with torch.no_grad():
        # in chunks, of which the first holds nothing of the first prompt; then token by token
        parts = [built(tokens[:, a:b], attention_mask=mask[:, a:b], cache=cache).logits for a, b in ((0, 5), (5, 9))]
        parts += [built(tokens[:, at : at + 1], cache=cache).logits for at in range(9, 14)]
        for row, length in enumerate(lengths):
            close(torch.cat(parts, 1)[row, 9 - length :], built(tokens[row : row + 1, 9 - length :]).logits[0])
    options = {"max_new_tokens": 4, "prefill_chunk": 4}
    both = generate(built, tokens[:, :9], attention_mask=mask, **options)
    for row, length in enumerate(lengths):
        alone = generate(built, tokens[row : row + 1, 9 - length : 9], **options)
        assert both[row : row + 1, 9 - length :].equal(alone)


def test_a_cache_of_unequal_rows_is_for_evaluation():
    built = model(CHOICES["moba"]).train()
    with pytest.raises(ValueError, match="needs positions, and a selection in evaluation mode"):
        built(ids(), cache=built.new_cache(unequal_rows=2))


@pytest.mark.parametrize("kind", ["lsh shared", "kmeans shared"])
def test_shared_queries_and_keys_have_one_projection(kind):
    built, apart = model(VARIANTS[kind]), model(dataclasses.replace(VARIANTS[kind], shared_qk=False))
    assert built.layers[0].attention.query is None
    assert "layers.0.attention.query.weight" not in built.state_dict()
    apart_config = TransformerConfig(
        vocab_size=19, dim=16, max_length=LENGTH,
        layers=tuple(
            dataclasses.replace(
                layer, attention=dataclasses.replace(layer.attention, num_kv_heads=4, selection=dataclasses.replace(
                    layer.attention.selection, shared_qk=False)),
            )
            for layer in built.config.layers
        ),
    )  # fmt: skip
    assert Transformer(apart_config).num_parameters() - built.num_parameters() == 2 * 16 * 32
    hashed = 2 * 4 * 8 * (2 * 2 if kind == "lsh shared" else 3)
    saved = flops(apart_config) - flops(built.config)
    assert saved == pytest.approx(2 * (2 * 16 * 32 + hashed))
    assert apart.layers[0].attention.query is not None
    with pytest.raises(ValueError, match="num_kv_heads must be num_heads=4 with shared_qk, got 2"):
        AttentionConfig(4, 2, 8, selection=VARIANTS[kind])


def flops(config):
    return flops_per_token(config, LENGTH)


def test_an_encoder_sorts_its_blocks_both_ways():
    both = dataclasses.replace(CHOICES["sinkhorn"], causal=False)
    layer = LayerConfig(AttentionConfig(4, 2, 8, "full()", selection=both), DenseConfig(16))
    encoder = TransformerConfig(vocab_size=19, dim=16, layers=(layer,) * 2, max_length=LENGTH, causal=False)
    assert TransformerConfig.from_dict(json.loads(json.dumps(encoder.to_dict()))) == encoder
    built, other, mask = Transformer(encoder).eval(), ids(), torch.ones(2, LENGTH, dtype=torch.bool)
    other[:, -1] = (other[:, -1] + 7) % 19
    assert (built(other).logits - built(ids()).logits)[:, 0].abs().max() > 1e-5
    mask[1, 14:] = False
    close(built(ids(), attention_mask=mask).logits[1, :14], built(ids()[1:, :14]).logits[0])
    assert selection_flops(16, layer.attention, 24) > selection_flops(
        16, config(CHOICES["sinkhorn"]).layers[0].attention, 24
    )
    with pytest.raises(ValueError, match=r"pattern must be full\(\) with a selection of causal=False, got 'causal"):
        AttentionConfig(4, 2, 8, selection=both)
    with pytest.raises(ValueError, match="sees the future"):
        dataclasses.replace(encoder, causal=True)


def test_heads_that_choose_their_keys_are_no_prunable_axis():
    kinds = {axis.kind for axis in model(CHOICES["moba"]).prunable_axes()}
    assert "neuron" in kinds and "head" not in kinds
