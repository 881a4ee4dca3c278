"""``make bench-gpu``: the way to an NVIDIA GPU's memory beside what CUDA does alone, in turns, on the same machine.

Beside copies from and to pinned memory, which is as fast as the link gets; beside CUDA's own copies from and to
ordinary memory, which is what a program has that does not care; and one copy in memory, which the channel adds.
"""

from __future__ import annotations

import asyncio
import ctypes
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from online import in_turns
from ratios import Pair, seconds_each, show

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cgpu_agent.backends.gpu.cuda import Context, _ask
from cgpu_agent.backends.gpu.cudachannel import CudaChannel
from cgpu_agent.backends.gpu.nvmlgpus import NvmlGpus
from cgpu_agent.errors import DeviceFault, Unavailable
from cgpu_agent.transfer.memory import address_of
from fixtures.cuda import PATIENCE, Owner

SIZE = 256 << 20
ROUNDS = 7
TIMES = 300


def rate(work: Callable[[], object], size: int) -> float:
    """GB/s of one run."""
    begun = time.perf_counter()
    work()
    return size / (time.perf_counter() - begun) / 1e9


class Alone:
    """CUDA without us."""

    def __init__(self, gpu: str) -> None:
        self._context = Context(gpu)
        with self._context.current():
            self._device = self._context.allocate(SIZE)
            self._pinned = self._context.pin(SIZE)
            self._stream = self._context.stream()
        ctypes.memset(self._pinned, 1, SIZE)

    def pinned(self, *, to_device: bool, size: int = SIZE) -> None:
        with self._context.current():
            if to_device:
                self._context.to_device(self._device, self._pinned, size, self._stream)
            else:
                self._context.to_host(self._pinned, self._device, size, self._stream)
            _ask("cuStreamSynchronize", self._stream)

    def ordinary(self, memory: bytearray, *, to_device: bool, size: int = SIZE) -> None:
        address = address_of(memoryview(memory))
        with self._context.current():
            if to_device:
                _ask("cuMemcpyHtoD", self._device, address, size)
            else:
                _ask("cuMemcpyDtoH", address, self._device, size)

    def end(self) -> None:
        self._context.destroy()


def pairs(gpu: str) -> list[Pair]:
    owner, alone = Owner.on(gpu), Alone(gpu)
    channels = [owner.channel(), owner.channel()]
    handles = [owner.allocate(SIZE), owner.allocate(SIZE)]
    memory = [bytearray(b"\x5a") * SIZE for _ in channels]
    found = []

    def write(number: int) -> None:
        channels[number].write(handles[number], 0, memory[number])

    def two() -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(write, range(2)))

    spare = bytearray(SIZE)
    works: dict[str, tuple[Callable[[], Any], int]] = {
        "write": (lambda: write(0), SIZE),
        "read": (lambda: channels[0].read_into(handles[0], 0, memory[0]), SIZE),
        "two": (two, 2 * SIZE),
        "pinned to": (lambda: alone.pinned(to_device=True), SIZE),
        "pinned from": (lambda: alone.pinned(to_device=False), SIZE),
        "ordinary to": (lambda: alone.ordinary(memory[0], to_device=True), SIZE),
        "ordinary from": (lambda: alone.ordinary(memory[0], to_device=False), SIZE),
        "memory": (
            lambda: ctypes.memmove(address_of(memoryview(spare)), address_of(memoryview(memory[0])), SIZE),
            SIZE,
        ),
    }
    for work, _ in works.values():
        work()
    told = in_turns(
        ROUNDS, {name: (lambda work=work, size=size: rate(work, size)) for name, (work, size) in works.items()}
    )
    for ours, theirs in (
        ("write", "pinned to"), ("write", "ordinary to"), ("write", "memory"), ("two", "write"),
        ("read", "pinned from"), ("read", "ordinary from"), ("read", "memory"),
    ):  # fmt: skip
        found.append(Pair.of(f"{ours}, 256 MiB", theirs, "GB/s", told[ours], told[theirs]))
    for size in (4 << 10, 1 << 20):
        found += small(channels[0], handles[0], memory[0], alone, size)
    found += packed(channels[0], handles[0], memory[0])
    alone.end()
    owner.end()
    return found


def small(channel: CudaChannel, handle: int, memory: bytearray, alone: Alone, size: int) -> list[Pair]:
    piece = memoryview(memory)[:size]
    told = in_turns(
        3,
        {
            "write": lambda: seconds_each(lambda: channel.write(handle, 0, piece), TIMES),
            "read": lambda: seconds_each(lambda: channel.read_into(handle, 0, piece), TIMES),
            "to": lambda: seconds_each(lambda: alone.ordinary(memory, to_device=True, size=size), TIMES),
            "from": lambda: seconds_each(lambda: alone.ordinary(memory, to_device=False, size=size), TIMES),
        },
    )
    return [
        Pair.of(f"write, {size >> 10} KiB", "cuMemcpyHtoD", "s", told["write"], told["to"]),
        Pair.of(f"read, {size >> 10} KiB", "cuMemcpyDtoH", "s", told["read"], told["from"]),
    ]


def packed(channel: CudaChannel, handle: int, memory: bytearray) -> list[Pair]:
    """1024 copies of 4 KiB: side by side, and scattered."""
    piece, whole = memoryview(memory)[:4096], memoryview(memory)[: 4 << 20]
    scattered = [(handle, 8192 * number, piece) for number in range(1024)]
    adjoining = [(handle, 4096 * number, piece) for number in range(1024)]
    told = in_turns(
        3,
        {
            "scattered": lambda: seconds_each(lambda: channel.write_many(scattered), TIMES // 10),
            "adjoining": lambda: seconds_each(lambda: channel.write_many(adjoining), TIMES // 10),
            "one": lambda: seconds_each(lambda: channel.write(handle, 0, whole), TIMES // 10),
        },
    )
    return [
        Pair.of(f"1024 writes of 4 KiB, {how}", "one of 4 MiB", "s", told[how], told["one"])
        for how in ("scattered", "adjoining")
    ]


def main() -> int:
    gpus = NvmlGpus()
    try:
        found = asyncio.run(gpus.list(timeout=PATIENCE))
    except (DeviceFault, Unavailable) as error:
        sys.exit(f"there is no NVIDIA GPU: {error.message}")
    finally:
        gpus.close()
    print(f"{found[0].model}, driver {found[0].driver}, confidential computing {'on' if found[0].cc else 'off'}")
    show(pairs(found[0].uuid))
    return 0


if __name__ == "__main__":
    sys.exit(main())
