"""Weighted sums of table rows and their two transposes: the core of deformable attention and RoIAlign on the CPU.

Both operators sample a feature map bilinearly, which is a weighted sum of rows of the map as a table
[pixels, channels]. ``embedding_bag`` computes such sums many times faster on a CPU than ``grid_sample`` and
torchvision's ``roi_align``, but its backward is slow; `scatter_rows` and `dot_rows` replace it.

These are parts of hand-written backward passes, without autograd of their own. Half precision is accumulated in
float32.
"""

import functools
import warnings

import torch
from torch import Tensor
from torch.nn import functional

_INT16_KEYS = 2**16 - 1  # keys below this are sorted as int16, which is half the passes of a radix sort of int32


def gather_rows(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of table rows, ``out[n] = sum_k weights[n, k] * table[indices[n, k]]``.

    >>> import torch
    >>> table = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
    >>> gather_rows(table, torch.tensor([[0, 2]]), torch.tensor([[1.0, 0.5]])).tolist()
    [[51.0, 102.0]]

    Args:
        table: rows, floating [R, D].
        indices: rows of each bag, int32 or int64 [N, K], in 0 ... R - 1.
        weights: one weight per index, dtype of ``table``, [N, K].

    Returns:
        One sum per bag, [N, D], in the dtype of ``table``.
    """
    if indices.numel() == 0:
        return table.new_zeros(indices.shape[0], table.shape[1])
    return functional.embedding_bag(indices, table, mode="sum", per_sample_weights=weights)


def scatter_rows(rows: Tensor, sources: Tensor, indices: Tensor, weights: Tensor, num_rows: int) -> list[Tensor]:
    """Add weighted rows into a table, ``table[indices[p]] += weights[p] * rows[sources[p]]``: `gather_rows` transposed.

    The pairs are sorted by their row of the table, so each row is again one weighted sum, without atomic additions and
    deterministic. Several sets of weights share one sort.

    >>> import torch
    >>> rows, sources, indices = torch.eye(2), torch.tensor([0, 1, 1]), torch.tensor([2, 0, 2], dtype=torch.int32)
    >>> scatter_rows(rows, sources, indices, torch.tensor([[1.0, 2.0, 3.0]]), num_rows=3)[0].tolist()
    [[0.0, 2.0], [0.0, 0.0], [1.0, 3.0]]

    Args:
        rows: floating [N, D].
        sources: row of ``rows`` of each pair, int32 or int64 [P], in 0 ... N - 1.
        indices: row of the table of each pair, int32 [P], in 0 ... num_rows - 1.
        weights: sets of weights of the pairs, dtype of ``rows``, [M, P].
        num_rows: rows of the table, R.

    Returns:
        One table [R, D] per set of weights, in the dtype of ``rows``.
    """
    if indices.numel() == 0:
        return [rows.new_zeros(num_rows, rows.shape[1]) for _ in weights]
    bounds = torch.arange(num_rows, dtype=torch.int32, device=indices.device)
    if num_rows < _INT16_KEYS:
        indices, bounds = (indices - 2**15).to(torch.int16), (bounds - 2**15).to(torch.int16)
    keys, order = indices.sort(stable=True)
    offsets = torch.searchsorted(keys, bounds, out_int32=sources.dtype == torch.int32)  # [R], first pair of each row
    ordered_sources = sources.index_select(0, order)
    return [
        functional.embedding_bag(ordered_sources, rows, offsets, mode="sum", per_sample_weights=ordered_weights)
        for ordered_weights in weights.index_select(1, order)
    ]


def dot_rows(rows: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """Dot products with table rows, ``out[n, k] = sum_d rows[n, d] * table[indices[n, k], d]``.

    The other transpose of `gather_rows`: its gradient with respect to the weights.

    >>> import torch
    >>> table = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
    >>> dot_rows(torch.tensor([[1.0, 1.0]]), table, torch.tensor([[0, 2]], dtype=torch.int32)).tolist()
    [[3.0, 300.0]]

    Args:
        rows: float32 or float64 [N, D].
        table: same dtype, [R, D].
        indices: int32 [N, K], in 0 ... R - 1.

    Returns:
        Products [N, K], in the dtype of ``rows``.
    """
    num_bags, bag_size = indices.shape
    if indices.numel() == 0:
        return rows.new_zeros(num_bags, bag_size)
    if bag_size >= table.shape[0]:  # sampled_addmm takes at most one index per element of the full product
        with torch.autocast(rows.device.type, enabled=False):
            return (rows @ table.t()).gather(1, indices.to(torch.int64))
    _silence_sparse_notice()
    pattern = torch.sparse_csr_tensor(
        torch.arange(0, indices.numel() + 1, bag_size, dtype=indices.dtype, device=indices.device),
        indices.reshape(-1),
        rows.new_zeros(indices.numel()),  # zeros, because beta = 0 would still turn a NaN into a NaN
        size=(num_bags, table.shape[0]),
        check_invariants=False,  # the columns of a bag may repeat and need no order here
    )
    torch.sparse.sampled_addmm(pattern, rows, table.t(), beta=0.0, out=pattern)  # in place, which spares a copy
    return pattern.values().view(num_bags, bag_size)


@functools.cache
def _silence_sparse_notice() -> None:
    """Trigger PyTorch's warning that sparse CSR tensors are in beta, which it gives once per process, unseen."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        torch.sparse_csr_tensor([0, 0], [], [], size=(1, 1), check_invariants=False)
