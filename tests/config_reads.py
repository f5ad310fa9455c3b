"""Which fields of the config the code reads: a small type inference over the source, from annotations and attributes.

A name is known by the annotation of its parameter or by what it was assigned; an attribute by the field of the section
that it is taken from. That is how this code is written; what the inference cannot follow does not count as a read.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from common.config.run import RunConfig

Field = tuple[str, str]  # section class, field name


def sections(model: type[BaseModel] = RunConfig) -> Iterator[type[BaseModel]]:
    """A section and all sections in it."""
    yield model
    for field in model.model_fields.values():
        inner = section_in(field.annotation)
        if inner is not None:
            yield from sections(inner)


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, alone or as the entries of a list or table."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_in(part))), None)


def all_fields(models: dict[str, type[BaseModel]]) -> set[Field]:
    """Every field that holds a value of its own: not the tables that only lead to others."""
    return {
        (model.__name__, name)
        for model in models.values()
        for name, field in model.model_fields.items()
        if section_in(field.annotation) is None
    }


class Reads(ast.NodeVisitor):
    """Collects the fields that one module reads."""

    def __init__(self, models: dict[str, type[BaseModel]]) -> None:
        self.found: set[Field] = set()
        self._models = models
        self._names: list[dict[str, type[BaseModel]]] = [{}]  # innermost scope last
        self._of_self: dict[str, type[BaseModel]] = {}

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        fields = [(entry.target, entry.annotation) for entry in node.body if isinstance(entry, ast.AnnAssign)]
        own = {target.id: self._annotated(annotation) for target, annotation in fields if isinstance(target, ast.Name)}
        outer, self._of_self = self._of_self, {name: model for name, model in own.items() if model is not None}
        self.generic_visit(node)
        self._of_self = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        names = {}
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
            model = self._annotated(argument.annotation)
            if model is not None:
                names[argument.arg] = model
        self._names.append(names)
        self.generic_visit(node)
        self._names.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            for name, value in _pairs(target, node.value):
                self._bind(name, self._type(value))

    def visit_For(self, node: ast.For) -> None:
        self._bind_loop(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._bind_loop(node.target, node.iter)
        self.generic_visit(node)

    def visit_ListComp(self, node: ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp) -> None:
        for generator in node.generators:  # first, so that the element sees what they bind
            self.visit(generator)
        self.generic_visit(node)

    visit_GeneratorExp = visit_SetComp = visit_DictComp = visit_ListComp

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self._type(node.value)
        if owner is not None and node.attr in owner.model_fields and isinstance(node.ctx, ast.Load):
            self.found.add((owner.__name__, node.attr))
        self.generic_visit(node)

    def _bind_loop(self, target: ast.expr, source: ast.expr) -> None:
        if isinstance(source, ast.Call) and isinstance(source.func, ast.Attribute):
            owner = self._type(source.func.value)  # table.items(), table.values()
            target = target.elts[-1] if isinstance(target, ast.Tuple) else target
            self._bind(target, owner)
        else:
            self._bind(target, self._type(source))

    def _bind(self, target: ast.expr, model: type[BaseModel] | None) -> None:
        if model is None:
            return
        if isinstance(target, ast.Name):
            self._names[-1][target.id] = model
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
            self._of_self[target.attr] = model

    def _annotated(self, annotation: ast.expr | None) -> type[BaseModel] | None:
        words = [node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)] if annotation else []
        return next((self._models[word] for word in words if word in self._models), None)

    def _type(self, node: ast.expr) -> type[BaseModel] | None:
        """The section that an expression is, or whose list or table it is."""
        if isinstance(node, ast.Name):
            return next((scope[node.id] for scope in reversed(self._names) if node.id in scope), None)
        if isinstance(node, ast.BinOp):  # one list of sections + another
            return self._type(node.left)
        if not isinstance(node, ast.Attribute):
            return None
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            return self._of_self.get(node.attr)
        if node.attr == "config":  # LoadedConfig.config
            return RunConfig
        owner = self._type(node.value)
        field = owner.model_fields.get(node.attr) if owner is not None else None
        return section_in(field.annotation) if field is not None else None


def _pairs(target: ast.expr, value: ast.expr) -> list[tuple[ast.expr, ast.expr]]:
    """What is assigned to what, entry by entry where both sides are tuples of one length."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        return list(zip(target.elts, value.elts, strict=True))
    return [(target, value)]


def read_fields(files: list[Path], models: dict[str, type[BaseModel]]) -> set[Field]:
    """The fields that any of the files reads."""
    found: set[Field] = set()
    for file in files:
        reads = Reads(models)
        reads.visit(ast.parse(file.read_text(encoding="utf-8")))
        found |= reads.found
    return found
