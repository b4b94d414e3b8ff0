import pytest
import torch

from lightning_convnext_det.ops.weighted_gather import dot_rows, gather_rows, scatter_rows

TABLE = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
INDICES = torch.tensor([[0, 2], [1, 1]], dtype=torch.int32)


def test_gather_rows__by_hand() -> None:
    sums = gather_rows(TABLE, INDICES, torch.tensor([[1.0, 2.0], [0.5, -1.0]]))
    assert sums.tolist() == [[7.0, 70.0], [-1.0, -10.0]]


def test_scatter_rows__by_hand() -> None:
    rows, sources = torch.tensor([[1.0, 10.0], [2.0, 20.0]]), torch.tensor([0, 1, 1])
    weights = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, -1.0]])
    first, second = scatter_rows(rows, sources, torch.tensor([2, 0, 2], dtype=torch.int32), weights, num_rows=4)
    assert first.tolist() == [[4.0, 40.0], [0.0, 0.0], [7.0, 70.0], [0.0, 0.0]]
    assert second.tolist() == [[0.0, 0.0], [0.0, 0.0], [-2.0, -20.0], [0.0, 0.0]]


def test_dot_rows__by_hand() -> None:
    products = dot_rows(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), TABLE, INDICES[:, :1])
    assert products.tolist() == [[1.0], [20.0]]


# 2 ** 16 - 1 rows are the first that int16 keys do not hold
@pytest.mark.parametrize("num_rows", [1, 7, 1000, 2**16 - 2, 2**16 - 1, 2**16 + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scatter_rows__is_the_transpose_of_gather_rows(num_rows: int, dtype: torch.dtype) -> None:
    table, rows = torch.randn(num_rows, 5, dtype=dtype), torch.randn(40, 5, dtype=dtype)
    indices, weights = torch.randint(num_rows, (40, 6), dtype=torch.int32), torch.randn(40, 6, dtype=dtype)
    indices[0] = num_rows - 1
    sources = torch.arange(40).repeat_interleave(6)
    (scattered,) = scatter_rows(rows, sources, indices.flatten(), weights.view(1, -1), num_rows)
    products = dot_rows(rows, table, indices)
    expected = (gather_rows(table, indices, weights) * rows).sum()
    torch.testing.assert_close((scattered * table).sum(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close((products * weights).sum(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bag_size", [2, 3, 4, 50], ids="{} of 3 rows".format)
def test_dot_rows__more_indices_than_rows(bag_size: int) -> None:
    rows, indices = torch.randn(8, 2), torch.randint(3, (8, bag_size), dtype=torch.int32)
    expected = (rows[:, None] * TABLE[indices.long()]).sum(dim=-1)
    torch.testing.assert_close(dot_rows(rows, TABLE, indices), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(dot_rows(rows, TABLE, indices), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gather_rows__half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    ones = torch.ones(1, 2000, dtype=dtype)  # summed in bfloat16 it would stop at 256
    sums = gather_rows(torch.ones(3, 2, dtype=dtype), torch.zeros(1, 2000, dtype=torch.int32), ones)
    assert sums.tolist() == [[2000.0, 2000.0]]
    (table,) = scatter_rows(torch.ones(3, 2, dtype=dtype), torch.zeros(2000).long(), torch.ones(2000).int(), ones, 2)
    assert table.tolist() == [[0.0, 0.0], [2000.0, 2000.0]]


def test_weighted_gather__nothing_to_sum() -> None:
    assert gather_rows(TABLE, INDICES[:0], torch.zeros(0, 2)).shape == (0, 2)
    assert gather_rows(TABLE, INDICES[:, :0], torch.zeros(2, 0)).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert dot_rows(TABLE[:2], TABLE, INDICES[:, :0]).shape == (2, 0)
    nothing = torch.zeros(0, dtype=torch.int32)
    assert [table.tolist() for table in scatter_rows(TABLE, nothing, nothing, torch.zeros(2, 0), 1)] == [
        [[0.0, 0.0]]
    ] * 2
