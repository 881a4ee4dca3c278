"""What GPUs cost a relying party: size of a bundle, and the time to judge it, for 0, 1 and 8 of them."""

from __future__ import annotations

import sys
from pathlib import Path

from online import in_turns
from ratios import Pair, per_second

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cgpu_agent.verifier.evidence import verify_evidence
from cgpu_agent.wire.gpuinventory import GpuInventory, GpuWords
from fixtures.lanes import asking, board, gpu_judge, inventory, words_of


def _bundle(count: int) -> bytes:
    def answer(nonce: bytes) -> tuple[GpuInventory, tuple[GpuWords, ...]]:
        words = words_of(board(count), nonce)
        return inventory(words), words

    return asking(answer) if count else asking(None, "boot")


def gpus_in_bundles(*, rounds: int, seconds: float) -> list[Pair]:
    """One core, reference values parsed beforehand and verified for every device anew."""
    bundles = {count: _bundle(count) for count in (0, 1, 8)}

    def judge(count: int) -> float:
        party, data = gpu_judge(gpu_count=count or None), bundles[count]

        def once() -> None:
            result = verify_evidence(data, party)
            assert result.accepted, result.refusal

        return 1 / per_second(once, seconds)

    found = in_turns(rounds, {str(count): lambda count=count: judge(count) for count in bundles})  # type: ignore[misc]
    one = [with_one - without for with_one, without in zip(found["1"], found["0"], strict=True)]
    eight = [with_eight - without for with_eight, without in zip(found["8"], found["0"], strict=True)]
    sizes = {count: [float(len(data))] for count, data in bundles.items()}
    return [
        Pair.of("bundle with 1 GPU", "without", "B", sizes[1], sizes[0]),
        Pair.of("bundle with 8 GPUs", "without", "B", sizes[8], sizes[0]),
        Pair.of("judging 1 GPU of a bundle", "the rest of the bundle", "s", one, found["0"]),
        Pair.of("judging 8 GPUs of a bundle", "judging 1 of them", "s", eight, one, "<= 8"),
    ]
