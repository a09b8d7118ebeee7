"""What does a worker hold while it trains, against the bound and against the full model?

torchrun --nproc-per-node 2 experiments/benchmarks/held_memory.py
torchrun --nproc-per-node 4 experiments/benchmarks/held_memory.py

The paper's network of 41 million parameters, SGD with momentum (m = 1), real processes. Counts the bytes of all distinct
storages of parameters, gradients and optimizer state after each local step, and reads the process's memory from the
kernel. Prints a table and writes experiments/benchmarks/results/held_memory_S.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from experiments.benchmarks.keep import RESULTS
from experiments.harness.record import write_record
from resist_lightning import Config, Engine
from resist_lightning.models import preact_resnet

MB = 1e6


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all distinct storages of parameters, gradients and optimizer state."""
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    parameters = list(model.parameters())
    return storage_bytes([*parameters, *(p.grad for p in parameters if p.grad is not None), *states])


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}
    return sum(storages.values())


def resident_bytes() -> int:
    """Memory of this process that is in RAM now, from the kernel."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--local-steps", type=int, default=2)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = preact_resnet(101, num_classes=10)
    full = sum(p.nbytes for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    engine = Engine(model, [optimizer], Config(local_steps=args.local_steps))
    blocks = [sum(p.nbytes for p in block.module.parameters()) for block in engine.layout.blocks]
    shared = full - sum(blocks)
    engine.start()
    worst: dict[str, float] = {"held": 0, "bound": 0, "resident": 0}
    for _ in range(args.rounds * args.local_steps):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        optimizer.step()
        mine = engine.partition.held[engine.collective.worker]
        bound = 3 * (shared + sum(blocks[block] for block in mine))
        held = held_bytes(model, optimizer)
        assert held <= bound, (held, bound)
        worst = {
            "held": max(worst["held"], held),
            "bound": max(worst["bound"], bound),
            "resident": max(worst["resident"], resident_bytes()),
        }
        engine.after_step()
    rows = engine.collective.gather_numbers(list(worst.values()))
    if dist.get_rank() == 0:
        table = Table("worker", "held, MB", "bound, MB", "full model, MB", "share", title=f"S = {len(rows)}, m = 1")
        for worker, (held, bound, _) in enumerate(rows):
            table.add_row(
                str(worker), f"{held / MB:.1f}", f"{bound / MB:.1f}", f"{3 * full / MB:.1f}", f"{held / 3 / full:.3f}"
            )
        Console().print(table)
        content = {"settings": vars(args), "workers": len(rows), "full_bytes": 3 * full}
        measured = [dict(zip(worst, row, strict=True)) for row in rows]
        write_record(RESULTS / f"held_memory_{len(rows)}.jsonl", {**content, "worst_bytes_by_worker": measured})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
