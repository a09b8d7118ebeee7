"""Tensors of each worker, their bytes, and messages for the user."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import nn

from resist_lightning import Config
from resist_lightning.comm.collective import SoloCollective
from resist_lightning.errors import BlockSelectionError
from resist_lightning.methods.residual import BranchEnd, parameters_of
from resist_lightning.methods.resist.layout import BlockLayout
from resist_lightning.methods.resist.subnet import Subnet
from resist_lightning.models import PreActResNet
from resist_lightning.state.optimizer_state import OptimizerStates
from tests.helpers.nets import Undeclared, mlp, small_preact


def test_what_is_not_in_a_block_is_shared_buffers_included():
    net = small_preact()
    layout = BlockLayout(net, Config(min_blocks=1), 2)
    blocks = [f"section3.{index}." for index in (1, 2, 3, 4)]
    names = [name for name, _ in [*net.named_parameters(), *net.named_buffers()]]
    assert list(layout.shared) == [name for name in names if not any(name.startswith(block) for block in blocks)]
    state = net.state_dict(keep_vars=True)
    assert all(tensor is state[name] for name, tensor in layout.shared.items())
    assert [id(p) for p in parameters_of(layout.blocks)] == [
        id(p) for name, p in net.named_parameters() if any(name.startswith(block) for block in blocks)
    ]


class Rotary(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "buffer":
            self.register_buffer("frequencies", torch.ones(6))
        else:
            self.frequencies = nn.Parameter(torch.ones(6), requires_grad=kind == "trained")


@pytest.mark.parametrize("kind", ["buffer", "frozen", "trained"])
def test_what_all_blocks_refer_to_and_nothing_trains_is_held_by_all_workers(kind: str) -> None:
    """One object of rotary embeddings in each block was refused as tied weights, as if a block were used twice."""
    net, rotary = mlp(Undeclared), Rotary(kind)
    for block in net.body:
        block.rotary = rotary
    if kind == "trained":
        with pytest.raises(BlockSelectionError, match=r"body\.1\.rotary\.frequencies.*tied"):
            BlockLayout(net, Config(blocks="body.*", min_blocks=1), 2)
        return
    layout = BlockLayout(net, Config(blocks="body.*", min_blocks=1), 2)

    assert layout.shared["body.0.rotary.frequencies"] is rotary.frequencies
    assert not any("rotary" in name for block in layout.blocks for name in block.tensors())
    assert max(layout.held_parameters(0)) < sum(parameter.numel() for parameter in net.parameters())
    Subnet(layout.blocks).hold([])
    assert rotary.frequencies.sum() == 6
    assert net.body[0].inside.weight.is_meta


@pytest.mark.parametrize(("blocks", "least"), [(1, 1), (4, 2), (5, 2), (9, 4), (10, 5), (35, 5)])
def test_the_default_minimum_is_the_paper_s_five_or_half_where_there_are_few_blocks(blocks, least):
    net = PreActResNet((1, 1, blocks + 1, 1), 4, width_multiplier=1 / 64)
    assert BlockLayout(net, Config(blocks="section3.*"), 4).schedule.min_blocks == least
    assert BlockLayout(net, Config(blocks="section3.*", min_blocks=0), 4).schedule.min_blocks == 0


@pytest.mark.parametrize(
    ("config", "workers", "partial", "scale"),
    [
        (Config(), 2, True, 0.5),
        (Config(blocks="section3.1"), 2, False, 1.0),
        (Config(min_blocks=1), 2, True, 0.5),
        (Config(min_blocks=3), 2, True, 0.75),
        (Config(min_blocks=1), 1, False, 1.0),
        (Config(blocks=[]), 3, False, 1.0),
        (Config(min_blocks=0, warmup_rounds=5), 4, True, 0.25),
        (Config(min_blocks=1, test_scale=0.3), 2, True, 0.3),
        (Config(blocks_per_worker=(3, 1)), 2, True, 0.5),
        (Config(blocks_per_worker=(4, 1)), 2, True, 0.625),
        (Config(blocks_per_worker=(4, 4)), 2, False, 1.0),
        (Config(min_blocks=1, blocks_per_worker="auto"), 2, True, 0.5),
        (Config(min_blocks=3, blocks_per_worker="auto"), 2, True, 0.75),
    ],
)
def test_whether_anything_is_partitioned_and_how_it_is_scaled(config, workers, partial, scale):
    layout = BlockLayout(small_preact(), config, workers)
    assert layout.partial is partial
    assert layout.scaling.scale == pytest.approx(scale)


def by_hand(tensors, dtype):
    return sum(t.numel() * t.element_size() for t in tensors if t.dtype == dtype)


def test_sizes_count_parameters_and_buffers_once_by_data_type():
    net = small_preact()
    sizes = BlockLayout(net, Config(min_blocks=1), 2).sizes(OptimizerStates([]))
    blocks = [list(net.section3[index].state_dict().values()) for index in (1, 2, 3, 4)]
    everything = list(net.state_dict().values())
    for dtype in (torch.float32, torch.int64):
        inside = [by_hand(tensors, dtype) for tensors in blocks]
        assert sizes.shared[str(dtype)] == by_hand(everything, dtype) - sum(inside) > 0
        assert [averaged[str(dtype)] for averaged in sizes.averaged] == inside
    assert list(sizes.blocks) == [sum(by_hand(t, d) for d in (torch.float32, torch.int64)) for t in blocks]
    assert sizes.states == (0, 0, 0, 0)


def test_frozen_parameters_are_not_averaged_but_travel_with_their_block():
    net = small_preact()
    plain = BlockLayout(net, Config(min_blocks=1), 2).sizes(OptimizerStates([]))
    frozen = [net.stem.weight, net.section3[2].conv1.weight]
    for parameter in frozen:
        parameter.requires_grad_(False)
    sizes = BlockLayout(net, Config(min_blocks=1), 2).sizes(OptimizerStates([]))
    assert plain.shared["torch.float32"] - sizes.shared["torch.float32"] == 4 * frozen[0].numel()
    assert plain.averaged[1]["torch.float32"] - sizes.averaged[1]["torch.float32"] == 4 * frozen[1].numel()
    assert sizes.blocks == plain.blocks


@pytest.mark.parametrize(("optimizer", "slots", "numbers"), [("SGD", 1, 0), ("AdamW", 2, 1)])
def test_state_that_travels_has_its_size(optimizer, slots, numbers):
    net = small_preact()
    options = {"momentum": 0.9} if optimizer == "SGD" else {}
    states = OptimizerStates([getattr(torch.optim, optimizer)(net.parameters(), lr=0.1, **options)])
    block = list(net.section3[1].parameters())
    expected = 4 * slots * sum(p.numel() for p in block) + 4 * numbers * len(block)
    assert BlockLayout(net, Config(min_blocks=1, momentum="travel"), 2).sizes(states).states == (expected,) * 4
    assert BlockLayout(net, Config(min_blocks=1, momentum="keep"), 2).sizes(states).states == (0,) * 4


@pytest.mark.parametrize("name", ["SGD", "Rprop", "NAdam"])
def test_asking_for_sizes_makes_no_state(name):
    """Rprop, NAdam, and SGD with dampening do not begin with zeros: a report of bytes would change the training."""
    net = small_preact()
    optimizer = getattr(torch.optim, name)(net.parameters(), **({"momentum": 0.9} if name == "SGD" else {}))
    BlockLayout(net, Config(min_blocks=1, momentum="travel"), 2).sizes(OptimizerStates([optimizer]))
    assert not optimizer.state


BASE = Config(min_blocks=1)


def digest(config=BASE, workers=2, change=lambda _: None):
    net = small_preact()
    change(net)
    return BlockLayout(net, config, workers).digest()


def test_the_digest_does_not_depend_on_the_weights():
    assert digest() == digest()
    assert digest(change=lambda net: nn.init.zeros_(net.stem.weight)) == digest()
    assert 0 <= digest() < 2**48


def widen(net):
    net.head = nn.Linear(net.head.in_features, 5)


def rename(net):
    net.classifier = net.head
    del net.head


@pytest.mark.parametrize(
    "other",
    [
        {"config": Config(min_blocks=1, seed=1)},
        {"config": Config(min_blocks=1, local_steps=49)},
        {"config": Config(min_blocks=2)},
        {"config": Config(min_blocks=1, blocks="section3.[123]")},
        {"config": Config(min_blocks=1, warmup_rounds=1)},
        {"config": Config(min_blocks=1, blocks_per_worker=(1, 3))},
        {"config": Config(min_blocks=1, blocks_per_worker="auto")},
        {"config": Config(min_blocks=1, momentum="keep")},
        {"config": Config(min_blocks=1, batch_norm="running")},
        {"config": Config(min_blocks=1, test_scale=0.4)},
        {"config": Config(min_blocks=1, wire="int8")},
        {"workers": 3},
        {"change": widen},
        {"change": rename},
        {"change": lambda net: net.double()},
        {"change": lambda net: net.head.bias.requires_grad_(False)},
    ],
)
def test_the_digest_tells_models_and_settings_apart(other):
    assert digest(**other) != digest()


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.register_buffer("mean", torch.zeros(3)),
        lambda net: setattr(net.section1[0], "bn1", nn.BatchNorm2d(4, track_running_stats=False)),
    ],
)
def test_the_digest_tells_buffers_apart(change):
    assert digest(change=change) != digest()


def test_the_description_says_what_was_chosen():
    text = BlockLayout(small_preact(), Config(min_blocks=1, local_steps=7), 3).describe()
    assert "4 residual blocks" in text
    assert "3 worker(s), 2, 1, 1 a worker" in text
    assert "section3.1-4" in text
    assert "7 local steps" in text
    assert "scale 0.3333" in text
    listed = BlockLayout(small_preact(), Config(blocks_per_worker=[1, 3]), 2).describe()
    assert "2 worker(s), 1, 3 a worker:" in listed
    auto = BlockLayout(small_preact(), Config(min_blocks=1, blocks_per_worker="auto"), 2).describe()
    assert "2, 2 a worker at first, later in proportion to speed:" in auto
    assert "All parameters are shared by 2" in BlockLayout(small_preact(), Config(blocks=[]), 2).describe()


@pytest.mark.parametrize(
    ("config", "workers", "message"),
    [
        (Config(blocks="section3.1"), 2, r"nothing is partitioned: the default min_blocks=1 gives every worker all 1 "),
        (Config(min_blocks=0), 5, r"5 workers for 4 blocks with min_blocks=0: in each round some workers train only"),
        (Config(min_blocks=1, blocks="section[23].*"), 2, r"section2\.0, section3\.0 match `blocks` but stay shared"),
    ],
)
def test_a_setting_with_less_effect_than_one_may_think_warns(config, workers, message):
    with pytest.warns(UserWarning, match=message):
        BlockLayout(small_preact(), config, workers).warn_about_settings()


@pytest.mark.parametrize(
    ("config", "workers"),
    [
        (Config(), 1),
        (Config(blocks_per_worker=[4, 0]), 2),
        (Config(min_blocks=4), 2),
        (Config(min_blocks=1), 2),
        (Config(blocks=[]), 3),
    ],
)
def test_what_the_user_asked_for_does_not_warn(config, workers):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BlockLayout(small_preact(), config, workers).warn_about_settings()


@pytest.mark.parametrize("least", [5, 99])
def test_an_explicit_minimum_above_the_number_of_blocks_is_an_error(least):
    with pytest.raises(ValueError, match=f"min_blocks={least} is impossible with 4 partitionable"):
        BlockLayout(small_preact(), Config(min_blocks=least), 2)


def test_a_minimum_that_only_the_warm_up_could_give_is_an_error_at_once():
    with pytest.raises(ValueError, match="min_blocks=5 is impossible"):
        BlockLayout(small_preact(), Config(min_blocks=5, warmup_rounds=9), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks_per_worker": [1, 2]}, "adds up to 3, but there are 4 partitionable blocks"),
        ({"blocks_per_worker": [3, 1], "min_blocks": 2}, "below min_blocks=2"),
        ({"blocks_per_worker": [9, 9]}, "a worker cannot hold more than the 4"),
        ({"blocks_per_worker": [4]}, r"1 number\(s\) for 2 worker"),
        ({"blocks_per_worker": "auto", "min_blocks": 5}, "min_blocks=5 is impossible"),
    ],
)
def test_counts_that_do_not_fit_the_network_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        BlockLayout(small_preact(), Config(**options), 2)


def measured(config=Config(min_blocks=1, blocks_per_worker="auto")):  # noqa: B008
    layout = BlockLayout(small_preact(), config, 2)
    for round in range(5):
        layout.learn(round, [2.0 - round % 2, 6.0 - 3.0 * (round % 2)], [8.0, 9.0])
    return layout


def test_a_resumed_run_goes_on_with_its_measured_counts_and_measures_anew_without():
    before = measured()
    assert before.schedule.counts == ((6, (3, 1)),)
    after = BlockLayout(small_preact(), before.config, 2)
    after.load_state_dict(before.schedule.state_dict(), 9)
    assert after.schedule == before.schedule
    assert after.digest() == before.digest() != BlockLayout(small_preact(), before.config, 2).digest()
    after.load_state_dict({}, 9)
    assert (after.schedule.measured_from, after.schedule.counts, after.schedule.seconds) == (10, (), ())


def test_a_resumed_run_goes_on_with_its_chosen_overlap_and_measures_anew_without():
    before = measured(Config(min_blocks=1, overlap="auto", warmup_rounds=1))
    assert before.overlaps.chosen == (4, 11)  # from the rounds after the warm-up: 1.2 x 9 s / 1 s
    assert [before.overlapped_steps(round) for round in (3, 4)] == [0, 11]
    after = BlockLayout(small_preact(), before.config, 2)
    assert after.digest() != before.digest()
    after.load_state_dict(json.loads(json.dumps(before.state_dict())), 9)
    assert after.schedule == before.schedule
    assert after.digest() == before.digest()
    after.load_state_dict({}, 9)
    assert (after.overlaps.chosen, after.overlaps.measured_from) == (None, 9)
    given = BlockLayout(small_preact(), Config(min_blocks=1, overlap=3), 2)
    given.load_state_dict(before.state_dict(), 9)
    assert given.overlapped_steps(9) == 3
    assert given.identity() == before.identity() | {"warmup_rounds": 0}


@pytest.mark.parametrize(("options", "workers"), [({}, 3), ({"blocks": "section3.[123]"}, 2), ({"min_blocks": 0}, 2)])
def test_a_table_of_other_workers_or_blocks_is_measured_anew(options, workers):
    config = Config(**{"min_blocks": 1, "blocks_per_worker": "auto", **options})
    after = BlockLayout(small_preact(), config, workers)
    after.load_state_dict(measured().schedule.state_dict(), 9)
    assert (after.schedule.measured_from, after.schedule.counts, after.schedule.seconds) == (10, (), ())


@pytest.mark.parametrize("counts", ["equal", (1, 3)])
def test_a_resumed_run_does_as_its_settings_say_whatever_was_measured(counts):
    after = BlockLayout(small_preact(), Config(min_blocks=1, blocks_per_worker=counts), 2)
    schedule = after.schedule
    after.load_state_dict(measured().schedule.state_dict(), 9)
    assert after.schedule == schedule


def test_measured_counts_change_neither_the_scale_nor_whether_anything_is_partitioned():
    layout = measured()
    assert (layout.scaling.scale, layout.partial) == (0.5, True)


def test_a_network_without_blocks_is_an_error_unless_none_are_asked_for():
    with pytest.raises(BlockSelectionError):
        BlockLayout(nn.Linear(3, 3), Config(), 2)
    assert BlockLayout(nn.Linear(3, 3), Config(blocks=[]), 2).blocks == ()


END = BranchEnd(("inside.weight", "inside.bias"), "inside")


def seen_by_one_worker(ends: list[tuple[BranchEnd, ...] | None], *, stepped: bool = True) -> None:
    """Let a worker report the branch ends of its blocks."""
    layout = BlockLayout(mlp(Undeclared), Config(min_blocks=1, blocks="body.*"), 2)
    for block, known in zip(layout.blocks, ends, strict=True):
        block.seen.ends = known
    layout.agree(SoloCollective(), stepped=stepped)


def test_a_checkpoint_that_cannot_be_a_plain_model_warns():
    with pytest.warns(UserWarning, match=r"scale of body\.0-1 does not fold into a weight"):
        seen_by_one_worker([(), (), (END,), (END,)])
    with pytest.warns(UserWarning, match="batch_norm='batch'.*track_running_stats=False"):
        BlockLayout(small_preact(), Config(min_blocks=1, batch_norm="batch"), 2).warn_about_settings()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BlockLayout(mlp(Undeclared), Config(min_blocks=1, blocks="body.*"), 2).warn_about_settings()
        seen_by_one_worker([None] * 4, stepped=False)  # as before a sanity check
        seen_by_one_worker([(END,)] * 4)
        BlockLayout(
            small_preact(track_running_stats=False), Config(min_blocks=1, batch_norm="batch"), 2
        ).warn_about_settings()


def test_what_all_workers_had_is_the_full_model() -> None:
    layout = BlockLayout(small_preact(), Config(min_blocks=1), 3)
    held = [{"shared": torch.tensor(1.0), f"block{worker}": torch.tensor(3.0 + worker)} for worker in range(3)]

    found = layout.full_tensors({"own": {"tensors": tensors}} for tensors in held)

    assert {name: value.item() for name, value in found.items()} == {"shared": 1, "block0": 3, "block1": 4, "block2": 5}
