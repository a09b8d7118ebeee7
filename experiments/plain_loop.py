"""ResIST in a plain PyTorch loop, without Lightning: the engine, three calls, and torchrun.

torchrun --nproc-per-node 2 experiments/plain_loop.py --steps 200
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from experiments.data.arrays import ArrayDataset
from experiments.data.sets import Digits
from resist_lightning import Config, Engine
from resist_lightning.models import preact_resnet


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Share of right answers on the test images, 0 to 1."""
    model.eval()
    answers = [(model(x).argmax(1) == y).float() for x, y in data.test_dataloader()]
    return torch.cat(answers).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="local steps of each worker")
    parser.add_argument("--local-steps", type=int, default=20, help="local steps per round")
    args = parser.parse_args()

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = Digits(batch_size=32)
    data.setup("fit")
    data.setup("test")
    images = ArrayDataset(data.parts["train"])
    sampler = DistributedSampler(images, seed=0, drop_last=True)
    loader = DataLoader(images, batch_size=32, sampler=sampler, collate_fn=data.training_transform)

    model = preact_resnet(26, num_classes=10, width_multiplier=0.25, in_channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    engine = Engine(model, [optimizer], Config(local_steps=args.local_steps, min_blocks=1))
    engine.start()  # all workers have the weights of worker 0, and each keeps its blocks
    epoch = 0
    while engine.clock.total_steps < args.steps:
        sampler.set_epoch(epoch)  # or every epoch would have the same order
        for x, y in loader:
            model.train()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            engine.after_step()  # at the end of a round the workers average, and exchange blocks
            if engine.clock.total_steps == args.steps:
                break
        with engine.full_model():  # whole inside, and as before afterwards
            found = accuracy(model, data)
        if dist.get_rank() == 0:
            print(f"epoch {epoch}: round {engine.clock.round}, test accuracy of the full model {100 * found:.1f} %")
        epoch += 1
    engine.finish()  # every worker has the full model
    if dist.get_rank() == 0:
        print(f"after {args.steps} local steps: test accuracy {100 * accuracy(model, data):.1f} %")
        print(
            "bytes sent by worker 0:",
            {kind: sent[0] for kind, sent in engine.sent_bytes_by_worker.items() if sent[0]},
        )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
