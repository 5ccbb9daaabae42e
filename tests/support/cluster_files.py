"""The files of infra/cluster, read as those read them who use them. Each check lists what is wrong; nothing is good."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra" / "cluster"
KUBERNETES = "1.34"  # the schemas that manifests are held against
RAYCLUSTER = yaml.safe_load((ROOT / "tests" / "infra" / "raycluster.schema.yaml").read_text())
SECRET_NAME = re.compile(r"KEY|TOKEN|PASSWORD|SECRET|CONNECTION_URL|AUTH_STRING")
REFERENCE = re.compile(r"\$\{\w+(:\?[^}]*)?\}")  # no default: ${NAME:-...} is none
CONTAINER_OPTIONS = ("resources", "securityContext", "env", "envFrom", "volumeMounts", "imagePullPolicy")
Document = dict[str, Any]


def run(*command: str, stdin: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A program of this environment (.venv/bin), which sees no variables but these."""
    known = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", **(env or {})}
    tool = Path(sys.executable).parent / command[0]
    return subprocess.run([str(tool), *command[1:]], input=stdin, env=known, capture_output=True, text=True, cwd=FOLDER)


# Compose


def compose(document: Document, variables: dict[str, str]) -> tuple[Document, list[str]]:
    """What Compose makes of a file with the variables filled in, all profiles; or what it has against it."""
    arguments = ["-f", "-", "--project-directory", ".", "--env-file", os.devnull, "--profile", "*"]
    told = run("docker-compose", *arguments, "config", "--format=json", stdin=json.dumps(document), env=variables)
    return (json.loads(told.stdout), []) if told.returncode == 0 else ({}, told.stderr.splitlines())


def loose_services(resolved: Document) -> Iterator[str]:
    """Services that run as root, gain privileges, or are reached from other machines."""
    ours = resolved["services"]["prefect"]["image"]  # the Dockerfile's; its USER is checked there
    for name, service in resolved["services"].items():
        user = service.get("user", "image" if service["image"] == ours else "root")
        if user.partition(":")[0] in ("root", "0"):
            yield f"{name} runs as root"
        if service.get("privileged") or service.get("cap_add") or service.get("cap_drop") != ["ALL"]:
            yield f"{name} has capabilities"
        if "no-new-privileges:true" not in service.get("security_opt", []):
            yield f"{name} may gain privileges"
        if service.get("network_mode") == "host":
            yield f"{name} is open to the network"
        for port in service.get("ports", []):
            if port.get("host_ip") != "127.0.0.1":
                yield f"{name} is open to the network at {port['target']}"


def compose_secrets(document: Document) -> Iterator[str]:
    """Values of secrets that stand in the file, also as defaults."""
    for name, service in document["services"].items():
        for variable, value in service.get("environment", {}).items():
            if SECRET_NAME.search(variable) and not REFERENCE.fullmatch(str(value)):
                yield f"{name} has the value of {variable}"


# Kubernetes


def manifests(text: str) -> dict[str, Document]:
    """Documents by kind and name."""
    return {f"{d['kind']}-{d['metadata']['name']}": d for d in yaml.safe_load_all(text)}


def invalid_manifests(documents: dict[str, Document]) -> Iterator[str]:
    """What the API server would refuse, or drop unless asked to be strict."""
    validator = jsonschema.Draft202012Validator(RAYCLUSTER)
    for name, document in documents.items():
        parts = [document]
        if document["kind"] == "RayCluster":
            errors = [f"{error.json_path} {error.message}" for error in validator.iter_errors(document)]
            yield from (f"{name}: {error}" for error in errors)
            parts = [] if errors else list(kubernetes_parts(document))
        for part in parts:
            try:
                kubernetes_validate.validate(part, KUBERNETES, strict=True)
            except kubernetes_validate.ValidationError as error:
                yield f"{name}: {error.json_path} {error.message}"


def kubernetes_parts(cluster: Document) -> Iterator[Document]:
    """What of a RayCluster is Kubernetes' own, as documents that Kubernetes has schemas for."""
    yield {"apiVersion": "v1", "kind": "ConfigMap", "metadata": cluster["metadata"]}
    for _, pod in ray_pods(cluster["spec"]):
        template = {"metadata": {"labels": {"app": "ray"}}, "spec": pod}
        spec = {"selector": {"matchLabels": {"app": "ray"}}, "template": template}
        yield {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "ray"}, "spec": spec}


def ray_pods(spec: Document) -> Iterator[tuple[str, Document]]:
    """Pods by the name of their group; the head's with the container that KubeRay adds."""
    head = spec["headGroupSpec"]["template"]["spec"]
    options = spec.get("autoscalerOptions", {})
    autoscaler = {"name": "autoscaler"} | {name: options[name] for name in CONTAINER_OPTIONS if name in options}
    yield "head", {**head, "containers": [*head["containers"], autoscaler]}
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]


def pods(documents: dict[str, Document]) -> Iterator[tuple[str, Document]]:
    """All pods by name."""
    for name, document in documents.items():
        if document["kind"] == "RayCluster":
            yield from ray_pods(document["spec"])
        elif "template" in document["spec"]:
            yield name, document["spec"]["template"]["spec"]


def containers(pod: Document) -> list[Document]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def loose_pods(documents: dict[str, Document]) -> Iterator[str]:
    """Pods that run as root, gain privileges, or are reached from outside the cluster."""
    for name, pod in pods(documents):
        if pod.get("hostNetwork") or pod.get("hostPID") or pod.get("hostIPC"):
            yield f"{name} is on the host"
        for container in containers(pod):
            security = pod.get("securityContext", {}) | container.get("securityContext", {})
            if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
                yield f"{name} runs as root"
            if security.get("privileged") or security.get("allowPrivilegeEscalation") is not False:
                yield f"{name} may gain privileges"
            if security.get("capabilities") != {"drop": ["ALL"]}:
                yield f"{name} has capabilities"
            if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
                yield f"{name} may make any system call"
            if any("hostPort" in port for port in container.get("ports", [])):
                yield f"{name} is open to the network"
    for name, document in documents.items():
        spec = document["spec"]
        head = spec.get("headGroupSpec", {})
        if {spec.get("type"), head.get("serviceType")} - {None, "ClusterIP"} or head.get("enableIngress"):
            yield f"{name} is open to the network"


def manifest_secrets(documents: dict[str, Document]) -> Iterator[str]:
    """Values of secrets that stand in the file."""
    yield from (f"{name} is a Secret" for name in documents if name.startswith("Secret-"))
    for name, pod in pods(documents):
        for variable in (entry for container in containers(pod) for entry in container.get("env", [])):
            if SECRET_NAME.search(variable["name"]) and "value" in variable:
                yield f"{name} has the value of {variable['name']}"


def by_crd(cluster: Document, crd: Document) -> Iterator[str]:
    """What a CustomResourceDefinition has against a document; fields that it does not have are refused."""
    (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
    validator = jsonschema.Draft4Validator(_closed(version["schema"]["openAPIV3Schema"]))
    yield from (f"{error.json_path} {error.message}" for error in validator.iter_errors(cluster))


def _closed(schema: Any) -> Any:
    """A structural schema as JSON Schema: what is not among the properties is refused."""
    if not isinstance(schema, dict):
        return [_closed(part) for part in schema] if isinstance(schema, list) else schema
    closed = {name: _closed(part) for name, part in schema.items()}
    structural = schema.get("type") == "object" and isinstance(schema.get("properties"), dict)
    if structural and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed["additionalProperties"] = False
    return closed


# Ray's launcher


def invalid_launcher(document: Document) -> list[str]:
    """What `ray up` has against a file, before it reaches for any machine; also of what it would fill in unasked."""
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    found = [f"{e.json_path} {e.message}" for e in jsonschema.Draft7Validator(schema).iter_errors(document)]
    try:
        validate_config(prepare_config(deepcopy(document)))
    except Exception as error:  # noqa: BLE001 Ray refuses with whatever it stumbles over
        found.append(f"{type(error).__name__}: {error}")
    return found


# Images, and the Dockerfile


def unpinned(image: str) -> bool:
    """Whether an image is named without a version or digest."""
    name, _, digest = image.partition("@")
    tag = name.rpartition("/")[2].partition(":")[2]
    return not re.fullmatch(r"sha256:[0-9a-f]{64}", digest) and not re.search(r"\d", tag)


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Instructions with their arguments, in order; arguments of the build have their defaults."""
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", dockerfile))
    lines = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    defaults = dict(rest.split("=", 1) for word, rest in lines if word == "ARG" and "=" in rest)
    return [(word, re.sub(r"\$\{(\w+)\}", lambda m: defaults.get(m[1], m[0]), rest)) for word, rest in lines]


def bad_dockerfile(dockerfile: str) -> Iterator[str]:
    """What Hadolint says, and what we promise beyond it."""
    yield from run("hadolint", "--no-color", "-", stdin=dockerfile).stdout.splitlines()
    found = instructions(dockerfile)
    stages = [number for number, (word, _) in enumerate(found) if word == "FROM"]
    bases = [found[number][1].split()[0] for number in stages]
    if len(stages) < 2:
        yield "one stage: what builds is in the image"
    yield from (f"{base} is not pinned" for base in bases if unpinned(base))
    last = found[stages[-1] :]
    users = [rest for word, rest in last if word == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*(:\d+)?", users[-1]):
        yield "the image's user is not a number other than root's"
    commands = [part.strip() for word, rest in found if word == "RUN" for part in rest.split("&&")]
    for command in commands:
        free = "constraints.txt" not in command and "--no-deps --editable ." not in command
        if "pip install" in command and free:
            yield f"not held by constraints.txt: {command}"
    if any("pip install" in rest for word, rest in last if word == "RUN"):
        yield "the last stage installs"
