"""Breaks the code on purpose, in one place at a time, and reports which tests notice: ``make mutants``.

Each mutant is a copy of the repository with one small change. Its tests must fail (killed); where they pass, the mutant
has survived and a contract has lost its test. ``tests/unit/test_mutants.py`` keeps the changes applicable.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("resist_lightning", "tests", "experiments", "hydra_plugins", "conf")
LIMIT_SECONDS = 600
AT_ONCE = 2


@dataclass(frozen=True)
class Mutant:
    """A small break of the code.

    Args:
        name: the broken behaviour, for the table.
        file: within ``resist_lightning``.
        old: the line or expression that is replaced; it stands in the file exactly once.
        new: its replacement.
        tests: pytest arguments; at least one of these tests must fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "sum for mean",
        "comm/mean.py",
        "numbers.add_(offset / (len(others) + 1))",
        "numbers.add_(offset)",
        ("tests/distributed/test_oracle.py",),
    ),
    Mutant(
        "no broadcast at the start",
        "methods/resist/start.py",
        "exchange.broadcast(list(layout.shared.values()), KIND)",
        "pass",
        ("tests/distributed/test_means.py", "tests/distributed/test_by_hand.py", "tests/distributed/test_agreement.py"),
    ),
    Mutant(
        "whole module on every worker until the start has ended",
        "methods/resist/sync.py",
        "self.make_room(round)  # what is given to others goes before anything arrives",
        "pass",
        ("tests/distributed/test_memory_at_start.py",),
    ),
    Mutant(
        "a worker's own file in its memory",
        "strategies/saving/checkpoint_files.py",
        "read_sealed(found[0], mapped=True)",
        "read_sealed(found[0])",
        ("tests/experiments/test_phases.py",),
    ),
    Mutant(
        "the full model's file in the memory of every worker",
        "strategies/saving/checkpoint_io.py",
        "mmap=True",
        "mmap=False",
        ("tests/experiments/test_phases.py",),
    ),
    Mutant(
        "the full weights twice on worker 0 for a checkpoint",
        "strategies/saving/saver.py",
        "copy = not at_once or value.untyped_storage().data_ptr() in own",
        "copy = True",
        ("tests/experiments/test_phases.py",),
    ),
    Mutant(
        "optimizer state is not counted against a memory limit",
        "state/memory_limit.py",
        "state=states.bytes(trained),",
        "state=0,",
        ("tests/unit/state/test_memory_limit.py",),
    ),
    Mutant(
        "every block to every worker at the start",
        "methods/resist/start.py",
        "for holder in partition.holders(block) if holder != 0",
        "for holder in range(1, partition.workers)",
        ("tests/unit/methods/resist/test_start.py",),
    ),
    Mutant(
        "what nobody trains at first is lost where neurons have several holders",
        "methods/ist/plan.py",
        'found = [own_slice(cut, held, worker), Piece(worker, 0, kept, None, "store", "full")]',
        "found = [own_slice(cut, held, worker)] if kept else []",
        ("tests/unit/methods/ist/test_start.py",),
    ),
    Mutant(
        "a worker that built no values resumes without its stores",
        "methods/ist/sync.py",
        "return is_unmade(self._layout.module) and not",
        "return False and not",
        ("tests/integration/test_building.py",),
    ),
    Mutant(
        "worker 0 collects from one worker only",
        "methods/ist/sync.py",
        "for peer in range(1, self._layout.workers):",
        "for peer in range(1, 2):",
        ("tests/unit/methods/ist/test_sync.py",),
    ),
    Mutant(
        "neurons are put together all at once",
        "methods/ist/parts.py",
        "+ sizes[name] > max(sizes.values()):",
        "+ sizes[name] > sum(sizes.values()):",
        ("tests/unit/methods/ist/test_parts.py", "tests/distributed/test_memory_at_start.py"),
    ),
    Mutant(
        "a row is lost where a message is divided",
        "methods/ist/messages.py",
        "replace(piece, rows=piece.rows[rows:])",
        "replace(piece, rows=piece.rows[rows + 1 :])",
        ("tests/unit/methods/ist/test_messages.py",),
    ),
    Mutant(
        "random numbers of a form",
        "strategies/building.py",
        "if begun_first.get(name) == state]",
        "if False]",
        ("tests/integration/test_building.py",),
    ),
    Mutant(
        "lost block",
        "schedule/transfers.py",
        "hand_over.extend(Transfer(root, worker, block) for worker in new if worker != root)",
        "hand_over.extend(Transfer(root, worker, block) for worker in new[1:] if worker != root)",
        ("tests/unit/schedule/test_transfers.py",),
    ),
    Mutant(
        "block sent twice",
        "schedule/transfers.py",
        "hand_over.extend(Transfer(root, worker, block) for worker in new if worker != root)",
        "hand_over.extend(2 * [Transfer(root, worker, block) for worker in new if worker != root])",
        ("tests/unit/schedule/test_transfers.py",),
    ),
    Mutant(
        "momentum kept at a sync",
        "engine/round_end.py",
        'if self._layout.config.momentum == "reset":',
        "if False:",
        ("tests/unit/engine/test_engine.py",),
    ),
    Mutant(
        "Adam's state restarts at a sync unless told otherwise",
        "methods/config.py",
        'momentum="reset" if plain else "keep"',
        'momentum="reset"',
        ("tests/unit/methods/test_config.py",),
    ),
    Mutant(
        "vectors are averaged with the matrices",
        "comm/compressed_mean.py",
        "apart = sum(map(is_vector, tensors)) if self._vectors is not None else 0",
        "apart = 0",
        ("tests/unit/comm/test_compressed_mean.py",),
    ),
    Mutant(
        "scale not undone after an evaluation",
        "methods/resist/folding.py",
        "each.undo(scale)",
        "pass",
        ("tests/unit/methods/resist/test_folding.py",),
    ),
    Mutant(
        "a branch that another one reads counts as its own",
        "methods/resist/branches.py",
        "if differ_at_most((both - other)[inside], (alone - neither)[inside], limit):",
        "if True:",
        ("tests/unit/methods/resist/test_branches.py",),
    ),
    Mutant(
        "partial checkpoint",
        "methods/part_guard.py",
        'self.refuse(name, "save")',
        "return",
        ("tests/unit/methods/ist/test_odd_trainings.py",),
    ),
    Mutant(
        "absent values read in silence",
        "state/absent.py",
        "raise absent._error()",
        "return torch.zeros(())",
        ("tests/unit/state/test_absent.py",),
    ),
    Mutant(
        "input of an absent block overwritten",
        "methods/resist/bypass.py",
        "if self.written is False:",
        "if True:",
        ("tests/unit/methods/resist/test_bypass.py",),
    ),
    Mutant(
        "header not compared",
        "checks/header.py",
        "if not differing:",
        "if True:",
        ("tests/unit/checks/test_header.py",),
    ),
    Mutant(
        "partition by process",
        "schedule/partition.py",
        "@lru_cache(maxsize=64)",
        "@(lambda f: lambda b, c, s, *rest: f(b, c, s + __import__('os').getpid(), *rest))",
        ("tests/unit/schedule/test_partition.py",),
    ),
    Mutant(
        "rounding down",
        "comm/quantize.py",
        "steps += 0.5",
        "steps += 0.0",
        ("tests/unit/comm/test_quantize.py",),
    ),
    Mutant(
        "resume without random state",
        "strategies/saving/trainer_state.py",
        'self.position.restore(state["position"])',
        "pass",
        ("tests/integration/test_exact_resume.py",),
    ),
    Mutant(
        "gradient of a stage cut",
        "methods/auxnet/step/backward.py",
        "return gradient.to(ctx.made.dtype), None, None, None, None",
        "return torch.zeros_like(ctx.made), None, None, None, None",
        ("tests/distributed/test_auxnet_steps.py",),
    ),
    Mutant(
        "a late gradient of another batch",
        "methods/auxnet/step/delayed.py",
        "while len(self._late) > max(self._wait, but):",
        "while len(self._late) > max(self._wait + 1, but):",
        ("tests/unit/methods/auxnet/step/test_delayed.py",),
    ),
    Mutant(
        "gradients are late in the warm-up",
        "methods/auxnet/step/delayed.py",
        "self._wait = 0 if warmup else self._delay",
        "self._wait = self._delay",
        ("tests/unit/methods/auxnet/step/test_delayed.py",),
    ),
    Mutant(
        "weights ahead in the warm-up",
        "methods/auxnet/step/delayed.py",
        "self._look_ahead(self._wait / accumulate)",
        "self._look_ahead(self._delay / accumulate)",
        ("tests/unit/methods/auxnet/step/test_delayed.py",),
    ),
    Mutant(
        "late gradients do not go through to the first stage",
        "methods/auxnet/step/delayed.py",
        "torch.zeros_like(late.given) if before is None else before",
        "torch.zeros_like(late.given)",
        ("tests/unit/methods/auxnet/step/test_delayed.py",),
    ),
    Mutant(
        "late gradients at the weights of now",
        "methods/auxnet/step/delayed.py",
        "copy += steps * (weight.detach() - self._before[name])",
        "pass",
        ("tests/unit/methods/auxnet/step/test_delayed.py",),
    ),
    Mutant(
        "late gradients are lost at a checkpoint",
        "methods/auxnet/step/delayed.py",
        'self._late = deque(_copied(late, self._device) for late in state["late"])',
        "self._late = deque()",
        ("tests/unit/methods/auxnet/step/test_delayed.py",),
    ),
    Mutant(
        "a number that stages keep changes in silence",
        "methods/auxnet/network/attributes.py",
        "if values == self._traced:",
        "if values.keys() == self._traced.keys():",
        ("tests/unit/methods/auxnet/network/test_attributes.py",),
    ),
    Mutant(
        "a tuple crosses a cut",
        "methods/auxnet/network/graph.py",
        "end = self._one_tensor(node)",
        "end = node",
        ("tests/unit/methods/auxnet/network/test_chain.py",),
    ),
    Mutant(
        "a stage moves away from what is wanted of it",
        "methods/auxnet/step/equations.py",
        "return self.per_element(truth) * (truth - target)",
        "return self.per_element(truth) * (target - truth)",
        ("tests/unit/methods/auxnet/step/test_learning.py",),
    ),
    Mutant(
        "stored guesses of other samples",
        "methods/auxnet/step/store.py",
        "rows = [self._rows[name] for name in names]",
        "rows = [self._rows[name] for name in [*names[1:], names[0]]]",
        ("tests/unit/methods/auxnet/step/test_learning.py",),
    ),
    Mutant(
        "entries placed as if memory were in the order of dimensions",
        "methods/ist/pieces.py",
        "starts = some * view.stride(0)",
        "starts = some * view[0].numel()",
        ("tests/unit/methods/ist/test_pieces.py",),
    ),
    Mutant(
        "neurons that stay on their worker are lost",
        "methods/ist/messages.py",
        "write([((key, piece), parts[key].take(piece, held)) for key, piece in stays])",
        "write([])",
        ("tests/unit/methods/ist/test_sync.py",),
    ),
    Mutant(
        "slice to the wrong worker",
        "methods/ist/plan.py",
        "yield Piece(source, target, rows, columns)",
        "yield Piece(target, source, rows, columns)",
        ("tests/unit/methods/ist/test_plan.py",),
    ),
    Mutant(
        "a keeper counts a holder twice",
        "methods/ist/merging.py",
        "counts.put(place, held, seen + (is_first if piece.source in left_out else 1))",
        "counts.put(place, held, seen + 1 + seen)",
        ("tests/unit/methods/ist/test_merging.py",),
    ),
    Mutant(
        "the owner of a neuron does not send it on",
        "methods/ist/holders.py",
        "found = _grouped(cut, [*owners.hand_over, *stays])",
        "found = _grouped(cut, stays)",
        ("tests/unit/methods/ist/test_holders.py",),
    ),
    Mutant(
        "a worker that is left out counts",
        "comm/mean.py",
        "total.mul_(workers / (workers - len(left_out)))",
        "pass",
        ("tests/unit/comm/test_mean.py",),
    ),
    Mutant(
        "tensors in mid-round not in the worker's file",
        "engine/resume.py",
        'self.put(self._own["tensors"])',
        "pass",
        ("tests/integration/test_exact_resume.py",),
    ),
    Mutant(
        "damaged file accepted",
        "checkpoint/files.py",
        "found, expected = _checksum_before_seal(file, size), int(seal[1], 16)",
        "found = expected = int(seal[1], 16)",
        ("tests/unit/checkpoint/test_files.py",),
    ),
    Mutant(
        "trials move the user's generators",
        "state/random_state.py",
        "torch.set_rng_state(torch_cpu)",
        "pass",
        ("tests/unit/strategies/data/test_seeded_loader.py",),
    ),
    Mutant(
        "non-finite values averaged",
        "checks/divergence.py",
        "    if not tensors:\n        return []\n    numbers",
        "    if True:\n        return [False] * len(tensors)\n    numbers",
        ("tests/unit/checks/test_divergence.py",),
    ),
    Mutant(
        "epochs of unequal length",
        "strategies/data/equal_epochs.py",
        "loader.limits = [min(limit, shortest) for limit in limits]",
        "pass",
        ("tests/unit/strategies/data/test_equal_epochs.py",),
    ),
    Mutant(
        "gradients of a worker's members not averaged",
        "comm/replicas.py",
        "result: Result = ddp(function, *args, **kwargs)",
        "result = function(*args, **kwargs)",
        ("tests/distributed/test_members.py", "tests/integration/test_members.py"),
    ),
    Mutant(
        "members send each other's parts",
        "comm/member_collective.py",
        "parts = self._to_wire([self._parts(flat)[self.member] for flat in flats])",
        "parts = self._to_wire([self._parts(flat)[-1 - self.member] for flat in flats])",
        ("tests/distributed/test_members.py",),
    ),
    Mutant(
        "members resume with the first one's random numbers",
        "strategies/saving/members.py",
        "return {**own, **of_each[collective.member]}",
        "return {**own, **of_each[0]}",
        ("tests/integration/test_members.py",),
    ),
    Mutant(
        "buffers of members differ at a sync",
        "comm/replicas.py",
        'collective.broadcast_inside(flat, "buffers")',
        "pass",
        ("tests/distributed/test_members.py", "tests/integration/test_members.py"),
    ),
    Mutant(
        "codes packed in the wrong order",
        "comm/quantize.py",
        "packed |= (words >> place * (8 - bits)) & _mask(place * bits, bits)",
        "packed |= (words >> (3 - place) * (8 - bits)) & _mask(place * bits, bits)",
        ("tests/unit/comm/test_quantize.py",),
    ),
    Mutant(
        "a piece of a compressed mean begins where the last one began",
        "comm/packing.py",
        "first = last",
        "first = last if last == size else first + 1",
        ("tests/unit/comm/test_packing.py", "tests/unit/comm/test_compressed_mean.py"),
    ),
    Mutant(
        "what rounding takes is lost",
        "comm/mean_of_changes.py",
        "rest.mul_(self._collective.workers)",
        "rest.zero_()",
        ("tests/unit/comm/test_compressed_mean.py",),
    ),
    Mutant(
        "a resumed run has forgotten what rounding took",
        "comm/compressed_mean.py",
        'state["taken"][name] = taken.cpu().clone()',
        "pass",
        ("tests/unit/comm/test_compressed_mean.py", "tests/integration/test_snapshots.py"),
    ),
    Mutant(
        "the scale of two bits is of half the step",
        "comm/quantize.py",
        "return squares.sqrt_()",
        "return squares.sqrt_() / 2",
        ("tests/unit/comm/test_quantize.py",),
    ),
    Mutant(
        "16-bit numbers summed in 16 bits",
        "comm/tensors.py",
        "return numbers.to(_SUMMED.get(numbers.dtype, numbers.dtype))",
        "return numbers",
        ("tests/unit/comm/test_mean.py",),
    ),
    Mutant(
        "a lost worker is waited for",
        "comm/waiting.py",
        "check()",
        "pass",
        ("tests/distributed/test_collective.py",),
    ),
    Mutant(
        "hand-over before the average has begun, on worker 1 only",
        "engine/round_end.py",
        "finish_average = self._sync.start_average(plan)",
        "finish_average = (lambda: self._sync.start_average(plan)()) "
        "if self._collective.worker == 1 else self._sync.start_average(plan)",
        ("tests/unit/engine/test_by_the_rules_of_nccl.py",),
    ),
    Mutant(
        "the outer momentum of one worker for all numbers of them",
        "methods/resist/sync.py",
        "outer_momentum_of(layout.workers)",
        "outer_momentum_of(1)",
        ("tests/distributed/test_oracle.py",),
    ),
    Mutant(
        "outer step in the wrong direction",
        "state/outer.py",
        "mean.copy_(wide - beyond)",
        "mean.copy_(wide + beyond)",
        ("tests/unit/state/test_outer.py",),
    ),
    Mutant(
        "outer momentum applied twice",
        "state/outer.py",
        "velocity.mul_(self._momentum).add_(change)",
        "velocity.mul_(self._momentum**2).add_(change)",
        ("tests/unit/state/test_outer.py",),
    ),
    Mutant(
        "buffers take outer steps",
        "state/outer.py",
        "return isinstance(tensor, nn.Parameter) and tensor.requires_grad and is_continuous(tensor.dtype)",
        "return is_continuous(tensor.dtype)",
        ("tests/unit/state/test_outer.py",),
    ),
    Mutant(
        "what was learned while a sync was under way is lost",
        "methods/resist/transit.py",
        "if key in stayed and key in self._own:",
        "if False:",
        ("tests/unit/methods/resist/test_overlapped_sync.py",),
    ),
    Mutant(
        "a fragment is drawn again before its sync",
        "methods/resist/partition.py",
        "drawn = [max(first, self._last_sync(fragment, round) + 1)",
        "drawn = [max(first, self._last_sync(fragment, round + 1) + 1)",
        ("tests/unit/schedule/test_fragments.py",),
    ),
    Mutant(
        "a sync of a fragment averages all shared layers",
        "methods/resist/sync.py",
        "return self._may_change(self._layout.fragments.within(fragment, tensors))",
        "return self._may_change(tensors)",
        ("tests/unit/methods/resist/test_fragments.py",),
    ),
    Mutant(
        "outer steps of a fragment begin at the last sync of another",
        "state/outer.py",
        "self._start = {key: start for key, start in self._start.items() if key in kept}",
        "self._start = {}",
        ("tests/unit/methods/resist/test_fragments.py",),
    ),
    Mutant(
        "error feedback before an outer step",
        "methods/resist/config.py",
        'return self.outer == "none"',
        "return True",
        ("tests/unit/methods/resist/test_fragments.py",),
    ),
    Mutant(
        "a resumed run forgets where branches end",
        "engine/resume.py",
        'self._layout.assume(state.get("seen", {}))',
        "pass",
        ("tests/integration/test_resume.py",),
    ),
    Mutant(
        "absent blocks are scaled",
        "methods/resist/sync.py",
        "present = [self._layout.blocks[index] for index in held]",
        "present = list(self._layout.blocks)",
        ("tests/unit/methods/resist/test_scaling.py",),
    ),
    Mutant(
        "the thread of a checkpoint removes the files of the next one",
        "strategies/saving/checkpoint_io.py",
        "before=min(written, default=None)",
        "before=None",
        ("tests/unit/strategies/saving/test_checkpoint_io.py",),
    ),
    Mutant(
        "what rounding took from other fragments is forgotten",
        "comm/feedback.py",
        "self._pieces = {key: piece for key, piece in known.items() if key in kept}",
        "self._pieces = {}",
        ("tests/unit/methods/resist/test_fragments.py",),
    ),
    Mutant(
        "what is frozen between two syncs of its fragment is not averaged",
        "methods/resist/sync.py",
        "self._changing |= {name for name in earlier & tensors.keys() if id(tensors[name]) in others}",
        "pass",
        ("tests/unit/methods/resist/test_fragments.py",),
    ),
    Mutant(
        "blocks leave with the shared layers",
        "methods/resist/overlapped_sync.py",
        "return steps_left <= self._layout.overlap_of_blocks(self._layout.overlapped_steps(round))",
        "return True",
        ("tests/unit/methods/resist/test_overlapped_sync.py",),
    ),
    Mutant(
        "overlap by the slowest worker's steps",
        "schedule/overlap.py",
        "return min(_steps_beside(sync, min(step_seconds)), round_steps - 1)",
        "return min(_steps_beside(sync, max(step_seconds)), round_steps - 1)",
        ("tests/unit/schedule/test_overlap.py",),
    ),
    Mutant(
        "a chosen overlap is not resumed",
        "methods/resist/partition.py",
        'return replace(self, overlaps=self.overlaps.resumed(table.get("overlap", {}), round))',
        "return self",
        ("tests/unit/methods/resist/test_overlapped_sync.py",),
    ),
    Mutant(
        "a chosen overlap changes the round that has ended",
        "schedule/overlap.py",
        "chosen=(round + 1, choose_overlap",
        "chosen=(round, choose_overlap",
        ("tests/unit/schedule/test_overlap.py",),
    ),
    Mutant(
        "worker 0 collects blocks from their owners only",
        "schedule/transfers.py",
        "return {block: tuple(found) for block, found in holders.items()}",
        "return {block: tuple(found[:1]) for block, found in holders.items()}",
        ("tests/unit/schedule/test_transfers.py",),
    ),
    Mutant(
        "worker 0 adds up and does not divide",
        "comm/mean.py",
        "_divide(numbers, collective.workers, left_out)",
        "pass",
        ("tests/unit/comm/test_mean.py", "tests/distributed/test_observation.py"),
    ),
    Mutant(
        "what was merged for worker 0 is saved as a worker's own",
        "engine/evaluation.py",
        "self.own.as_in_training() if self.active else {}",
        "self.own.as_in_training() if self.whole else {}",
        ("tests/unit/methods/ist/test_observation.py",),
    ),
    Mutant(
        "right after a sync, averages that are shown are taken for equal",
        "engine/evaluation.py",
        "changes = changes or int(self.own.swapped_since_note(self._own_tensors()))",
        "pass",
        ("tests/integration/test_validation_hooks.py",),
    ),
    Mutant(
        "metrics stay on worker 0",
        "strategies/first.py",
        "self._take(self._tell(None), engine)",
        "self._tell(None)",
        ("tests/integration/test_first.py",),
    ),
    Mutant(
        "velocities of blocks stay behind",
        "methods/resist/sync.py",
        "return replace(plan, hand_over=(*plan.hand_over, *numbered))",
        "return plan if numbered else plan",
        ("tests/unit/methods/resist/test_sync.py",),
    ),
    Mutant(
        "lengths of rounds shifted by a round",
        "schedule/progress.py",
        "self.local_steps = self._length_after(self.steps_before)",
        "self.local_steps = self._length_after(self.steps_before - (self.local_steps if self.round else 0))",
        ("tests/unit/schedule/test_round_length.py",),
    ),
    Mutant(
        "last rounds shifted by a round",
        "schedule/stages.py",
        "clock.round + left - finish_rounds",
        "clock.round + left - finish_rounds + 1",
        ("tests/unit/schedule/test_stages.py",),
    ),
    Mutant(
        "branches of later stages not scaled",
        "methods/resist/partition.py",
        "return scale / self.share(round) if self.stages else 1.0",
        "return 1.0",
        ("tests/unit/methods/resist/test_partition.py",),
    ),
    Mutant(
        "a resumed round gets a new length",
        "engine/resume.py",
        "if not self._knows_length:",
        "if True:",
        ("tests/unit/engine/test_resume.py",),
    ),
    Mutant(
        "lengths of rounds not compared",
        "checks/handshake.py",
        "clock.step, stop, layout, clock.agreed_steps)",
        "clock.step, stop, layout, 0)",
        ("tests/distributed/test_disagreement.py",),
    ),
    Mutant(
        "a stop that a broadcast spreads is compared",
        "checks/handshake.py",
        "stop = 0 if purpose is Purpose.HOST else self._host.stop_flag()",
        "stop = self._host.stop_flag()",
        ("tests/integration/test_modules.py",),
    ),
    Mutant(
        "the step of a plateau passed over",
        "strategies/saving/trainer_state.py",
        'self._step_passed_over(state.get("passed_over", []))',
        "self._step_passed_over([])",
        ("tests/integration/test_resume_alone.py",),
    ),
    Mutant(
        "own weights kept twice",
        "engine/engine.py",
        "if self.observing:  # inside another one",
        "if False:",
        ("tests/unit/engine/test_engine.py",),
    ),
    Mutant(
        "many workers with an equal share of the neurons",
        "methods/ist/config.py",
        "return 0.0 if workers <= 2 else HALF",
        "return 0.0",
        ("tests/unit/methods/ist/test_layout.py",),
    ),
    Mutant(
        "any size of a batch flattens any tensor",
        "methods/ist/network/operations.py",
        "if others[0].batch != value.batch:",
        "if False:",
        ("tests/unit/methods/ist/network/test_flow.py",),
    ),
    Mutant(
        "neurons of a frozen backbone are dealt out",
        "methods/ist/network/discovery.py",
        "if _is_trained(module, layer, trained)]",
        "if layer.name]",
        ("tests/unit/methods/ist/network/test_discovery.py",),
    ),
    Mutant(
        "a frozen norm gets the sum of a subnet",
        "methods/ist/subnet.py",
        "if not norm.training and name not in layout.trained_norms:",
        "if False:",
        ("tests/unit/methods/ist/test_subnet.py",),
    ),
    Mutant(
        "neurons in the default memory format",
        "methods/ist/subnet.py",
        "replace_memory(name, tensor, empty.permute(places))",
        "replace_memory(name, tensor, empty.permute(places).contiguous())",
        ("tests/unit/methods/ist/test_odd_trainings.py",),
    ),
    Mutant(
        "a heartbeat that is not signed is believed",
        "faults/signature.py",
        "if not hmac.compare_digest(tag, self._tag(place, line).encode()):",
        "if False:",
        ("tests/unit/faults/test_signature.py", "tests/unit/faults/test_heartbeats.py"),
    ),
    Mutant(
        "a line of a stranger makes its worker silent",
        "faults/failure_detector.py",
        "for worker in overwritten & self._last.keys():",
        "for worker in set[int]():",
        ("tests/unit/faults/test_failure_detector.py",),
    ),
    Mutant(
        "every worker reads all heartbeats",
        "faults/failure_detector.py",
        "return self._watched if self.monitoring else",
        "return self._watched if True else",
        ("tests/unit/faults/test_failure_detector.py",),
    ),
    Mutant(
        "a worker that is killed at the start is waited for",
        "faults/start_watch.py",
        "other.home == self._own.home and not is_alive(other.pid)",
        "False",
        ("tests/unit/faults/test_start_watch.py",),
    ),
    Mutant(
        "evaluator: a model in two files is evaluated twice",
        "evaluator.py",
        "if all(other.weights != weights for other in self._found):",
        "if True:",
        ("tests/unit/test_evaluator.py",),
    ),
    Mutant(
        "evaluator: the worst model is kept",
        "evaluator.py",
        'sign = 1 if mode == "max" else -1',
        "sign = -1",
        ("tests/unit/test_evaluator.py",),
    ),
    Mutant(
        "evaluator: a run that goes on is thought to have ended",
        "callbacks/end_marker.py",
        "remove_end(folder)",
        "pass",
        ("tests/unit/test_evaluator.py",),
    ),
)


def applied(text: str, mutant: Mutant) -> str:
    """The file's text with the mutant's change.

    Raises:
        ValueError: if the text to replace does not stand in it exactly once.
    """
    found = text.count(mutant.old)
    if found != 1:
        raise ValueError(f"mutant {mutant.name!r}: {mutant.old!r} stands {found} times in {mutant.file}, not once.")
    return text.replace(mutant.old, mutant.new)


def run(mutant: Mutant) -> tuple[str, float]:
    """Run a mutant's tests; returns whether it is killed, and the seconds."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(ROOT / name, Path(folder, name), ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", folder)
        path = Path(folder, "resist_lightning", mutant.file)
        path.write_text(applied(path.read_text(), mutant))
        # `-m` gives the copy precedence over the installed package.
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.tests]
        try:
            done = subprocess.run(
                command, check=False, cwd=folder, capture_output=True, text=True, timeout=LIMIT_SECONDS
            )
        except subprocess.TimeoutExpired:
            return "killed (hangs)", time.monotonic() - start
    verdicts = {0: "SURVIVED", 1: "killed"}
    verdict = verdicts.get(done.returncode, f"no verdict: pytest ended with {done.returncode}\n{done.stdout[-2000:]}")
    return verdict, time.monotonic() - start


def main() -> None:
    """Run the mutants whose names contain the arguments, or all; fail if one survives."""
    wanted = [m for m in MUTANTS if not sys.argv[1:] or any(part in m.name for part in sys.argv[1:])]
    survivors = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for mutant, (verdict, seconds) in zip(wanted, pool.map(run, wanted), strict=True):
            survivors += not verdict.startswith("killed")
            sys.stdout.write(f"{mutant.name:48s} {verdict:16s} {seconds:5.0f} s   {' '.join(mutant.tests)}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(wanted) - survivors} of {len(wanted)} mutants killed\n")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
