"""The used part of the schemas of resources that Kubernetes itself does not know; another field is an error.

After the CRDs of the Prometheus operator (monitoring.coreos.com/v1), KEDA (keda.sh/v1alpha1) and KServe
(serving.kserve.io/v1beta1). Pods inside are Kubernetes' own schema's to judge.
"""

import re
from typing import Any

from jsonschema import Draft202012Validator

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
LABELS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
DURATION: Schema = {"type": "string", "pattern": "^([0-9]+(ms|s|m|h|d|w|y))+$"}
NAME: Schema = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}


def fields(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """Return the schema of an object with these fields and no other."""
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }


def each(items: Schema) -> Schema:
    """Return the schema of a list with at least one item."""
    return {"type": "array", "items": items, "minItems": 1}


def resource(version: str, kind: str, spec: Schema) -> Schema:
    """Return the schema of a whole resource."""
    metadata = fields({"name": NAME, "namespace": NAME}, {"labels": LABELS, "annotations": LABELS})
    return fields({"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": metadata, "spec": spec})


SELECTOR = fields({"matchLabels": LABELS})
RELABELING = fields(
    {
        "action": {"enum": ["replace", "keep", "drop", "hashmod", "labelmap", "labeldrop", "labelkeep"]},
    },
    {"sourceLabels": each(TEXT), "regex": TEXT, "targetLabel": TEXT, "replacement": {"type": "string"}},
)
SERVICE_MONITOR = resource(
    "monitoring.coreos.com/v1",
    "ServiceMonitor",
    fields(
        {
            "selector": SELECTOR,
            "endpoints": each(
                fields(
                    {"port": NAME, "path": {"type": "string", "pattern": "^/"}},
                    {"interval": DURATION, "scrapeTimeout": DURATION, "metricRelabelings": each(RELABELING)},
                )
            ),
        },
        {"namespaceSelector": fields({"matchNames": each(NAME)}), "jobLabel": TEXT},
    ),
)
RULE = {
    **fields(
        {"expr": TEXT},
        {"alert": TEXT, "record": TEXT, "for": DURATION, "labels": LABELS, "annotations": LABELS},
    ),
    "oneOf": [{"required": ["alert"]}, {"required": ["record"]}],
}
PROMETHEUS_RULE = resource(
    "monitoring.coreos.com/v1",
    "PrometheusRule",
    fields({"groups": each(fields({"name": TEXT, "rules": each(RULE)}, {"interval": DURATION}))}),
)
COUNT: Schema = {"type": "integer", "minimum": 0}
SCALING = fields(
    {},
    {
        "stabilizationWindowSeconds": {"type": "integer", "minimum": 0, "maximum": 3600},
        "policies": each(
            fields(
                {
                    "type": {"enum": ["Pods", "Percent"]},
                    "value": {"type": "integer", "minimum": 1},
                    "periodSeconds": {"type": "integer", "minimum": 1, "maximum": 1800},
                }
            )
        ),
        "selectPolicy": {"enum": ["Max", "Min", "Disabled"]},
    },
)
NUMBER_AS_TEXT: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?$"}
SCALED_OBJECT = resource(
    "keda.sh/v1alpha1",
    "ScaledObject",
    fields(
        {
            "scaleTargetRef": fields({"name": NAME}, {"apiVersion": TEXT, "kind": TEXT}),
            "triggers": each(
                fields(
                    {
                        "type": {"const": "prometheus"},
                        "metadata": fields(
                            {
                                "serverAddress": {"type": "string", "pattern": "^https?://"},
                                "query": TEXT,
                                "threshold": NUMBER_AS_TEXT,
                            },
                            {"activationThreshold": NUMBER_AS_TEXT, "ignoreNullValues": {"enum": ["true", "false"]}},
                        ),
                    },
                    {"metricType": {"enum": ["AverageValue", "Value"]}},
                )
            ),
        },
        {
            "minReplicaCount": COUNT,
            "maxReplicaCount": COUNT,
            "pollingInterval": COUNT,
            "cooldownPeriod": COUNT,
            "fallback": fields({"failureThreshold": COUNT, "replicas": COUNT}),
            "advanced": fields(
                {
                    "horizontalPodAutoscalerConfig": fields(
                        {"behavior": fields({}, {"scaleUp": SCALING, "scaleDown": SCALING})}
                    )
                }
            ),
        },
    ),
)
POD_FIELDS = (
    "serviceAccountName",
    "automountServiceAccountToken",
    "terminationGracePeriodSeconds",
    "securityContext",
    "volumes",
)
INFERENCE_SERVICE = resource(
    "serving.kserve.io/v1beta1",
    "InferenceService",
    fields(
        {
            "predictor": fields(
                {
                    "containers": {
                        "type": "array",
                        "minItems": 1,
                        # What KServe knows the predictor's container by.
                        "contains": {"properties": {"name": {"const": "kserve-container"}}},
                    }
                },
                {
                    "minReplicas": COUNT,
                    "maxReplicas": COUNT,
                    "deploymentStrategy": {"type": "object"},
                    **{name: {} for name in POD_FIELDS},
                },
            )
        }
    ),
)
SCHEMAS = {
    schema["properties"]["kind"]["const"]: schema
    for schema in (SERVICE_MONITOR, PROMETHEUS_RULE, SCALED_OBJECT, INFERENCE_SERVICE)
}


def problems(document: dict[str, Any]) -> list[str]:
    """Return what is wrong with a resource of one of `SCHEMAS`."""
    return [error.message for error in Draft202012Validator(SCHEMAS[document["kind"]]).iter_errors(document)]


def metric_names(query: str) -> set[str]:
    """Return the metrics of ours that a PromQL expression asks for."""
    return set(re.findall(r"\b(?:detserve|ts)_[a-z_]+\b", query))
