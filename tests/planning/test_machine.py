import pytest
import torch

from lightning_convnext_det.planning import machine as module
from lightning_convnext_det.planning.machine import find_machine
from lightning_convnext_det.planning.precision import Rates, measure_rates


def test_measure_rates__times_both_precisions_and_leaves_the_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    rates = measure_rates("cpu", seconds=0.001)
    assert min(rates) > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert Rates(100.0, 50.0).gain == 0.5
    assert measure_rates("cpu", seconds=0.001) is rates


@pytest.mark.parametrize(
    ("native", "devices", "environment", "measured"),
    [(True, 1, {}, True), (False, 1, {}, False), (True, 2, {}, False), (True, 1, {"LOCAL_RANK": "1"}, False)],
    ids=["alone", "no bfloat16", "two devices", "a rank"],
)
def test_find_machine__measures_where_one_device_decides_alone(
    native: bool, devices: int, environment: dict[str, str], measured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_has_bfloat16", lambda kind: native)
    monkeypatch.setattr(module, "measure_rates", lambda kind: Rates(1.0, 2.0))
    for name in ("LOCAL_RANK", "RANK", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = find_machine("cpu", devices)
    assert (found.rates is not None) == measured
    assert (found.accelerator, found.devices, found.bfloat16) == ("cpu", devices, native)
    assert found.cores >= 1
    assert found.memory > 2**28


@pytest.mark.parametrize(
    ("devices", "count"), [("auto", 1), (-1, 1), (3, 3), ("2", 2), ([0, 1], 2), ("0,3", 2), ("0,", 1)]
)
def test_find_machine__counts_devices_as_lightning_does(
    devices: object, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "measure_rates", lambda kind: Rates(1.0, 2.0))
    assert find_machine("cpu", devices).devices == count
