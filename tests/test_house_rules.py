"""The house rules: small files with one job each, no hiding places for options, a README that shows what is there."""

from __future__ import annotations

import ast
import fnmatch
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from common.config import load_config
from common.config.load import ENGINES
from common.config.merge import Layers
from safework_jax.config import JaxSection
from safework_torch.config import TorchSection
from tests.config_reads import all_fields, read_fields, sections

ROOT = Path(__file__).parents[1]
METHOD = sorted(path for name in ("common", "safework_torch", "safework_jax") for path in (ROOT / name).rglob("*.py"))
EVERYTHING = METHOD + sorted(path for name in ("tests", "benchmarks") for path in (ROOT / name).rglob("*.py"))

MAX_FILE, MAX_FUNCTION, MAX_CLASS, MAX_IMPORTS = 400, 60, 250, 15

Functions = ast.FunctionDef | ast.AsyncFunctionDef
Check = Callable[[ast.Module], Iterator[ast.AST]]


# Rules on the source: each gives the places that break it -------------------------------------------------------------


def long_functions(tree: ast.Module) -> Iterator[ast.AST]:
    return (node for node in ast.walk(tree) if isinstance(node, Functions) and length(node) > MAX_FUNCTION)


def long_classes(tree: ast.Module) -> Iterator[ast.AST]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and length(node) > MAX_CLASS)


def length(node: Functions | ast.ClassDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def many_imports(tree: ast.Module) -> Iterator[ast.AST]:
    """Imports past the limit: of libraries and of our own modules. The standard library ties a module to nothing."""
    counted: dict[str, ast.AST] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            counted.setdefault(node.module, node)
        elif isinstance(node, ast.Import):
            for alias in node.names:  # `import jax` and `import jax.numpy` are one library
                counted.setdefault(alias.name.partition(".")[0], node)
    foreign = [node for name, node in counted.items() if name.partition(".")[0] not in sys.stdlib_module_names]
    return iter(foreign[MAX_IMPORTS:])


def getattr_with_default(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and is_name(node.func, "getattr") and len(node.args) > 2:
            yield node


def kwargs_passed_on(tree: ast.Module) -> Iterator[ast.AST]:
    for function in ast.walk(tree):
        if not isinstance(function, Functions) or function.args.kwarg is None:
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.keyword) and node.arg is None and is_name(node.value, function.args.kwarg.arg):
                yield node.value


def is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def broad_excepts(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            names = {part.id for part in ast.walk(node.type) if isinstance(part, ast.Name)} if node.type else set()
            if node.type is None or names & {"Exception", "BaseException"}:
                yield node


def echoes(tree: ast.Module) -> Iterator[ast.AST]:
    """Functions whose body is one call with their own arguments. A decorator makes it another function."""
    for function in ast.walk(tree):
        if not isinstance(function, Functions) or function.decorator_list:
            continue
        body = function.body[1:] if ast.get_docstring(function) is not None else function.body
        call = body[0].value if len(body) == 1 and isinstance(body[0], ast.Return | ast.Expr) else None
        own = [argument.arg for argument in function.args.args if argument.arg not in ("self", "cls")]
        if isinstance(call, ast.Call) and own and given_names(call) == own and not set(names_in(call.func)) & set(own):
            yield function


def given_names(call: ast.Call) -> list[str | None]:
    """Names of the plain variables that a call is given; None for anything else."""
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    return [value.id if isinstance(value, ast.Name) else None for value in given]


def names_in(node: ast.AST) -> list[str]:
    return [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]


def no_docstring(tree: ast.Module) -> Iterator[ast.AST]:
    return iter([] if ast.get_docstring(tree) else [tree])


# Rule -> (where it holds, what breaks it, a smallest example that does).
CHECKS: dict[str, tuple[list[Path], Check, str]] = {
    "a module says in its docstring what it is": (EVERYTHING, no_docstring, "x = 1"),
    "a function has at most 60 lines": (EVERYTHING, long_functions, '"""M."""\ndef f():\n' + " x = 1\n" * 60),
    "a class has at most 250 lines": (EVERYTHING, long_classes, '"""M."""\nclass C:\n' + " x = 1\n" * 250),
    "a module has at most 15 imports": (METHOD, many_imports, "\n".join(f"import lib{n}" for n in range(16))),
    "no getattr with a default": (METHOD, getattr_with_default, "getattr(config, 'x', 3)"),
    "no **kwargs passed on": (METHOD, kwargs_passed_on, "def f(**options):\n return g(1, **options)"),
    "no broad except": (EVERYTHING, broad_excepts, "try:\n f()\nexcept (OSError, Exception):\n pass"),
    "no function that is one call with its own arguments": (METHOD, echoes, "def f(a, b):\n return g(a, key=b)"),
}


@pytest.mark.parametrize("rule", CHECKS)
def test_source(rule: str) -> None:
    files, check, example = CHECKS[rule]
    assert list(check(ast.parse(example))), "the rule does not see its own example"
    broken = [
        f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
        for file in files
        for node in check(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert broken == []


def test_a_file_has_at_most_400_lines() -> None:
    lengths = {file.relative_to(ROOT): len(file.read_text(encoding="utf-8").splitlines()) for file in EVERYTHING}
    assert {str(file): lines for file, lines in lengths.items() if lines > MAX_FILE} == {}


def test_names_say_what_is_inside() -> None:
    empty = {"utils", "util", "helpers", "helper", "misc", "manager", "base", "v2", "common_utils"}
    assert [str(file.relative_to(ROOT)) for file in METHOD if file.stem in empty or file.parent.name in empty] == []


def test_backends_mirror_each_other() -> None:
    torch, jax = ({file.name for file in (ROOT / name).glob("*.py")} for name in ("safework_torch", "safework_jax"))
    assert torch <= jax


# Configs --------------------------------------------------------------------------------------------------------------


def says_where_to_run(file: Path) -> bool:
    """Whether it is a run file, and not a part of one."""
    layers = Layers()
    layers.add_file(file)
    return "run.dir" in layers.origins


CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
WHOLE = [file for file in CONFIGS if says_where_to_run(file)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: str(file.relative_to(ROOT / "configs")))
def test_every_config_loads_for_both_engines(file: Path, engine: str) -> None:
    """A run file on its own; a part of one on top of the quickstart."""
    files = [file] if file in WHOLE else [ROOT / "configs" / "quickstart.yaml", file]
    loaded = load_config(files, [f"backend.name={engine}"])
    assert loaded.config.backend.name == engine
    assert isinstance(loaded.engine, {"torch": TorchSection, "jax": JaxSection}[engine])
    assert any(origin.startswith(f"{file}:") for origin in loaded.origins.values())


def test_there_are_run_files() -> None:
    assert ROOT / "configs" / "quickstart.yaml" in WHOLE


def test_every_config_field_is_read() -> None:
    models = {model.__name__: model for model in (*sections(), TorchSection, JaxSection)}
    # The engines' tables are parsed into their own sections, whose fields are checked here too.
    fields = all_fields(models) - {("BackendSection", engine) for engine in ENGINES}
    assert len(fields) > 60
    users = [file for file in METHOD if ROOT / "common" / "config" not in file.parents]
    assert sorted(fields - read_fields(users, models)) == []


def test_reads_are_told_from_what_looks_like_them(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "def f(config: RunConfig, section: DataSection, other: Thing):\n"
        "    loss, rate = config.loss, other.learning_rate\n"
        "    config.batch.packed = 3\n"
        "    return loss.type, [source.weight for source in section.train], other.path, config.model.pathh\n"
        "class C:\n"
        "    def __init__(self, config: RunConfig):\n"
        "        self._config = config\n"
        "    def g(self):\n"
        "        return self._config.rollout.top_k, self._rollout.top_p\n"
        "    def h(self, loaded):\n"
        "        return [v.rule for v in loaded.config.rewards.verifiers.values()]\n"
    )
    models = {model.__name__: model for model in sections()}
    found = read_fields([file], models) & all_fields(models)
    assert found == {
        ("LossConfig", "type"),
        ("DataSource", "weight"),
        ("RolloutSection", "top_k"),
        ("VerifierSection", "rule"),
    }


# The tree in the README -----------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A line of the tree: a path and what stands behind it."""

    path: str
    about: str


def tree_block(readme: str) -> list[str]:
    """Lines of the block, fenced or indented, that begins with README.md and holds the backends."""
    blocks = [textwrap.dedent(block).strip("`\n") for block in re.split(r"\n\s*\n|```\w*\n", readme)]
    return next(b for b in blocks if b.startswith("README.md") and "safework_torch/" in b).splitlines()


def tree(readme: str) -> list[Entry]:
    """Entries of the README's tree. A line that is further in than a child would be continues a description."""
    entries: list[Entry] = []
    folders: list[str] = []
    for line in tree_block(readme):
        depth, odd = divmod(len(line) - len(line.lstrip()), 2)
        if odd or depth > len(folders):
            continue
        name, _, about = line.strip().partition(" ")
        del folders[depth:]
        entries.append(Entry("".join([*folders, name]), about.strip()))
        if name.endswith("/"):
            folders.append(name)
    return entries


def on_disk(folder: Path) -> set[str]:
    """What a folder holds for a reader, folders with a slash: nothing hidden, made or ignored."""
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split() if not line.startswith("#")]
    ignored += [".*", "__init__.py", "LICENSE", "CHANGELOG.md"]
    paths = [path for path in folder.iterdir() if not any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored)]
    return {f"{path.name}/" if path.is_dir() else path.name for path in paths}


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tree_in_the_readme_is_the_disk() -> None:
    shown: dict[str, set[str]] = {}
    for entry in tree(README):
        folder, _, name = entry.path.rstrip("/").rpartition("/")
        shown.setdefault(folder, set()).add(name + ("/" if entry.path.endswith("/") else ""))
    assert {"", "common"} <= shown.keys()
    assert shown == {folder: on_disk(ROOT / folder) for folder in shown}


def test_folders_named_behind_a_folder_are_there() -> None:
    named = {entry.path: set(re.findall(r"[\w.]+/", entry.about)) for entry in tree(README)}
    shown = {path: folders for path, folders in named.items() if folders and path.endswith("/")}
    assert {"configs/", "tests/"} <= shown.keys()
    assert shown == {path: {name for name in on_disk(ROOT / path) if name.endswith("/")} for path in shown}


def test_files_named_behind_the_torch_backend_are_there() -> None:
    about = next(entry.about for entry in tree(README) if entry.path == "safework_torch/")
    assert {word if word.endswith("/") else f"{word}.py" for word in about.split()} == on_disk(ROOT / "safework_torch")


def test_the_tree_is_read_as_a_person_reads_it() -> None:
    readme = """Words.

```
README.md      this
common/        the method,
                 on two lines
  loop.py      loop
  data/        deeper
    chat.py    x
safework_torch/   main
```
"""
    paths = ["README.md", "common/", "common/loop.py", "common/data/", "common/data/chat.py", "safework_torch/"]
    assert [entry.path for entry in tree(readme)] == paths
