"""The alert rules by Prometheus' own unit tests, and that these tests would notice a rule that does not do its work."""

import json
import subprocess

import pytest
import yaml
from checkout import ROOT
from prometheus_server import program

FOLDER = ROOT / "k8s" / "monitoring"
RULES = yaml.safe_load((FOLDER / "alerts.yaml").read_text("utf-8"))
ALERTS = [rule["alert"] for group in RULES["groups"] for rule in group["rules"]]


def promtool(*arguments, folder=FOLDER):
    return subprocess.run(
        [program("promtool"), *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_rules_pass_their_unit_tests():
    assert promtool("check", "rules", "alerts.yaml").returncode == 0
    done = promtool("test", "rules", "alerts_test.yaml")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("alert", "breaks"),
    [
        pytest.param(alert, breaks, marks=[] if alert == "DetserveQueueSlow" else pytest.mark.nightly)
        for alert in ALERTS
        for breaks in ("never", "always")
    ],
)
def test_a_rule_that_is_broken_fails_them(alert, breaks, tmp_path):
    rules = json.loads(json.dumps(RULES))
    (rule,) = (rule for group in rules["groups"] for rule in group["rules"] if rule["alert"] == alert)
    rule["expr"] = "vector(1) > 2" if breaks == "never" else "count by (instance, model_name) ({instance!=''}) > 0"
    rule.pop("for", None)
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(rules))
    (tmp_path / "alerts_test.yaml").write_text((FOLDER / "alerts_test.yaml").read_text("utf-8"))
    assert promtool("test", "rules", "alerts_test.yaml", folder=tmp_path).returncode == 1


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_says_what_it_is_and_what_to_do(alert):
    (rule,) = (rule for group in RULES["groups"] for rule in group["rules"] if rule["alert"] == alert)
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert len(rule["annotations"]["summary"]) > 20
    assert len(rule["annotations"]["runbook"]) > 60


def test_the_dashboard_is_one_that_grafana_takes():
    dashboard = json.loads((FOLDER / "dashboard.json").read_text("utf-8"))
    identities = [panel["id"] for panel in dashboard["panels"]]
    assert len(identities) == len(set(identities)) > 15
    for panel in dashboard["panels"]:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["description"]
            assert [target["refId"] for target in panel["targets"]] == list("ABCDEF"[: len(panel["targets"])])
