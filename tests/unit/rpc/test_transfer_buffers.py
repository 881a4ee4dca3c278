"""The TransferBuffers service converts what it is told, and refuses what says nothing."""

from __future__ import annotations

import pytest

from cgpu_agent.api.v1 import transfer_buffers_pb2 as pb
from cgpu_agent.client.calls import Copy, _copy, _progress
from cgpu_agent.domain.channels import Range
from cgpu_agent.domain.transfers import Progress
from cgpu_agent.errors import DeviceFault, Misuse
from cgpu_agent.rpc.transfer_buffers import _progress as told
from cgpu_agent.rpc.transfer_buffers import _range


@pytest.mark.parametrize("to_device", [True, False])
def test_a_copy_is_read_as_the_sdk_wrote_it(to_device: bool) -> None:
    assert _range(_copy(Copy(to_device, b"lease", 1, 2, 3, 4))) == Range(to_device, b"lease", 1, 2, 3, 4)


@pytest.mark.parametrize("direction", [0, 3])
def test_a_copy_that_does_not_say_which_way_is_none(direction: int) -> None:
    with pytest.raises(Misuse) as raised:
        _range(pb.Copy(direction=direction, length=1))  # type: ignore[arg-type]
    assert raised.value.slug == "BAD_COPY"


def test_progress_is_read_as_it_was_written() -> None:
    error = DeviceFault("SLOT_ALTERED", "a tag does not fit")
    found = _progress(told(Progress(7, "failed", 1, 2, 3.0, 4.0, error)))
    assert (found.ticket, found.done, found.total, found.rate, found.eta_seconds) == (7, 1, 2, 3.0, 4.0)
    assert (found.ended, found.reason, found.message) == (True, "SLOT_ALTERED", "a tag does not fit")
    assert [
        _progress(told(Progress(1, state, 0, 0, 0, 0, None))).ended for state in ("waiting", "running", "done")
    ] == [
        False,
        False,
        True,
    ]
