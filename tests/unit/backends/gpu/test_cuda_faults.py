"""A CUDA driver that fails, lies or hangs: what is told, what ends, and that nothing is left or used again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from cgpu_agent.backends.gpu import cudachannel
from cgpu_agent.backends.gpu.cudafaults import MEANINGS, OUT_OF_MEMORY
from cgpu_agent.errors import AgentError, DeviceFault, Exhausted, Unavailable
from fixtures.cuda import FakeCuda, Owner, eventually, fake_cuda
from fixtures.nvml import uuid_of

SECRET = bytes.fromhex("6b65792d6f662d736f6d65626f64792d2d7730726b6c3061642d2d2d2d2d2d21")
ECC, UNNAMED = 214, 12345


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with fake_cuda() as cuda:
        yield cuda
        assert cuda.count("faults") == 0
        eventually(cuda.has_nothing)


def refused(call: Callable[[], object], kind: type[AgentError] = DeviceFault) -> AgentError:
    with pytest.raises(kind) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("code", [code for code in [*MEANINGS, 700, UNNAMED] if code != OUT_OF_MEMORY])
@pytest.mark.parametrize("call", ["cuInit", "cuCtxCreate_v4", "cuMemAlloc_v2"])
def test_every_code_is_told_with_its_reason(cuda: FakeCuda, call: str, code: int) -> None:
    cuda.fail(call, code)
    if call == "cuMemAlloc_v2":
        owner = Owner.of()
        error = refused(lambda: owner.allocate(1), AgentError)
        owner.end()
    else:
        error = refused(Owner.of, AgentError)
    slug, words = MEANINGS.get(999 if code == UNNAMED else code, ("GPU_ERROR", ""))
    assert error.slug == slug
    assert words in error.message
    assert isinstance(error, Unavailable if slug == "GPU_UNSUPPORTED" else DeviceFault)


def test_no_memory_for_a_context_or_a_channel(cuda: FakeCuda) -> None:
    cuda.fail("cuCtxCreate_v4", OUT_OF_MEMORY)
    assert refused(Owner.of).slug == "GPU_ERROR"
    cuda.plug(uuid_of(0))
    owner = Owner.of()
    for call in ("cuMemHostAlloc", "cuStreamCreate", "cuEventCreate"):
        cuda.fail(call, OUT_OF_MEMORY)
        assert refused(owner.channel, Exhausted).slug == "TRANSFER_CHANNELS"
        cuda.fail(call, 0)
    assert [cuda.count(what) for what in ("pinned", "streams", "events")] == [0, 0, 0]
    owner.channel().close()
    owner.end()
    assert cuda.count("left") == 0


@pytest.mark.parametrize("code", [ECC, 999, 719])
def test_an_error_that_stays_ends_channel_and_memory_but_no_other_owners(cuda: FakeCuda, code: int) -> None:
    owner, other = Owner.of(), Owner.of()
    channel, second, handle = owner.channel(), owner.channel(), owner.allocate(64)
    cuda.poison(code)
    told = refused(lambda: channel.write(handle, 0, SECRET)).slug
    assert told == "GPU_ERROR"
    assert channel.dead is not None
    assert channel.dead.slug == told
    assert refused(lambda: channel.write(handle, 0, SECRET), Unavailable).slug == "TRANSFER_DEAD"
    assert refused(lambda: second.write(handle, 0, SECRET)).slug == told
    assert refused(lambda: second.write(handle, 0, SECRET), Unavailable).slug == "TRANSFER_DEAD"
    assert refused(lambda: owner.allocate(1)).slug == told
    assert refused(lambda: owner.free(handle)).slug == told
    assert refused(owner.channel).slug == told
    channel.close()
    assert refused(owner.end).slug == told  # nothing could be wiped: that is said, and all of it given back
    assert cuda.count("contexts") == 1
    assert not cuda.holds(SECRET, device=False, freed=True)

    working, place = other.channel(), other.allocate(32)
    working.write(place, 0, SECRET)
    assert other.read(working, place, 32) == SECRET
    other.end()


def test_a_read_that_fails_writes_nothing_more(cuda: FakeCuda) -> None:
    owner = Owner.of()
    channel, handle = owner.channel(), owner.allocate(32)
    channel.write(handle, 0, SECRET)
    cuda.poison(ECC)
    out = bytearray(32)
    assert refused(lambda: channel.read_into(handle, 0, out)).slug == "GPU_ERROR"
    assert out == bytes(32)
    refused(owner.end)


def test_a_gpu_that_stalls_ends_the_channel_and_nothing_it_may_yet_touch_is_used_again(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cudachannel, "STALL", 0.05)
    monkeypatch.setattr(cudachannel, "_SETTLE", 0.05)
    owner = Owner.of()
    channel, handle = owner.channel(), owner.allocate(64)
    cuda.pause()
    assert refused(lambda: channel.write(handle, 0, SECRET)).slug == "TRANSFER_STALLED"
    assert refused(lambda: owner.free(handle)).slug == "GPU_TIMEOUT"
    assert refused(lambda: owner.allocate(1)).slug == "GPU_TIMEOUT"
    channel.close()
    cuda.pause(on=False)
    # The copy comes late, and finds its memory where it was: "faults" stays 0.
    assert cuda.count("allocations") == cuda.count("pinned") == 1
    assert refused(owner.end).slug == "GPU_TIMEOUT"


def test_stopping_does_not_wait_for_a_gpu_that_hangs(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudachannel, "STALL", 1e9)
    monkeypatch.setattr(cudachannel, "_SETTLE", 0.05)
    owner = Owner.of()
    channel, handle = owner.channel(), owner.allocate(64)
    cuda.pause()
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(channel.write, handle, 0, SECRET)
        eventually(lambda: cuda.holds(SECRET, device=False, freed=False))
        channel.stop()
        assert refused(writing.result, Unavailable).slug == "TRANSFER_STOPPED"
    assert refused(lambda: owner.allocate(1)).slug == "GPU_TIMEOUT"
    refused(owner.end)


def test_a_context_that_comes_too_late_is_given_back(cuda: FakeCuda) -> None:
    cuda.hang("cuCtxCreate_v4")
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(Owner.of, timeout=0.1)
        assert refused(opening.result).slug == "GPU_TIMEOUT"
        assert cuda.count("contexts") == 0
        cuda.hang("cuCtxCreate_v4", on=False)


def test_an_allocation_that_comes_too_late_is_given_back(cuda: FakeCuda) -> None:
    owner = Owner.of()
    cuda.hang("cuMemAlloc_v2")
    fault = refused(lambda: owner.allocate(64, timeout=0.1))
    assert isinstance(fault, DeviceFault)
    assert (fault.slug, fault.outcome_unknown) == ("GPU_TIMEOUT", True)
    cuda.hang("cuMemAlloc_v2", on=False)
    owner.channel().close()  # behind it, on the owner's thread
    assert cuda.count("allocations") == 0
    owner.end()


def test_a_channel_that_comes_too_late_is_given_back(cuda: FakeCuda) -> None:
    owner = Owner.of()
    cuda.hang("cuMemHostAlloc")
    assert refused(lambda: owner.channel(timeout=0.1)).slug == "GPU_TIMEOUT"
    cuda.hang("cuMemHostAlloc", on=False)
    owner.allocate(1)
    assert cuda.count("pinned") == 0
    owner.end()


def test_an_end_that_timed_out_wipes_all_the_same(cuda: FakeCuda) -> None:
    owner = Owner.of()
    channel, handle = owner.channel(), owner.allocate(64)
    channel.write(handle, 0, SECRET)
    cuda.hang("cuMemAlloc_v2")
    assert refused(lambda: owner.allocate(1, timeout=0.1)).slug == "GPU_TIMEOUT"
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(owner.end, timeout=0.1)
        assert refused(ending.result).slug == "GPU_TIMEOUT"
    cuda.hang("cuMemAlloc_v2", on=False)
    eventually(cuda.has_nothing)
    assert not any(cuda.holds(SECRET, device=device, freed=True) for device in (True, False))
    assert cuda.count("left") == 0
