"""Files that must be on the disk, whole or not at all, and what to say where the disk refuses one."""

from __future__ import annotations

import errno
import os
from pathlib import Path


class NotSaved(RuntimeError):
    """A file of the run folder is not what it should be, mostly because the disk refused a write; the message says
    which one, what is safe, and what to do.
    """


def not_written(path: Path | str, error: OSError, then: str, safe: str = "") -> NotSaved:
    """What to raise when the disk refused a write; `then`: what to do once that is mended, `safe`: what is not lost."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "Make room on the disk" if is_full else "Mend that"
    kept = f"; {safe}" if safe else ""
    return NotSaved(f"{path}: could not be written ({error.strerror or error}){kept}. {remedy} and {then}.")


def not_locked(path: Path, error: OSError) -> NotSaved:
    """What to raise where a file system has no locks."""
    return NotSaved(
        f"{path}: cannot be kept to one process ({error.strerror or error}). Choose a path on another disk."
    )


def write_whole(path: Path, text: str) -> None:
    """Write a small file that is there with all of its text, on the disk, or not at all. Raises OSError."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.rename(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def flush_to_disk(folder: Path) -> None:
    """Return when everything in the folder is on the disk."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Return when a file, or what a folder lists, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
