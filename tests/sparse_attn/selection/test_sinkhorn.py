import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from sparse_attn.selection.sinkhorn import SinkhornSorting, balance
from tests.sparse_attn.selection.sinkhorn_oracle import balance_by_loops
from tests.tolerances import close


def make(heads=4, kv_heads=2, length=13, keys=None, d=4, *, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    sizes = ((heads, length), (kv_heads, keys or length), (kv_heads, keys or length))
    return [torch.randn(2, *size, d, generator=g, dtype=dtype).requires_grad_() for size in sizes]


def make_module(kv_heads=2, **options):
    return SinkhornSorting(4, kv_heads, **{"block": 3, "max_blocks": 6, "iterations": 4, **options}).double()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("size", "iterations"), [(1, 2), (2, 3), (5, 3), (4, 0)])
def test_balance_and_its_gradient_are_those_of_the_loops(causal, size, iterations):
    logits = (3 * torch.randn(size, size, dtype=torch.float64)).requires_grad_()
    found, wanted = balance(logits, iterations=iterations, causal=causal), balance_by_loops(logits, iterations, causal)
    close(found, wanted)
    weight = torch.randn_like(wanted)
    for a, e in zip(
        torch.autograd.grad((found * weight).sum(), logits), torch.autograd.grad((wanted * weight).sum(), logits),
        strict=True,
    ):  # fmt: skip
        close(a, e)


@given(st.integers(1, 7), st.booleans(), st.sampled_from([0.1, 1.0, 100.0]), st.integers(0, 99))
def test_rows_sum_to_one_and_the_future_has_no_weight(size, causal, spread, seed):
    logits = spread * torch.randn(2, size, size, generator=torch.Generator().manual_seed(seed)).double()
    found = balance(logits, iterations=5, causal=causal)
    assert found.isfinite().all() and (found >= 0).all()
    rows = torch.ones(2, size, dtype=torch.float64)
    if causal:
        rows[:, 0] = 0
        assert (found.triu() == 0).all()
    close(found.sum(-1), rows)


def test_many_iterations_make_it_doubly_stochastic_and_sharp_logits_a_permutation():
    found = balance(torch.randn(5, 5).double(), iterations=200, causal=False)
    close(found.sum(-2), torch.ones(5, dtype=torch.float64))
    order = torch.randperm(5)
    sharp = balance(50 * torch.eye(5).double()[order], iterations=20, causal=False)
    close(sharp, torch.eye(5).double()[order])
    close(sharp.mT @ (sharp @ torch.arange(5.0).double()), torch.arange(5.0).double())


def by_loops(module, q, k, v, mask=None, noise=None):
    out = []
    size, length, offset = module.block, q.shape[2], k.shape[2] - q.shape[2]
    blocks = -(-k.shape[2] // size)
    for b in range(q.shape[0]):
        real = [mask is None or bool(mask[b, j]) for j in range(k.shape[2])]
        for h in range(q.shape[1]):
            head = h // (q.shape[1] // k.shape[1])
            inside = [[j for j in range(c * size, min((c + 1) * size, k.shape[2])) if real[j]] for c in range(blocks)]
            sums = [k[b, head, rows].sum(0) if rows else 0 * k[b, head, 0] for rows in inside]
            logits = torch.stack([torch.stack([s @ module.weight[head, :, r] for s in sums]) for r in range(blocks)])
            logits = logits + module.bias[head, :blocks, None]
            if noise is not None:
                logits = logits + noise[head, :blocks, :blocks]
            places = balance_by_loops(logits / module.temperature, module.iterations, module.causal)
            for i in range(offset, offset + length):
                place, keys, values = i // size, [], []
                for n in range(size):
                    there = [c for c in range(place if module.causal else blocks) if c * size + n in inside[c]]
                    total = sum(places[place, c] for c in there)
                    if there:
                        keys.append(sum(places[place, c] * k[b, head, c * size + n] for c in there) / total)
                        values.append(sum(places[place, c] * v[b, head, c * size + n] for c in there) / total)
                for j in inside[place]:
                    if j <= i or not module.causal:
                        keys.append(k[b, head, j])
                        values.append(v[b, head, j])
                if not keys:
                    out.append(0 * v[b, head, 0])
                    continue
                scores = torch.stack(keys) @ q[b, h, i - offset] / math.sqrt(q.shape[-1])
                out.append(scores.softmax(0) @ torch.stack(values))
    return torch.stack(out).view(*q.shape[:3], -1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "keys"), [(10, 10), (5, 14), (1, 6), (1, 1)])
def test_outputs_and_gradients_are_those_of_the_loops(causal, length, keys):
    kv_heads = 1 if causal else 2
    module, inputs = make_module(kv_heads, causal=causal, iterations=2), make(2, kv_heads, length, keys)
    with torch.no_grad():
        module.bias.normal_()
    out, wanted = module(*inputs).out, by_loops(module, *inputs)
    close(out, wanted)
    weight = torch.randn_like(wanted)
    trained = [*inputs, module.weight, module.bias]
    expected = torch.autograd.grad((wanted * weight).sum(), trained, allow_unused=True)
    actual = torch.autograd.grad((out * weight).sum(), trained, allow_unused=True)
    for a, e, x in zip(actual, expected, trained, strict=True):
        close(torch.zeros_like(x) if a is None else a, torch.zeros_like(x) if e is None else e)


def test_padding_is_not_seen():
    module, (q, k, v) = make_module(), make()
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[0, :2], mask[1, :5] = False, False
    close(module(q, k, v, key_mask=mask).out, by_loops(module, q, k, v, mask))


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 99))
def test_no_later_token_changes_an_output(cut, block, seed):
    module, (q, k, v) = make_module(block=block, max_blocks=13), make(seed=seed)
    later = [x.detach().clone() for x in (q, k, v)]
    for x in later:
        x[:, :, cut:] = torch.randn_like(x[:, :, cut:])
    close(module(*later).out[:, :, :cut], module(q, k, v).out[:, :, :cut])


@pytest.mark.parametrize("length", [1, 4, 7])
def test_decoding_repeats_the_whole_forward(length):
    module, (q, k, v) = make_module(), make()
    whole = module(q, k, v).out
    close(module(q[:, :, -length:], k, v).out, whole[:, :, -length:])
    close(module(q[:, :, :8], k[:, :, :8], v[:, :, :8]).out, whole[:, :, :8])


def test_noise_is_recorded_and_changes_with_the_step():
    module, (q, k, v) = make_module(gumbel=True, seed=3), make()
    out = module(q, k, v).out
    noise = -(-torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(3)).log()).log()
    close(out, by_loops(module, q, k, v, noise=noise.double()), torch.float32)
    close(module(q, k, v).out, out)
    again = checkpoint(lambda *x: module(*x).out, q, k, v, use_reentrant=False)
    close(torch.autograd.grad(again.sum(), k)[0], torch.autograd.grad(out.sum(), k)[0])
    module.after_step()
    assert not torch.allclose(module(q, k, v).out, out)
    other = make_module(gumbel=True, seed=3)
    other.load_state_dict(module.state_dict())
    close(other(q, k, v).out, module(q, k, v).out)
    close(module.eval()(q, k, v).out, by_loops(module, q, k, v))


def test_a_learned_place_receives_the_wanted_block():
    module, (_, k, _) = make_module(), make(length=12)
    with torch.no_grad():
        module.weight.zero_()
        module.bias.zero_()
        module.weight[:, 0, 3] = 100
    first = k.detach().clone()
    first[..., 0] = 0.0
    first[:, :, 3:6, 0] = 1.0
    places = module.sorting(first.unflatten(2, (4, 3)))
    close(places[:, :, 3, 1], torch.ones(2, 2, dtype=torch.float64))


def test_half_precision_and_nothing():
    module, (q, k, v) = make_module().bfloat16(), (x.detach().bfloat16() for x in make())
    assert module(q, k, v).out.dtype == torch.bfloat16
    assert module(q[:, :, :0], k, v).out.shape == (2, 4, 0, 4)


def test_bad_sizes():
    for options, message in (
        ({"block": 0}, "block must be >= 1, got 0"),
        ({"iterations": -1}, "iterations must be >= 0, got -1"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"seed": 2**64}, r"seed must be in \[-2\*\*63, 2\*\*64\), got 18446744073709551616"),
    ):
        with pytest.raises(ValueError, match=message):
            make_module(**options)
    q, k, v = make(length=19)
    with pytest.raises(ValueError, match="the number of keys must be at most max_blocks · block = 18, got 19"):
        make_module()(q, k, v)
    with pytest.raises(ValueError, match="query heads must be a multiple of the 2 key heads, got 3"):
        make_module()(q[:, :3], k, v)
    with pytest.raises(ValueError, match="k must have 2 heads of 4, got 1 of 4"):
        make_module()(q, k[:, :1], v[:, :1])
    with pytest.raises(ValueError, match="q must not be longer than k=3, got 19"):
        make_module()(q, k[:, :, :3], v[:, :, :3])
