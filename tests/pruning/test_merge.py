"""Merging is exact for duplicates, follows the least error otherwise, and folds constants into biases."""

import copy

import pytest
import torch
from torch import nn

from pruning import Axis, Slice, prune_neurons
from pruning.merge import activation_moments, fold_constant_neurons, merge_neurons
from pruning.merge_experts import cluster, merge_experts
from tests.pruning.toy import tokens, toy
from tests.tolerances import close
from transformer import DenseConfig, MoEConfig, Transformer, TransformerConfig


def axis_of(model, kind="neuron"):
    return next(axis for axis in model.prunable_axes() if axis.kind == kind)


@torch.no_grad()
def duplicate(model, source, target, *, gain=1.0):
    """Neuron `target` of the toy computes gain times what `source` does."""
    layer = model.feedforward[0]
    hidden = layer.down.in_features
    for parameter in (layer.gate_up.weight, layer.gate_up.bias):
        parameter[target] = parameter[source]
        parameter[hidden + target] = gain * parameter[hidden + source]


def own(feedforward, seed=0):
    config = TransformerConfig.uniform(vocab_size=31, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, max_length=32,
                                       feedforward=feedforward)  # fmt: skip
    model = Transformer(config, generator=torch.Generator().manual_seed(seed)).eval()
    return model


def ids(batch=4, length=9, seed=0):
    return torch.randint(31, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", [{}, {"incoming": "average"}, {"batches": [tokens()]}])
def test_duplicates_merge_without_changing_the_output(options):
    model = toy((2, 1, 6))
    for source, target in ((0, 3), (0, 5)):
        duplicate(model, source, target)
    expected = model(tokens(seed=5))
    report = merge_neurons(model, fraction=1 / 3, **options)
    close(model(tokens(seed=5)), expected)
    name = "feedforward.0.neurons"
    assert {*report.gone[name], *report.into[name]} == {0, 3, 5} and report.errors[name] < 1e-9
    assert model.feedforward[0].down.in_features == 4 and "2 neurons merged" in str(report)
    assert report.parameters_after == sum(p.numel() for p in model.parameters()) < report.parameters_before


def test_multiples_merge_by_activations_alone():
    model = toy((2, 1, 6))
    duplicate(model, 1, 4, gain=-2.5)
    by_weights, expected = copy.deepcopy(model), model(tokens(seed=5))
    report = merge_neurons(model, fraction=1 / 6, batches=[tokens(), {"input_ids": tokens(seed=2)}])
    close(model(tokens(seed=5)), expected)
    assert {report.gone["feedforward.0.neurons"][0], report.into["feedforward.0.neurons"][0]} == {1, 4}
    merge_neurons(by_weights, fraction=1 / 6)
    assert (by_weights(tokens(seed=5)) - expected).abs().max() > 1e-3


def slow_merges(into, out, count):
    """Every pair looked at anew before each merging."""
    out, alive, made = out.clone(), list(range(len(into))), []
    for _ in range(count):
        costs = {
            (j, i): sum((a - b) ** 2 for a, b in zip(into[i].tolist(), into[j].tolist(), strict=True))
            * sum(value**2 for value in out[j].tolist())
            for j in alive
            for i in alive
            if i != j
        }
        j, i = min(costs, key=costs.get)
        out[i] += out[j]
        alive.remove(j)
        made.append((j, i, costs[j, i]))
    return made, out[alive]


@pytest.mark.parametrize("seed", range(4))
def test_the_order_and_the_weights_are_those_of_a_loop_over_all_pairs(seed):
    model = toy((2, 1, 9), seed=seed)
    layer = model.feedforward[0]
    into = torch.cat(
        [part.reshape(9, -1) for p in (layer.gate_up.weight, layer.gate_up.bias) for part in p.split(9)], 1
    )
    made, out = slow_merges(into.detach(), layer.down.weight.detach().T, 6)
    report = merge_neurons(model, fraction=6 / 9)
    name = "feedforward.0.neurons"
    assert report.gone[name] == tuple(j for j, _, _ in made) and report.into[name] == tuple(i for _, i, _ in made)
    close(layer.down.weight.T, out)
    assert report.errors[name] == pytest.approx(sum(cost for _, _, cost in made))


def test_average_gives_the_mean_of_all_members():
    model = toy((2, 1, 4))
    layer = model.feedforward[0]
    with torch.no_grad():
        layer.gate_up.weight.mul_(100)
        layer.gate_up.bias.zero_()
        for unit, gain in ((1, 1.0), (2, 1.001), (3, 1.0025)):
            for start in (0, 4):
                layer.gate_up.weight[start + unit] = gain * layer.gate_up.weight[start + 1]
    expected = layer.gate_up.weight[[1, 5]].detach() * (1 + 1.001 + 1.0025) / 3
    merge_neurons(model, fraction=0.5, incoming="average")
    close(layer.gate_up.weight[[1, 3]], expected)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_own_models_merge_and_reload(tmp_path, activation):
    model = own(DenseConfig(hidden=12, activation=activation))
    with torch.no_grad():
        for name in ("gate", "up") if activation == "swiglu" else ("up",):
            weight = getattr(model.layers[0].feedforward, name).weight
            weight[7] = weight[2]
    expected = model(ids()).logits
    alone = [axis for axis in model.prunable_axes() if axis.name == "layers.0.feedforward.neurons"]
    merge_neurons(model, fraction=1 / 12, batches=[ids(seed=3)], axes=alone)
    close(model(ids()).logits, expected)
    merge_neurons(model, fraction=0.5)
    assert [layer.feedforward.hidden for layer in model.config.layers] == [6, 6]
    again = Transformer.from_pretrained(model.save_pretrained(tmp_path))
    assert again(ids()).logits.equal(model(ids()).logits)


def test_merging_loses_less_than_removing():
    model = toy((2, 1, 24), seed=2)
    for target in range(12, 24):
        duplicate(model, target - 12, target)
    with torch.no_grad():
        model.feedforward[0].gate_up.weight += 0.02 * torch.randn_like(model.feedforward[0].gate_up.weight)
    expected, removed = model(tokens()), copy.deepcopy(model)
    prune_neurons(removed, fraction=0.5)
    merge_neurons(model, fraction=0.5, batches=[tokens(seed=7)])
    assert (model(tokens()) - expected).norm() < 0.4 * (removed(tokens()) - expected).norm()


def test_moments_leave_padding_out():
    model, axis = toy((2, 1, 6)), axis_of(toy((2, 1, 6)))
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    seen = []
    hook = model.feedforward[0].down.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    found = activation_moments(model, [axis], [{"input_ids": tokens(), "attention_mask": mask}])[axis.name]
    hook.remove()
    rows = [seen[0][b, t] for b in range(3) for t in range(7) if mask[b, t]]
    close(found.mean, sum(rows) / len(rows))
    close(found.products, sum(torch.outer(row, row) for row in rows) / len(rows))


def test_a_constant_neuron_becomes_a_bias():
    model = toy((2, 1, 6))
    with torch.no_grad():
        model.feedforward[0].gate_up.weight[[2, 8]] = 0
        model.feedforward[0].gate_up.weight[[4, 10]] = 0
    expected = model(tokens(seed=5))
    report = fold_constant_neurons(model, [tokens()], tolerance=0.0)
    assert report.gone == {"feedforward.0.neurons": (2, 4)} and not report.into
    close(model(tokens(seed=5)), expected)


def test_the_error_is_the_variance_times_the_outgoing_weights():
    model = toy((2, 1, 6))
    whole, seen = copy.deepcopy(model), []
    hook = model.feedforward[0].down.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, 1)))
    model(tokens())
    hook.remove()
    errors = (seen[0].var(0, correction=0) * model.feedforward[0].down.weight.square().sum(0)).detach()
    report = fold_constant_neurons(model, [tokens()], fraction=0.5)
    gone = report.gone["feedforward.0.neurons"]
    assert gone == tuple(sorted(errors.argsort()[:3].tolist()))
    assert report.errors["feedforward.0.neurons"] == pytest.approx(float(errors[list(gone)].sum()))
    means = seen[0].mean(0)

    def fixed(_, x):
        x = x[0].clone()
        x[..., list(gone)] = means[list(gone)]
        return (x,)

    whole.feedforward[0].down.register_forward_pre_hook(fixed)
    close(model(tokens(seed=5)), whole(tokens(seed=5)))


def test_a_model_without_biases_is_refused_and_merges_instead():
    model = own(DenseConfig(hidden=12))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"'layers.0.feedforward.down' has no bias .* TransformerConfig has no place"):
        fold_constant_neurons(model, [ids()], fraction=0.5)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert sum(map(len, merge_neurons(model, fraction=0.5).gone.values())) == 12


def test_llama_gets_biases_where_its_config_has_them(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).double().eval()
    whole, seen = copy.deepcopy(model), {}
    for index, layer in enumerate(whole.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, x, i=index: seen.__setitem__(i, x[0].flatten(0, 1)))
    whole(ids())
    means = {index: rows.mean(0) for index, rows in seen.items()}
    report = fold_constant_neurons(model, [ids()], fraction=0.25)
    assert model.config.mlp_bias and model.config.intermediate_size == 9
    for index, layer in enumerate(whole.model.layers):
        gone = list(report.gone[f"model.layers.{index}.mlp.neurons"])

        def fixed(_, x, gone=gone, mean=means[index]):
            x = x[0].clone()
            x[..., gone] = mean[gone]
            return (x,)

        layer.mlp.down_proj.register_forward_pre_hook(fixed)
    with torch.no_grad():
        close(model(ids(seed=4)).logits, whole(ids(seed=4)).logits)
        model.save_pretrained(tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
        assert again(ids()).logits.equal(model(ids()).logits)


def moe(**options):
    model = own(MoEConfig(hidden=8, num_experts=6, **({"k": 1, "router": "switch"} | options)))
    for name, parameter in model.named_parameters():
        if name.endswith(("up_bias", "down_bias")):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def twin(model, source, target, *, shuffled=False):
    """Expert `target` of each layer is a copy of `source`, router row and all, its hidden neurons in another order."""
    order = torch.randperm(8) if shuffled else torch.arange(8)
    for layer in model.layers:
        experts = layer.feedforward.experts
        for half in (slice(0, 8), slice(8, 16)):
            experts.up[target, :, half] = experts.up[source, :, half][:, order]
        experts.down[target] = experts.down[source][:, order]
        if experts.up_bias is not None:
            experts.up_bias[target] = experts.up_bias[source].view(2, 8)[:, order].flatten()
            experts.down_bias[target] = experts.down_bias[source]
        layer.feedforward.router.weight[target] = layer.feedforward.router.weight[source]


@pytest.mark.parametrize("router", ["kept", "mean"])
@pytest.mark.parametrize(("shuffled", "bias"), [(False, False), (True, False), (True, True)])
def test_twin_experts_merge_without_changing_the_output(tmp_path, router, shuffled, bias):
    # renormalised: the weight of the one expert of a token is 1, whoever else has a share
    model = moe(router="top_k", expert_bias=bias)
    twin(model, 1, 4, shuffled=shuffled)
    twin(model, 1, 5, shuffled=shuffled)
    expected = model(ids()).logits
    report = merge_experts(model, [ids()], fraction=1 / 3, router=router)
    close(model(ids()).logits, expected)
    for name in ("layers.0.feedforward.experts", "layers.1.feedforward.experts"):
        assert {*report.gone[name], *report.into[name]} == {1, 4, 5} and report.errors[name] < 1e-6
    assert [layer.feedforward.num_experts for layer in model.config.layers] == [4, 4]
    again = Transformer.from_pretrained(model.save_pretrained(tmp_path))
    assert again(ids()).logits.equal(model(ids()).logits)


def test_a_logsumexp_row_keeps_the_mass_of_twins():
    model = moe()
    twin(model, 1, 4)
    before = model(ids())
    merge_experts(model, [ids()], fraction=1 / 6, router="logsumexp")
    after = model(ids())
    scores, merged = before.routings[0].scores, after.routings[0].scores
    wanted = scores[:, [0, 2, 3, 5]]
    kept = [unit for unit in range(5) if unit != 1]
    # one row has no constant term: it fits log 2 more as well as the rows allow
    plain = wanted / (1 - scores[:, 4:5])
    assert (merged[:, kept] - wanted).norm() < 0.6 * (plain - wanted).norm()


def test_experts_without_order_need_alignment():
    aligned, plain = moe(router="top_k"), moe(router="top_k")
    for model in (aligned, plain):
        torch.manual_seed(1)
        twin(model, 1, 4, shuffled=True)
        with torch.no_grad():
            # both are chosen, so that both have a share in the average
            for layer in model.layers:
                layer.feedforward.router.weight[4] = -layer.feedforward.router.weight[1]
    expected = plain(ids()).hidden
    merge_experts(aligned, [ids()], fraction=1 / 6, router="kept")
    report = merge_experts(plain, [ids()], fraction=1 / 6, router="kept", align=False)
    assert {report.gone["layers.0.feedforward.experts"][0], report.into["layers.0.feedforward.experts"][0]} == {1, 4}
    assert (aligned(ids()).hidden - expected).norm() < (plain(ids()).hidden - expected).norm()


@pytest.mark.parametrize("bias", [False, True])
def test_weights_are_averaged_by_frequency(bias):
    model = moe(k=2, router="top_k", expert_bias=bias)
    start = copy.deepcopy(model)
    counts = start(ids()).routings[0].loads().double()
    report = merge_experts(model, [ids()], fraction=0.5, align=False)
    name = "layers.0.feedforward.experts"
    groups = {}
    for gone, kept in zip(report.gone[name], report.into[name], strict=True):
        groups.setdefault(kept, [kept]).append(gone)
    stays = sorted(set(range(6)) - set(report.gone[name]))
    for kept, group in groups.items():
        wanted = sum(counts[e] * start.layers[0].feedforward.experts.down[e] for e in group) / counts[group].sum()
        close(model.layers[0].feedforward.experts.down[stays.index(kept)], wanted.float())
        if bias:
            whole = start.layers[0].feedforward.experts.down_bias
            wanted = sum(counts[e] * whole[e] for e in group) / counts[group].sum()
            close(model.layers[0].feedforward.experts.down_bias[stays.index(kept)], wanted.float())
        assert counts[kept] == counts[group].max()
    close(model.layers[0].feedforward.router.weight, start.layers[0].feedforward.router.weight[stays])


@pytest.mark.parametrize("options", [{"k": 2, "router": "top_k"}, {"k": 2, "router": "sigmoid"},
                                     {"k": 2, "router": "sigmoid", "num_groups": 2, "top_groups": 2},
                                     {"k": 2, "router": "noisy_top_k"}])  # fmt: skip
@pytest.mark.parametrize("router", ["kept", "mean", "logsumexp"])
def test_top_k_stays_feasible(options, router):
    model = moe(**options)
    merge_experts(model, [ids(), {"input_ids": ids(seed=1)}], fraction=0.9, router=router)
    assert all(layer.feedforward.num_experts >= 2 for layer in model.config.layers)
    out = model(ids())
    assert out.logits.isfinite().all() and all(int(r.expert.max()) < model.config.layers[0].feedforward.num_experts
                                               for r in out.routings)  # fmt: skip


def test_mixtral_experts_merge():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=31, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=1,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    parameters = dict(model.named_parameters())
    stacks = [p for name, p in parameters.items() if p.ndim == 3 or name.endswith("gate.weight")]
    assert len(stacks) == 3
    with torch.no_grad():
        for parameter in stacks:
            parameter.mul_(20)
            parameter[3] = parameter[1]
        expected = model(ids()).logits
        report = merge_experts(model, [ids()], fraction=0.25)
        assert {*next(iter(report.gone.values())), *next(iter(report.into.values()))} == {1, 3}
        close(model(ids()).logits, expected)


def test_clusters_worked_by_hand():
    # experts on a line at 0, 1, 10, 12, the last never chosen
    outputs = torch.tensor([0.0, 1.0, 10.0, 12.0], dtype=torch.float64).view(4, 1, 1)
    counts = torch.tensor([1.0, 3.0, 2.0, 0.0], dtype=torch.float64)
    assert cluster(outputs, counts, 1) == ([[0], [1], [2, 3]], 0.0)
    groups, error = cluster(outputs, counts, 2)
    assert groups == [[1, 0], [2, 3]] and error == pytest.approx(1 * 3 / 4)
    groups, error = cluster(outputs, counts, 3)
    assert groups == [[1, 2, 0, 3]] and error == pytest.approx(0.75 + 4 * 2 / 6 * (10 - 0.75) ** 2)
    assert cluster(outputs, counts, 1, parts=2)[0] == [[1, 0], [2, 3]]


@pytest.mark.parametrize(
    "run, message",
    [
        (lambda m: merge_neurons(m, fraction=1.0), "fraction must be in \\[0, 1\\), got 1.0"),
        (lambda m: merge_neurons(m, fraction=0.5, batches=[]), "batches must hold at least one batch"),
        (lambda m: merge_neurons(m, fraction=0.5, batches=[tokens()], incoming="average"), "incoming must be 'kept'"),
        (lambda m: fold_constant_neurons(m, [tokens()]), "fraction or tolerance must be given, one of them, got None"),
        (lambda m: merge_experts(m, [tokens()], fraction=0.5), "must have axes of kind 'expert'"),
    ],
)
def test_bad_input_changes_nothing(run, message):
    model = toy((2, 1, 6))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        run(model)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_unmergeable_experts_are_named():
    model = nn.Sequential(nn.Linear(4, 4))
    axis = Axis("expert", 0, "experts", 4, 1, "0", (Slice("0.weight", 0, 1),), lambda kept: None)
    with pytest.raises(ValueError, match="experts of 'experts' must be stacked"):
        merge_experts(model, [torch.ones(1, 4)], fraction=0.5, axes=[axis])
