"""One step of an optimizer on a small network, the parameters of one of its blocks, and an unusual optimizer."""

from __future__ import annotations

import torch

from resist_lightning.methods.resist.network import select_blocks


def stepped(module, optimizer):
    optimizer.zero_grad()
    module(torch.randn(4, 3, 8, 8)).sum().backward()
    optimizer.step()


def of_block(module, index=0):
    return list(select_blocks(module)[index].module.parameters())


class Own(torch.optim.Optimizer):
    """Keeps state where real optimizers do: in an attribute, a list of its parameters, numbers in state and groups.

    A schedule-free optimizer has a mode and a copy of the weights; Prodigy follows the gradients in its groups.
    """

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "count": 0, "d": 1.0})
        self.factor, self.calls, self.mode, self.log = 0.5, 0, "eval", []
        self.all_parameters = [p for group in self.param_groups for p in group["params"]]

    def train(self):
        self.mode = "train"

    @torch.no_grad()
    def step(self, closure=None):
        assert self.mode == "train", "not in train mode"
        assert set(self.all_parameters) == set(self.param_groups[0]["params"])
        self.calls += 1
        for group in self.param_groups:
            group["count"] += 1
            group["late"] = group.get("late", 0) + 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, z=p.detach().clone(), wide=torch.zeros_like(p, dtype=torch.float64))
                state["step"] += 1
                group["d"] += float(p.grad.abs().sum())
                p.sub_(p.grad, alpha=group["lr"] * self.factor)
