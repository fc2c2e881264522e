"""Under torch.compile, in a process of its own: the shape checks of the other tests cannot be traced."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import torch
from sparse_attn import attend, parse_pattern
from tests.tolerances import close

pattern = parse_pattern(sys.argv[1])
inputs = [torch.randn(1, 2, 200, 4, requires_grad=True) for _ in range(3)]

def block(q, k, v):
    return attend(q * 2, k, v, pattern=pattern).relu()

explained = torch._dynamo.explain(block)(*inputs)
compiled, plain = torch.compile(block, backend="aot_eager")(*inputs), block(*inputs)
close(compiled, plain)
for actual, wanted in zip(torch.autograd.grad(compiled.sum(), inputs), torch.autograd.grad(plain.sum(), inputs)):
    close(actual, wanted)
print(explained.graph_break_count, *{str(reason.reason) for reason in explained.break_reasons})
"""


@pytest.mark.parametrize(("text", "breaks"), [("causal()", 0), ("full()", 0), ("causal() & sliding_window(40)", 1)])
def test_only_a_sparse_pattern_breaks_the_graph_and_says_so(text, breaks):
    """What is compiled around the break gives the same output and gradients."""
    result = subprocess.run([sys.executable, "-c", PROGRAM, text], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    count, _, reason = result.stdout.partition(" ")
    assert int(count) == breaks
    assert breaks == 0 or "walks the blocks of a sparse pattern" in reason
