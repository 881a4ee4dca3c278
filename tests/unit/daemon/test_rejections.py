"""A GPU that is rejected for hours does not fill the journal, and one that is rejected anew is told of."""

from __future__ import annotations

from cgpu_agent.daemon.rejections import Rejections
from cgpu_agent.domain.gpustate import Phase, Reason, Session
from fixtures.gpuinfo import gpu


def test_who_is_rejected_for_hours_is_told_of_once_for_each_reason() -> None:
    off, tools = Reason("GPU_CC_OFF", "off"), Reason("GPU_DEV_TOOLS", "on")
    rejections = Rejections()

    def news(phase: Phase, reason: Reason | None = None) -> list[str]:
        sessions = (Session(gpu(0), phase, reason), Session(gpu(1), "trusted"))
        return [each.slug for _, each in rejections.news(sessions)]

    assert news("discovered") == []
    assert news("rejected", off) == ["GPU_CC_OFF"]
    assert news("attesting", off) == news("rejected", off) == []
    assert news("rejected", tools) == ["GPU_DEV_TOOLS"]
    assert news("trusted") == []
    assert news("rejected", tools) == ["GPU_DEV_TOOLS"]
    assert rejections.news([]) == []
    assert news("rejected", tools) == ["GPU_DEV_TOOLS"]
