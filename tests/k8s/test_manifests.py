"""The rendered manifests: valid for Kubernetes 1.33 and newer, and as safe and lossless as they say."""

import copy
import functools
import json
import re
from collections.abc import Callable

import kubernetes_validate
import pytest
import yaml
from custom_resources import SCHEMAS, problems
from kubernetes_validate.utils import all_versions
from manifests import COMPONENTS, ENTRIES, K8S, Document, entry, flags, one, pods, with_components

VERSIONS = [version for version in all_versions() if tuple(map(int, version.split("."))) >= (1, 33)]


@pytest.fixture(scope="session", params=[*ENTRIES, *(f"components/{name}" for name in COMPONENTS)])
def documents(request, tmp_path_factory) -> list[Document]:
    if not request.param.startswith("components/"):
        return entry(request.param)
    return with_components(tmp_path_factory.mktemp("overlay"), [request.param.removeprefix("components/")])


def validate(document: Document, version: str) -> None:
    _validate(json.dumps(document, sort_keys=True), version)


@functools.cache
def _validate(text: str, version: str) -> None:
    """Most renderings share most of their documents, and a version's definitions are megabytes to be read each time."""
    document = json.loads(text)
    if document["kind"] in SCHEMAS:
        assert problems(document) == []
    else:
        kubernetes_validate.validate(document, version, strict=True)


def test_there_are_versions_to_validate_against():
    assert len(VERSIONS) >= 5


@pytest.mark.parametrize("version", VERSIONS)
def test_every_document_is_valid(documents, version):
    for document in documents:
        validate(document, version)
    for _, pod in pods(documents):
        validate(pod, version)


def test_all_components_go_together(tmp_path):
    documents = with_components(tmp_path / "all", COMPONENTS, "overlays/gpu")
    for document in documents:
        validate(document, VERSIONS[-1])
    arguments = flags(one(documents, "Deployment")["spec"]["template"]["spec"]["containers"][0]["args"])
    assert {"--device", "--tls-cert", "--tls-key", "--require-signature", "--edge-tokens"} <= arguments.keys()


def _misspelt_probe(document: Document) -> None:
    probe = document["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]
    probe["httpGett"] = probe.pop("httpGet")


def _port_as_text(document: Document) -> None:
    document["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPort"] = "8080"


def _unknown_policy(document: Document) -> None:
    document["spec"]["strategy"]["rollingUpdate"]["maxUnavailible"] = 0


@pytest.mark.parametrize("spoil", [_misspelt_probe, _port_as_text, _unknown_policy])
@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])
def test_a_wrong_field_fails_the_validation(spoil, version):
    document = copy.deepcopy(one(entry("overlays/cpu"), "Deployment"))
    spoil(document)
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(document, version)


@pytest.mark.parametrize(
    ("name", "kind", "spoil"),
    [
        ("overlays/monitored", "ServiceMonitor", lambda spec: spec["endpoints"][0].update(prot="monitor")),
        ("overlays/monitored", "ServiceMonitor", lambda spec: spec["endpoints"][0].update(interval="15 seconds")),
        ("overlays/monitored", "PrometheusRule", lambda spec: spec["groups"][0]["rules"][0].pop("expr")),
        ("overlays/monitored", "PrometheusRule", lambda spec: spec["groups"][0]["rules"][0].update(record="x")),
        ("overlays/keda", "ScaledObject", lambda spec: spec["triggers"][0]["metadata"].update(threshold=0.1)),
        ("overlays/keda", "ScaledObject", lambda spec: spec.update(maxReplicas=8)),
        ("kserve", "InferenceService", lambda spec: spec["predictor"]["containers"][0].update(name="detserve")),
        ("kserve", "InferenceService", lambda spec: spec["predictor"].update(replicas=2)),
    ],
)
def test_a_wrong_field_of_a_custom_resource_is_a_problem(name: str, kind: str, spoil: Callable[[Document], None]):
    document = copy.deepcopy(one(entry(name), kind))
    assert problems(document) == []
    spoil(document["spec"])
    assert problems(document) != []


def test_every_pod_is_restricted(documents):
    """The rules of the Pod Security Standard "restricted", by which the namespace refuses other pods."""
    namespace = one(documents, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    seen = 0
    for _, pod in pods(documents):
        spec = pod["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 10001
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        for volume in spec["volumes"]:
            (kind,) = volume.keys() - {"name"}
            assert kind in {
                "configMap",
                "csi",
                "downwardAPI",
                "emptyDir",
                "ephemeral",
                "persistentVolumeClaim",
                "projected",
                "secret",
            }
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            seen += 1
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert not any("hostPort" in port for port in container.get("ports", []))
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert "memory" in container["resources"]["limits"]
    assert seen


def test_names_that_refer_to_each_other_are_there(documents):
    """Volumes, claims, accounts, selectors and port names: the schema knows none of these ties."""
    names = {(document["kind"], document["metadata"]["name"]) for document in documents}
    for owner, pod in pods(documents):
        spec = pod["spec"]
        volumes = {volume["name"] for volume in spec["volumes"]}
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            mounted = [mount["name"] for mount in container["volumeMounts"]]
            assert set(mounted) <= volumes
            assert len({mount["mountPath"] for mount in container["volumeMounts"]}) == len(mounted)
        for volume in spec["volumes"]:
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in names
        if account := spec.get("serviceAccountName"):
            assert ("ServiceAccount", account) in names
        if owner.startswith("Deployment/"):
            labels = pod["metadata"]["labels"]
            ports = {port["name"] for container in spec["containers"] for port in container["ports"]}
            for service in (document for document in documents if document["kind"] == "Service"):
                assert service["spec"]["selector"].items() <= labels.items()
                assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
            for document in documents:
                if document["kind"] == "PodDisruptionBudget":
                    assert document["spec"]["selector"]["matchLabels"].items() <= labels.items()
                if document["kind"] == "NetworkPolicy":
                    assert document["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
                    named = [port["port"] for rule in document["spec"]["ingress"] for port in rule["ports"]]
                    assert set(named) <= ports


def test_nobody_but_the_monitoring_reaches_more_than_inference():
    documents = entry("overlays/monitored")
    policy = one(documents, "NetworkPolicy")["spec"]
    open_to_all, watched = policy["ingress"]
    assert {port["port"] for port in open_to_all["ports"]} == {"http", "grpc"}
    assert [port["port"] for port in watched["ports"]] == ["monitor"]
    assert watched["from"]
    assert (policy["policyTypes"], policy["egress"]) == (["Ingress", "Egress"], [])
    service = one(documents, "Service", "detserve")
    assert {port["targetPort"] for port in service["spec"]["ports"]} == {"http", "grpc"}
    # TorchServe's own ports are named nowhere.
    ports = [port for _, pod in pods(documents) for port in pod["spec"]["containers"][0]["ports"]]
    assert {port["containerPort"] for port in ports} == {8080, 7070, 8083}


def test_a_rolling_update_loses_nothing():
    spec = one(entry("overlays/cpu"), "Deployment")["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert "replicas" not in spec
    (container,) = spec["template"]["spec"]["containers"]
    sleeps = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain, end = 30, 15  # serve stop's own
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] >= sleeps + drain + end
    # Asked often enough that a replica that drains is out before it refuses.
    assert sleeps >= container["readinessProbe"]["periodSeconds"]


def test_the_gpu_overlay_asks_for_one():
    spec = one(entry("overlays/gpu"), "Deployment")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["image"] == "detserve:cuda"
    assert flags(container["args"])["--device"] == "gpu"
    assert spec["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    cpu = one(entry("overlays/cpu"), "Deployment")["spec"]["template"]["spec"]["containers"][0]
    differing = {"--device", "--workers", "--threads-per-worker", "--batch-size", "--max-batch-delay-ms"}
    assert {key: value for key, value in flags(cpu["args"]).items() if key not in differing} == {
        key: value for key, value in flags(container["args"]).items() if key not in differing
    }


def test_keda_takes_the_place_of_the_autoscaler():
    keda, plain = entry("overlays/keda"), entry("overlays/monitored")
    assert not [document for document in keda if document["kind"] == "HorizontalPodAutoscaler"]
    scaled, autoscaler = one(keda, "ScaledObject")["spec"], one(plain, "HorizontalPodAutoscaler")["spec"]
    assert scaled["scaleTargetRef"]["name"] == autoscaler["scaleTargetRef"]["name"] == "detserve"
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (
        autoscaler["minReplicas"],
        autoscaler["maxReplicas"],
    )
    target = autoscaler["metrics"][0]["pods"]["target"]["averageValue"]
    assert float(scaled["triggers"][0]["metadata"]["threshold"]) == int(target.removesuffix("m")) / 1000
    assert scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == autoscaler["behavior"]


@pytest.mark.parametrize("name", ["overlays/cpu", "kserve"])
def test_the_adapters_rule_makes_the_autoscalers_metric(name):
    metric = one(entry(name), "HorizontalPodAutoscaler")["spec"]["metrics"][0]["pods"]["metric"]["name"]
    (rule,) = yaml.safe_load((K8S / "prometheus-adapter" / "values.yaml").read_text())["rules"]["custom"]
    series = rule["seriesQuery"].partition("{")[0]
    assert re.fullmatch(rule["name"]["matches"], series)
    assert rule["name"]["as"] == metric
    assert {"<<.LabelMatchers>>", "<<.GroupBy>>"} <= set(re.findall(r"<<[^>]+>>", rule["metricsQuery"]))
    assert series in rule["metricsQuery"]


def test_the_prometheus_rule_is_the_alerts_file():
    """Prometheus reads one, the operator the other; docs/kubernetes.md has the line that makes one of the other."""
    alerts = (K8S / "monitoring" / "alerts.yaml").read_text()
    _, _, spec = (K8S / "monitoring" / "prometheus-rule.yaml").read_text().partition("\nspec:\n")
    assert spec == "".join(f"  {line}\n" if line else "\n" for line in alerts.splitlines())
    assert one(entry("overlays/monitored"), "PrometheusRule")["spec"] == yaml.safe_load(alerts)


def test_the_dashboard_is_given_to_grafana():
    (config,) = [
        document
        for document in entry("overlays/monitored")
        if document["kind"] == "ConfigMap" and document["metadata"]["labels"].get("grafana_dashboard") == "1"
    ]
    assert config["data"] == {"detserve.json": (K8S / "monitoring" / "dashboard.json").read_text()}


def test_the_evaluations_shards_and_its_merge_belong_together():
    documents = entry("evaluate-job")
    shards, merge = one(documents, "Job", "detserve-evaluate"), one(documents, "Job", "detserve-evaluate-merge")
    given, merged = (flags(job["spec"]["template"]["spec"]["containers"][0]["args"]) for job in (shards, merge))
    assert shards["spec"]["completionMode"] == "Indexed"
    assert given["--shard"] == f"$(JOB_COMPLETION_INDEX)/{shards['spec']['completions']}"
    assert given["--out"] == merged["--merge"]
    assert given["--annotations"] == merged["--annotations"]


def test_tls_models_from_an_image_and_signatures_change_what_they_say(tmp_path):
    plain = one(entry("overlays/cpu"), "Deployment")["spec"]["template"]["spec"]
    tls = with_components(tmp_path / "tls", ["tls"])
    assert one(tls, "Service", "detserve")["spec"]["ports"][0]["appProtocol"] == "https"
    image = with_components(tmp_path / "image", ["models-from-image"])
    spec = one(image, "Deployment")["spec"]["template"]["spec"]
    assert [container["name"] for container in spec["initContainers"]] == ["fetch", "verify"]
    assert "emptyDir" in next(volume for volume in spec["volumes"] if volume["name"] == "models")
    assert not [document for document in image if document["kind"] == "PersistentVolumeClaim"]
    signed = one(with_components(tmp_path / "signed", ["signed-models"]), "Deployment")["spec"]["template"]["spec"]
    assert "--trusted-key" in signed["initContainers"][0]["command"][2]
    assert "--trusted-key" not in plain["initContainers"][0]["command"][2]
