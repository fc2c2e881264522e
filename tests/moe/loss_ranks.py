"""What each rank of test_losses runs, with unequal real tokens: python -m tests.moe.loss_ranks RANK 2 FOLDER."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from moe.losses import load_balancing_loss
from moe.routers.sigmoid import SigmoidRouter
from moe.routers.top_k import choose_top_k


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    logits, real = torch.load(folder / "in.pt", weights_only=True)
    mine = logits[10 * rank : 10 * rank + 10].requires_grad_()
    loss = load_balancing_loss(choose_top_k(mine, 2, renormalize=True, real=real[10 * rank :][:10]), scope="global")
    loss.backward()
    router = SigmoidRouter(4, 4, k=1)
    router.load_state_dict({"weight": torch.eye(4), "bias": torch.zeros(4)})
    router(torch.eye(4)[[[0, 0, 1], [1, 1, 1, 2, 3]][rank]])
    router.after_step()
    torch.save((loss.detach(), mine.grad, router.bias), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
