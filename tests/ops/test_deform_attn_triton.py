import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_convnext_det.ops.deform_attn import attention_by_grid_sample, multi_scale_deformable_attention
from tests.ops.samples import attention_arguments

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")  # Triton 3.9, knobs.py: a default
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.heavy
def test_attention_by_triton__through_the_interpreter() -> None:
    checks = Path(__file__).with_name("triton_interpreter_checks.py")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler for NVIDIA is built for Linux")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kernel", ["_forward_kernel", "_backward_kernel"])
def test_attention_by_triton__compiles_for_a_gpu_that_is_not_here(
    kernel: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lightning_convnext_det.ops import deform_attn_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(deform_attn_triton, kernel)
    constants = {"LEVELS": 4, "POINTS": 4, "BAGS": 16, "CHANNELS": 32, "DTYPE": triton.language.float32}
    types = {"levels": "*i32", "value": f"*{dtype}", "output": f"*{dtype}", "grad_output": f"*{dtype}"}
    pointers = ("locations", "attention", "grad_value", "grad_locations", "grad_attention")
    types |= dict.fromkeys(pointers, "*fp32") | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in function.arg_names}
    binary = triton.compile(ASTSource(function, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert len(binary.asm["cubin"]) > 0


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [1, 7, 32, 64, 96])
def test_attention_by_triton__equals_the_reference_on_a_gpu(head_dim: int, dtype: torch.dtype) -> None:
    sample = attention_arguments([(60, 45), (30, 23), (1, 9)], 2, 3000, heads=4, head_dim=head_dim, dtype=dtype)
    value, shapes, locations, weights = sample
    tensors = [tensor.detach().cuda().requires_grad_() for tensor in (value, locations, weights)]
    direction = torch.randn(2, 3000, 4 * head_dim, device="cuda").to(dtype)
    results: list[tuple[Tensor, ...]] = []
    for path in (multi_scale_deformable_attention, attention_by_grid_sample):
        output = path(tensors[0], shapes, *tensors[1:])
        results.append((output, *torch.autograd.grad(output, tensors, direction)))
    eps = max(torch.finfo(dtype).eps, 1e-5)
    for ours, reference in zip(*results, strict=True):
        assert ours.dtype == reference.dtype
        scale = reference.double().square().mean().sqrt().item()
        different = ~torch.isclose(ours.double(), reference.double(), rtol=4 * eps, atol=4 * eps * scale)
        # the gradient of a location jumps at pixel centres, which rounding may put to either side
        assert different.double().mean().item() < 1e-4


@needs_cuda
@pytest.mark.gpu
def test_attention_by_triton__is_what_cuda_tensors_take(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_convnext_det.ops import deform_attn_triton

    calls: list[Tensor] = []
    original = deform_attn_triton.attention_by_triton
    monkeypatch.setattr(deform_attn_triton, "attention_by_triton", lambda *a: calls.append(a[0]) or original(*a))
    value, shapes, locations, weights = attention_arguments([(6, 5)])
    multi_scale_deformable_attention(value.cuda(), shapes, locations.cuda(), weights.cuda())
    monkeypatch.setenv("DISABLE_CUSTOM_KERNELS", "1")
    multi_scale_deformable_attention(value.cuda(), shapes, locations.cuda(), weights.cuda())
    assert len(calls) == 1
