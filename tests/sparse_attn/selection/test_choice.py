"""One attend for patterns and for choices: what each method chose equals its own mask, by the reference backend."""

from dataclasses import replace

import pytest
import torch

from sparse_attn import alibi_slopes, attend, causal
from sparse_attn.choice import Choice
from sparse_attn.selection import (
    DSA,
    LSH,
    NSA,
    BlockSelection,
    Buckets,
    KMeansRouting,
    MoBA,
    TokenSelection,
    TopKKeys,
)
from tests.tolerances import close
from tests.typecheck import unchecked

B, H, HKV, L, S, D = 2, 4, 2, 23, 29, 8


def tensors(queries: int = L, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((B, H, queries, D), (B, HKV, S, D), (B, HKV, S, D - 2))
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def blocks() -> BlockSelection:
    draws = torch.rand(B, HKV, L, -(-S // 4), generator=torch.Generator().manual_seed(1)).argsort(-1)[..., :3]
    draws[0, 0, 5] = -1
    return BlockSelection(draws, 4, S, S - L)


def tokens(heads: int) -> TokenSelection:
    draws = torch.rand(B, heads, L, S, generator=torch.Generator().manual_seed(2)).argsort(-1)[..., :5].clone()
    draws[1, 0, 3] = -1
    draws[:, :, :, 2] = draws[:, :, :, 2].where(draws[:, :, :, 2] % 3 != 0, -1)
    return TokenSelection(draws, S)


def buckets(without_self: bool) -> Buckets:
    g = torch.Generator().manual_seed(3)
    keys = torch.randint(4, (B, HKV, 2, S), generator=g)
    keys[1, :, :, :4] = -1
    return Buckets(torch.randint(4, (B, H, 2, L), generator=g), keys, 4, 3, without_self)


CHOICES = {
    "blocks": blocks,
    "tokens of all heads": lambda: tokens(1),
    "tokens of key heads": lambda: tokens(HKV),
    "tokens of heads": lambda: tokens(H),
    "buckets": lambda: buckets(False),
    "buckets without self": lambda: buckets(True),
}
OPTIONS = {
    "plain": {},
    "scaled": {"scale": 0.7},
    "capped": {"softcap": 2.0},
    "alibi": {"alibi": alibi_slopes(H).double()},
    "both": {"softcap": 2.0, "alibi": alibi_slopes(H).double()},
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_outputs_log_sums_and_gradients_equal_those_of_the_mask(name, options):
    given, chosen = tensors(), CHOICES[name]()
    assert isinstance(chosen, Choice)
    found, wanted = (
        attend(*given, layout=chosen, backend=backend, return_lse=True, **options) for backend in ("auto", "reference")
    )
    seen = wanted[1] > -torch.inf
    assert seen.any() and (found[1] > -torch.inf).equal(seen)
    g = torch.Generator().manual_seed(4)
    up = [torch.randn(part.shape, generator=g, dtype=part.dtype) for part in wanted]
    grads = []
    for out, lse in (found, wanted):
        total = (out * up[0]).sum() + (lse.masked_fill(~seen, 0) * up[1]).sum()
        grads.append(torch.autograd.grad(total, given))
    for one, other in zip((found[0], found[1].masked_fill(~seen, 0), *grads[0]),
                          (wanted[0], wanted[1].masked_fill(~seen, 0), *grads[1]), strict=True):  # fmt: skip
        close(one, other)
    assert attend(*given, layout=chosen, **options).equal(found[0])


@pytest.mark.parametrize("name", ["blocks", "tokens of all heads", "tokens of heads"])
def test_padding_is_seen_by_nobody(name):
    (q, k, v), chosen = tensors(), CHOICES[name]()
    mask = torch.rand(B, S, generator=torch.Generator().manual_seed(5)) > 0.3
    found = attend(q, k, v, layout=chosen, key_mask=mask)
    close(found, attend(q, k, v, layout=chosen, key_mask=mask, backend="reference"))
    noise = torch.randn_like(k)[..., : D - 2] * 100
    close(found, attend(q, k, v.where(mask[:, None, :, None], noise), layout=chosen, key_mask=mask))


def test_keys_of_buckets_know_their_padding():
    given, chosen = tensors(), buckets(False)
    real = torch.ones(B, S, dtype=torch.bool)
    real[1, :4] = False
    assert attend(*given, layout=chosen, key_mask=real).equal(attend(*given, layout=chosen))
    close(attend(*given, layout=chosen), attend(*given, layout=chosen, key_mask=real, backend="reference"))
    real[0, 7] = False
    with pytest.raises(ValueError, match="key_mask must hide no key that is in a bucket"):
        attend(*given, layout=chosen, key_mask=real)


METHODS = {
    "MoBA": lambda: MoBA(block=4, top_k=2),
    "TopKKeys": lambda: TopKKeys(4),
    "LSH": lambda: LSH(D, HKV, num_buckets=4, rounds=2, chunk=4, shared_qk=False),
    "DSA": lambda: DSA(12, heads=2, head_dim=4, top_k=4).double(),
}


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_chose_is_what_it_attends_to(method):
    module, (q, k, v) = METHODS[method](), tensors(S)
    more = {"hidden": torch.randn(B, S, 12, dtype=torch.float64)} if method == "DSA" else {}
    selected = module.eval()(q, k, v, **more)
    for backend in ("auto", "reference"):
        close(attend(q, k, v, layout=selected.chosen, backend=backend), selected.out)


def test_dropout_takes_as_much_as_it_scales():
    q, k, v = tensors()
    ones = torch.ones_like(v)
    torch.manual_seed(0)
    for name in CHOICES:
        mean = attend(q, k, ones, layout=CHOICES[name](), dropout=0.4).mean()
        kept = attend(q, k, ones, layout=CHOICES[name]()).mean()
        assert 0.8 < mean / kept < 1.2 and mean != kept


def test_half_precision_and_autocast_agree_with_double():
    for name in CHOICES:
        q, k, v = tensors(dtype=torch.float32)
        exact = attend(*tensors(), layout=CHOICES[name]())
        with torch.autocast("cpu", torch.bfloat16):
            out = attend(q, k, v, layout=CHOICES[name]())
        assert out.dtype == torch.bfloat16
        close(out, exact, torch.bfloat16)


@pytest.mark.parametrize("name", CHOICES)
def test_sizes_backends_and_patterns_that_do_not_go_together(name):
    q, k, v = tensors()
    chosen = CHOICES[name]()
    for backend in ("auto", "reference"):
        with pytest.raises(ValueError, match=r"must be for"):
            attend(q[:, :, 1:], k, v, layout=chosen, backend=backend)
        with pytest.raises(ValueError, match=r"must be for"):
            attend(q, k[:, :, 1:], v[:, :, 1:], layout=chosen, backend=backend)
    for backend in ("folded", "sdpa", "triton", "flex"):
        with pytest.raises(ValueError, match=rf"backend must be 'auto' or 'reference' .* got '{backend}'"):
            attend(q, k, v, layout=chosen, backend=backend)
    with pytest.raises(ValueError, match="pass layout alone"):
        attend(q, k, v, layout=chosen, pattern=causal())


def twice(chosen, index=2):
    """The same choice, but for one query that lists ``index`` in two places, apart from each other."""
    name = "blocks" if isinstance(chosen, BlockSelection) else "tokens"
    lists = getattr(chosen, name).clone()
    lists[-1, 0, -1, :3] = torch.tensor([index, 5, index])
    return replace(chosen, **{name: lists})


def bucketed(**changed) -> Buckets:
    return replace(buckets(True), **changed)


WRONG = {
    "heads of blocks": (lambda: BlockSelection(torch.zeros(B, H, L, 1, dtype=torch.long), 4, S, S - L), "must be for"),
    "a block": (lambda: BlockSelection(torch.full((B, HKV, L, 1), 8), 4, S, S - L), r"blocks .* \[-1, 8\), got 8"),
    "a block before all": (lambda: BlockSelection(torch.full((B, HKV, L, 1), -2), 4, S, S - L), r"8\), got -2"),
    "a token": (lambda: TokenSelection(torch.full((B, 1, L, 1), S), S), r"tokens must be in \[-1, 29\), got 29"),
    "a block twice": (lambda: twice(blocks()), "selected blocks must come at most once in a list, got 2 twice"),
    "block 0 twice": (lambda: twice(blocks(), 0), "selected blocks must come at most once in a list, got 0 twice"),
    "a token twice": (lambda: twice(tokens(1)), "selected tokens must come at most once in a list, got 2 twice"),
    "token 0 twice": (lambda: twice(tokens(1), 0), "selected tokens must come at most once in a list, got 0 twice"),
    "before all": (lambda: TokenSelection(torch.full((B, 1, L, 1), -3), S), r"tokens must be in \[-1, 29\), got -3"),
    "no integers": (lambda: TokenSelection(torch.zeros(B, 1, L, 1), S), "tokens must be integers, got torch.float32"),
    "heads of tokens": (lambda: TokenSelection(torch.zeros(B, 3, L, 1, dtype=torch.long), S), "heads must be 1"),
    "a bucket": (lambda: bucketed(queries=buckets(True).queries + 1), r"queries must be in \[0, 4\), got 4"),
    "a bucket below 0": (lambda: bucketed(queries=buckets(True).queries - 1), r"queries must be in \[0, 4\), got -1"),
    "padding below -1": (lambda: bucketed(keys=buckets(True).keys - 1), r"keys must be in \[-1, 4\), got -2"),
    "padding in a round": (
        lambda: bucketed(keys=torch.cat([buckets(True).keys[:, :, :1], torch.full((B, HKV, 1, S), -1)], 2)),
        "a key must be -1 in every round or in none, got both at key 0 of head 0 of sequence 0",
    ),
    "other rounds": (lambda: bucketed(queries=buckets(True).queries[:, :, :1]), "as many rounds as keys, 2, got 1"),
    "no rounds": (
        lambda: bucketed(queries=torch.zeros(B, H, 0, L, dtype=torch.long), keys=torch.zeros(B, HKV, 0, S).long()),
        "rounds of buckets must be >= 1, got 0",
    ),
    "3 dimensions": (lambda: bucketed(queries=buckets(True).queries[:, :, 0]), r"queries must have 4 dim.*2, 4, 23\]"),
    "tokens of 2": (lambda: replace(tokens(1), tokens=tokens(1).tokens[0, 0]), "tokens must have 4 dimensions.*23, 5"),
    "no chunk": (lambda: bucketed(chunk=0), "chunk must be >= 1, got 0"),
    "no bucket": (lambda: bucketed(num_buckets=0), "num_buckets must be >= 1, got 0"),
    "no block": (lambda: replace(blocks(), block=0), "block must be >= 1, got 0"),
    "blocks of 3 dimensions": (
        lambda: replace(blocks(), blocks=blocks().blocks[..., 0]), r"blocks must have 4 dimensions.* \[2, 2, 23\]"
    ),
    "blocks of 5 dimensions": (lambda: replace(blocks(), blocks=blocks().blocks[..., None]), "must have 4 dimensions"),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", WRONG)
def test_both_backends_refuse_what_is_not_there(name, backend):
    made, message = WRONG[name]
    with unchecked(), pytest.raises(ValueError, match=message):
        attend(*tensors(), layout=made(), backend=backend)


# of draws [B, Hkv, 150, 1]: more keys than int8 counts
WIDE = {
    "blocks": lambda draws: BlockSelection(draws[:, :, :L].clamp(max=74), 2, 150, 127),
    "tokens": lambda draws: TokenSelection(draws[:, :, :L], 150),
    "buckets": lambda draws: Buckets(draws[:, [0, 0, 1, 1], None, 4 : L + 4, 0], draws[:, :, None, :, 0], 100, 3),
}


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32], ids=str)
@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_integers_of_every_width_choose_alike(name, dtype, backend):
    g = torch.Generator().manual_seed(6)
    q, k = (torch.randn(B, heads, length, D, generator=g) for heads, length in ((H, L), (HKV, 150)))
    draws = torch.randint(100, (B, HKV, 150, 1), generator=g)
    if dtype.is_signed:
        draws[1, :, :4] = -1
    with unchecked():  # the annotations take no uint8
        found = attend(q, k, k, layout=WIDE[name](draws.to(dtype)), backend=backend)
    assert found.equal(attend(q, k, k, layout=WIDE[name](draws), backend=backend)) and found.any()


def test_more_queries_than_keys_are_no_buckets():
    ids = torch.zeros(1, 1, 1, 3, dtype=torch.long)
    q, k = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 1, 4)
    for backend in ("auto", "reference"):
        with pytest.raises(ValueError, match="at most as many queries as keys, 1, got 3"):
            attend(q, k, k, layout=Buckets(ids, ids[..., :1], 1, 4), backend=backend)


@pytest.mark.parametrize("slopes", [None, alibi_slopes(H).double()], ids=["plain", "alibi"])
def test_blocks_stand_where_their_offset_says(slopes):
    """A query's place is the choice's: not that of the last keys."""
    q, k, v = tensors()
    chosen = BlockSelection(blocks().blocks, 4, S, 2)
    found, wanted = (
        attend(q, k, v, layout=chosen, alibi=slopes, backend=name, return_lse=True) for name in ("auto", "reference")
    )
    close(found[0], wanted[0])
    close(found[1], wanted[1])
    assert (found[0] - attend(q, k, v, layout=blocks(), alibi=slopes)).abs().max() > 1e-3


def test_a_query_alone_in_padding_has_no_sum():
    given, real = tensors(S), torch.ones(B, S, dtype=torch.bool)
    real[1, :4] = False
    g = torch.Generator().manual_seed(3)
    keys = torch.randint(4, (B, HKV, 2, S), generator=g).masked_fill(~real[:, None, None], -1)
    chosen = Buckets(torch.randint(4, (B, H, 2, S), generator=g), keys, 4, 3, True)
    out, lse = attend(*given, layout=chosen, return_lse=True)
    wanted = attend(*given, layout=chosen, return_lse=True, backend="reference")
    assert (lse[1, :, :4] == -torch.inf).all() and (out[1, :, :4] == 0).all()
    close(out, wanted[0])
    assert (lse == -torch.inf).equal(wanted[1] == -torch.inf)


def test_methods_without_a_choice_of_pairs_have_none():
    for kind in (NSA, KMeansRouting):
        assert not isinstance(kind, Choice)
    assert not isinstance(causal(), Choice) and not isinstance(causal().layout(8), Choice)
