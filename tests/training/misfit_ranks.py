"""What each rank of test_distributed_faults runs: python -m tests.training.misfit_ranks FOLDER CONFIG.

Each case is a life of its own of the command, as after a restart of torchrun. Its error goes to FOLDER/RANK.json.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

from training.cli import main

HEADS = ("--expert-parallel", "1", "--tensor-parallel", "2")
HALF = ("--sparsify.sparsity", "0.5")
# case: what both ranks add to the command, and rank 1 alone
CASES: dict[str, tuple[list[str], list[str]]] = {
    "seed": ([], ["--seed", "7"]),
    "mesh": ([], ["--expert-parallel", "1"]),
    "batch on one": ([], ["--train.batch", "5"]),
    "time-out": ([], ["--distributed.timeout-s", "30"]),
    "world": (["--expert-parallel", "3"], []),
    "batch": (["--train.batch", "5"], []),
    "experts": (["--model.num-experts", "1", "--model.k", "1"], []),
    "no experts": (["--model.feedforward", "dense"], []),
    "tensor world": (["--tensor-parallel", "3"], []),
    "both": (["--tensor-parallel", "2"], []),
    "heads": ([*HEADS, "--model.kv-heads", "1"], []),
    "compiled heads": ([*HEADS, "--train.compile"], []),
    "learned": ([*HEADS, "--sparsify.method", "variational"], []),
    "penalty": (["--sparsify.fisher-penalty", "0.1", "--sparsify.method", "variational"], []),
    "masks of the whole": (
        ["--shard", "fsdp", "--sparsify.method", "snip", *HALF, "--train.steps", "2", "--out", "OUT/pruned"],
        [],
    ),
    "none of it": (["--train.steps", "1"], []),
    "nothing to resume": (["--resume", "--out", "OUT/absent"], []),
    "resumed on one": ([], ["--resume"]),
    "started anew on one": ([], ["--overwrite"]),
    "another start": (["--resume"], ["--checkpoint", "OUT/elsewhere"]),
    "unread": ([], []),
    "unread on one": ([], []),
    "a wrong flag on one": ([], ["--model.num-experts", "four"]),
    "another model": (["--resume", "--model.dim", "32"], []),
    "other heads": (["--resume", "--model.heads", "4"], []),
    "other k": (["--resume", "--model.k", "1"], []),
    "other settings of training": (["--resume", "--train.steps", "1", "--model.dropout", "0.1"], []),
    "other experts": (["--resume", "--model.num-experts", "6"], []),
    "data": (["--overwrite"], []),
}


def said(arguments: list[str]) -> str:
    """The error of the command, or nothing."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.suppress(SystemExit):
        main(arguments)
    return "".join(line for line in errors.getvalue().splitlines() if line.startswith("error: "))


if __name__ == "__main__":
    out, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    found = {}
    for life, (case, (both, one)) in enumerate(CASES.items()):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(life)
        os.chdir(out / f"rank-{rank}" if case == "data" else out / "rank-0")
        unread = case == "unread" or (case == "unread on one" and rank == 1)
        file = str(out / "unread.toml") if unread else sys.argv[2]
        command = ["train", file, "--out", str(out / "run"), "--expert-parallel", "2", *both, *one * rank]
        found[case] = said([argument.replace("OUT", str(out)) for argument in command])
    (out / f"{rank}.json").write_text(json.dumps(found))
