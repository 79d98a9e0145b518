"""The Helm chart: valid manifests for every kind of values, refused values, and names that exist."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fovea.service.remote.store_uri import STORE_SCHEMES
from fovea.service.settings import ENVIRONMENT_PREFIX, Settings
from tests.certificates import Authority
from tests.deploy.chart_files import CHART, render_chart_files
from tests.deploy.conftest import list_metric_names, needs_helm, needs_promtool
from tests.deploy.manifests import (
    NEWEST_KUBERNETES,
    Manifest,
    get_manifest,
    render_chart,
    run_helm,
    validate_manifest,
)
from tests.documents import read_page
from tests.servers import ROOT, Server

RULES = ROOT / "deploy" / "alerts.yml"
TEMPLATES = "\n".join(path.read_text() for path in sorted((CHART / "templates").rglob("*")) if path.is_file())
VALUES: Manifest = yaml.safe_load((CHART / "values.yaml").read_text())
SETTING_NAMES = {ENVIRONMENT_PREFIX + name.upper() for name in Settings.model_fields}

KEDA = {"type": "keda", "minReplicas": 2, "maxReplicas": 6, "prometheus": "http://prometheus:9090"}
ON = {"enabled": True}

CASES: dict[str, Manifest] = {
    "defaults": {},
    "claim": {"models": {"persistentVolumeClaim": {"claimName": "zoo", "subPath": "a/b"}}},
    "image": {"models": {"image": {"reference": "example/zoo@sha256:" + "0" * 64, "path": "models"}}},
    "init": {
        "models": {
            "initContainer": {
                "image": "example/copy:1",
                "command": ["cp", "-r", "/zoo/.", "/models"],
                "args": ["-v"],
                "env": [{"name": "A", "value": "b"}],
                "envFrom": [{"secretRef": {"name": "store"}}],
                "resources": {"limits": {"memory": "1Gi"}},
                "pullPolicy": "Always",
                "sizeLimit": "2Gi",
            }
        }
    },
    "uri": {"models": {"uri": "s3://bucket/zoo"}, "envFrom": [{"secretRef": {"name": "s3"}}]},
    "google": {
        "models": {"uri": "gs://bucket/zoo"},
        "env": [{"name": "GOOGLE_APPLICATION_CREDENTIALS", "value": "/keys/key.json"}],
        "volumes": [{"name": "keys", "secret": {"secretName": "google"}}],
        "volumeMounts": [{"name": "keys", "mountPath": "/keys", "readOnly": True}],
    },
    "azure": {"models": {"uri": "abfs://container@account.dfs.core.windows.net/zoo"}},
    "one node": {
        "rollout": {"maxSurge": 0, "maxUnavailable": "50%"},
        "probes": {"startupSeconds": 1800},
        "resources": {"limits": {"cpu": None}},
    },
    "hpa": {"autoscaling": {"type": "hpa", "target": 0.5}},
    "keda": {"autoscaling": KEDA},
    "keda with a password": {
        "autoscaling": {**KEDA, "authentication": {"name": "prometheus", "modes": "tls,basic"}}
    },
    "ingress": {
        "ingress": {
            **ON,
            "className": "nginx",
            "hosts": ["a.example.com", "*.b.example.com"],
            "tlsSecret": "certificate",
            "annotations": {"a": "b"},
        }
    },
    "route": {
        "httpRoute": {
            **ON,
            "parentRefs": [{"name": "public", "namespace": "gateways", "sectionName": "https"}],
            "hostnames": ["a.example.com"],
        }
    },
    "monitoring": {
        "serviceMonitor": {**ON, "labels": {"release": "prometheus"}},
        "prometheusRule": {**ON, "labels": {"release": "prometheus"}},
    },
    "policy": {
        "networkPolicy": {
            "from": [{"namespaceSelector": {"matchLabels": {"a": "b"}}}],
            "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"port": 4318}]}],
        }
    },
    "gpu": {
        "image": {"repository": "example/fovea", "tag": "0.1.1-cuda", "pullPolicy": "Always"},
        "resources": {"limits": {"cpu": "4", "memory": "8Gi", "nvidia.com/gpu": 1}},
        "settings": {"FOVEA_PROVIDER": "cuda"},
        "runtimeClassName": "nvidia",
        "nodeSelector": {"gpu": "true"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    },
    "secure": {
        "keys": {"secret": "api-keys", "entry": "keys.txt"},
        "tls": {"secret": "certificate", "clientCA": {"secret": "authority", "entry": "ca.crt"}},
        "grpc": ON,
        "settings": {"FOVEA_CALLER_RATE": 50, "FOVEA_CALLER_BURST": 200, "FOVEA_CALLER_SHARES": True},
        "service": {"type": "LoadBalancer", "externalTrafficPolicy": "Local"},
        "serviceMonitor": {
            **ON,
            "key": {"secret": "prometheus-key", "entry": "key"},
            "tlsConfig": {
                "ca": {"secret": {"name": "certificate", "key": "ca.crt"}},
                "cert": {"secret": {"name": "prometheus", "key": "tls.crt"}},
                "keySecret": {"name": "prometheus", "key": "tls.key"},
                "serverName": "photos.example.com",
            },
        },
        "test": {"key": {"secret": "test-key", "entry": "key"}, "certificateSecret": "test-certificate"},
    },
    "tls": {"tls": {"secret": "certificate"}, "serviceMonitor": ON},
    "urls": {"settings": {"FOVEA_URL_HOSTS": "photos.example.com"}},
    "small": {
        "replicas": 1,
        "user": None,
        "serviceAccount": {"create": False},
        "podDisruptionBudget": {"enabled": False},
        "networkPolicy": {"enabled": False},
        "imagePullSecrets": [{"name": "pull"}],
        "podLabels": {"team": "a"},
        "podAnnotations": {"b": "c"},
        "priorityClassName": "high",
        "affinity": {"nodeAffinity": {}},
        "service": {"type": "LoadBalancer", "port": 8080, "annotations": {"a": "b"}},
        "env": [{"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
    },
}

KINDS = {"Deployment", "NetworkPolicy", "Pod", "PodDisruptionBudget", "Service", "ServiceAccount"}


def test_derived_files_are_up_to_date() -> None:
    for path, text in render_chart_files().items():
        assert (CHART / path).read_text() == text, f"{path} is old; run `make chart`"


@needs_helm
@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_every_manifest_is_valid(case: str) -> None:
    manifests = render_chart(CASES[case])
    assert len({(one["kind"], one["metadata"]["name"]) for one in manifests}) == len(manifests)
    oldest = re.search(r"^kubeVersion: .>=(.+)-0.$", (CHART / "Chart.yaml").read_text(), re.MULTILINE)
    assert oldest is not None
    for manifest in manifests:
        validate_manifest(manifest, NEWEST_KUBERNETES)
        if case != "image":  # refused there: `test_image_volume_needs_a_new_cluster`
            validate_manifest(manifest, oldest[1])


@needs_helm
def test_cases_make_every_kind() -> None:
    templates = set(re.findall(r"^kind: (\w+)$", TEMPLATES, re.MULTILINE))
    assert {one["kind"] for case in CASES.values() for one in render_chart(case)} == templates
    assert {one["kind"] for one in render_chart()} == KINDS


@needs_helm
def test_unknown_kinds_and_fields_are_refused() -> None:
    manifests = render_chart(CASES["monitoring"])
    for kind in ("Deployment", "ServiceMonitor"):
        manifest = get_manifest(manifests, kind)
        with pytest.raises(Exception, match="replicaz"):
            validate_manifest({**manifest, "spec": {**manifest["spec"], "replicaz": 1}})
    with pytest.raises(LookupError, match="no schema of ServiceMonitors"):
        validate_manifest(
            {**manifests[0], "kind": "ServiceMonitors", "apiVersion": "monitoring.coreos.com/v1"}
        )


@needs_helm
def test_lint_finds_nothing() -> None:
    process = run_helm("lint", "--strict", ".")
    assert process.returncode == 0, process.stdout


REFUSED: list[tuple[Manifest, str]] = [
    ({"replica": 3}, "replica"),
    ({"replicas": "three"}, "replicas"),
    ({"replicas": -1}, "replicas"),
    ({"image": {"repository": "Fovea"}}, "image/repository"),
    ({"image": {"repository": "example.com/fovea:1"}}, "image/repository"),
    ({"image": {"digest": "sha256:12"}}, "image/digest"),
    ({"image": {"pullPolicy": "Sometimes"}}, "image/pullPolicy"),
    ({"settings": {"FOVEA_QUEUE_IMAGE": 3}}, "FOVEA_QUEUE_IMAGE"),
    ({"settings": {"FOVEA_QUEUE_IMAGES": 0}}, "FOVEA_QUEUE_IMAGES"),
    ({"settings": {"FOVEA_PORT": 9000}}, "FOVEA_PORT"),
    ({"settings": {"FOVEA_PROVIDER": "rocm"}}, "FOVEA_PROVIDER"),
    ({"env": [{"name": "FOVEA_PORT", "value": "9000"}]}, "env/0/name"),
    ({"env": [{"name": "fovea_drain_limit", "value": "300"}]}, "missing property 'valueFrom'"),
    ({"env": [{"name": "FOVEA_HOST", "valueFrom": {"fieldRef": {}}}]}, "env has FOVEA_HOST a second time"),
    ({"env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}, "env has A a second time"),
    ({"volumes": [{"name": "state", "emptyDir": {}}]}, "a volume of the chart"),
    ({"volumeMounts": [{"name": "a", "mountPath": "/models"}]}, "volumeMounts/0/mountPath"),
    ({"rollout": {"maxSurge": 0}}, "no pod could be replaced"),
    ({"rollout": {"maxSurge": "0%"}}, "no pod could be replaced"),
    ({"rollout": {"maxSurge": "1"}}, "rollout/maxSurge"),
    ({"podLabels": {"app.kubernetes.io/name": "other"}}, "app.kubernetes.io/name"),
    ({"models": None}, "missing property 'models'"),
    ({"settings": None}, "missing property 'settings'"),
    ({"models": {"uri": "s3:/bucket"}}, "models/uri"),
    ({"models": {"uri": "https://bucket/zoo"}}, "models/uri"),
    ({"models": {"uri": "s3://key:secret@bucket/zoo"}}, "models/uri"),
    ({"models": {"uri": "s3://a", "persistentVolumeClaim": {"claimName": "b"}}}, "models"),
    ({"models": {"persistentVolumeClaim": {}}}, "claimName"),
    ({"resources": {"limits": {"cpu": "two"}}}, "resources/limits/cpu"),
    ({"user": 0}, "user"),
    ({"probes": {"startupSeconds": 0}}, "startupSeconds"),
    ({"service": {"type": "ExternalName"}}, "service/type"),
    ({"service": {"port": 70000}}, "service/port"),
    ({"ingress": {"enabled": True}}, "ingress/hosts"),
    ({"ingress": {"enabled": True, "hosts": ["https://a.example.com"]}}, "ingress/hosts/0"),
    ({"httpRoute": {"enabled": True}}, "httpRoute/parentRefs"),
    ({"autoscaling": {"type": "vpa"}}, "autoscaling/type"),
    ({"autoscaling": {"type": "keda"}}, "autoscaling/prometheus"),
    ({"autoscaling": {"authentication": {"modes": "bearer"}}}, "autoscaling/authentication"),
    ({"autoscaling": {"target": 25}}, "autoscaling/target"),
    ({"podDisruptionBudget": {"maxUnavailable": 0}}, "maxUnavailable"),
    ({"networkPolicy": {"from": [{}]}}, "networkPolicy/from/0"),
    ({"serviceMonitor": {"interval": "10"}}, "serviceMonitor/interval"),
    ({"terminationGracePeriodSeconds": 20}, "it must be at least 30"),
    ({"settings": {"FOVEA_DRAIN_GRACE": 30}}, "it must be at least 53"),
    ({"autoscaling": {"type": "hpa", "minReplicas": 11}}, "more than autoscaling.maxReplicas, 10"),
    ({"settings": {"FOVEA_KEYS": "/keys"}}, "FOVEA_KEYS"),
    ({"settings": {"FOVEA_TLS_CERT": "/tls.crt"}}, "FOVEA_TLS_CERT"),
    ({"settings": {"FOVEA_GRPC_PORT": 9000}}, "FOVEA_GRPC_PORT"),
    ({"settings": {"FOVEA_CALLER_BURST": 9}}, "FOVEA_CALLER_BURST without FOVEA_CALLER_RATE"),
    ({"env": [{"name": "FOVEA_KEYS", "valueFrom": {"secretKeyRef": {}}}]}, "env/0/name"),
    ({"keys": {"file": "keys"}}, "file"),
    ({"keys": {"secret": "API_KEYS"}}, "keys/secret"),
    ({"keys": {"entry": "a/b"}}, "keys/entry"),
    ({"tls": {"cert": "-----BEGIN CERTIFICATE-----"}}, "cert"),
    ({"tls": {"clientCA": {"secret": "a"}}}, "entry"),
    ({"tls": {"clientCA": {"secret": "a", "entry": "ca.crt"}}}, "tls.clientCA needs tls.secret"),
    ({"test": {"key": {"secret": "a", "entry": "key"}}}, "test.key needs keys.secret"),
    ({"test": {"certificateSecret": "a"}}, "test.certificateSecret needs tls.clientCA"),
    ({"serviceMonitor": {"key": {"secret": "a", "entry": "key"}}}, "serviceMonitor.key needs keys.secret"),
    ({**CASES["secure"], "serviceMonitor": ON}, "Prometheus needs a certificate"),
    ({"serviceMonitor": {"tlsConfig": {"serverName": "a"}}}, "serviceMonitor.tlsConfig needs tls.secret"),
    ({"service": {"externalTrafficPolicy": "Local"}}, "needs service.type NodePort or LoadBalancer"),
    ({"service": {"grpcPort": 80}, "grpc": ON}, "service.port and service.grpcPort are both 80"),
    ({"volumes": [{"name": "tls", "emptyDir": {}}]}, "a volume of the chart"),
    ({"volumeMounts": [{"name": "a", "mountPath": "/run/fovea/tls"}]}, "volumeMounts/0/mountPath"),
]


@needs_helm
@pytest.mark.parametrize(("values", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_wrong_values_are_refused(values: Manifest, message: str) -> None:
    with pytest.raises(AssertionError) as refusal:
        render_chart(values)
    assert message in str(refusal.value)


def test_schema_refuses_unknown_keys_everywhere() -> None:
    """Objects of Kubernetes' own types are free: the API server validates them."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert schema["properties"].keys() == VALUES.keys() | {"global"}
    _assert_strict(schema)


def _assert_strict(schema: Manifest) -> None:
    if "properties" in schema and schema.get("type") == "object":
        assert schema["additionalProperties"] is False, schema
    parts = [*schema.get("properties", {}).values(), schema.get("items")]
    for part in filter(None, parts):
        _assert_strict(part)


def test_values_are_complete() -> None:
    """A value that is null would end in an error of a template, which names no value."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert set(schema["required"]) == VALUES.keys() - {"user"}  # null lets the cluster choose


def test_uris_are_those_of_the_stores() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    pattern = re.compile(schema["properties"]["models"]["properties"]["uri"]["pattern"])
    for scheme in STORE_SCHEMES:
        assert bool(pattern.search(f"{scheme}://bucket/zoo")) == (scheme not in ("file", "memory"))


@needs_helm
def test_image_volume_needs_a_new_cluster() -> None:
    with pytest.raises(AssertionError, match=r"models\.image needs Kubernetes 1\.33"):
        render_chart(CASES["image"], "--kube-version", "1.32.0")


# --- names that exist ----------------------------------------------------------------------------


def test_settings_metrics_and_paths_in_the_chart_exist(server: Server) -> None:
    notes = (CHART / "values.yaml").read_text() + (CHART / "files" / "classify.py").read_text()
    text = TEMPLATES + notes
    assert set(re.findall(r"FOVEA_[A-Z_]+", text)) - {"FOVEA_KEY"} <= SETTING_NAMES  # a variable of clients
    metrics = set(re.findall(r"\bfovea_[a-z_]+", text))
    assert metrics == {"fovea_images_in_flight", "fovea_images_limit"}
    assert metrics <= list_metric_names()
    documented = server.client.get("/openapi.json").json()["paths"].keys() | {"/metrics"}
    paths = set(re.findall(r"(/health/\w+|/metrics|/v1/\w+)", text))
    assert {"/health/live", "/health/ready", "/metrics", "/v1/classify", "/v1/models"} <= paths <= documented


def test_defaults_of_the_drain_are_the_services() -> None:
    for name in ("drain_grace", "drain_limit"):
        assert f'"FOVEA_{name.upper()}" {Settings.model_fields[name].default}' in TEMPLATES
    drain = Settings.model_fields["drain_grace"].default + Settings.model_fields["drain_limit"].default
    assert VALUES["terminationGracePeriodSeconds"] >= drain + 3


@needs_helm
def test_dockerfile_has_the_user_and_the_port_of_the_chart() -> None:
    text = (ROOT / "Dockerfile").read_text()
    users = set(re.findall(r"^USER (\d+):(\d+)$", text, re.MULTILINE))
    ports = set(re.findall(r"^EXPOSE (\d+)$", text, re.MULTILINE))
    pod = get_manifest(render_chart(), "Deployment")["spec"]["template"]["spec"]
    context, (container,) = pod["securityContext"], pod["containers"]
    assert users == {(str(context["runAsUser"]), str(context["runAsGroup"]))}
    (port,) = container["ports"]
    assert ports == {str(port["containerPort"])} == {_read_environment(container)["FOVEA_PORT"]}


def _read_environment(container: Manifest) -> dict[str, str]:
    return {one["name"]: one["value"] for one in container["env"] if "value" in one}


# --- what the objects say ------------------------------------------------------------------------


@needs_helm
@pytest.mark.parametrize("case", ["defaults", "init", "small"])
def test_pods_are_restricted(case: str) -> None:
    """The rules of the Pod Security Standard `restricted`, a read-only root, and no token."""
    manifests = render_chart(CASES[case])
    pods = [get_manifest(manifests, "Deployment")["spec"]["template"], get_manifest(manifests, "Pod")]
    for pod in pods:
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert ("runAsUser" in spec["securityContext"]) == (case != "small")
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


@needs_helm
def test_service_does_not_select_the_test_pod() -> None:
    manifests = render_chart()
    selector = get_manifest(manifests, "Service")["spec"]["selector"]
    deployment = get_manifest(manifests, "Deployment")["spec"]
    assert deployment["selector"]["matchLabels"] == selector
    assert selector.items() <= deployment["template"]["metadata"]["labels"].items()
    assert not selector.items() <= get_manifest(manifests, "Pod")["metadata"]["labels"].items()


@needs_helm
@pytest.mark.parametrize(
    ("case", "models", "volume"),
    [
        ("defaults", None, None),
        ("claim", "/models", "persistentVolumeClaim"),
        ("image", "/models/models", "image"),
        ("init", "/models", "emptyDir"),
        ("uri", "s3://bucket/zoo", None),
        ("google", "gs://bucket/zoo", None),
    ],
)
def test_models_are_mounted_read_only(case: str, models: str | None, volume: str | None) -> None:
    pod = get_manifest(render_chart(CASES[case]), "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert _read_environment(container).get("FOVEA_MODELS") == models
    mounts = {one["name"]: one for one in container["volumeMounts"]}
    volumes = {one["name"]: one for one in pod["volumes"]}
    assert mounts.keys() == volumes.keys()
    assert ("models" in volumes) == (volume is not None)
    if volume:
        assert volume in volumes["models"]
        assert mounts["models"]["readOnly"] is True
        assert f"{models}/".startswith(mounts["models"]["mountPath"] + "/")


@needs_helm
def test_copy_of_a_store_lies_in_a_volume() -> None:
    pod = get_manifest(render_chart(CASES["uri"]), "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    cache = _read_environment(container)["FOVEA_MODEL_CACHE"]
    assert cache in {one["mountPath"] for one in container["volumeMounts"]}
    assert "FOVEA_MODEL_CACHE" not in str(render_chart())


@needs_helm
def test_settings_become_text_that_the_service_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {
        "FOVEA_DECODE_BYTES": 1610612736,
        "FOVEA_TRACES": True,
        "FOVEA_DRAIN_GRACE": 0,
        "FOVEA_BATCH_WAIT_MS": 1.5,
        "FOVEA_SWAP_FLIPS": 0.02,
        "FOVEA_TRUSTED_PROXIES": "10.0.0.0/8,::1",
    }
    manifests = render_chart({"settings": settings})
    (container,) = get_manifest(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    environment = _read_environment(container)
    assert environment["FOVEA_DECODE_BYTES"] == "1610612736"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    read = Settings()
    assert (read.decode_bytes, read.traces, read.drain_grace) == (1610612736, True, 0)
    assert (read.batch_wait_ms, read.swap_flips) == (1.5, 0.02)
    assert read.trusted_proxies == ("10.0.0.0/8", "::1")


def _list_secret_files(pod: Manifest, container: Manifest) -> dict[str, tuple[str, str]]:
    """Return the Secret and the entry of each file that a container finds, by its path."""
    mounts = {one["name"]: one for one in container["volumeMounts"]}
    files = {}
    for volume in pod["volumes"]:
        if "secret" in volume:
            mount = mounts[volume["name"]]
            assert mount["readOnly"] is True
            assert "subPath" not in mount, "Kubernetes never updates it"
            for item in volume["secret"]["items"]:
                files[f"{mount['mountPath']}/{item['path']}"] = (volume["secret"]["secretName"], item["key"])
    return files


@needs_helm
def test_settings_name_the_files_of_the_secrets() -> None:
    pod = get_manifest(render_chart(CASES["secure"]), "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    files, environment = _list_secret_files(pod, container), _read_environment(container)
    assert {name: files[path] for name, path in environment.items() if path in files} == {
        "FOVEA_KEYS": ("api-keys", "keys.txt"),
        "FOVEA_TLS_CERT": ("certificate", "tls.crt"),
        "FOVEA_TLS_KEY": ("certificate", "tls.key"),
        "FOVEA_TLS_CLIENT_CA": ("authority", "ca.crt"),
    }
    assert len(files) == 4


@needs_helm
def test_chart_needs_no_secret_by_default() -> None:
    pod = get_manifest(render_chart(), "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert not _list_secret_files(pod, container)
    names = _read_environment(container).keys()
    assert not {"FOVEA_KEYS", "FOVEA_TLS_CERT", "FOVEA_TLS_CLIENT_CA", "FOVEA_GRPC_PORT"} & names


@needs_helm
@pytest.mark.parametrize(("case", "scheme"), [("defaults", None), ("secure", "HTTPS"), ("tls", "HTTPS")])
def test_probes_speak_as_the_service_does(case: str, scheme: str | None) -> None:
    manifests = render_chart(CASES[case])
    (container,) = get_manifest(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"].get("scheme") == scheme
    service = next(one for one in manifests if one["kind"] == "Service")
    assert service["spec"]["ports"][0]["appProtocol"] == ("https" if scheme else "http")


@needs_helm
def test_grpc_has_a_port_everywhere() -> None:
    """In settings, container, policy, Service, and a Service without an address of its own."""
    manifests = render_chart({"grpc": ON})
    (container,) = get_manifest(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    port = int(_read_environment(container)["FOVEA_GRPC_PORT"])
    assert {"name": "grpc", "containerPort": port} in container["ports"]
    (rule,) = get_manifest(manifests, "NetworkPolicy")["spec"]["ingress"]
    assert port in {one["port"] for one in rule["ports"]}
    service, headless = (one["spec"] for one in manifests if one["kind"] == "Service")
    assert [one["name"] for one in service["ports"]] == ["http", "grpc"]
    assert headless["clusterIP"] == "None"
    assert headless["selector"] == service["selector"]
    # No second target of the ServiceMonitor, which looks for the port `http`.
    assert [(one["name"], one["port"]) for one in headless["ports"]] == [("grpc", port)]


@needs_helm
def test_prometheus_has_the_key_and_the_certificate() -> None:
    monitor = get_manifest(render_chart(CASES["secure"]), "ServiceMonitor")["spec"]["endpoints"][0]
    assert monitor["authorization"] == {
        "type": "Bearer", "credentials": {"name": "prometheus-key", "key": "key"},
    }  # fmt: skip
    assert monitor["tlsConfig"] == CASES["secure"]["serviceMonitor"]["tlsConfig"]
    assert monitor["scheme"] == "https"


@needs_helm
def test_prometheus_verifies_the_certificate_by_default() -> None:
    monitor = get_manifest(render_chart(CASES["tls"]), "ServiceMonitor")["spec"]["endpoints"][0]
    assert monitor["tlsConfig"] == {
        "ca": {"secret": {"name": "certificate", "key": "ca.crt"}}, "serverName": "fovea.photos.svc",
    }  # fmt: skip
    assert "authorization" not in monitor


@needs_helm
def test_rules_are_those_of_the_repository() -> None:
    rules = get_manifest(render_chart(CASES["monitoring"]), "PrometheusRule")
    assert rules["spec"] == yaml.safe_load(RULES.read_text())


@needs_helm
@pytest.mark.parametrize("name", ["fovea", "photos", "a" * 53])
def test_targets_get_the_job_that_the_rules_name(name: str) -> None:
    manifests = render_chart(CASES["monitoring"], name=name)
    monitor = get_manifest(manifests, "ServiceMonitor")["spec"]
    service = get_manifest(manifests, "Service")
    assert service["metadata"]["labels"][monitor["jobLabel"]] == "fovea"
    assert 'up{job="fovea"}' in RULES.read_text()
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}


@needs_helm
def test_scaler_compares_a_ratio_and_not_its_share_per_pod() -> None:
    manifests = render_chart(CASES["keda"])
    scaler, service = get_manifest(manifests, "ScaledObject")["spec"], get_manifest(manifests, "Service")
    (trigger,) = scaler["triggers"]
    labels = f'{{job="fovea", namespace="photos", service="{service["metadata"]["name"]}"}}'
    assert trigger["metricType"] == "Value"
    assert trigger["metadata"] == {
        "serverAddress": "http://prometheus:9090",
        "query": f"sum(fovea_images_in_flight{labels}) / sum(fovea_images_limit{labels})",
        "threshold": "0.25",
        "ignoreNullValues": "false",  # an empty answer would count as 0, and remove pods under load
    }


@needs_helm
def test_scaler_asks_a_prometheus_with_a_password() -> None:
    scaler = get_manifest(render_chart(CASES["keda with a password"]), "ScaledObject")["spec"]
    (trigger,) = scaler["triggers"]
    assert trigger["authenticationRef"] == {"name": "prometheus", "kind": "TriggerAuthentication"}
    assert trigger["metadata"]["authModes"] == "tls,basic"


@needs_helm
@needs_promtool
def test_scaler_adds_up_the_pods_of_its_release(tmp_path: Path) -> None:
    """Two pods of this release and one of another, by Prometheus' own evaluation."""
    (trigger,) = get_manifest(render_chart(CASES["keda"]), "ScaledObject")["spec"]["triggers"]
    pods = {"a": ("fovea", 64), "b": ("fovea", 32), "c": ("other", 256)}
    series = []
    for pod, (service, images) in pods.items():
        labels = f'{{job="fovea", namespace="photos", service="{service}", pod="{pod}"}}'
        series.append({"series": f"fovea_images_in_flight{labels}", "values": str(images)})
        series.append({"series": f"fovea_images_limit{labels}", "values": "256"})
    sample = {"labels": "{}", "value": (64 + 32) / (256 + 256)}
    query = {"expr": trigger["metadata"]["query"], "eval_time": "0m", "exp_samples": [sample]}
    text = yaml.safe_dump({"tests": [{"input_series": series, "promql_expr_test": [query]}]})
    (tmp_path / "test.yml").write_text(text)
    process = subprocess.run(
        ["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr


@needs_helm
@pytest.mark.parametrize("case", ["hpa", "keda"])
def test_autoscaled_deployment_has_no_number_of_replicas(case: str) -> None:
    deployment = get_manifest(render_chart(CASES[case]), "Deployment")
    assert "replicas" not in deployment["spec"]
    assert get_manifest(render_chart(), "Deployment")["spec"]["replicas"] == 2


@needs_helm
def test_averages_for_the_autoscaler_are_in_thousandths() -> None:
    scaler = get_manifest(render_chart(CASES["hpa"]), "HorizontalPodAutoscaler")["spec"]
    assert scaler["metrics"][0]["pods"]["target"] == {"type": "AverageValue", "averageValue": "500m"}


@needs_helm
@pytest.mark.parametrize(
    ("case", "ports"),
    [
        ("defaults", []),
        ("uri", [53, 53, 443, 80]),
        ("google", [53, 53, 443, 80, 988]),
        ("azure", [53, 53, 443]),
        ("policy", [4318]),
        ("urls", [53, 53, 443]),
        ("secure", []),
    ],
)
def test_pods_reach_only_what_they_need(case: str, ports: list[int]) -> None:
    policy = get_manifest(render_chart(CASES[case]), "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert [port["port"] for rule in policy["egress"] for port in rule["ports"]] == ports
    (rule,) = policy["ingress"]
    deployment = get_manifest(render_chart(CASES[case]), "Deployment")["spec"]["template"]["spec"]
    ports_of_pod = [port["containerPort"] for one in deployment["containers"] for port in one["ports"]]
    assert [port["port"] for port in rule["ports"]] == ports_of_pod
    assert ("from" in rule) == (case == "policy")


@needs_helm
def test_images_by_url_come_from_public_addresses_only() -> None:
    """The guard of the service comes first; the policy holds if it has a fault."""
    policy = get_manifest(render_chart(CASES["urls"]), "NetworkPolicy")["spec"]
    (rule,) = (one for one in policy["egress"] if one["ports"][0]["port"] == 443)
    blocks = [peer["ipBlock"] for peer in rule["to"]]
    assert [block["cidr"] for block in blocks] == ["0.0.0.0/0", "::/0"]
    closed = [ipaddress.ip_network(one) for block in blocks for one in block["except"]]
    for address in ("10.0.0.1", "127.0.0.1", "169.254.169.254", "172.20.0.1", "192.168.1.1", "100.64.0.1",
                    "fd00:ec2::254", "fe80::1"):  # fmt: skip
        ip = ipaddress.ip_address(address)
        assert any(ip in network for network in closed if network.version == ip.version), address
    for network in closed:
        assert not network.is_global


@needs_helm
@pytest.mark.parametrize("case", ["uri", "google"])
def test_pods_reach_the_cloud_s_tokens_by_address_only(case: str) -> None:
    """A role of the service account needs its tokens, and port 80 of others stays shut."""
    policy = get_manifest(render_chart(CASES[case]), "NetworkPolicy")["spec"]
    for rule in policy["egress"]:
        if not {80, 988} & {port["port"] for port in rule["ports"]}:
            continue
        for peer in rule["to"]:
            network = ipaddress.ip_network(peer["ipBlock"]["cidr"])
            assert network.num_addresses == 1
            assert not network.is_global


@needs_helm
@pytest.mark.parametrize("case", ["uri", "google"])
def test_tokens_of_the_cloud_can_be_shut_off(case: str) -> None:
    """Keys in a Secret need no token, and the address may give out the node's own."""
    values = {**CASES[case], "networkPolicy": {"cloudTokens": False}}
    policy = get_manifest(render_chart(values), "NetworkPolicy")["spec"]
    assert [port["port"] for rule in policy["egress"] for port in rule["ports"]] == [53, 53, 443]


@needs_helm
def test_pods_reach_the_dns_of_openshift() -> None:
    words = ["--api-versions", "security.openshift.io/v1"]
    policy = get_manifest(render_chart(CASES["uri"], *words), "NetworkPolicy")["spec"]
    assert [port["port"] for port in policy["egress"][0]["ports"]] == [53, 53, 5353, 5353]


@needs_helm
def test_roll_out_waits_longer_than_the_startup_probe() -> None:
    for case in ("defaults", "one node"):
        spec = get_manifest(render_chart(CASES[case]), "Deployment")["spec"]
        (container,) = spec["template"]["spec"]["containers"]
        probe = container["startupProbe"]
        assert spec["progressDeadlineSeconds"] >= probe["periodSeconds"] * probe["failureThreshold"] + 120
        assert spec["progressDeadlineSeconds"] >= 600  # the default of Kubernetes


@needs_helm
def test_pod_of_the_test_goes_where_the_service_goes() -> None:
    """An image for one architecture, and nodes with taints."""
    manifests = render_chart(CASES["gpu"])
    pod, service = get_manifest(manifests, "Pod")["spec"], get_manifest(manifests, "Deployment")["spec"]
    for field in ("nodeSelector", "tolerations", "serviceAccountName"):
        assert pod[field] == service["template"]["spec"][field]


@needs_helm
def test_logs_of_the_test_can_be_read() -> None:
    annotations = get_manifest(render_chart(), "Pod")["metadata"]["annotations"]
    assert annotations["helm.sh/hook-delete-policy"] == "before-hook-creation"


@needs_helm
@pytest.mark.long
def test_helm_test_classifies_with_a_real_service(server: Server) -> None:
    """The pod's own command, with another host and port."""
    (container,) = get_manifest(render_chart(), "Pod")["spec"]["containers"]
    assert container["command"][0] == "python3"
    host, port = server.url.removeprefix("http://").split(":")
    command = [sys.executable, *container["command"][1:], container["args"][0], host, port]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("small: {")


@needs_helm
def test_pod_of_the_test_sees_no_private_key_of_the_service() -> None:
    pod = get_manifest(render_chart(CASES["secure"]), "Pod")["spec"]
    (container,) = pod["containers"]
    assert set(_list_secret_files(pod, container).values()) == {
        ("certificate", "tls.crt"), ("test-certificate", "tls.crt"), ("test-certificate", "tls.key"),
    }  # fmt: skip
    assert container["env"] == [
        {"name": "FOVEA_KEY", "valueFrom": {"secretKeyRef": {"name": "test-key", "key": "key"}}}
    ]


@needs_helm
@pytest.mark.long
def test_helm_test_classifies_with_keys_and_certificates(tmp_path: Path) -> None:
    """The pod's own command against a real service with keys and mutual TLS, and all that it must refuse."""
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    own = authority.issue("service", "fovea.photos.svc")
    client, other = authority.issue("client", "client"), stranger.issue("other", "fovea.photos.svc")
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(client.certificate, folder / "tls.crt")
    shutil.copy(client.key, folder / "tls.key")
    key = "test-key-0123456789-abcdefghijklmnopqrstuvwxyz"
    keys = tmp_path / "keys"
    keys.write_text(f"test:classify:{hashlib.sha256(key.encode()).hexdigest()}\n")
    (container,) = get_manifest(render_chart(CASES["secure"]), "Pod")["spec"]["containers"]
    code, _, _, *files = container["args"]
    assert len(files) == 2
    settings = {**own.settings, "FOVEA_TLS_CLIENT_CA": str(authority.file), "FOVEA_KEYS": str(keys)}
    with Server(None, authority.trust(client), **settings) as server:
        host, port = server.url.removeprefix("https://").split(":")

        def run(certificate: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, *container["command"][1:], code, host, port, str(certificate), *words]
            return subprocess.run(command, capture_output=True, text=True, check=False, env=variables)

        process = run(own.certificate, str(folder), FOVEA_KEY=key + "\n")
        assert process.returncode == 0, process.stderr
        assert "{" in process.stdout
        for words, variables, status in (((str(folder),), {}, 401), ((), {"FOVEA_KEY": key}, 403)):
            process = run(own.certificate, *words, **variables)
            assert process.returncode == 0, process.stderr
            assert f"refuses callers without a key or certificate: {status};" in process.stdout
        assert "401" in run(own.certificate, str(folder), FOVEA_KEY=key + "x").stderr
        # The key goes to nobody but the holder of the very certificate.
        process = run(other.certificate, str(folder), FOVEA_KEY=key)
        assert "CERTIFICATE_VERIFY_FAILED" in process.stderr
        assert process.returncode != 0


@needs_helm
def test_notes_name_the_way_in() -> None:
    words = ["--dry-run=client", "--namespace", "photos"]
    process = run_helm("install", "fovea", ".", *words)
    assert process.returncode == 0, process.stderr
    assert "port-forward service/fovea 8000:80" in process.stdout
    assert "WARNING" not in process.stdout


@needs_helm
def test_notes_show_the_key_and_the_certificate() -> None:
    options = [
        word for name, one in CASES["secure"].items() for word in ("--set-json", f"{name}={json.dumps(one)}")
    ]
    process = run_helm("install", "fovea", ".", "--dry-run=client", "--namespace", "photos", *options)
    assert process.returncode == 0, process.stderr
    command = re.search(r"^  curl .*$", process.stdout, re.MULTILINE)
    assert command is not None
    words = shlex.split(command[0])
    assert {"Authorization: Bearer $FOVEA_KEY", "--cert", "https://localhost:8000/v1/classify"} <= set(words)
    assert "dns:///fovea-grpc.photos:8001" in process.stdout
    assert "Callers need no key" not in process.stdout


@needs_helm
@pytest.mark.parametrize(
    ("values", "words"),
    [
        (CASES["init"], "the init container reaches no address"),
        ({"settings": {"FOVEA_TRACES": True}}, "traces reach no collector"),
        ({"replicas": 1}, "a drained node interrupts the service"),
        ({"settings": {"FOVEA_TRACES": True}, **CASES["policy"]}, ""),
        ({**CASES["tls"], "ingress": {**ON, "hosts": ["a.example.com"]}}, "backend-protocol to HTTPS"),
        ({**CASES["tls"], "ingress": CASES["ingress"]["ingress"]}, ""),
        ({**CASES["tls"], **CASES["route"]}, "needs a BackendTLSPolicy for the Service fovea"),
        ({**CASES["route"], "settings": {"FOVEA_CALLER_SHARES": True}}, "Set FOVEA_TRUSTED_PROXIES"),
        (
            {
                **CASES["route"],
                "settings": {"FOVEA_CALLER_SHARES": True, "FOVEA_TRUSTED_PROXIES": "10.0.0.0/8"},
            },
            "",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_notes_warn(values: Manifest, words: str) -> None:
    options = [word for name, one in values.items() for word in ("--set-json", f"{name}={json.dumps(one)}")]
    process = run_helm("install", "fovea", ".", "--dry-run=client", "--namespace", "photos", *options)
    assert process.returncode == 0, process.stderr
    assert words in process.stdout
    assert ("WARNING" in process.stdout) == bool(words)


# --- the page ------------------------------------------------------------------------------------


def test_page_has_every_value_with_its_default() -> None:
    table = read_page("kubernetes").partition("## Values")[2]
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*?) \|", table, re.MULTILINE))
    defaults = {name: "" if value is None else f"`{_format(value)}`" for name, value in _list_values(VALUES)}
    assert rows == defaults


def _list_values(values: Manifest, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _list_values(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _format(value: object) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def test_page_adds_the_packages_of_the_extra_to_the_image() -> None:
    (command,) = re.findall(r"^RUN pip install .* 'grpcio.*$", read_page("kubernetes"), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = [word for word in shlex.split(command) if re.search(r"[<>=]", word)]
    assert packages == project["optional-dependencies"]["grpc"]
    folder = re.search(r"--target (\S+)", command)
    assert folder is not None
    own_path = re.search(r"PYTHONPATH=(\S+)", (ROOT / "Dockerfile").read_text())
    assert own_path is not None
    assert f"\nENV PYTHONPATH={folder[1]}:{own_path[1]}\n" in read_page("kubernetes")


@needs_helm
def test_commands_of_the_page_are_accepted() -> None:
    """Each `helm install` or `helm upgrade` of the page renders."""
    page = read_page("kubernetes").replace("\\\n", " ")
    commands = re.findall(r"^\$ helm (?:install|upgrade) (\w+) deploy/helm/fovea(.*)$", page, re.MULTILINE)
    assert len(commands) >= 5
    for name, options in commands:
        words = shlex.split(options, comments=True)
        # Only a release has former values. `--reuse-values` would leave out values that are new in a chart.
        assert "--reuse-values" not in words
        words = [word for word in words if word != "--reset-then-reuse-values"]
        process = run_helm("template", name, ".", *words)
        assert process.returncode == 0, process.stderr
