"""A JobSet for TPU slices on Google Kubernetes Engine: one process a host, restarted as a whole."""

from __future__ import annotations

import io
import re
from math import prod
from pathlib import PurePosixPath
from posixpath import normpath
from typing import Any, NamedTuple

from ruamel.yaml import YAML

from common.config import ConfigError
from common.launch.job import STOPPED, Job

# The accelerator's name on nodes, and how many numbers a topology of it has.
_KINDS = {
    "v4": ("tpu-v4-podslice", 3),
    "v5p": ("tpu-v5p-slice", 3),
    "v5e": ("tpu-v5-lite-podslice", 2),
    "v6e": ("tpu-v6e-slice", 2),
}
_CHIPS_PER_HOST = 4
_TPU = "google.com/tpu"
_RUNTIME_PORT = 8471  # of TPU hosts among each other
_TARGET = re.compile(r"(\w+):(\d+(?:x\d+){1,2})")


class Slice(NamedTuple):
    """A TPU slice: the accelerator as its nodes are labelled, its topology, its hosts, and the chips of each."""

    accelerator: str
    topology: str
    hosts: int
    chips_per_host: int


class Gke(NamedTuple):
    """What the cluster is asked for. volume: a claim and the folder at which every host sees it, `CLAIM:FOLDER`.
    grace_s: seconds to finish the step and save. restarts: after failures; those after preemption are not counted.
    """

    target: Slice
    slices: int
    image: str
    volume: str
    grace_s: int
    restarts: int


def read_target(text: str) -> Slice:
    """The slice that `v5p:4x4x8` names. Raises ConfigError."""
    match = _TARGET.fullmatch(text)
    kind, topology = match.groups() if match else ("", "")
    if kind not in _KINDS:
        raise ConfigError(
            f"--target {text}: is no TPU slice. Give KIND:TOPOLOGY, KIND one of {', '.join(_KINDS)}, such as v5p:4x4x8."
        )
    accelerator, axes = _KINDS[kind]
    sizes = [int(size) for size in topology.split("x")]
    chips = prod(sizes)
    if len(sizes) != axes or (chips != 1 and chips % _CHIPS_PER_HOST) or not chips:
        raise ConfigError(
            f"--target {text}: a topology of {kind} has {axes} numbers, and its chips fill hosts of {_CHIPS_PER_HOST}. "
            "Give one that the cluster has node pools of."
        )
    per_host = min(chips, _CHIPS_PER_HOST)
    return Slice(accelerator, topology, chips // per_host, per_host)


def job_file(job: Job, asked: Gke) -> str:
    """The JobSet as YAML. Raises ConfigError for a config that cannot run there."""
    config = job.loaded.config
    if config.backend.name != "jax":
        raise job.refuse("backend.name", config.backend.name, "does not run on TPUs. Set it to jax.")
    job.refuse_other_mesh(asked.slices * asked.target.hosts * asked.target.chips_per_host, "chips")
    claim, _, folder = asked.volume.partition(":")
    if not claim or not folder.startswith("/"):
        raise ConfigError(
            f"--volume {asked.volume}: is no claim and folder. Give CLAIM:/FOLDER, as in results:/results."
        )
    if PurePosixPath(folder) not in PurePosixPath(normpath(config.run.dir)).parents:
        problem = f"is not below {folder} (--volume), and would go with the pod. Set it there."
        raise job.refuse("run.dir", config.run.dir, problem)
    text = io.StringIO()
    YAML().dump(_job_set(job, asked, claim, folder), text)
    return text.getvalue()


def _job_set(job: Job, asked: Gke, claim: str, folder: str) -> dict[str, Any]:
    """JobSet gives every pod a name that the others resolve, and GKE tells each its place and its slice's hosts."""
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            # A slice for itself: without this two of them may share a node pool and wait for each other.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": asked.restarts,
                "rules": [
                    {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]},
                ],
            },
            "replicatedJobs": [
                {"name": "slice", "replicas": asked.slices, "template": {"spec": _hosts(job, asked, claim, folder)}}
            ],
        },
    }


def _hosts(job: Job, asked: Gke, claim: str, folder: str) -> dict[str, Any]:
    """The job of one slice. A pod that a signal stopped fails it under a name that the JobSet's rule knows."""
    return {
        "parallelism": asked.target.hosts,
        "completions": asked.target.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": list(STOPPED)}},
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"spec": _pod(job, asked, claim, folder)},
    }


def _pod(job: Job, asked: Gke, claim: str, folder: str) -> dict[str, Any]:
    chips = {_TPU: asked.target.chips_per_host}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": asked.grace_s,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": asked.target.accelerator,
            "cloud.google.com/gke-tpu-topology": asked.target.topology,
        },
        "containers": [
            {
                "name": "trainer",
                "image": asked.image,
                # By itself: a shell between would keep SIGTERM. Kubernetes puts variables in for $(NAME), and $ for $$.
                "command": ["safework", "train", *(word.replace("$", "$$") for word in job.words)],
                "env": [{"name": "JAX_PLATFORMS", "value": "tpu,cpu"}, {"name": "PYTHONUNBUFFERED", "value": "1"}],
                "ports": [{"containerPort": _RUNTIME_PORT}],
                "resources": {"requests": chips, "limits": dict(chips)},
                "volumeMounts": [{"name": "runs", "mountPath": folder}],
            }
        ],
        "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": claim}}],
    }
