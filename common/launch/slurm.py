"""A SLURM job file: the servers of the judges on each node, one trainer process a GPU, queued again when stopped."""

from __future__ import annotations

import os
import shlex
from typing import NamedTuple

from common.launch.job import STOPPED, Job, shell


class Slurm(NamedTuple):
    """What the scheduler is asked for. processes: of the trainer on each node. cpus: of each of them; 0: what the
    cluster gives. grace_s: seconds before its end in which the job may finish its step and save. Empty texts are left
    to the cluster's defaults.
    """

    nodes: int
    gpus_per_node: int
    processes: int
    cpus: int
    grace_s: int
    time: str
    partition: str
    account: str


# Each task is told its place in the words of torchrun, which both engines read.
_PLACE = "export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE={processes}"


def job_file(job: Job, asked: Slurm) -> str:
    """The text of the file for sbatch. Raises ConfigError for rows, or for a mesh, that its processes cannot share."""
    rows, processes = job.loaded.config.batch.rows_per_microbatch, asked.nodes * asked.processes
    if job.loaded.config.backend.name == "jax" and asked.gpus_per_node:
        # One of several processes of a node has a GPU of its own, a single one all of them. Alone it may leave some.
        gpus = processes if asked.processes > 1 else asked.nodes * asked.gpus_per_node
        job.refuse_other_mesh(gpus, "GPUs", may_leave_some=processes == 1)
    if job.loaded.config.backend.name == "torch" and rows % processes:
        problem = f"does not divide over the {processes} processes. Choose a multiple of that."
        raise job.refuse("batch.rows_per_microbatch", rows, problem)
    return "\n".join([*_header(job, asked), *_servers(job, asked), *_trainer(job, asked), *_end()]) + "\n"


def _header(job: Job, asked: Slurm) -> list[str]:
    options = {
        "job-name": job.name,
        "nodes": str(asked.nodes),
        "ntasks-per-node": str(asked.processes),
        "gpus-per-node": str(asked.gpus_per_node) if asked.gpus_per_node else "",
        "cpus-per-task": str(asked.cpus) if asked.cpus else "",
        "time": asked.time,
        "partition": asked.partition,
        "account": asked.account,
        # To this script alone: the servers must outlive the step that is being finished.
        "signal": f"B:TERM@{asked.grace_s}",
        "output": "%x-%j.log",
    }
    return [
        "#!/bin/bash",
        *(f"#SBATCH --{name}={value}" for name, value in options.items() if value),
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "",
        f"cd {shlex.quote(os.getcwd())} || exit 1",
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))",
        "export MASTER_ADDR MASTER_PORT",
        "servers= trainer=",
        "stop() {  # STEP SRUN; srun answers SIGTERM by killing its tasks, the scheduler passes it on to them",
        '    step=$(squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format="%i %j" |',
        "        awk -v name=\"$1\" '$2 == name')",
        '    if [ -n "$step" ]; then scancel --signal=TERM "${step%% *}"; else kill -TERM "$2"; fi',
        "}",
        'trap \'if [ -n "$trainer" ]; then stop trainer "$trainer"; else exit 143; fi\' TERM',
        "",
    ]


def _servers(job: Job, asked: Slurm) -> list[str]:
    """Start the servers on every node that has one, and wait until all are ready."""
    if not job.launched:
        return []
    return [
        'logs="servers/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"',
        'mkdir -p "$logs"',
        f"srun --job-name=servers --nodes={asked.nodes} --ntasks-per-node=1 --ntasks={asked.nodes} \\",
        f'    --overlap --cpu-bind=none --output="$logs/serve-%t.log" {shell("serve", *job.words)} --logs "$logs" &',
        "servers=$!",
        f'until [ "$(grep -ls "^ready: " "$logs"/serve-*.log | wc -l)" -eq {asked.nodes} ]; do',
        '    if ! kill -0 "$servers" 2>/dev/null; then',
        '        echo "error: the judges\' servers have ended, see $logs" >&2',
        '        tail -n 30 "$logs"/serve-*.log >&2',
        "        exit 1",
        "    fi",
        "    sleep 2",
        "done",
        "",
    ]


def _trainer(job: Job, asked: Slurm) -> list[str]:
    task = f"{_PLACE.format(processes=asked.processes)}; exec {shell('train', *job.words)}"
    return [
        f"srun --job-name=trainer --nodes={asked.nodes} --ntasks-per-node={asked.processes} \\",
        f"    --ntasks={asked.nodes * asked.processes} --overlap --cpu-bind=none --kill-on-bad-exit=0 \\",
        f"    bash -c {shlex.quote(task)} &",
        "trainer=$!",
        'wait "$trainer"',
        "status=$?",
        'while kill -0 "$trainer" 2>/dev/null; do  # a signal ends the waiting, not the trainer',
        '    wait "$trainer"',
        "    status=$?",
        "done",
        "",
    ]


def _end() -> list[str]:
    stopped = "|".join(map(str, STOPPED))
    return [
        'if [ -n "$servers" ]; then',
        '    stop servers "$servers"',
        '    wait "$servers"',
        "fi",
        'case "$status" in',
        f'    {stopped}) scontrol requeue "$SLURM_JOB_ID" ;;  # stopped by a signal: goes on from its checkpoint',
        "esac",
        'exit "$status"',
    ]
