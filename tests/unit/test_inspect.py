"""The description of a network before anything trains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet101

from resist_lightning.errors import BlockSelectionError
from resist_lightning.inspect import inspect_model, main
from resist_lightning.methods.resist.config import Config
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.methods.resist.overview import costs
from tests.helpers.nets import MlpBlock, Undeclared, mlp, on_meta, small_preact


class Folding(nn.Module):
    """A residual block of an unknown class, whose branch ends in a linear layer."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outside(self.inside(x).relu())


class Plain(nn.Module):
    """A block that is not residual, though it looks so."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.inside = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x) + 1 + x.mean()


class Deep(nn.Module):
    """A network of two stages of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 6)
        self.stage1 = nn.Sequential(*(Folding(6) for _ in range(3)))
        self.between = nn.Linear(6, 8)
        self.stage2 = nn.Sequential(*(Folding(8) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.stage2(self.between(self.stage1(self.stem(x))))


def text_of(module: nn.Module, **options: object) -> str:
    text = str(inspect_model(module, **options))
    assert max(map(len, text.splitlines())) <= 100
    return text


def test_the_papers_network():
    found = inspect_model(on_meta(resnet101))

    by_glob = {row.globs: row for row in found.rows}
    chosen = by_glob[("layer3.*",)]
    assert chosen.blocks == 22
    assert chosen.chosen
    assert chosen.folds
    assert chosen.ends == ("bn3",)
    assert not by_glob[("layer3.0",)].keeps_shape
    assert [row.chosen for row in found.rows].count(True) == 1
    assert [other.globs for other in found.alternatives] == [("layer*.*",)]


def test_rows_choose_exactly_their_blocks():
    found = inspect_model(Deep(), min_blocks=1)

    for row in found.rows:
        again = BlockLayout(Deep(), Config(blocks=list(row.globs), min_blocks=1), 2)
        assert len(again.blocks) == row.blocks


def test_held_is_the_mean_of_the_layouts_own_numbers():
    net = small_preact()
    found = inspect_model(net, workers=3, min_blocks=1)

    layout = BlockLayout(net, Config(min_blocks=1), 3)
    held = [number for round in range(8) for number in layout.held_parameters(round)]
    mean, least, most = found.costs.held
    assert mean == pytest.approx(sum(held) / len(held))
    assert (least, most) == (min(held), max(held))


def test_nothing_is_sent_for_blocks_that_stay():
    alone = inspect_model(small_preact(), workers=1)
    assert alone.costs.sent == (0, 0, 0)
    pair = inspect_model(small_preact(), workers=2).costs
    assert 0 < pair.sent[0] < pair.local_sgd


def test_what_local_sgd_would_send_is_what_it_sends():
    """Frozen layers, which are not averaged, counted."""
    net = mlp(MlpBlock)
    net.stem.requires_grad_(False)
    found = costs(BlockLayout(net, Config(blocks=[]), 3))
    assert found.local_sgd == found.slowest > 0


def test_an_example_shows_what_folds_and_what_a_worker_computes():
    net = mlp(Folding)
    assert "not seen" in text_of(net)
    found = inspect_model(net, example=torch.randn(2, 3), min_blocks=1, blocks="body.*")

    (row,) = found.rows
    assert row.folds
    assert row.ends == ("outside",)
    operations = {"stem": 3 * 6, "block": 2 * 6 * 6, "head": 6 * 4}
    whole = operations["stem"] + 4 * operations["block"] + operations["head"]
    assert row.flops == pytest.approx(4 * operations["block"] / whole)
    assert found.costs.computed == pytest.approx(1 - 2 * operations["block"] / whole)


def test_a_block_that_does_not_fold_says_so():
    text = text_of(mlp(Undeclared), example=torch.randn(2, 3), blocks="body.*")
    assert "hook (no fold)" in text


def test_other_choices_are_told_with_what_a_worker_would_hold():
    found = inspect_model(mlp(MlpBlock), blocks="body.1", min_blocks=0)
    other = found.alternatives[-1]

    again = inspect_model(mlp(MlpBlock), blocks=list(other.globs), min_blocks=0).costs
    assert other.held == pytest.approx(again.held[0] / again.parameters)


class Token(Deep):
    """Calls a module with a view of a parameter, as PiT does with its class token."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.project = nn.Parameter(torch.zeros(6)), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.project(self.token.expand(len(x), -1))


def test_a_module_may_be_called_with_a_view_of_a_parameter():
    """torch's counter of operations ended, and the error said that the network does not take the example."""
    net = Token()
    assert inspect_model(net, example=torch.randn(2, 3)).costs.computed is not None
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_the_network_is_left_as_it_is():
    net = mlp(Folding).train()
    net[0].eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)

    torch.manual_seed(3)
    inspect_model(net, example=torch.randn(2, 3, generator=torch.Generator()))

    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert [child.training for child in net.children()] == [False, True, True]
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in net.modules())


def test_a_block_that_only_looks_residual_is_refused():
    with pytest.raises(BlockSelectionError, match=r"body\.\d.* is not residual"):
        inspect_model(mlp(Plain), example=torch.randn(2, 3), blocks="body.*")


class PastHooks(nn.Sequential):
    """Calls the forwards of its blocks, past their hooks."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block.forward(x)
        return x


def test_blocks_that_a_training_will_refuse_as_they_are_called_past_their_hooks_are_named():
    inspection = inspect_model(PastHooks(*(Folding() for _ in range(4))), example=torch.randn(2, 6))
    assert "did not call 1-3 as block(x): a training refuses" in inspection.note
    assert not inspect_model(nn.Sequential(*(Folding() for _ in range(4))), example=torch.randn(2, 6)).note


def test_misspelt_settings_are_refused():
    with pytest.raises(TypeError, match="min_block"):
        inspect_model(small_preact(), min_block=1)


def test_the_notebook_shows_table_and_picture():
    shown = inspect_model(small_preact(), min_blocks=1)._repr_html_()
    assert "<pre>PreActResNet" in shown
    assert "data:image/png;base64," in shown


def test_the_picture_has_a_cell_for_each_block_worker_and_round():
    figure = inspect_model(small_preact(), workers=3, min_blocks=1).figure(rounds=2)
    assert len(figure.axes[0].patches) == 2 * 3 * (1 + 4)


def test_the_command(capsys, tmp_path):
    picture = tmp_path / "held.png"
    main([f"{__name__}:Deep", "--input", "2x3", "--workers", "3", "--picture", str(picture)])

    output = capsys.readouterr().out
    assert "stage1.*" in output or "stage*.*" in output
    assert "folds: outside" in output
    assert "3 workers" in output
    assert picture.stat().st_size > 1000


class Mixed(Deep):
    """Its second stage only looks residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stage2 = nn.Sequential(*(Plain(8) for _ in range(3)))


def test_the_command_shows_the_globs_by_which_a_block_that_is_refused_can_be_left_out(capsys):
    with pytest.raises(SystemExit, match=r"error: block 'stage2\.0' .* is not residual.*blocks='stage1\.\*' chooses"):
        main([f"{__name__}:Mixed", "--input", "2x3", "--blocks", "stage*.*"])
    assert "\nstage1.*  " in capsys.readouterr().out
    main([f"{__name__}:Mixed", "--input", "2x3", "--blocks", "stage1.*"])


def test_the_command_passes_arguments_to_the_factory(capsys):
    main(["resist_lightning.models:preact_resnet", "depth=14", "--min-blocks", "0", "width_multiplier=0.125"])
    assert "a guess" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["torchvision.models"], "must be package.module:name"),
        (["./nets:make"], "must be package.module:name"),
        (["nets.py:make"], "must be package.module:name, .* or net:make for net.py"),
        (["nowhere.at_all:net"], "No module named 'nowhere'; is it installed"),
        (["torchvision.models:resnet51"], "has no 'resnet51'. Did you mean .*resnet"),
        (["torchvision.models:resnet50", "wdith=2"], "raised TypeError: .*wdith"),
        (["torchvision.models:resnet50", "2"], "must be key=value"),
        (["collections:Counter"], "made a Counter, not a torch.nn.Module"),
        ([f"{__name__}:Deep", "--input", "2x4"], r"an example of 2x4: .* Give an input .* with the batch as its first"),
        ([f"{__name__}:Deep", "--input", "two"], "must be numbers joined by x"),
        ([f"{__name__}:Deep", "--blocks", "trunk.*"], "matches nothing"),
        (["torch.nn:Linear", "in_features=2", "out_features=2"], "choose with `blocks=`"),
    ],
)
def test_errors_are_one_line_with_the_way_out(arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    said = str(stopped.value)
    assert said.startswith("error: ")
    assert "\n" not in said
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(said)


def test_a_few_lines_are_printed_before_training():
    lines = BlockLayout(small_preact(), Config(min_blocks=1), 2).describe().splitlines()
    assert len(lines) <= 6
    assert "A worker holds" in lines[1]
    assert "MB per sync" in lines[2]
    assert "For an evaluation it sends" in lines[3]
    lines = BlockLayout(small_preact(), Config(blocks=[], evaluate_on="first"), 2).describe().splitlines()
    assert "MB per sync. For an evaluation it sends" in lines[1]
    assert "worker 0 nothing" in lines[1]
