"""``make transfer-sweep``: how fast transfers would be by size and number of slots; plotted in build/.

A reduced model of the engine in two processes: the same passes over memory (seal into staging, copy to the ring, copy
to staging, clear, open in place), without headers, keys that change, or sleep. The engine's own sizes are constants.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import sys
import time
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cgpu_agent.transfer.memory import PrivateMemory, address_of, clear, copy
from cgpu_agent.wire.transfer import DEPTH, SLOT_SIZE, TAG_SIZE

OUTPUT = Path(__file__).resolve().parents[2] / "build" / "transfer-sweep.svg"
SIZES = tuple(1 << power for power in range(14, 22))
DEPTHS = (2, 4, 8, 16, 32)
TOTAL = 64 << 20

_PAGE = 4096
_FILLED, _EMPTIED = 0, 8  # words of the first page
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 720, 420, 60, 30, 50
_COLOURS = ("#332288", "#88ccee", "#117733", "#ddaa33", "#cc3311")


def rate(size: int, depth: int) -> float:
    """GB/s of one pass over ``TOTAL`` bytes, from this process to another."""
    stride = size + _PAGE
    with mmap.mmap(
        -1, _PAGE + depth * stride, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    ) as ring:
        child = os.fork()
        if child == 0:
            try:
                _open_all(ring, size, depth, stride)
            finally:
                os._exit(0)
        elapsed = _seal_all(ring, size, depth, stride)
        os.waitpid(child, 0)
    return TOTAL / elapsed / 1e9


def _seal_all(ring: mmap.mmap, size: int, depth: int, stride: int) -> float:
    cipher, source = AESGCM(bytes(32)), PrivateMemory(TOTAL, lock=False).view
    source[:] = bytes(TOTAL)
    staging, slots = PrivateMemory(size + TAG_SIZE, lock=False), address_of(ring) + _PAGE
    with memoryview(ring).cast("Q") as words:
        while words[_EMPTIED] == 0:  # the other process is there
            pass
        begun = time.perf_counter()
        for number in range(TOTAL // size):
            while number - (words[_EMPTIED] - 1) >= depth:
                pass
            piece = source[number * size : (number + 1) * size]
            cipher.encrypt_into(number.to_bytes(12, "big"), piece, None, staging.view)
            copy(slots + number % depth * stride, staging.address, size + TAG_SIZE)
            words[_FILLED] = number + 1
        while words[_EMPTIED] <= TOTAL // size:
            pass
        return time.perf_counter() - begun


def _open_all(ring: mmap.mmap, size: int, depth: int, stride: int) -> None:
    cipher, target = AESGCM(bytes(32)), PrivateMemory(TOTAL, lock=False).view
    staging, slots = PrivateMemory(size + TAG_SIZE, lock=False), address_of(ring) + _PAGE
    with memoryview(ring).cast("Q") as words:
        words[_EMPTIED] = 1
        for number in range(TOTAL // size):
            while words[_FILLED] <= number:
                pass
            slot = slots + number % depth * stride
            copy(staging.address, slot, size + TAG_SIZE)
            clear(slot, size + TAG_SIZE)
            if number + 1 < TOTAL // size:
                words[_EMPTIED] = number + 2
            place = target[number * size : (number + 1) * size]
            cipher.decrypt_into(number.to_bytes(12, "big"), staging.view, None, place)
        words[_EMPTIED] = TOTAL // size + 1


def plot(found: dict[tuple[int, int], float]) -> str:
    """An SVG: GB/s over the size of a slot, a line for each depth."""
    top = max(found.values())
    across = (_WIDTH - _LEFT - 130) / (len(SIZES) - 1)
    tall = _HEIGHT - _TOP - _BOTTOM

    def at(index: int, value: float) -> tuple[float, float]:
        return _LEFT + index * across, _HEIGHT - _BOTTOM - value / top * tall

    marks = []
    for index, size in enumerate(SIZES):
        x, y = at(index, 0)
        marks.append(f'<text x="{x:.0f}" y="{y + 18:.0f}" text-anchor="middle">{size >> 10} KiB</text>')
    for step in range(5):
        x, y = at(0, top * step / 4)
        marks.append(
            f'<line x1="{x:.0f}" x2="{at(len(SIZES) - 1, 0)[0]:.0f}" y1="{y:.0f}" y2="{y:.0f}" stroke="#ddd"/>'
        )
        marks.append(f'<text x="{x - 8:.0f}" y="{y + 4:.0f}" text-anchor="end">{top * step / 4:.1f}</text>')
    for depth, colour in zip(DEPTHS, _COLOURS, strict=True):
        points = [at(index, found[size, depth]) for index, size in enumerate(SIZES)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        marks.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        row = _TOP + 18 * DEPTHS.index(depth)
        marks.append(f'<text x="{_WIDTH - 110}" y="{row}" fill="{colour}">{depth} slots</text>')
    x, y = at(SIZES.index(SLOT_SIZE), found[SLOT_SIZE, DEPTH])
    marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="none" stroke="black"/>')
    marks.append(f'<text x="{_LEFT}" y="{_TOP - 12}">GB/s by the size of a slot; the circle: as it is</text>')
    marks.append(f'<text x="{_WIDTH - 110}" y="{_HEIGHT - 12}">model</text>')
    body = "\n".join(marks)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure transfers by size and number of slots.")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median counts")
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT, metavar="FILE", help=f"default: {OUTPUT}")
    arguments = parser.parse_args()
    pairs = [(size, depth) for size in SIZES for depth in DEPTHS]
    rounds = [{pair: rate(*pair) for pair in pairs} for _ in range(arguments.rounds)]
    found = {pair: statistics.median(each[pair] for each in rounds) for pair in pairs}
    print("GB/s    " + "".join(f"{depth:>6} slots" for depth in DEPTHS))
    for size in SIZES:
        print(f"{size >> 10:4} KiB" + "".join(f"{found[size, depth]:12.2f}" for depth in DEPTHS))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(plot(found))
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
