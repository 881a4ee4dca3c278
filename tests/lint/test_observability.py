"""The example dashboard and alerts have the form that Grafana and Prometheus read."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "packaging" / "observability"
DASHBOARD = json.loads((EXAMPLES / "dashboard.json").read_text())
GROUPS = yaml.safe_load((EXAMPLES / "alerts.yaml").read_text())["groups"]
RECIPES = sorted((ROOT / "docs" / "recipes").glob("cgpu-metrics-*"))
RULES = [rule for group in GROUPS for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def balanced(expression: str) -> bool:
    """Whether every bracket outside of texts is closed by its like."""
    open_, pairs = [], {")": "(", "}": "{", "]": "["}
    for char in re.sub(r'"[^"]*"', "", expression):
        if char in "([{":
            open_.append(char)
        elif char in pairs and (not open_ or open_.pop() != pairs[char]):
            return False
    return not open_


def rectangle(panel: dict[str, Any]) -> set[tuple[int, int]]:
    place = panel["gridPos"]
    return {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_is_wrong_and_where_to_look(rule: dict[str, Any]) -> None:
    assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"[A-Z][A-Za-z]+", rule["alert"])
    assert balanced(rule["expr"])
    assert re.fullmatch(r"\d+[sm]", rule.get("for", "0s"))
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"].keys() == {"summary", "description"}


def test_alerts_have_names_of_their_own() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES) > 10
    assert all(group.keys() == {"name", "rules"} for group in GROUPS)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_asks_the_chosen_source_about_the_chosen_machines(panel: dict[str, Any]) -> None:
    assert panel["type"] in ("stat", "timeseries")
    for target in panel["targets"]:
        assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert balanced(target["expr"])
        names = re.findall(r"\bcgpu_agent_\w+", target["expr"])
        assert len(re.findall(r'\bcgpu_agent_\w+\{instance=~"\$instance"', target["expr"])) == len(names) > 0


def test_the_dashboard_is_whole() -> None:
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} == {"datasource", "instance"}
    places = [place for panel in DASHBOARD["panels"] for place in rectangle(panel)]
    assert len(set(places)) == len(places), "panels lie over each other"
    assert max(x for x, _ in places) < 24


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_has_nothing_to_say_about_the_recipes(tmp_path: Path) -> None:
    stub = tmp_path / "cgpuctl"
    stub.write_text("#!/bin/sh\n")
    stub.chmod(0o755)
    for recipe in RECIPES:
        text = recipe.read_text().replace("/usr/bin/cgpuctl", str(stub))
        (tmp_path / recipe.name).write_text(text.replace("/usr/lib/systemd/systemd-socket-proxyd", str(stub)))
    units = [str(tmp_path / recipe.name) for recipe in RECIPES]
    environment = {**os.environ, "LC_ALL": "C", "SYSTEMD_UNIT_PATH": f"{tmp_path}:{ROOT / 'systemd'}:"}
    command = ["systemd-analyze", "verify", "--man=no", *units]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    said = [line for line in (answer.stdout + answer.stderr).splitlines() if "cgpu-metrics" in line]
    assert len(units) == 4
    assert said == []


def test_every_alert_is_explained() -> None:
    text = (ROOT / "docs" / "observability.md").read_text()
    assert [rule["alert"] for rule in RULES if f"`{rule['alert']}`" not in text] == []
