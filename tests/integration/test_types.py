"""Type checkers see the public types in a user's program, and find its mistakes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".mypy_cache"

GOOD = """
from datetime import timedelta

import lightning as L
import torch
from torch import nn
from typing_extensions import assert_type

import resist_lightning as rl
from resist_lightning.callbacks import EndMarker, RoundMonitor, SeedPerWorker
from resist_lightning.inspect import inspect_model
from resist_lightning.models import preact_resnet

net: nn.Module = preact_resnet(14)
resist = rl.ResISTStrategy(local_steps=50, min_blocks=5, blocks="layer3.*", timeout=timedelta(minutes=5))
local_sgd = rl.LocalSGDStrategy(local_steps=50)
ist = rl.ISTStrategy(local_steps=20, layers="classifier.*")
auxnet = rl.AuxNetStrategy(method="al-net", cuts=["net.layer2"])
assert_type(resist.config, rl.Config)
assert_type(local_sgd.config, rl.Config)
assert_type(ist.config, rl.NeuronConfig)
assert_type(auxnet.config, rl.StageConfig)
trainer = L.Trainer(strategy=resist, callbacks=[RoundMonitor(every_n_rounds=2), SeedPerWorker(seed=1), EndMarker()])

optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
engine = rl.Engine(net, [optimizer], rl.Config(local_steps=50, min_blocks=1))
engine.start()
engine.after_step()
engine.finish()
assert_type(engine.clock.total_steps, int)
print(inspect_model(net, workers=3))

simulator = rl.Simulator(net, lambda copy: torch.optim.SGD(copy.parameters(), lr=0.1), rl.Config(), workers=4)
for worker in simulator.workers:
    worker.optimizers[0].step()
simulator.after_step()
assert_type(simulator.full_model(), nn.Module)

errors: tuple[type[Exception], ...] = (rl.WorkerLost, rl.NotFinite, rl.CheckpointError)
"""

BAD = {
    "rl.ResISTStrategy(local_stepps=50)": "call-arg",
    "rl.LocalSGDStrategy(local_steps=nn.Linear(1, 1))": "arg-type",
    "rl.ISTStrategy(layers=3)": "arg-type",
    "rl.AuxNetStrategy(method='al')": "arg-type",
    "rl.Config(min_blocks='5')": "arg-type",
    "rl.Engine(nn.Linear(1, 1), torch.optim.SGD, rl.Config())": "arg-type",
    "print(rl.LocalSGDStrategy().config.bolcks)": "attr-defined",
}


# Two seconds with the cache of `make lint`, a minute without it.
@pytest.mark.skipif(
    not (CACHE / "{}.{}".format(*sys.version_info)).exists(), reason="mypy has no cache yet: `make lint` makes it"
)
def test_a_users_program_is_checked(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    head = "import torch\nfrom torch import nn\nimport resist_lightning as rl\n"
    (tmp_path / "bad.py").write_text(head + "\n".join(BAD))

    options = ["--strict", f"--config-file={ROOT / 'pyproject.toml'}", f"--cache-dir={CACHE}"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "good.py", "bad.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )

    found = re.findall(r"^(.*):(\d+): error: .*\[(.*)\]$", done.stdout, re.MULTILINE)
    first = head.count("\n") + 1
    assert found == [("bad.py", str(first + i), code) for i, code in enumerate(BAD.values())], done.stdout + done.stderr
