"""The JobSet for TPU slices against the schemas of Kubernetes, and the command in it as two processes of a cluster."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from jsonschema import validate
from ruamel.yaml import YAML

from common.config import ConfigError
from common.launch.gke import Slice, read_target
from tests.e2e.test_teams import run_of
from tests.runs import DEADLINE, ENVIRONMENT, read_lines, safework
from tests.teams import free_port
from tests.training import ROOT

# What of a JobSet (v1alpha2) stands around its jobs, as its API reference has it; the jobs have a schema of their own.
_NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 40}
_ACTIONS = ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
_REASONS = ["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"]


def _table(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_RULE = _table("action", action={"enum": _ACTIONS}, onJobFailureReasons=_list({"enum": _REASONS}))
_POLICY = _table(maxRestarts={"type": "integer", "minimum": 0}, rules=_list(_RULE))
_JOBS = _table(
    "name", "template", name=_NAME, replicas={"type": "integer", "minimum": 1}, template=_table("spec", spec={})
)
JOB_SET = _table(
    "apiVersion",
    "kind",
    "metadata",
    "spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=_table("name", name=_NAME, annotations=_TEXTS),
    spec=_table("replicatedJobs", failurePolicy=_POLICY, replicatedJobs=_list(_JOBS)),
)
OPTIONS = ("--on", "gke", "--target", "v5p:4x4x8", "--image", "registry/image:1", "--volume")
SINGLE = ("--on", "gke", "--target", "v5e:1x1", "--image", "registry/image:1", "--volume")


def job_set(folder: Path, *words: str | Path) -> dict[str, Any]:
    """The JobSet that the command writes."""
    out = folder / "job.yaml"
    run = safework("launch", *words, "--out", out)
    assert run.returncode == 0 and f"kubectl apply -f {out}" in run.stdout, run
    return YAML(typ="safe", pure=True).load(out)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gke")
    words = ("run.steps=1", "evaluation.at_ends=false", "backend.jax.mesh={fsdp: 2}", "model.system=$$5 of $(HOME)")
    run_file = run_of(folder, "jax")
    return folder, job_set(folder, run_file, *words, *SINGLE, f"claim:{folder}", "--slices", "2")


def as_kubernetes_starts(word: str) -> str:
    """A word of a command without variables: `$$` is a dollar sign, which keeps `$(NAME)` from being one."""
    assert not re.search(r"(?<!\$)(\$\$)*\$\(", word), word
    return word.replace("$$", "$")


def test_it_is_what_kubernetes_takes(tmp_path: Path) -> None:
    pod_of_128 = "backend.jax.mesh={replica: 2, fsdp: 32, tensor: 4}"
    words = (run_of(tmp_path, "jax"), pod_of_128, "batch.rows_per_microbatch=64", f"run.dir={tmp_path}/2026-11-29")
    found = job_set(tmp_path, *words, *OPTIONS, f"claim:{tmp_path}", "--slices", "2")
    validate(found, JOB_SET)
    assert found["metadata"]["name"] == "run-2026-11-29"
    [jobs] = found["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, "spec": jobs["template"]["spec"]}
    kubernetes_validate.validate(job, "1.31", strict=True)
    assert jobs["replicas"] == 2
    spec = jobs["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == 32 and spec["backoffLimit"] == 0
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x8",
    }
    assert pod["terminationGracePeriodSeconds"] == 600 and pod["restartPolicy"] == "Never"
    [container] = pod["containers"]
    assert container["resources"] == {kind: {"google.com/tpu": 4} for kind in ("requests", "limits")}
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"] == {"operator": "In", "values": [130, 143]}


def test_its_command_trains_as_two_processes_that_jax_detects(written: tuple[Path, dict[str, Any]]) -> None:
    """In a cluster that JAX knows by SLURM's variables; those of a TPU pod need its hardware."""
    folder, found = written
    [jobs] = found["spec"]["replicatedJobs"]
    [container] = jobs["template"]["spec"]["template"]["spec"]["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]} | {
        **ENVIRONMENT,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "JAX_COORDINATOR_PORT": str(free_port()),
    }
    processes = [
        subprocess.Popen(
            [as_kubernetes_starts(word) for word in container["command"]],
            cwd=ROOT,
            env=os.environ | variables | {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        ended = [process.communicate(timeout=DEADLINE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], ended
    assert len(read_lines(folder / "run" / "metrics.jsonl")) == 1
    assert "system: $$5 of $(HOME) #" in (folder / "run" / "config.yaml").read_text()
    assert "done: " in ended[0][0] and "done: " not in ended[1][0]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("v5p:4x4x8", Slice("tpu-v5p-slice", "4x4x8", 32, 4)),
        ("v5p:2x2x1", Slice("tpu-v5p-slice", "2x2x1", 1, 4)),
        ("v5e:16x16", Slice("tpu-v5-lite-podslice", "16x16", 64, 4)),
        ("v5e:1x1", Slice("tpu-v5-lite-podslice", "1x1", 1, 1)),
    ],
)
def test_hosts_follow_from_the_topology(target: str, expected: Slice) -> None:
    assert read_target(target) == expected


@pytest.mark.parametrize("target", ["v5p", "v9:4x4", "v5p:4x4", "v5e:3x3", "v5e:1x3", "h100:8", "v5e:0x4"])
def test_what_is_no_slice_is_refused(target: str) -> None:
    with pytest.raises(ConfigError, match=f"--target {target}: "):
        read_target(target)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((*SINGLE, "claim:/elsewhere"), "is not below /elsewhere (--volume), and would go with the pod."),
        (
            (*SINGLE, "claim:/runs", "run.dir=/runs/../lost"),
            "is not below /runs (--volume), and would go with the pod.",
        ),
        ((*OPTIONS, "claim:/"), "is not as large as the 128 chips asked for. Make it so."),
        ((*SINGLE, "claim"), "--volume claim: is no claim and folder."),
        ((*OPTIONS, "claim:/", "backend.name=torch"), "does not run on TPUs. Set it to jax."),
        ((*OPTIONS, "claim:/", "--nodes", "3"), "--nodes 3: is for --on slurm. Leave it out."),
        (("--on", "gke"), "--target is not given, and --on gke needs it"),
        (("--on", "slurm", "--nodes", "1", "--gpus-per-node", "0"), "then --processes-per-node must say"),
        (
            ("--on", "slurm", "--nodes", "3", "--gpus-per-node", "1", "backend.name=torch"),
            "does not divide over the 3 processes. Choose a multiple of that.",
        ),
        (
            ("--on", "slurm", "--nodes", "2", "--gpus-per-node", "8", "--processes-per-node", "6"),
            "is not as large as the 12 GPUs asked for. Make it so.",
        ),
        (
            ("--on", "slurm", "--nodes", "2", "--gpus-per-node", "8", "--processes-per-node", "1"),
            "is not as large as the 16 GPUs asked for. Make it so.",
        ),
        (
            (
                "--on",
                "slurm",
                "--nodes",
                "1",
                "--gpus-per-node",
                "2",
                "--processes-per-node",
                "1",
                "backend.jax.mesh.fsdp=4",
            ),
            "is not as large as the 2 GPUs asked for. Make it so.",
        ),
        (
            ("--on", "slurm", "--nodes", "1", "--gpus-per-node", "1", "--account", "a\n#SBATCH --nodes=9"),
            "--account 'a\\n#SBATCH --nodes=9': holds a space, where an #SBATCH line ends. Give one word.",
        ),
    ],
)
def test_what_cannot_be_launched(
    words: tuple[str, ...], sentence: str, written: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    from common.cli import main

    assert main(["launch", str(written[0] / "run.yaml"), *words]) == 1
    assert sentence in capsys.readouterr().err
