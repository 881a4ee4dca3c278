"""What is an NVIDIA GPU or switch on the PCI bus, and which module drives it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cgpu_agent.backends.gpu import sysfs as module
from cgpu_agent.backends.gpu.sysfs import loaded_driver, nvidia_functions, pci_address
from cgpu_agent.errors import DeviceFault
from fixtures.nvml import FakeDriver


@pytest.fixture
def machine(tmp_path: Path) -> FakeDriver:
    return FakeDriver.loaded(tmp_path, devices=0)


@pytest.mark.parametrize("kind", ["0x030000", "0x030200", "0x038000", "0x068000", "0x0680ff"])
def test_finds_gpus_and_switches(machine: FakeDriver, kind: str) -> None:
    machine.plug_function("0000:01:00.0", kind=kind)
    assert list(nvidia_functions(machine.sysfs)) == ["0000:01:00.0"]


@pytest.mark.parametrize(
    ("vendor", "kind"),
    [("0x10de", "0x040300"), ("0x10de", "0x060400"), ("0x10de", "0x0c0330"), ("0x1234", "0x030000")],
)
def test_passes_over_other_functions_and_other_vendors(machine: FakeDriver, vendor: str, kind: str) -> None:
    machine.plug_function("0000:01:00.1", vendor=vendor, kind=kind)
    assert not nvidia_functions(machine.sysfs)


def test_addresses_are_in_order_and_domains_may_be_wide(machine: FakeDriver) -> None:
    names = ["0001:00:00.0", "10000:02:00.0", "0000:41:00.0"]
    for name in names:
        machine.plug_function(name)
    assert list(nvidia_functions(machine.sysfs)) == sorted(names)


def test_a_machine_whose_bus_is_empty_has_none(machine: FakeDriver) -> None:
    assert nvidia_functions(machine.sysfs) == {}


def test_refuses_to_tell_without_a_bus(tmp_path: Path) -> None:
    with pytest.raises(DeviceFault) as caught:
        nvidia_functions(tmp_path)
    assert caught.value.slug == "GPU_ERROR"
    assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize("name", ["vendor", "class"])
@pytest.mark.parametrize("content", ["", "10de", "0x", "0x10de0x10de", "0x" + "0" * 300, "0x10DE\n", "-1"])
def test_refuses_an_identifier_that_is_no_number(machine: FakeDriver, name: str, content: str) -> None:
    machine.plug_function("0000:01:00.0")
    (machine.sysfs / "bus/pci/devices/0000:01:00.0" / name).write_text(content)
    with pytest.raises(DeviceFault) as caught:
        nvidia_functions(machine.sysfs)
    assert caught.value.slug == "GPU_ERROR"


def test_refuses_to_leave_out_a_device_that_cannot_be_read(machine: FakeDriver) -> None:
    machine.plug_function("0000:01:00.0")
    (machine.sysfs / "bus/pci/devices/0000:01:00.0/class").unlink()
    with pytest.raises(DeviceFault):
        nvidia_functions(machine.sysfs)


def test_a_device_that_left_while_we_looked_is_no_device(machine: FakeDriver) -> None:
    (machine.sysfs / "bus/pci/devices/0000:01:00.0").symlink_to("nowhere")
    assert nvidia_functions(machine.sysfs) == {}


def test_refuses_a_name_that_is_no_address(machine: FakeDriver) -> None:
    machine.plug_function("0000:01:00.0\x1b")
    with pytest.raises(DeviceFault):
        nvidia_functions(machine.sysfs)


def test_refuses_more_devices_than_a_bus_has(machine: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FUNCTIONS", 2)
    for number in range(3):
        machine.plug_function(f"0000:0{number}:00.0")
    with pytest.raises(DeviceFault):
        nvidia_functions(machine.sysfs)


def test_a_driver_that_was_loaded_again_is_another(machine: FakeDriver) -> None:
    first = loaded_driver(machine.sysfs)
    assert first == loaded_driver(machine.sysfs)
    machine.load("second", "550.90.07")
    second = loaded_driver(machine.sysfs)
    assert first is not None
    assert second is not None
    assert first.version == second.version == "550.90.07"
    assert first != second


def test_without_a_module_there_is_no_driver(tmp_path: Path) -> None:
    assert loaded_driver(tmp_path) is None


def test_a_module_without_a_version_is_a_driver_still(machine: FakeDriver) -> None:
    (machine.sysfs / "module/nvidia/version").unlink()
    found = loaded_driver(machine.sysfs)
    assert found is not None
    assert found.version == ""


@pytest.mark.parametrize(
    ("numbers", "address"), [((0, 1, 0), "0000:01:00.0"), ((0x10001, 0xFF, 0x1F), "10001:ff:1f.0")]
)
def test_an_address_is_written_as_the_kernel_writes_it(numbers: tuple[int, int, int], address: str) -> None:
    assert pci_address(*numbers) == address


def test_this_machine_can_be_looked_at() -> None:
    if not os.path.isdir("/sys/bus/pci/devices"):  # noqa: PTH112 - as plain as the question
        pytest.skip("this machine has no PCI bus")
    assert all(inode > 0 for inode in nvidia_functions().values())
