"""A loop of your own, sharded: `torchrun --nproc-per-node 2 examples/own_loop.py org/name`, or one process."""

import sys

import torch

from automodel_trainer import AutoModelForCausalLM, FSDP2Strategy, clip_grad_norm_


def main(model: str, steps: int = 100) -> None:
    strategy = FSDP2Strategy().start()  # the ranks of torchrun or srun, or this process alone
    network = AutoModelForCausalLM.from_pretrained(model, strategy).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    torch.manual_seed(0)
    for step in range(steps):
        rows = torch.randint(6, 200, (4, 32)).to(strategy.root_device)
        mine = rows[strategy.dp_rank :: strategy.dp_size]
        loss = network(input_ids=mine, labels=mine).loss
        loss.backward()  # gradients are means over ranks
        norm = clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}, gradient norm {norm.item():.3f}")
    network.save_pretrained("my-own-model")  # every rank calls it
    strategy.stop()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
