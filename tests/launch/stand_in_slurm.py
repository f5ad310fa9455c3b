"""What stands in for SLURM's own commands in tests: `srun` starts the tasks it is told to, with SLURM's variables, and
kills them when it gets SIGTERM, as the real one does; `squeue` knows such steps by name, and `scancel` signals all
processes of one; `scontrol` knows one host, and notes what is queued again. All that they start is real.
"""

from __future__ import annotations

import sys
from pathlib import Path

SRUN = """\
import json, os, signal, subprocess, sys
words, options, steps = sys.argv[1:], {}, os.environ["TEST_STEPS"]
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
    pipes = {"stdout": log, "stderr": log and subprocess.STDOUT}
    tasks.append(subprocess.Popen(words, env=environment, start_new_session=True, **pipes))
os.makedirs(steps, exist_ok=True)
file = os.path.join(steps, f"{os.environ['SLURM_JOB_ID']}.{len(os.listdir(steps))} {options['job-name']}")
with open(file, "w") as step:
    json.dump([task.pid for task in tasks], step)
signal.signal(signal.SIGTERM, lambda *_: [task.kill() for task in tasks])
codes = [task.wait() for task in tasks]
os.rename(file, file + " ended")
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""

SQUEUE = """\
import os, sys
asked = ["--noheader", "--steps", f"--jobs={os.environ['SLURM_JOB_ID']}", "--format=%i %j"]
assert sys.argv[1:] == asked, sys.argv
print(*(name for name in os.listdir(os.environ["TEST_STEPS"]) if not name.endswith(" ended")), sep="\\n")
"""

SCANCEL = """\
import json, os, signal, sys
assert sys.argv[1] == "--signal=TERM", sys.argv
[name] = [name for name in os.listdir(os.environ["TEST_STEPS"]) if name.split()[0] == sys.argv[2]]
for task in json.load(open(os.path.join(os.environ["TEST_STEPS"], name))):
    os.killpg(task, signal.SIGTERM)
"""

SCONTROL = """\
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1")
else:
    print(*sys.argv[1:], file=open(os.environ["TEST_SCONTROL"], "a"))
"""


def write_commands(folder: Path) -> Path:
    """The folder with all commands, for PATH."""
    folder.mkdir()
    for name, source in (("srun", SRUN), ("squeue", SQUEUE), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        file = folder / name
        file.write_text(f"#!{sys.executable}\n{source}")
        file.chmod(0o755)
    return folder
