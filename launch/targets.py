"""Whether what `_target_` names is there, and takes what it is given: read from its source, which is not run.

The classes of models need torch, which takes seconds to import; their source says in milliseconds what they are called
and what their constructors take. What cannot be known so (built at run time, or decorated) is left to the ranks.
"""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from launch.keys import relative
from launch.schema import ConfigError

REPOSITORY = Path(__file__).resolve().parents[1]
DEPTH = 8  # of imports and base classes that are followed

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Definition:
    """A class or function in a source file."""

    module: str
    path: Path
    node: ast.ClassDef | Function

    @property
    def place(self) -> str:
        return f"{self.node.name} ({relative(self.path)}:{self.node.lineno})"


@dataclass(frozen=True)
class Arguments:
    """What may be given by name, and what of it must be; `more`: whatever else, too."""

    names: tuple[str, ...]
    required: tuple[str, ...]
    more: bool


class AbsentError(Exception):
    """What is named is not there; the message says what is."""


class UnknownError(Exception):
    """What is named cannot be known without running it."""


def check_targets(tree: Mapping[str, Any]) -> None:
    """ConfigError for the first section of a config that names what is not there, or gives what it does not take."""
    for key, section in [(key, tree[key]) for key in sorted(tree, key=lambda key: key == "model")]:
        for path, part in sections(section, key):
            check_target(part, path)


def sections(tree: object, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping with a `_target_`, and its dotted key."""
    if isinstance(tree, Mapping):
        if isinstance(tree.get("_target_"), str):
            yield path, tree
        for key, part in tree.items():
            yield from sections(part, f"{path}.{key}")
    elif isinstance(tree, list):
        for number, part in enumerate(tree):
            yield from sections(part, f"{path}.{number}")


def check_target(section: Mapping[str, Any], path: str) -> None:
    """ConfigError if what a section names is not there, or takes other arguments than those beside it."""
    target = str(section["_target_"])
    try:
        found = definition(target)
        takes = arguments(found)
    except AbsentError as error:
        raise ConfigError(f"{path}._target_={target}: {error}") from None
    except UnknownError:
        return
    given = [key for key in section if not key.startswith("_")]
    strange = [key for key in given if key not in takes.names]
    if strange and not takes.more:
        key = strange[0]
        close = get_close_matches(key, takes.names, n=1)
        advice = f"did you mean {path}.{close[0]}?" if close else f"it takes {', '.join(takes.names) or 'nothing'}."
        raise ConfigError(f"{path}.{key}={str(section[key])[:60]}: {found.place} takes no {key}; {advice}")
    lacking = [key for key in takes.required if key not in given]
    if lacking and not section.get("_partial_") and "_args_" not in section:
        key = f"{path}.{lacking[0]}"
        raise ConfigError(f"{key} has no value, which {found.place} needs; give +{key}=...")


def definition(target: str) -> Definition:
    """The class or function that a dotted path names."""
    parts = target.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise AbsentError("write package.module.Class.")
    spec = top_level(parts[0])
    for place in range(1, len(parts)):
        module, name = ".".join(parts[:place]), parts[place]
        inner = submodule(spec, name)
        if inner is not None:
            spec = inner
        elif place + 1 == len(parts):
            return member(module, spec, name)
        elif spec.submodule_search_locations is not None and not defines(spec, name):
            raise AbsentError(f"there is no module {module}.{name}{in_folder(module, spec, name)}")
        else:  # a class in a class
            raise UnknownError
    raise AbsentError(f"{target} is a module; name a class in it.")


def top_level(name: str) -> ModuleSpec:
    """The package or module that is called so, where ranks look for it: here, in the working directory, installed."""
    path = [str(REPOSITORY), str(Path.cwd()), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    spec = PathFinder.find_spec(name, path) or importlib.util.find_spec(name)
    if spec is None:
        raise AbsentError(f"there is no module {name} here, in the working directory, or installed.")
    return spec


def submodule(spec: ModuleSpec, name: str) -> ModuleSpec | None:
    """A module of a package, by its last name alone: of a full one, Python would ask for the packages it is in."""
    if spec.submodule_search_locations is None:
        return None
    return PathFinder.find_spec(name, list(spec.submodule_search_locations))


def in_folder(module: str, spec: ModuleSpec, name: str) -> str:
    """Which file may be meant by a module that a package does not have."""
    names = [path.stem for place in spec.submodule_search_locations or () for path in Path(place).glob("[!_]*.py")]
    close = get_close_matches(name, names, n=1)
    return f"; did you mean {module}.{close[0]}?" if close else "."


@cache
def source(path: str) -> ast.Module:
    try:
        return ast.parse(Path(path).read_bytes(), path)
    except SyntaxError as error:
        raise ConfigError(f"{relative(path)}:{error.lineno}: {error.msg}; mend the file.") from None
    except (OSError, ValueError):
        raise UnknownError from None


def statements(spec: ModuleSpec) -> list[ast.stmt]:
    """What a module does when it is imported, whatever the conditions."""
    if spec.origin is None or not spec.origin.endswith(".py"):
        raise UnknownError
    return list(flat(source(spec.origin).body))


def flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        yield statement
        for part in ("body", "orelse", "finalbody", "handlers"):
            if not isinstance(statement, ast.ClassDef | Function):
                for inner in getattr(statement, part, []):
                    yield from flat(inner.body if isinstance(inner, ast.ExceptHandler) else [inner])


def defines(spec: ModuleSpec, name: str) -> bool:
    """Whether a module has something of this name, as far as can be seen."""
    try:
        return any(name in names_of(statement) or "*" in names_of(statement) for statement in statements(spec))
    except UnknownError:
        return spec.origin is not None


def names_of(statement: ast.stmt) -> list[str]:
    """What a statement gives names to."""
    if isinstance(statement, ast.ClassDef | Function):
        return [statement.name]
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).partition(".")[0] for alias in statement.names]
    return [node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


def member(module: str, spec: ModuleSpec, name: str, depth: int = 0) -> Definition:
    """What a module has under a name, wherever it was imported from."""
    if depth > DEPTH:
        raise UnknownError
    body = statements(spec)
    found = [statement for statement in body if name in names_of(statement)]
    if not found:
        dynamic = any({"*", "__getattr__"} & set(names_of(one)) for one in body)
        if dynamic or "globals()" in Path(str(spec.origin)).read_text(errors="replace"):
            raise UnknownError
        classes = [one.name for one in body if isinstance(one, ast.ClassDef) and not one.name.startswith("_")]
        close = get_close_matches(name, classes, n=1)
        advice = f"; did you mean {close[0]}?" if close else f"; it has {', '.join(classes)}." if classes else "."
        raise AbsentError(f"{relative(str(spec.origin))} has no {name}{advice}")
    last = found[-1]
    if len(found) > 1:  # by a condition, or a decorator's overloads
        raise UnknownError
    if isinstance(last, ast.ClassDef | Function):
        return Definition(module, Path(str(spec.origin)), last)
    if isinstance(last, ast.ImportFrom):
        alias = next(alias for alias in last.names if (alias.asname or alias.name) == name)
        return imported(absolute(module, spec, last), alias.name, depth)
    raise UnknownError


def absolute(module: str, spec: ModuleSpec, statement: ast.ImportFrom) -> str:
    """The module that a `from ... import` in another one names."""
    if not statement.level:
        return statement.module or ""
    package = module.split(".") if spec.submodule_search_locations is not None else module.split(".")[:-1]
    package = package[: len(package) - statement.level + 1]
    return ".".join([*package, *filter(None, [statement.module])])


def imported(module: str, name: str, depth: int) -> Definition:
    spec = top_level(module.partition(".")[0])
    for part in module.split(".")[1:]:
        inner = submodule(spec, part)
        if inner is None:
            raise UnknownError
        spec = inner
    try:
        return member(module, spec, name, depth + 1)
    except AbsentError:  # it may be a module; or else an import fails, which is told with its line
        raise UnknownError from None


def arguments(found: Definition, depth: int = 0) -> Arguments:
    """What a call of it takes by name."""
    node = found.node
    if depth > DEPTH or node.decorator_list:
        raise UnknownError
    if not isinstance(node, ast.ClassDef):
        return signature(node.args, bound=False)
    inside = {one.name: one for one in node.body if isinstance(one, Function)}
    if node.keywords or "__new__" in inside:
        raise UnknownError
    constructor = inside.get("__init__")
    if constructor is None:
        return arguments(base(found), depth + 1)
    if constructor.decorator_list:
        raise UnknownError
    takes = signature(constructor.args, bound=True)
    passed = passed_on(constructor)
    if passed is None:
        return takes
    inherited = arguments(base(found), depth + 1)
    names = [name for name in inherited.names if name not in passed]
    return Arguments(
        names=tuple(dict.fromkeys([*takes.names, *names])),
        required=tuple(dict.fromkeys([*takes.required, *(name for name in inherited.required if name in names)])),
        more=inherited.more,
    )


def signature(given: ast.arguments, *, bound: bool) -> Arguments:
    """Of a function's arguments, those that can be given by name; the first is left out of a method's."""
    positional = [*given.posonlyargs, *given.args]
    optional = len(given.defaults)
    needed = positional[: len(positional) - optional]
    by_name = [*given.args, *given.kwonlyargs]
    skipped = {positional[0].arg} if bound and positional else set()
    required = [one.arg for one in needed]
    required += [one.arg for one, value in zip(given.kwonlyargs, given.kw_defaults, strict=True) if value is None]
    return Arguments(
        names=tuple(one.arg for one in by_name if one.arg not in skipped),
        required=tuple(name for name in required if name not in skipped),
        more=given.kwarg is not None,
    )


def passed_on(constructor: Function) -> set[str] | None:
    """Where a constructor hands its further arguments to its base alone, what it gives that one beside them."""
    more = constructor.args.kwarg
    if more is None:
        return None
    uses = [node for node in ast.walk(constructor) if isinstance(node, ast.Name) and node.id == more.arg]
    for call in (node for node in ast.walk(constructor) if isinstance(node, ast.Call)):
        is_base = ast.unparse(call.func) == "super().__init__" and len(uses) == 1 and not call.args
        if is_base and any(word.arg is None and word.value is uses[0] for word in call.keywords):
            return {word.arg for word in call.keywords if word.arg is not None}
    return None


def base(found: Definition) -> Definition:
    """The only base of a class that can have a constructor."""
    assert isinstance(found.node, ast.ClassDef)
    named = [ast.unparse(one) for one in found.node.bases if ast.unparse(one) not in ("ABC", "object")]
    if len(named) != 1 or "." in named[0] or "[" in named[0]:
        raise UnknownError
    package = [str(found.path.parent)] if found.path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(found.module, found.path, submodule_search_locations=package)
    assert spec is not None
    try:
        return member(found.module, spec, named[0])
    except AbsentError:
        raise UnknownError from None
