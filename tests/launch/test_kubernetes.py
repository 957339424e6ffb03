"""The manifest of replicas: its parts name each other, and its command is one of ours."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

from stf_jax.cli.main import _parser
from stf_jax.serve.app import Service
from stf_jax.serve.server import ServeConfig

MANIFEST = Path(__file__).parents[2] / "launch" / "kubernetes" / "serve.yaml"


@pytest.fixture(scope="module")
def parts() -> dict[tuple[str, str], dict[str, Any]]:
    documents = list(yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8")))
    return {(part["kind"], part["metadata"]["name"]): part for part in documents}


def test_it_is_what_the_api_takes(parts: dict[tuple[str, str], dict[str, Any]]) -> None:
    if importlib.util.find_spec("kubernetes_validate") is None:
        pytest.skip("needs kubernetes-validate")
    import kubernetes_validate

    for part in parts.values():
        kubernetes_validate.validate(part, kubernetes_validate.latest_version(), strict=True)


def test_ingress_service_and_pods_name_each_other(
    parts: dict[tuple[str, str], dict[str, Any]],
) -> None:
    spec = parts["Deployment", "stf-jax"]["spec"]
    labels, pod = spec["template"]["metadata"]["labels"], spec["template"]["spec"]
    service = parts["Service", "stf-jax"]["spec"]
    assert spec["selector"]["matchLabels"] == labels == service["selector"]
    (container,), (port,) = pod["containers"], service["ports"]
    assert port["targetPort"] in {one["name"] for one in container["ports"]}
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    ingress = parts["Ingress", "stf-jax"]
    (rule,) = ingress["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    backend = path["backend"]["service"]
    assert backend == {"name": "stf-jax", "port": {"name": port["name"]}}
    annotations = ingress["metadata"]["annotations"]
    assert all(isinstance(value, str) for value in annotations.values())
    # The server's own limit of a body.
    limit = annotations["nginx.ingress.kubernetes.io/proxy-body-size"]
    assert int(limit.removesuffix("m")) * 2**20 == Service(name="model").most_body


def test_the_command_is_one_of_ours(parts: dict[tuple[str, str], dict[str, Any]]) -> None:
    deployment = parts["Deployment", "stf-jax"]["spec"]
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][0] == "stf-jax"
    options = _parser().parse_args(container["command"][1:])
    config = ServeConfig(
        name=options.name, port=options.port, slots=options.slots, grace=options.grace
    )
    assert options.host == "0.0.0.0"
    assert config.port == container["ports"][0]["containerPort"]
    assert config.grace < pod["terminationGracePeriodSeconds"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
