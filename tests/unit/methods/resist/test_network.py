"""Choice of blocks: the paper's rule, globs, predicates; and refusals."""

from __future__ import annotations

import re

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

from resist_lightning.errors import BlockSelectionError
from resist_lightning.methods.globs import summary
from resist_lightning.methods.residual import candidates, find_blocks
from resist_lightning.methods.resist.network import left_out, select_blocks
from resist_lightning.models import preact_resnet
from tests.helpers.nets import MlpBlock, OwnForward, Renamed, Undeclared, mlp, narrow_resnet, on_meta, small_preact


def names(module, choice=None):
    return [block.name for block in select_blocks(module, choice)]


def all_but_first(section: str, counts: tuple[int, ...]) -> list[str]:
    """Names of a ResNet's blocks, without the first of each section."""
    return [f"{section}{number}.{index}" for number, count in enumerate(counts, 1) for index in range(1, count)]


@pytest.mark.parametrize(
    ("make", "counts", "branch_end"),
    [
        (torchvision.models.resnet18, (2, 2, 2, 2), "bn2"),
        (torchvision.models.resnet34, (3, 4, 6, 3), "bn2"),
        (torchvision.models.resnet50, (3, 4, 6, 3), "bn3"),
        (torchvision.models.resnext50_32x4d, (3, 4, 6, 3), "bn3"),
        (torchvision.models.wide_resnet50_2, (3, 4, 6, 3), "bn3"),
    ],
)
def test_all_sections_are_partitioned_where_the_third_is_less_than_half_of_the_network(make, counts, branch_end):
    blocks = select_blocks(on_meta(make))
    assert [block.name for block in blocks] == all_but_first("layer", counts)
    assert {block.branch_end for block in blocks} == {branch_end}
    assert all(block.keeps_shape for block in blocks)


@pytest.mark.parametrize(("make", "count"), [(torchvision.models.resnet101, 22), (torchvision.models.resnet152, 35)])
def test_the_paper_s_rule_on_torchvision(make, count):
    blocks = select_blocks(on_meta(make))
    assert [block.name for block in blocks] == [f"layer3.{index}" for index in range(1, count + 1)]
    assert {block.branch_end for block in blocks} == {"bn3"}


@pytest.mark.parametrize(("depth", "count"), [(14, 2), (38, 14), (101, 22), (152, 35), (200, 49)])
def test_the_paper_s_rule_on_our_networks(depth, count):
    blocks = select_blocks(on_meta(lambda: preact_resnet(depth)))
    assert [block.name for block in blocks] == [f"section3.{index}" for index in range(1, count + 1)]
    assert {block.branch_end for block in blocks} == {"conv2"}


@pytest.mark.parametrize(
    ("name", "counts", "branch_end"),
    [("resnet18", (2, 2, 2, 2), "bn2"), ("resnet26", (2, 2, 2, 2), "bn3"), ("seresnet50", (3, 4, 6, 3), None)],
)
def test_blocks_of_timm_are_known(name, counts, branch_end):
    """Squeeze-and-excitation comes after the last norm, so that scaling the norm does not scale the branch."""
    blocks = select_blocks(on_meta(lambda: timm.create_model(name)))
    assert [block.name for block in blocks] == all_but_first("layer", counts)
    assert {block.branch_end for block in blocks} == {branch_end}


def test_a_network_inside_a_module_is_found_under_its_qualified_name():
    module = nn.ModuleDict({"net": narrow_resnet(), "loss": nn.CrossEntropyLoss()})
    assert names(module) == ["net.layer3.1", "net.layer3.2"]
    assert names(module, "layer3.*") == ["net.layer3.1", "net.layer3.2"]
    assert names(module, "net.layer3.2") == ["net.layer3.2"]


def test_the_rule_looks_at_each_network_by_itself():
    module = nn.ModuleDict({"one": narrow_resnet(), "two": small_preact()})
    assert names(module) == ["one.layer3.1", "one.layer3.2", *(f"two.section3.{i}" for i in (1, 2, 3, 4))]


def test_a_glob_leaves_blocks_that_change_the_shape_shared_and_reports_them():
    net = narrow_resnet(layers=(2, 2, 3, 1))
    assert names(net, "layer3.*") == ["layer3.1", "layer3.2"]
    assert left_out(net, "layer3.*") == ("layer3.0",)
    assert names(net, ["layer2.*", "layer1.*"]) == ["layer1.0", "layer1.1", "layer2.1"]
    assert left_out(net, ["layer2.*", "layer1.*"]) == ("layer2.0",)
    assert names(net, "layer[13].1") == ["layer1.1", "layer3.1"]
    assert left_out(net, None) == left_out(net, lambda name, _: "3" in name) == ()


def test_globs_that_meet_choose_a_block_once_and_the_order_is_the_network_s():
    net = narrow_resnet()
    assert names(net, ["layer3.2", "layer3.*", "layer3.1"]) == ["layer3.1", "layer3.2"]


def test_a_predicate_sees_name_and_module():
    net = narrow_resnet(layers=(2, 1, 3, 1))
    assert names(net, lambda name, module: isinstance(module, BasicBlock) and name.endswith(".1")) == [
        "layer1.1",
        "layer3.1",
    ]


def test_no_blocks_at_all_may_be_asked_for():
    assert names(small_preact(), []) == []
    assert names(nn.Linear(2, 2), []) == []


@pytest.mark.parametrize("choice", ["layer3.0", ["layer3.1", "layer3.0"], lambda name, _: name == "layer3.0"])
def test_a_block_that_changes_the_shape_is_refused_where_it_is_named(choice):
    with pytest.raises(BlockSelectionError, match=r"'layer3\.0' changes the shape.*layer3\.1-2"):
        select_blocks(narrow_resnet(), choice)


@pytest.mark.parametrize("choice", ["layer7.*", ["layer3.*", "layer7.*"]])
def test_a_glob_that_matches_nothing_lists_the_candidates(choice):
    with pytest.raises(BlockSelectionError, match=r"blocks='layer7\.\*' matches nothing.*layer1\.0, layer3\.1-2"):
        select_blocks(narrow_resnet(), choice)


def test_a_predicate_that_chooses_nothing_lists_the_candidates():
    with pytest.raises(BlockSelectionError, match=r"predicate .*chose nothing.*layer3\.1-2"):
        select_blocks(narrow_resnet(), lambda *_: False)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
        torchvision.models.vgg11,
        torchvision.models.googlenet,
    ],
)
def test_a_network_without_known_residual_blocks_says_what_to_do(make):
    with pytest.raises(BlockSelectionError, match=r"No residual block was recognised.*residual_branch_end"):
        select_blocks(on_meta(make))


def test_a_block_of_one_s_own_takes_part_by_declaring_where_its_branch_ends():
    net = mlp(MlpBlock)
    assert [(block.name, block.branch_end) for block in select_blocks(net, "body.*")] == [
        (f"body.{index}", "out") for index in range(4)
    ]


def test_a_block_of_an_unknown_kind_is_taken_at_its_word():
    blocks = select_blocks(mlp(Undeclared), "body.*")
    assert [(block.name, block.branch_end) for block in blocks] == [(f"body.{index}", None) for index in range(4)]


def test_a_subclass_folds_only_with_the_forward_that_we_know():
    renamed = find_blocks(narrow_resnet(Renamed))
    own = find_blocks(narrow_resnet(OwnForward))
    assert {block.branch_end for block in renamed} == {"bn3"}
    assert {block.branch_end for block in own} == {None}
    assert len(renamed) == len(own) == 6


def test_a_block_with_a_forward_of_its_own_is_not_taken_for_its_class() -> None:
    """A forward put in place of the class's, with a gate behind the last norm, was scaled in that norm, in silence."""
    net = narrow_resnet(Renamed)
    net.layer3[1].forward = lambda x: x + net.layer3[1].bn3(x).sigmoid()
    ends = {block.name: block.branch_end for block in find_blocks(net)}
    assert [name for name, end in ends.items() if end is None] == ["layer3.1"]


def test_a_block_in_a_block_is_refused():
    net = mlp(MlpBlock)
    net.body[1].inside = nn.Sequential(MlpBlock(6), nn.Linear(6, 12))
    with pytest.raises(BlockSelectionError, match=r"'body\.1\.inside\.0' lies in block 'body\.1'"):
        select_blocks(net, lambda _, module: isinstance(module, MlpBlock))


def test_a_block_that_shares_a_weight_is_refused():
    net = small_preact()
    net.section3[2].conv1.weight = net.section3[1].conv1.weight
    with pytest.raises(BlockSelectionError, match=r"section3\.1\.conv1\.weight, section3\.2\.conv1\.weight.*tied"):
        select_blocks(net, "section3.*")
    assert names(net, "section3.[34]") == ["section3.3", "section3.4"]
    # By default it stays shared, with a message.
    assert names(net) == ["section3.3", "section3.4"]
    assert left_out(net, None) == ("section3.1", "section3.2")


def test_a_block_that_is_registered_twice_is_refused():
    net = small_preact()
    net.section3[3] = net.section3[1]
    with pytest.raises(BlockSelectionError, match="give each block tensors of its own"):
        select_blocks(net, "section3.*")
    net.requires_grad_(False)
    with pytest.raises(BlockSelectionError, match="give each block tensors of its own"):
        select_blocks(net, "section3.*")


def test_where_all_blocks_are_one_the_default_says_so():
    block = MlpBlock(6)
    with pytest.raises(BlockSelectionError, match=r"tied weights"):
        select_blocks(nn.Sequential(block, block, block, block))


@pytest.mark.parametrize("scripted", ["body.1", "body.1.inside"])
def test_a_scripted_block_is_refused_by_name(scripted):
    net = mlp(Undeclared)
    owner, _, name = scripted.rpartition(".")
    setattr(net.get_submodule(owner), name, torch.jit.trace(net.get_submodule(scripted), torch.ones(1, 6)))
    with pytest.raises(BlockSelectionError, match=rf"block 'body\.1' is TorchScript \(at '{re.escape(scripted)}'\)"):
        select_blocks(net, "body.1")
    assert names(net, ["body.0", "body.2"]) == ["body.0", "body.2"]


def test_a_tied_weight_outside_the_blocks_does_no_harm():
    net = mlp(MlpBlock)
    net.second_head = net.head
    assert len(select_blocks(net, "body.*")) == 4


@pytest.mark.parametrize(
    ("listed", "short"),
    [
        ([], ""),
        (["a.1"], "a.1"),
        (["a.1", "a.2", "a.3", "a.5", "b.6", "b.7"], "a.1-3, a.5, b.6-7"),
        (["a.9", "a.10", "head", "tail"], "a.9-10, head, tail"),
    ],
)
def test_names_are_shortened_to_runs(listed, short):
    assert summary(listed) == short


def test_candidates_are_blocks_that_keep_the_shape():
    assert candidates(narrow_resnet()) == "Blocks that can be partitioned: layer1.0, layer3.1-2."


def test_a_block_lists_parameters_then_buffers_by_qualified_name():
    net = small_preact()
    block = select_blocks(net)[0]
    tensors = block.tensors()
    assert list(tensors)[:2] == ["section3.1.bn1.weight", "section3.1.bn1.bias"]
    assert list(tensors)[-1] == "section3.1.bn2.num_batches_tracked"
    assert len(tensors) == 6 + 6
    state = net.state_dict(keep_vars=True)
    assert all(tensors[name] is state[name] for name in tensors)
    assert block.section == "section3"


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ("stem.0", r"'stem\.0' is a single layer or a chain of layers \(Conv2d\)"),
        ("stem.*", r"'stem\.0' is a single layer"),
        (lambda name, _: name == "stem", r"'stem' is a single layer or a chain of layers \(Sequential\)"),
        ("pool", r"'pool' is a single layer or a chain of layers \(MaxPool2d\)"),
        ("rest", r"'rest' has no parameters"),
    ],
)
def test_layers_chains_of_layers_and_what_has_no_parameters_are_no_blocks(choice, reason):
    class Rest(nn.Module):
        def forward(self, x):
            return x.sin()

    net = nn.Sequential()
    net.add_module("stem", nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))
    net.add_module("pool", nn.MaxPool2d(1))
    net.add_module("rest", Rest())
    with pytest.raises(BlockSelectionError, match=reason):
        select_blocks(net, choice)


def test_layers_among_blocks_stay_shared_under_a_glob_and_are_reported():
    net = mlp(Undeclared)
    net.body.append(nn.Linear(6, 6))
    net.body.append(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
    assert names(net, "body.*") == [f"body.{index}" for index in range(4)]
    assert left_out(net, "body.*") == ("body.4", "body.5")


class Wider(MlpBlock):
    """A block whose shape does not follow from its registered layers, but is declared."""

    def __init__(self, width):
        super().__init__(width)
        self.last = nn.Linear(width, 3 * width)


class UndeclaredWider(Undeclared):
    def __init__(self, width):
        super().__init__(width)
        self.last = nn.Linear(width, 3 * width)


@pytest.mark.parametrize("block", [Wider, UndeclaredWider])
def test_the_order_of_registration_refuses_no_block(block):
    net = mlp(block)
    assert names(net, "body.*") == [f"body.{index}" for index in range(4)]
    assert names(net, "body.2") == names(net, lambda name, _: name == "body.2") == ["body.2"]


def test_where_some_blocks_seem_to_change_the_shape_a_glob_takes_the_others():
    net = mlp(Undeclared)
    net.body[0].last = nn.Linear(6, 9)
    assert names(net, "body.*") == ["body.1", "body.2", "body.3"]
    assert left_out(net, "body.*") == ("body.0",)


def distilling(student, teacher):
    return nn.ModuleDict({"teacher": teacher.requires_grad_(False), "student": student})


def test_a_frozen_teacher_stays_whole():
    net = distilling(small_preact(), narrow_resnet())
    assert names(net) == [f"student.section3.{i}" for i in (1, 2, 3, 4)]
    assert names(distilling(narrow_resnet(), narrow_resnet()), "layer3.*") == ["student.layer3.1", "student.layer3.2"]
    assert names(net, "teacher.layer3.*") == ["teacher.layer3.1", "teacher.layer3.2"]  # may be trained later


def test_a_network_that_no_optimizer_has_stays_whole():
    net = nn.ModuleDict({"average": small_preact(), "net": small_preact()})
    trained = {id(parameter) for parameter in net["net"].parameters()}
    assert [block.network for block in select_blocks(net, None, trained)] == ["net"] * 4
    with pytest.raises(BlockSelectionError, match=r"nothing trains in the network of .*teacher\.layer3\.1-2.*blocks="):
        select_blocks(distilling(nn.Linear(2, 2), narrow_resnet()))


def test_an_optimizer_of_another_module_is_told_apart_from_frozen_blocks():
    """Blocks that two rules name were listed twice, and nothing was said of optimizers."""
    net, other = small_preact(), small_preact()
    with pytest.raises(BlockSelectionError, match=r"the network of section1\.0, section3\.1-4 \(no optimizer has"):
        select_blocks(net, None, {id(parameter) for parameter in other.parameters()})


class Teaches(nn.Module):
    def __init__(self, teacher_first: bool, **frozen: bool) -> None:
        super().__init__()
        names = ("teacher", "student") if teacher_first else ("student", "teacher")
        for name in names:
            setattr(self, name, mlp(MlpBlock))
            getattr(self, name).body.requires_grad_(not frozen.get(name, False))
            if frozen.get(name, False):
                getattr(self, name).requires_grad_(False)


@pytest.mark.parametrize("first", [True, False])
def test_of_several_networks_only_those_that_train_are_dealt_out(first):
    net = Teaches(first, teacher=True)
    assert {block.network for block in select_blocks(net, "body.*")} == {"student"}
    assert left_out(net, "body.*") == tuple(f"teacher.body.{i}" for i in range(4))
    with_gradients = Teaches(first)
    optimized = {id(p) for p in with_gradients.student.parameters()}
    assert {block.network for block in select_blocks(with_gradients, "body.*", optimized)} == {"student"}
    assert {block.network for block in select_blocks(with_gradients, "body.*")} == {"student", "teacher"}
    assert len(select_blocks(Teaches(first, student=True, teacher=True), "student.body.*")) == 4
