"""A worker of `receives_first.py`: exchanges flat buffers with its neighbour, in several ways."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from experiments.harness.links.crew import Place
from resist_lightning.comm.torch_collective import GroupCollective

Way = Callable[[Tensor, Tensor, int], None]


def sends_first(out: Tensor, into: Tensor, peer: int) -> None:
    _batch([dist.P2POp(dist.isend, out, peer), dist.P2POp(dist.irecv, into, peer)])


def receives_first(out: Tensor, into: Tensor, peer: int) -> None:
    _batch([dist.P2POp(dist.irecv, into, peer), dist.P2POp(dist.isend, out, peer)])


def all_to_all_single(out: Tensor, into: Tensor, peer: int) -> None:
    own, other = [0, out.numel()], [0, into.numel()]
    if peer == 0:
        own, other = own[::-1], other[::-1]
    dist.all_to_all_single(into, out, other, own)


def ours(out: Tensor, into: Tensor, peer: int) -> None:
    GroupCollective().exchange({peer: [out]}, {peer: [into]}, {"hand_over": out.nbytes})


def _batch(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations):
        work.wait()


WAYS: dict[str, Way] = {way.__name__: way for way in (sends_first, receives_first, all_to_all_single, ours)}


def main(place: Place, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    numbers = round(settings["megabytes"] * 1e6 / 4)
    out, into = torch.full((numbers,), float(place.worker)), torch.empty(numbers)
    peer = 1 - place.worker
    for way in WAYS.values():  # connections are made, pages are touched
        way(out[:1000], into[:1000], peer)
    place.ready()
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(settings["repeats"]):
        for name, way in WAYS.items():
            into.fill_(-1)
            dist.barrier()
            before, start = place.bytes(), time.perf_counter()
            way(out, into, peer)
            seconds, after = time.perf_counter() - start, place.bytes()
            assert bool((into == peer).all()), f"{name}: something else arrived"
            sent = after[0] - before[0] if before and after else 0
            found.setdefault(name, []).append({"seconds": seconds, "kernel_sent_bytes": sent})
    place.measured()
    place.report({"payload_bytes": out.nbytes, "ways": found})
    dist.barrier()
    dist.destroy_process_group()
