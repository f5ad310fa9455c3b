"""What stands in for SLURM's own commands in tests: `srun` starts the tasks it is told to, with SLURM's variables, and
passes SIGTERM on; `scontrol` knows one host, and notes what is queued again. All that they start is real.
"""

from __future__ import annotations

import sys
from pathlib import Path

SRUN = """\
import os, signal, subprocess, sys
words, options = sys.argv[1:], {}
while words[0].startswith("--"):
    name, _, value = words.pop(0)[2:].partition("=")
    options[name] = value
count, each = int(options["ntasks"]), int(options["ntasks-per-node"])
tasks = []
for rank in range(count):
    place = {"SLURM_PROCID": rank, "SLURM_NTASKS": count, "SLURM_LOCALID": rank % each}
    place |= {"SLURM_STEP_NUM_TASKS": count, "SLURM_STEP_NODELIST": "127.0.0.1"}
    environment = os.environ | {name: str(value) for name, value in place.items()}
    log = open(options["output"].replace("%t", str(rank)), "wb") if "output" in options else None
    tasks.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log and subprocess.STDOUT))
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""

SCONTROL = """\
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1")
else:
    print(*sys.argv[1:], file=open(os.environ["TEST_SCONTROL"], "a"))
"""


def write_commands(folder: Path) -> Path:
    """The folder with both commands, for PATH."""
    folder.mkdir()
    for name, source in (("srun", SRUN), ("scontrol", SCONTROL)):
        file = folder / name
        file.write_text(f"#!{sys.executable}\n{source}")
        file.chmod(0o755)
    return folder
