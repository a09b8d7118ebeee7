"""One step of an optimizer on a small network, and the parameters of one of its blocks."""

from __future__ import annotations

import torch

from resist_lightning.methods.resist.network import select_blocks


def stepped(module, optimizer):
    optimizer.zero_grad()
    module(torch.randn(4, 3, 8, 8)).sum().backward()
    optimizer.step()


def of_block(module, index=0):
    return list(select_blocks(module)[index].module.parameters())
