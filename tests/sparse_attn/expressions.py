"""Random pattern expressions, each with its truth written a second time in plain Python."""

from collections.abc import Callable

from hypothesis import strategies as st

from sparse_attn import Pattern, causal, full, sinks, sliding_window

Truth = Callable[[int, int], bool]
Case = tuple[Pattern, Truth]


def both(a: Case, b: Case) -> Case:
    return a[0] & b[0], lambda i, j: a[1](i, j) and b[1](i, j)


def either(a: Case, b: Case) -> Case:
    return a[0] | b[0], lambda i, j: a[1](i, j) or b[1](i, j)


small = st.integers(1, 12)
leaves = st.one_of(
    st.just((full(), lambda i, j: True)),
    st.just((causal(), lambda i, j: i >= j)),
    small.map(lambda w: (sliding_window(w), lambda i, j: -w < i - j < w)),
    small.map(lambda n: (sinks(n), lambda i, j: j < n)),
)
cases = st.recursive(
    leaves,
    lambda inner: st.tuples(st.sampled_from([both, either]), inner, inner).map(lambda t: t[0](t[1], t[2])),
    max_leaves=4,
)
