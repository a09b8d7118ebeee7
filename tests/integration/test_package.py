"""The package from ``python -m build``: files, metadata, and a training with nothing but its declared dependencies."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("resist_lightning", "hydra_plugins", "conf", "docs", "experiments", "tests")

TRAINING = '''
import json, os, sys, warnings

import lightning as L
import torch

before = set(sys.modules)
import resist_lightning
from resist_lightning.models import preact_resnet

added = {name.partition(".")[0] for name in set(sys.modules) - before}
warnings.resetwarnings()  # `-W error` is for the imports


def listening():
    """The local addresses at which this process listens, of all families."""
    mine = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            mine.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:  # the folder's own descriptor
            pass
    rows = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/net/{name}").read().splitlines()[1:]]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine]


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = preact_resnet(14, width_multiplier=1 / 16)

    def training_step(self, batch, index):
        if index == 0:
            with open(f"worker-{self.global_rank}.json", "w") as file:
                json.dump(listening(), file)
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


if __name__ == "__main__":
    data = torch.utils.data.TensorDataset(torch.randn(16, 3, 8, 8), torch.zeros(16, dtype=torch.long))
    strategy = resist_lightning.ResISTStrategy(local_steps=2, min_blocks=1, start_method="fork")
    trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=2, max_epochs=1)
    trainer.fit(Classifier(), torch.utils.data.DataLoader(data, 2))
    with open("result.json", "w") as file:
        json.dump({"file": resist_lightning.__file__, "added": sorted(added)}, file)
'''


def run(*command: object, folder: Path) -> str:
    """Run a program that must not find this repository by PYTHONPATH; returns its output."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the sdist of a copy of the repository, and the wheel that is made from the sdist."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "copy").mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder / "copy")
        elif path.name in FOLDERS:
            shutil.copytree(path, folder / "copy" / path.name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", "copy", folder=folder)
    return folder / "dist"


def file_of(built: Path, pattern: str) -> Path:
    (found,) = built.glob(pattern)
    return found


def sources() -> set[str]:
    """The package's source files, and its marker for type checkers."""
    paths = [path for folder in ("resist_lightning", "hydra_plugins") for path in (ROOT / folder).rglob("*.py")]
    names = {str(path.relative_to(ROOT)) for path in paths}
    assert len(names) > 100
    return {*names, "resist_lightning/py.typed"}


def test_the_wheel_has_the_package_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(file_of(built, "*.whl")) as wheel:
        names = set(wheel.namelist())
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == sources()
    assert {name.partition("/")[2] for name in metadata} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "licenses/LICENSE",
        "top_level.txt",
    }


def test_the_sdist_has_what_the_wheel_is_made_from(built: Path) -> None:
    with tarfile.open(file_of(built, "*.tar.gz")) as sdist:
        names = {member.name.partition("/")[2] for member in sdist if member.isfile()}
    made = {name for name in names if ".egg-info/" in name} | {"PKG-INFO"}
    assert names - made == sources() | {"LICENSE", "README.md", "pyproject.toml", "setup.cfg"}


def test_an_index_would_take_both(built: Path) -> None:
    output = run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir(), folder=built)
    assert output.count("PASSED") == 2


def install(wheel: Path, folder: Path) -> Path:
    """Make an environment with the wheel, and links to its dependencies as installed here.

    So it costs no gigabytes, and packages that the wheel does not name, such as torchvision, are missing.

    Returns:
        The environment's interpreter.
    """
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, folder=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (installed,) = distributions(name="resist-lightning", path=[str(site)])
    for needed in required_by(installed, set()).values():
        for top in {file.parts[0] for file in needed.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():  # several distributions share the folder of a namespace
                (site / top).symlink_to(Path(str(needed.locate_file(top))))
    return python


def required_by(package: Distribution, extras: set[str]) -> dict[str, Distribution]:
    """All distributions that one requires, directly or not; checks that their versions are accepted."""
    found: dict[str, Distribution] = {}
    waiting: list[tuple[Distribution, set[str]]] = [(package, extras)]
    while waiting:
        each, extras = waiting.pop()
        for requirement in map(Requirement, each.requires or ()):
            marker = requirement.marker
            if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                continue
            needed = distribution(requirement.name)
            assert requirement.specifier.contains(needed.version, prereleases=True), requirement
            name = canonicalize_name(requirement.name)
            if name not in found or requirement.extras:
                found[name] = needed
                waiting.append((needed, set(requirement.extras)))
    return found


@pytest.fixture(scope="module")
def trained(built: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The reports of two workers that trained in an empty folder, in the wheel's environment."""
    python = install(file_of(built, "*.whl"), tmp_path_factory.mktemp("environment"))
    folder = tmp_path_factory.mktemp("empty")
    program = folder.parent / "train.py"
    program.write_text(TRAINING)
    run(python, "-W", "error", program, folder=folder)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    result["listening"] = [json.loads((folder / f"worker-{worker}.json").read_text()) for worker in range(2)]
    result["environment"] = python.parents[1]
    result["checkpoints"] = list(folder.rglob("*.ckpt"))
    return result


def test_it_trains_with_what_it_requires_and_warns_of_nothing_when_imported(trained: dict[str, Any]) -> None:
    assert Path(trained["file"]).is_relative_to(trained["environment"])
    assert [path.name for path in trained["checkpoints"]] == ["epoch=0-step=4.ckpt"]


def test_importing_it_adds_nothing_but_itself_and_torch_to_lightning(trained: dict[str, Any]) -> None:
    outside = set(trained["added"]) - sys.stdlib_module_names
    assert outside <= {"resist_lightning", "torch"}
    assert "resist_lightning" in outside


def test_what_listens_is_what_the_page_on_security_says(trained: dict[str, Any]) -> None:
    first, second = trained["listening"]
    everywhere = [address for address in first if not int(address, 16)]
    assert len(everywhere) == 1, "the store, on all interfaces"
    assert len(first) == 2, "the store and gloo"
    assert len(second) == 1, "gloo"
    assert int(second[0], 16), "gloo listens at the address of the host's name only"
