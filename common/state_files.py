"""The training state of either engine on disk: safetensors under Hugging Face names, fp32, bit for bit, and a manifest.

    model.safetensors           parameters
    first_moment.safetensors    AdamW's running mean of gradients
    second_moment.safetensors   AdamW's running mean of squared gradients
    ema.safetensors             the average of the parameters, where the run keeps one
    manifest.json               what each file holds and how long it is, the shape of each tensor, and the counters

Of several processes each writes its own slices and nobody has the whole: `model-00001-of-00002.safetensors` and so on,
in which `model.norm.weight[0:8]` is the first eight elements of that tensor. The manifest is written last, once every
element is there exactly once. Whoever reads takes the slices that it needs, in any other number of processes, on
either engine.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
from pydantic import BaseModel, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from common.disk import NotSaved, sync, write_whole
from common.types import Box, Kind, Piece, TrainingState

MANIFEST = "manifest.json"
Count = Annotated[int, Field(strict=True, ge=0)]
Shape = tuple[Count, ...]


class Part(BaseModel):
    """What one process wrote: the length of each of its files, by kind, and its boxes of each tensor."""

    bytes: dict[str, Count]
    slices: dict[str, list[Box]]


class Note(Part):
    """What a process leaves beside its files until the manifest is written."""

    shapes: dict[str, Shape]
    optimizer_steps: Count
    save: str


class Manifest(BaseModel):
    """loop: what the training loop remembers. save: which save all files are of. shapes: of every tensor. parts: of all
    processes, in order.
    """

    loop: dict[str, Any]
    optimizer_steps: Count
    save: str
    shapes: dict[str, Shape]
    parts: Annotated[list[Part], Field(min_length=1)]

    @model_validator(mode="after")
    def _is_complete(self) -> Manifest:
        """Every element of every tensor is in one part, and every part has the same kinds."""
        kinds = self.parts[0].bytes.keys()
        if "model" not in kinds or any(part.bytes.keys() != kinds for part in self.parts):
            raise ValueError("its parts do not have the same kinds of tensors, of which model is one")
        if not all(part.slices.keys() <= self.shapes.keys() for part in self.parts):
            raise ValueError("its parts have tensors whose shapes it lacks")
        for name, shape in self.shapes.items():
            if not _covers_once(shape, [box for part in self.parts for box in part.slices.get(name, [])]):
                raise ValueError(f"the slices of {name!r} are not each of its elements once")
        return self


def whole(array: np.ndarray) -> list[Piece]:
    """A tensor in one piece."""
    return [Piece(array, (0,) * array.ndim, array.shape)]


def write_state(state: TrainingState, folder: Path) -> None:
    """Write a state that one process has whole into a folder that exists. Raises OSError when the disk does."""
    write_part(state, folder, 0, 1)
    seal(folder, 1, {})


def write_part(state: TrainingState, folder: Path, index: int, count: int, save: str = "") -> None:
    """Write the pieces of process `index` of `count`, each kind in a file, and when they are on the disk a note of
    them. save: which save this is, the same in all of its files. Raises OSError when the disk does.
    """
    files: dict[str, int] = {}
    for kind, tensors in state.tensors.items():
        file = folder / _file_name(kind, index, count)
        pieces = [(name, piece) for name, parts in tensors.items() for piece in parts]
        save_tensors({_key(name, piece.box, piece.shape): piece.array for name, piece in pieces}, file, {"save": save})
        sync(file)
        files[kind] = file.stat().st_size
    boxes: dict[str, list[Box]] = {}
    for tensors in state.tensors.values():  # cut the same way in every kind
        boxes |= {name: [piece.box for piece in parts] for name, parts in tensors.items() if parts}
    shapes = {name: parts[0].shape for tensors in state.tensors.values() for name, parts in tensors.items() if parts}
    note = Note(bytes=files, slices=boxes, shapes=shapes, optimizer_steps=state.optimizer_steps, save=save)
    write_whole(note_file(folder, index, count), note.model_dump_json())


def note_file(folder: Path, index: int, count: int) -> Path:
    """Where a process leaves its note when its part is complete."""
    return folder / f"part{_suffix(index, count)}.json"


def seal(folder: Path, count: int, loop: Mapping[str, Any]) -> None:
    """Check that the parts of all processes make up a state, and write its manifest in place of their notes.

    loop: what the training loop remembers beside it, JSON-ready. Raises OSError when the disk does.
    """
    notes = [Note.model_validate_json(note_file(folder, index, count).read_bytes()) for index in range(count)]
    shapes: dict[str, tuple[int, ...]] = {}
    for note in notes:
        assert note.optimizer_steps == notes[0].optimizer_steps, "processes are not at the same step"
        assert note.save == notes[0].save, "parts are of two saves"
        for name, shape in note.shapes.items():
            assert shapes.setdefault(name, shape) == shape, f"processes disagree on the shape of {name}"
    parts = [Part(bytes=note.bytes, slices=note.slices) for note in notes]
    first = notes[0]
    manifest = Manifest(
        loop=dict(loop), optimizer_steps=first.optimizer_steps, save=first.save, shapes=shapes, parts=parts
    )
    write_whole(folder / MANIFEST, manifest.model_dump_json())
    for index in range(count):
        note_file(folder, index, count).unlink()


def _covers_once(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Whether boxes cover each element of a tensor once and nothing outside it: counted on the grid of their edges."""
    if any(len(box) != len(shape) or any(start > stop for start, stop in box) for box in boxes):
        return False
    edges = [sorted({0, size, *(bound for box in boxes for bound in box[axis])}) for axis, size in enumerate(shape)]
    if any(edge[0] != 0 or edge[-1] != size for edge, size in zip(edges, shape, strict=True)):
        return False
    counts = np.zeros([len(edge) - 1 for edge in edges], np.int64)
    for box in boxes:
        places = (slice(*(bisect_left(edge, b) for b in bounds)) for edge, bounds in zip(edges, box, strict=True))
        counts[tuple(places)] += 1
    return bool((counts == 1).all())


def _suffix(index: int, count: int) -> str:
    return "" if count == 1 else f"-{index + 1:05d}-of-{count:05d}"


def _file_name(kind: Kind, index: int, count: int) -> str:
    return f"{kind}{_suffix(index, count)}.safetensors"


def _key(name: str, box: Box, shape: Sequence[int]) -> str:
    """The name of a piece within a file: that of its tensor, and the slice where it is not all of it."""
    if all(bounds == (0, size) for bounds, size in zip(box, shape, strict=True)):
        return name
    return f"{name}[{', '.join(f'{start}:{stop}' for start, stop in box)}]"


def save_tensors(tensors: Mapping[str, np.ndarray], file: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file, readable as any new file is. Raises OSError when the disk refuses."""
    try:
        save_file({name: np.asarray(array, order="C") for name, array in tensors.items()}, file, metadata)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(file)) from error
    # The library makes its file for the owner alone.
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)


def drop_moments(folder: Path) -> None:
    """Remove the moments from what `write_state` wrote; the parameters can still be read."""
    for kind in ("first_moment", "second_moment"):
        (folder / _file_name(kind, 0, 1)).unlink()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete state. Raises NotSaved where there is none that can be read."""
    file = folder / MANIFEST
    try:
        return Manifest.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        problem = "is not there, so this is no checkpoint, or one of an older version"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    except ValidationError as error:
        problem = f"is damaged ({first_problem(error)})"
    raise NotSaved(f"{file}: {problem}. {_remedy(folder)}")


def first_problem(error: ValidationError) -> str:
    """The first entry that does not fit its schema, and why."""
    first = error.errors()[0]
    entry, why = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    return f"{entry!r}: {why}" if entry else why


def saved_kinds(folder: Path) -> list[Kind]:
    """What a complete state has. Raises NotSaved where its manifest cannot be read."""
    return _kinds(read_manifest(folder))


def _kinds(manifest: Manifest) -> list[Kind]:
    return [kind for kind in get_args(Kind) if kind in manifest.parts[0].bytes]


def _remedy(folder: Path) -> str:
    return (
        f"Put it back, or remove {folder}: the run then goes on from the checkpoint before it, or begins anew where "
        "there is none."
    )


class SavedState:
    """A state on disk, of which tensors and parts of tensors can be read; see `open_state`.

    shapes: of all tensors, by name, the same for every kind. kinds: those that it has.
    """

    def __init__(self, folder: Path, files: ExitStack) -> None:
        manifest = read_manifest(folder)
        self.optimizer_steps, self.shapes = manifest.optimizer_steps, manifest.shapes
        self.kinds = _kinds(manifest)
        self._folder, self._files, self._parts, self._save = folder, files, manifest.parts, manifest.save
        self._opened: dict[str, Any] = {}
        self._slices: defaultdict[str, list[tuple[int, Box]]] = defaultdict(list)
        for index, part in enumerate(self._parts):
            for name, boxes in part.slices.items():
                self._slices[name] += [(index, box) for box in boxes]

    def refuse_other_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise NotSaved where a model's tensors are not those of this state."""
        for name in sorted({*shapes, *self.shapes}):
            there, here = self.shapes.get(name), shapes.get(name)
            if there == here:
                continue
            raise NotSaved(
                f"{self._folder}: is of another model than model.path: {name} is {there} there and {here} here. "
                "Put the model back, or start anew in another run.dir."
            )

    def read(self, kind: Kind, name: str, part: tuple[slice, ...] = ()) -> np.ndarray:
        """A tensor, or the part of it between the bounds of the slices given for its first dimensions: a new array.

        Raises NotSaved for a file that is missing, damaged or not as long as it was written.
        """
        shape = self.shapes[name]
        padded = (*part, *[slice(None)] * (len(shape) - len(part)))
        wanted: Box = tuple(cut.indices(size)[:2] for cut, size in zip(padded, shape, strict=True))
        parts = []
        for index, box in self._slices[name]:
            shared = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(wanted, box, strict=True))
            if all(start < stop for start, stop in shared):
                file, key = self._open(kind, index), _key(name, box, shape)
                try:
                    array = file.get_tensor(key) if shared == box else file.get_slice(key)[_within(box, shared)]
                except SafetensorError as error:
                    raise self._unreadable(self._folder, f"its files are not those of its manifest ({error})") from None
                if shared == wanted:
                    return array
                parts.append((_within(wanted, shared), array))
        found = np.empty([stop - start for start, stop in wanted], parts[0][1].dtype if parts else np.float32)
        for place, array in parts:
            found[place] = array
        return found

    def _open(self, kind: Kind, index: int) -> Any:
        name = _file_name(kind, index, len(self._parts))
        if name not in self._opened:
            path, size = self._folder / name, self._parts[index].bytes[kind]
            try:
                if path.stat().st_size != size:
                    raise self._unreadable(path, f"has {path.stat().st_size} bytes where {size} were written")
                opened = self._files.enter_context(safe_open(path, "np"))
                if (opened.metadata() or {}).get("save", "") != self._save:
                    raise self._unreadable(path, "is of another save than its manifest")
                self._opened[name] = opened
            except FileNotFoundError:
                raise self._unreadable(path, "is not there") from None
            except SafetensorError as error:
                raise self._unreadable(path, f"is damaged ({error})") from None
        return self._opened[name]

    def _unreadable(self, path: Path, problem: str) -> NotSaved:
        return NotSaved(f"{path}: {problem}. {_remedy(self._folder)}")


def _within(outer: Box, inner: Box) -> tuple[slice, ...]:
    """Where a box lies in another one around it."""
    return tuple(slice(a - start, b - start) for (start, _), (a, b) in zip(outer, inner, strict=True))


@contextmanager
def open_state(folder: Path) -> Iterator[SavedState]:
    """What `seal` has completed in a folder, open for reading. Raises NotSaved where that cannot be read."""
    with ExitStack() as files:
        yield SavedState(folder, files)
