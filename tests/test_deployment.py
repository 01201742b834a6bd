"""Every file in cluster/ against the schema of what reads it, and the promises that those schemas do not know."""

import json
import os
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).parent.parent / "cluster"
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))
LAUNCHER = sorted((CLUSTER / "launcher").glob("*.yaml"))
COMPOSE = CLUSTER / "mlflow" / "compose.yaml"
SCHEMAS = Path(os.environ.get("AMT_RAY_SCHEMAS", CLUSTER.parent.parent / "shared" / "schemas"))
KUBERNETES = "1.33"


def documents(file):
    return [one for one in yaml.safe_load_all(file.read_text()) if one]


OBJECTS = [pytest.param(one, id=f"{file.stem}-{one['kind']}") for file in KUBERAY for one in documents(file)]
RAY_OBJECTS = [one for one in OBJECTS if one.values[0]["apiVersion"].startswith("ray.io/")]
CORE_OBJECTS = [one for one in OBJECTS if one not in RAY_OBJECTS]


def closed(schema):
    """A CRD's schema as JSON schema: unknown keys are wrong, and a port may be a number or a name."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {key: closed(value) for key, value in schema.items() if not key.startswith("x-kubernetes")}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def crd(kind):
    file = SCHEMAS / f"ray.io_{kind.lower()}s.yaml"
    if not file.exists():
        pytest.skip(f"KubeRay's CRDs are not beside the checkout, nor where AMT_RAY_SCHEMAS says: {file.name}")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    versions = yaml.load(file.read_text(), Loader=loader)["spec"]["versions"]
    schema = closed(next(one for one in versions if one["name"] == "v1")["schema"]["openAPIV3Schema"])
    return schema | {"properties": schema["properties"] | {"metadata": {"type": "object"}}}


def pod_specs(tree):
    """Every pod's spec in an object, wherever it lies."""
    if isinstance(tree, dict):
        if "containers" in tree:
            yield tree
        for value in tree.values():
            yield from pod_specs(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from pod_specs(value)


@pytest.mark.parametrize("manifest", RAY_OBJECTS)
def test_kuberay__ray_objects_are_what_the_operator_takes(manifest):
    jsonschema.Draft202012Validator(crd(manifest["kind"])).validate(manifest)


def test_kuberay__a_misspelt_key_is_refused():
    manifest = documents(CLUSTER / "kuberay" / "raycluster.yaml")[0]
    manifest["spec"]["workerGroupSpecs"][0]["minReplica"] = 0
    with pytest.raises(jsonschema.ValidationError, match="minReplica"):
        jsonschema.Draft202012Validator(crd("RayCluster")).validate(manifest)


@pytest.mark.parametrize("manifest", CORE_OBJECTS)
def test_kuberay__other_objects_are_what_kubernetes_takes(manifest):
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("manifest", [one for one in OBJECTS if list(pod_specs(one.values[0]))])
def test_kuberay__pods_are_restricted_limited_and_looked_after(manifest):
    for pod in pod_specs(manifest):
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
            assert container["name"] == "submitter" or {"readinessProbe", "livenessProbe"} <= container.keys()
            mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
            claimed = {one["metadata"]["name"] for one in manifest["spec"].get("volumeClaimTemplates", ())}
            assert mounted <= {volume["name"] for volume in pod.get("volumes", ())} | claimed


@pytest.mark.parametrize("manifest", RAY_OBJECTS)
def test_kuberay__a_cluster_asks_for_a_token_grows_from_nothing_and_keeps_its_head_free(manifest):
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    assert spec["authOptions"]["mode"] == "token" and spec["enableInTreeAutoscaling"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP" and not spec["headGroupSpec"].get("enableIngress")
    assert all(group["minReplicas"] == 0 < group["maxReplicas"] for group in spec["workerGroupSpecs"])


def test_kuberay__the_namespace_is_closed_and_each_opening_names_its_guests():
    policies = [one.values[0] for one in OBJECTS if one.values[0]["kind"] == "NetworkPolicy"]
    opened = [one["spec"] for one in policies if one["spec"].get("ingress")]
    assert any(one["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]} for one in policies)
    assert opened and all(rule["from"] and {} not in rule["from"] for spec in opened for rule in spec["ingress"])


@pytest.mark.parametrize("file", LAUNCHER, ids=lambda file: file.stem)
def test_launcher__ray_up_takes_it_and_opens_no_dashboard(file):
    config = yaml.safe_load(file.read_text())
    starts = " ".join(config["head_start_ray_commands"])
    validate_config(prepare_config(config))
    assert "--dashboard-host=127.0.0.1" in starts and "~/.ray/auth_token" in {*config["file_mounts"].values()}
    if config["provider"]["type"] != "local":
        workers = [one for name, one in config["available_node_types"].items() if name != config["head_node_type"]]
        assert config["idle_timeout_minutes"] <= 15 and all(one["min_workers"] == 0 for one in workers)
        assert "spot" in json.dumps(workers).lower()


def test_compose__is_what_compose_takes():
    file = resources.files("check_jsonschema.builtin_schemas.vendor") / "compose-spec.json"
    tree = yaml.safe_load(COMPOSE.read_text())
    jsonschema.validate(tree, json.loads(file.read_text()))
    published = [port for service in tree["services"].values() for port in service.get("ports", ())]
    assert published == ["${MLFLOW_BIND:-127.0.0.1}:5000:5000"]


@pytest.mark.parametrize("file", sorted((CLUSTER / "slurm").iterdir()), ids=lambda file: file.name)
@pytest.mark.parametrize("checker", [["bash", "-n"], ["shellcheck", "--severity=style"]], ids=lambda c: c[0])
def test_slurm__scripts_are_sound(file, checker):
    if shutil.which(checker[0]) is None:
        pytest.skip(f"{checker[0]} is not installed")
    told = subprocess.run([*checker, str(file)], capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr


def test_containerfile__runs_as_nobody_special_and_copies_what_is_there():
    lines = (CLUSTER / "Containerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users and users[-1] == "1000:1000"
    assert all((CLUSTER.parent / word).exists() for word in copied)


def test_readme__names_every_file_and_no_other():
    told = set(
        re.findall(r"cluster/[\w./-]+\.(?:yaml|sbatch)|cluster/Containerfile", (CLUSTER / "README.md").read_text())
    )
    there = {f"cluster/{file.relative_to(CLUSTER)}" for file in CLUSTER.rglob("*") if file.is_file()}
    assert told == {name for name in there if not name.endswith("README.md")}
