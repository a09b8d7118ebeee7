"""The pages are true: snippets run, links lead somewhere, tables show their result files."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import re
import runpy
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

import resist_lightning
from experiments.harness import tables
from resist_lightning.comm import hosts
from resist_lightning.comm.hosts import Place
from resist_lightning.methods.resist.network import select_blocks
from resist_lightning.strategies.saving.restarts import check_shrinking
from tests.helpers.programs import ROOT, run_program
from tests.helpers.trainers import run_trainers

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("experiments/**/*.md")])

PRELUDE = """
import lightning as L, torch
from torch.utils.data import DataLoader, TensorDataset

class LitClassifier(L.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net
    def training_step(self, batch, index):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

datamodule = DataLoader(TensorDataset(torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.long)), 2)

if __name__ == "__main__":
"""


def snippets(page: str) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert found
    return found


def test_the_first_snippet_trains(tmp_path: Path) -> None:
    snippet = snippets("README.md")[0]
    (tmp_path / "script.py").write_text(PRELUDE + "".join(f"    {line}\n" for line in snippet.splitlines()))

    output = run_program(["script.py"], tmp_path, PL_TRAINER_MAX_STEPS="2")

    assert "blocks are partitioned over 2 worker(s)" in output
    assert "`max_steps=2` reached" in output


def test_the_settings_are_real() -> None:
    scope: dict[str, object] = {}
    exec(snippets("README.md")[1], scope)
    assert scope["strategy"].config.min_blocks == 5
    assert scope["baseline"].config.blocks == []


def test_the_loop_without_lightning_trains() -> None:
    from resist_lightning.models import preact_resnet

    model = preact_resnet(14, width_multiplier=1 / 16)
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = [(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))] * 2
    scope = {"model": model, "optimizer": optimizer, "loader": loader, "torch": torch}

    exec(snippets("README.md")[2], scope)

    assert scope["engine"].clock.total_steps == 2
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_the_snippet_with_snapshots_is_not_refused_under_the_command_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # of `torchrun --nproc-per-node=4 --max-restarts=3`
    scope: dict[str, Any] = {"resist_lightning": resist_lightning}

    exec(snippets("README.md")[3], scope)

    check_shrinking(scope["strategy"].options)


def test_a_model_of_ones_own_is_inspected_and_its_branch_end_declared() -> None:
    look, declare = snippets("docs/adding-a-model.md")
    scope: dict[str, Any] = {}
    exec(look, scope)
    (row,) = [row for row in scope["inspection"].rows if row.chosen]
    assert row.ends == ("conv2",)

    exec(declare, scope)
    blocks = select_blocks(scope["model"])
    assert {block.branch_end for block in blocks} == {"conv2"}


def test_the_first_training_is_the_file_and_prints_what_the_page_says(tmp_path: Path) -> None:
    page = (ROOT / "docs/start.md").read_text()
    program = ROOT / "docs/examples/first_training.py"
    (shown,) = snippets("docs/start.md")
    (printed,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)

    assert shown == program.read_text()
    assert printed in run_program([str(program)], tmp_path, PL_TRAINER_MAX_STEPS="2")


def test_the_loop_with_fabric_is_the_file_and_learns() -> None:
    program = ROOT / "docs/examples/fabric_loop.py"
    assert program.read_text() in snippets("docs/tools.md")
    printed, nothing = run_trainers(fabric_loop, 2, str(program))
    assert not nothing
    assert float(printed.removeprefix("accuracy")) > 0.5  # 0.1 by chance


def fabric_loop(_: int, program: str) -> str:
    """A worker's output."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        L.Fabric(accelerator="cpu", devices=2).launch(runpy.run_path(program)["train"])
    return printed.getvalue().strip()


@pytest.mark.parametrize(
    ("page", "name", "kind"),
    [
        ("clusters.md", "train.py", "python"),
        ("clusters.md", "train.sbatch", "bash"),
        ("tools.md", "optuna_pruning.py", "python"),
    ],
)
def test_files_to_copy_are_those_that_tests_of_engines_run(page: str, name: str, kind: str) -> None:
    shown = re.findall(rf"```{kind}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    assert (ROOT / "docs/examples" / name).read_text() in shown


def test_errors_of_hosts_are_quoted_as_they_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search for an error must find it on the page, which had host names without the boot id, and no ranks."""
    monkeypatch.setattr(hosts, "host_name", lambda: "host-1 (boot 1a2b3c4d)")
    first = Place("host-0 (boot 9f8e7d6c)", "0", "172.17.0.1")
    loopback = replace(first, host=hosts.host_name(), network="1", address="127.0.1.1", interfaces="eth0 (10.77.0.2)")
    loopback = replace(loopback, reason="its name 'host-1' resolves to it")
    no_interface = hosts.this_place({"GLOO_SOCKET_IFNAME": "eth7"}, nccl=False)
    same_address = replace(first, host=hosts.host_name(), network="1")
    said = [hosts.judge([first, second]) for second in (loopback, no_interface, same_address)]

    quoted = re.findall(r"\| `([^`|]*host-1 \(boot[^`]*)`", (ROOT / "docs/clusters.md").read_text())
    quoted = [text for text in quoted if "cannot reach" not in text]  # torch's own message
    assert len(quoted) == len(said)
    for text, message in zip(quoted, said, strict=True):
        assert re.match(".*".join(map(re.escape, text.split("..."))), message), (text, message)


def test_the_reference_has_everything_public_with_an_example_that_runs() -> None:
    page = (ROOT / "docs/api.md").read_text()
    entries = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", page, re.DOTALL | re.MULTILINE))
    without = {name for name, text in entries.items() if "```python" not in text}
    errors = {name for name in entries if isinstance(getattr(resist_lightning, name, None), type(Exception))}
    errors = {name for name in errors if issubclass(getattr(resist_lightning, name), Exception)}

    assert set(resist_lightning.__all__) <= set(entries)
    assert without == errors | {"Evaluation", "Inspection"}
    for example in snippets("docs/api.md"):
        exec(example, {})


@pytest.mark.parametrize("face", ["ResISTStrategy", "ISTStrategy", "AuxNetStrategy", "LocalSGDStrategy"])
def test_every_option_is_explained_on_a_page_beside_the_reference(face: str) -> None:
    pages = [page.read_text() for page in ROOT.glob("docs/*.md") if page.name != "api.md"]
    assert pages
    for option in inspect.signature(getattr(resist_lightning, face)).parameters:
        assert any(re.search(rf"`{option}`|\b{option}=", text) for text in pages), option


def test_what_is_public_in_other_modules_is_in_the_reference() -> None:
    contributing, page = (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / "docs/api.md").read_text()
    (public,) = re.findall(r"\*\*What is public:\*\*(.*?)\n\n", contributing, re.DOTALL)
    on_ray = ast.parse((ROOT / "resist_lightning/strategies/ray.py").read_text())  # Ray need not be installed
    (names,) = (ast.literal_eval(part.value) for part in on_ray.body if ast.unparse(part).startswith("__all__"))
    assert "resist_lightning.strategies.ray" in public
    assert len(names) == 4
    for name in [*names, *re.findall(r"`(\w+)`", public)]:
        assert f"`{name}`" in page or f"### {name}\n" in page, name


def test_tables_show_their_result_files() -> None:
    for page in tables.PAGES:
        text = page.read_text()
        assert tables.PLACE.search(text)
        assert tables.filled(text) == text, "run python experiments/harness/tables.py"


def test_every_decision_is_listed_by_its_number() -> None:
    """A Markdown list numbers its items consecutively from the first one: "decision 46" was shown as 44."""
    page = (ROOT / "docs/decisions/README.md").read_text().partition("## All of them")[2]
    listed = re.findall(r"^- \[(\d+) .*\]\((\d{4}-.*\.md)\)$", page, re.MULTILINE)
    assert len(listed) == len(page.split("\n- ")) - 1
    assert [int(number) for number, _ in listed] == [int(file[:4]) for _, file in listed]
    assert [file for _, file in listed] == sorted(path.name for path in (ROOT / "docs/decisions").glob("0*.md"))


def test_the_changelog_has_its_sections_in_the_order_that_contributing_says() -> None:
    (said,) = re.findall(r"with (\*Added\*.*?) in this order", (ROOT / "CONTRIBUTING.md").read_text())
    order = re.findall(r"\*(\w+)\*", said)
    for version in (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1:]:
        sections = re.findall(r"^### (\w+)$", version, re.MULTILINE)
        assert sections
        assert sections == [name for name in order if name in sections]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


class Parsed(LightningCLI):
    """A program like that of the page on tools, with subcommands that run nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Do nothing: the test looks at the strategy that would train."""


def test_command_lines_of_lightning_cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page asked for a class's help without the subcommand, which a program with subcommands refuses."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])  # LightningCLI would warn of pytest's arguments
    saved = tmp_path / "lightning_logs" / "version_0" / "config.yaml"
    saved.parent.mkdir(parents=True)
    saved.write_text("trainer: {strategy: {class_path: resist_lightning.ResISTStrategy}, devices: 2}\n")
    lines = re.findall(
        r"^python train\.py (.*--(?:trainer|config).*)$", (ROOT / "docs/tools.md").read_text(), re.MULTILINE
    )
    assert len(lines) == 4
    for line in lines:
        arguments = shlex.split(line)
        if ".help=" in line:
            with pytest.raises(SystemExit, match="0"):
                Parsed(BoringModel, BoringDataModule, args=arguments)
            assert "--trainer.strategy.local_steps" in capsys.readouterr().out
        else:
            cli = Parsed(
                BoringModel, BoringDataModule, args=[*arguments[:1], "--trainer.accelerator=cpu", *arguments[1:]]
            )
            assert isinstance(cli.trainer.strategy, resist_lightning.ResISTStrategy)
