"""Which activations are kept is derived; here it is compared with what autograd really holds, and with brute force."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flexbatch.checkpoint.locate import locate
from flexbatch.checkpoint.reader import open_checkpoint
from flexbatch.finetune.context import LearningContext
from flexbatch.finetune.layer import LayerMath
from flexbatch.finetune.meter import ActivationMeter
from flexbatch.finetune.parameters import Parameters
from flexbatch.finetune.pruning import kept_by, shapes_only
from flexbatch.kernels.rotary import RotaryTable
from flexbatch.memory.weights import GroupWeights, Operand
from flexbatch.models.registry import family_of
from flexbatch.scheduler.training import cut
from tests.tiny import ALL_VARIANTS, tiny_checkpoint

ALL = {"qkv", "out", "gate_up", "up", "down"}


def group_weights(path: Path, group: int) -> GroupWeights:
    """All weights of a group, without a store."""
    folder = locate(str(path))
    table = family_of(folder.shape).table(folder.shape)
    checkpoint = open_checkpoint(folder, table)
    spec = table.groups[group]
    weights = GroupWeights(torch.float32)
    for linear in spec.linears:
        names = [f"{spec.prefix}{part.module}" for part in linear.parts]
        parts = [checkpoint.read(checkpoint.entries[f"{name}.weight"]).float() for name in names]
        bias = [checkpoint.read(checkpoint.entries[f"{name}.bias"]).float() for name in names] if linear.bias else []
        parts = [part.t().contiguous() if linear.transposed else part for part in parts]
        weights.linears[linear.name] = Operand(tuple(parts), torch.cat(bias) if bias else None)
    for vector in spec.vectors:
        weights.vectors[vector.name] = checkpoint.read(checkpoint.entries[spec.prefix + vector.tensor]).float()
    return weights


@pytest.mark.parametrize(("family", "variant"), ALL_VARIANTS)
def test_only_a_last_product_that_nobody_reads_is_left_out(family: str, variant: str, tmp_path: Path) -> None:
    shape = locate(str(tiny_checkpoint(tmp_path, family, variant))).shape
    names = {each.linear for each in kept_by(shape, 1, ALL)}
    assert names <= ALL
    # After a post-norm layer the norm's own gradient reads the sum; before one, nobody does.
    expected = {"down"} if shape.pre_norm else set()
    assert shapes_only(shape, 1, ALL) == expected
    assert shapes_only(shape, 1, {"qkv"}) == expected
    assert {each.linear for each in kept_by(shape, 1, {"down"}) if each.input} == {"down"}
    assert all(each.reason for each in kept_by(shape, 1, {"down"}))


@pytest.mark.parametrize("trained", [["q_proj"], ["down_proj"], ["o_proj", "up_proj"], "all-linear"])
def test_autograd_holds_only_inputs_of_trained_linears(trained: list[str] | str, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "llama")
    shape = locate(str(path)).shape
    parameters = Parameters.create(shape, rank=2, alpha=2, target_modules=trained, seed=0)
    family, weights = family_of(shape), group_weights(path, 1)
    assert shape.rope is not None
    rotation = RotaryTable(shape.rope).lookup(torch.arange(9))
    spec = family.table(shape).layers[0]
    outputs = {each.name: tuple(part.out_features for part in each.parts) for each in spec.linears}
    saved: dict[int, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    class Watching(LearningContext):
        def linear(self, name: str, x: Tensor) -> Tensor:
            inputs[name] = x
            return LearningContext.linear(self, name, x)

    context = Watching(shape, torch.arange(9), weights, rotation, 1, parameters, outputs)

    def hold(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        x = torch.randn(9, shape.hidden_size, requires_grad=True)
        q, k, v = family.project(context, x)
        attended = (q + k.repeat_interleave(2, 1) + v.repeat_interleave(2, 1)).detach().requires_grad_()
        y = family.finish(context, x, attended)
    kept = {name for name, tensor in inputs.items() if tensor.data_ptr() in saved}
    wanted = {name for name in inputs if parameters.of(1, name) is not None}
    # The product of the gated halves is made in place of the activation, and belongs to ``down`` alone.
    assert kept == wanted
    assert y.requires_grad


def test_the_result_that_is_left_out_changes_no_gradient(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "qwen2")
    shape = locate(str(path)).shape
    parameters = Parameters.create(shape, rank=2, alpha=2, target_modules="all-linear", seed=0)
    family, weights = family_of(shape), group_weights(path, 2)
    assert shape.rope is not None
    rotary = RotaryTable(shape.rope).lookup(torch.arange(40))
    outputs = {
        each.name: tuple(part.out_features for part in each.parts) for each in family.table(shape).layers[1].linears
    }
    found = []
    for left_out in (frozenset[str](), shapes_only(shape, 2, ALL)):
        parameters.zero()

        def context(window: object, left_out: frozenset[str] = left_out) -> LearningContext:
            return LearningContext(
                shape, torch.arange(40), weights, rotary, 2, parameters, outputs, shapes_only=left_out
            )  # fmt: skip

        x, dy = torch.randn(40, shape.hidden_size, generator=_seed(1)), torch.randn(
            40, shape.hidden_size, generator=_seed(2)
        )  # fmt: skip
        (batch,) = cut([40], 64)
        LayerMath(family, context, shape.scale_of(1), None).backward(x, batch.windows, dy, wanted=True)
        found.append([dy, *(parameters.gradient(name).clone() for name in parameters.names())])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_the_meter_sees_what_is_held_and_what_is_freed() -> None:
    before = torch.zeros(1000)
    with ActivationMeter() as meter:
        one = torch.empty(250)
        views = [one.view(10, 25)[2:], before.add_(1)]
        assert meter.used == 1000
        one = one[:2]
        two = torch.ones(500, requires_grad=True) * 2
        assert meter.used == 1000 + 2000 + 2000  # autograd holds nothing of a product with a constant but the leaf
        del views, one, two
        assert meter.used == 0
        x = torch.ones(100, requires_grad=True)
        y = x.exp().sin()
        assert meter.used == 400 + 400 + 400  # x itself, exp (kept for sin) and the result
        y.sum().backward()
        del y
        assert meter.used == 400 + 400  # x and its gradient
    assert meter.peak >= 5000


def _seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)
