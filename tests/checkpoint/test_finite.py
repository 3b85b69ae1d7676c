import pytest
import torch

from megatron_adapt.checkpoint.finite import FiniteWatch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_are_named_once_per_tensor(caplog, dtype, value):
    rows = torch.randn(9, 4).to(dtype)
    rows[3, 1] = rows[7, 0] = value
    watch = FiniteWatch("DIR")
    watch.check("good", 0, torch.randn(9, 4).to(dtype))
    watch.check("x.weight", 100, rows)
    watch.check("x.weight", 200, rows)
    (record,) = caplog.records
    assert record.message.startswith("DIR: x.weight has values that are not finite in rows 103, 107; they are kept")


def test_many_rows_are_counted_and_norms_are_looked_at_too(caplog):
    FiniteWatch("DIR").check("norm", 0, torch.full((8,), torch.nan))
    assert "in rows 0, 1, 2, 3, 4 and 3 more;" in caplog.text


def test_the_largest_finite_values_are_no_cause_for_a_warning(caplog):
    watch = FiniteWatch("DIR")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        watch.check("x", 0, torch.full((50, 50), torch.finfo(dtype).max, dtype=dtype))
    watch.check("ids", 0, torch.arange(5))
    assert not caplog.records
