"""RMS norm, gated SiLU and rotation as compiled kernels against torch's operations, in every type and stride."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flexbatch.kernels import native
from flexbatch.kernels.activations import gated
from flexbatch.kernels.norms import rms_norm
from flexbatch.kernels.rotary import apply_rotary


def both(function: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """What the compiled kernel gives, and torch's operations."""
    compiled = function()
    with monkeypatch.context() as patch:
        patch.setattr(native, "usable", lambda _: False)
        return compiled, function()


def assert_alike(found: tuple[Tensor, Tensor]) -> None:
    """Equal, but for sums in another order: in a narrow type that is at most one rounding, and rarely."""
    ours, torchs = found
    assert ours.dtype == torchs.dtype
    if ours.dtype == torch.float32:
        torch.testing.assert_close(ours, torchs, rtol=2e-6, atol=2e-6)
    else:
        torch.testing.assert_close(ours, torchs, rtol=2**-7, atol=1e-6)
        assert (ours != torchs).sum() <= max(1, ours.numel() / 1000)


@pytest.fixture(params=native.TYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each type that kernels know."""
    chosen: torch.dtype = request.param
    return chosen


@pytest.mark.parametrize(("rows", "width"), [(1, 576), (17, 64), (100, 33), (0, 16)])
def test_rms_norm(rows: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    whole, weight = torch.randn(rows, 2 * width).to(dtype) * 3, torch.rand(width).to(dtype)
    for x in (whole[:, :width].contiguous(), whole[:, width:], whole[:, ::2]):
        assert_alike(both(lambda x=x: rms_norm(x, weight, 1e-5), monkeypatch))  # type: ignore[misc]


def test_rms_norm_of_zeros_and_of_what_is_no_number(dtype: torch.dtype) -> None:
    x, weight = torch.zeros(3, 32).to(dtype), torch.ones(32).to(dtype)
    x[1, 4] = torch.nan
    normed = rms_norm(x, weight, 1e-6)
    assert (normed[[0, 2]] == 0).all()
    assert normed[1].isnan().all()


@pytest.mark.parametrize(("rows", "width"), [(1, 1536), (40, 48), (19, 7)])
def test_gated_silu(rows: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    drawn = torch.randn(rows, 2 * width) * torch.logspace(-3, 1.7, 2 * width)
    drawn[0, :3] = torch.tensor([100.0, -100.0, 0.0])
    for gate_up in (drawn.to(dtype), drawn.t().contiguous().t().to(dtype)):
        assert_alike(both(lambda x=gate_up: gated("silu", x), monkeypatch))  # type: ignore[misc]


@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (5, 16), (3, 10)])
def test_rotation(heads: int, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    whole = torch.randn(23, heads + 4, dim).to(dtype)
    angles = torch.rand(23, dim // 2) * 6
    for x in (whole, whole[:, 2 : 2 + heads], whole.transpose(0, 2).contiguous().transpose(0, 2)):
        assert_alike(both(lambda x=x: apply_rotary(x, angles.cos(), angles.sin()), monkeypatch))  # type: ignore[misc]


def test_derivatives_are_torchs() -> None:
    """Where a gradient is wanted, operations are those that have one."""
    torch.manual_seed(3)
    weight = torch.rand(16).bfloat16()
    gate_up = torch.randn(4, 32).bfloat16().requires_grad_()
    x = torch.randn(4, 16).bfloat16().requires_grad_()
    with torch.enable_grad():
        rms_norm(x, weight, 1e-5).sum().backward()
        gated("silu", gate_up).sum().backward()
    assert x.grad is not None
    assert gate_up.grad is not None
    assert not native.serves(gate_up)
    with torch.no_grad():
        assert native.serves(gate_up)
        assert not native.serves(gate_up, weight.float())
