"""Time multi-scale deformable attention against grid_sample and birder's, side by side in one run.

    python benchmarks/attention.py                    # CPU, float32 and bfloat16
    python benchmarks/attention.py --device cuda      # also birder's compiled CUDA kernel, with peak memory
    python benchmarks/attention.py --compile          # also grid_sample under torch.compile

The sizes are those of Deformable DETR on an image of 640 x 640: strides 4 to 32, 34,000 queries in an encoder layer,
300 in a decoder layer, 8 heads of 32 channels, 4 points.
"""

import os
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lightning_convnext_det.ops.deform_attn import attention_by_grid_sample, multi_scale_deformable_attention
from side_by_side import Contestants, compare, create_parser, print_header

SHAPES = [(160, 160), (80, 80), (40, 40), (20, 20)]
Arguments = tuple[Tensor, list[tuple[int, int]], Tensor, Tensor]
Path = Callable[[Tensor, list[tuple[int, int]], Tensor, Tensor], Tensor]


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="also time grid_sample under torch.compile")
    options = parser.parse_args()
    print_header("Multi-scale deformable attention", options, ("triton", "birder"))
    for queries in (34_000, 300):
        for dtype in (torch.float32, torch.bfloat16):
            arguments = create_arguments(options.batch, queries, dtype, options.device)
            paths = create_paths(options.device, options.compile)
            name = f"{queries:,} queries, {str(dtype).removeprefix('torch.')}"
            with torch.no_grad():
                forward: Contestants = {who: partial(path, *arguments) for who, path in paths.items()}
                compare(f"{name}, forward", forward, options)
            both: Contestants = {who: partial(differentiate, path, arguments) for who, path in paths.items()}
            compare(f"{name}, forward and backward", both, options)


def create_arguments(batch: int, queries: int, dtype: torch.dtype, device: str) -> Arguments:
    """Queries at the pixels, as in the encoder, and samples a few pixels around each of them."""
    torch.manual_seed(0)
    centres = [
        torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(1) for h, w in SHAPES
    ]
    reference = torch.cat(centres)  # [S, 2]
    if queries < len(reference):
        reference = reference[torch.randperm(len(reference))[:queries]]
    spread = 2 / torch.tensor([(width, height) for height, width in SHAPES])  # two pixels of each level
    locations = reference[None, :, None, None, None] + torch.randn(batch, queries, 8, 4, 4, 2) * spread[:, None]
    weights = torch.rand(batch, queries, 8, 16).softmax(-1).unflatten(-1, (4, 4))
    value = torch.randn(batch, sum(height * width for height, width in SHAPES), 8, 32).to(dtype)
    tensors = [tensor.to(device).requires_grad_() for tensor in (value, locations, weights)]
    return tensors[0], SHAPES, tensors[1], tensors[2]


def create_paths(device: str, compiled: bool) -> dict[str, Path]:
    paths: dict[str, Path] = {"grid_sample": attention_by_grid_sample, "ours": multi_scale_deformable_attention}
    if compiled:
        paths["grid_sample compiled"] = torch.compile(attention_by_grid_sample)
    if (birder := create_birder_path(device)) is not None:
        paths[f"birder's {'CUDA kernel' if device == 'cuda' else 'PyTorch'}"] = birder
    return paths


def create_birder_path(device: str) -> Path | None:
    """Birder's attention: its pure PyTorch path on a CPU, its CUDA kernel, compiled now, on a GPU; None without it."""
    if device == "cpu":
        os.environ["DISABLE_CUSTOM_KERNELS"] = "1"
    try:
        from birder.ops.msda import MultiScaleDeformableAttention

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attention = MultiScaleDeformableAttention()
    except ImportError:
        return None
    finally:
        os.environ.pop("DISABLE_CUSTOM_KERNELS", None)
    if device == "cuda" and not attention.is_available:
        print("birder's CUDA kernel could not be compiled here")
        return None
    sizes = torch.tensor(SHAPES, device=device)
    starts = sizes.prod(1).cumsum(0) - sizes.prod(1)
    shapes = [list(shape) for shape in SHAPES]

    def attend(value: Tensor, _: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
        if value.dtype != locations.dtype:  # as under autocast: its paths want one dtype
            value = value.to(locations.dtype)
        return attention(value, sizes, starts, locations, weights, 64, shapes)

    return attend


def differentiate(path: Path, arguments: Arguments) -> tuple[Tensor, ...]:
    output = path(*arguments)
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    return torch.autograd.grad(output, tensors, torch.ones_like(output))


if __name__ == "__main__":
    main()
