"""``cgpuctl gpu list``: what it says is what the agent says, and nothing in it reaches the terminal raw."""

from __future__ import annotations

import json

import pytest

from cgpu_agent.api.v1 import gpus_pb2
from cgpu_agent.cli.gpusession import document, tell

pb = gpus_pb2

TRUSTED = pb.Gpu(
    uuid="GPU-1",
    bdf="0000:01:00.0",
    model="H100",
    driver="550.90.07",
    vbios="96.00.9F.00.01",
    phase=pb.GPU_PHASE_TRUSTED,
    ueid="1234",
    valid_seconds=99.9,
    simulated=True,
    cc=True,
    cc_environment="prod",
    dev_tools=False,
    multi_gpu="none",
)
REJECTED = pb.Gpu(
    uuid="GPU-2", bdf="0000:02:00.0", phase=pb.GPU_PHASE_REJECTED, reason="BAD", message="it is \x1b[31m bad"
)
FOUND = pb.GpuSet(
    state=pb.GPU_SET_STATE_NOT_READY,
    reason="BAD",
    message="it is \x1b bad",
    backend="software",
    gpus=[TRUSTED, REJECTED],
)


def test_people_read_states_reasons_and_modes(capsys: pytest.CaptureFixture[str]) -> None:
    tell(FOUND, json=False)
    said = capsys.readouterr().out
    for part in ("not ready: it is", "[BAD]", "trusted", "rejected", "ueid 1234, valid for 99 s", "protects nothing"):
        assert part in said
    assert "confidential computing on (prod), developer tools off" in said
    assert "confidential computing unknown (unknown), developer tools unknown" in said
    assert "\x1b" not in said


def test_programs_read_json_with_short_words(capsys: pytest.CaptureFixture[str]) -> None:
    tell(FOUND, json=True)
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(json.dumps(document(FOUND)))
    assert (told["state"], told["trust_epoch"], told["attesting"]) == ("not_ready", 0, False)
    assert [gpu["phase"] for gpu in told["gpus"]] == ["trusted", "rejected"]
    assert told["gpus"][0]["cc"] is True
    assert "cc" not in told["gpus"][1]
