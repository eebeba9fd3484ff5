"""Which keys of a run file does code read? By following the configuration through names, not by bare attribute names.

A *place* is where an expression points inside the configuration: "" is the Config, "learn" its section, "teachers.*" one of
its teachers. `run.config` is the Config; so is what a parameter or a variable annotated `Config` holds, and what `load`
gives first. A name has the place of what is assigned to it in its function, or in one around it.
"""

from __future__ import annotations

import ast
import typing
from collections.abc import Iterable, Iterator

from streamopd.config import Section

Scope = dict[str, str]  # name -> place
MODULES = ("config", "configs")  # as which streamopd.config is imported


def unread(root: type[Section], sources: Iterable[str], own: str = "") -> list[str]:
    """Keys of `root`, dotted, that no source reads. `own` is the source of `root`: its properties read for who reads them."""
    keys, read = Keys(root), set()
    for source in sources:
        tree = ast.parse(source)
        read |= Reader(keys, _imported_types(tree)).reads(tree)
    for place, section in keys.sections.items():
        for name, body in _properties(own, section.__name__):
            if _join(place, name) in read:
                read |= Reader(keys, set()).reads(body, {"self": place})
    return sorted(keys.leaves - read)


class Keys:
    """Sections by place and by type, and the keys that are values."""

    def __init__(self, root: type[Section]) -> None:
        self.sections: dict[str, type[Section]] = {}
        self.leaves: set[str] = set()
        self._walk(root, "")

    def _walk(self, section: type[Section], place: str) -> None:
        self.sections[place] = section
        for key, hint in typing.get_type_hints(section).items():
            below = [(hint, "")] if _is_section(hint) else [(h, ".*") for h in typing.get_args(hint) if _is_section(h)]
            for kind, suffix in below:
                self._walk(kind, _join(place, key) + suffix)
            if not below:
                self.leaves.add(_join(place, key))


class Reader:
    """Follows the configuration through a module, which knows the sections `types` by their bare names."""

    def __init__(self, keys: Keys, types: set[str]) -> None:
        self.places = set(keys.sections) | {place.removesuffix(".*") for place in keys.sections}
        prefixed = {f"{module}.{section.__name__}": place for place, section in keys.sections.items() for module in MODULES}
        self.by_type = prefixed | {s.__name__: place for place, s in keys.sections.items() if s.__name__ in types}

    def reads(self, tree: ast.AST, scope: Scope | None = None) -> set[str]:
        """Every attribute of the configuration that is taken below `tree`, dotted."""
        found: set[str] = set()
        inner = self._with_names(tree, dict(scope or {}))
        for node in _own_nodes(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                place = self.place(node.value, inner)
                found |= {_join(place, node.attr)} if place is not None else set()
            if isinstance(node, _FUNCTIONS):
                found |= self.reads(node, inner)
        return found

    def place(self, node: ast.AST, scope: Scope) -> str | None:
        """Where an expression points; None: nowhere inside the configuration."""
        if isinstance(node, ast.Name):
            return scope.get(node.id)
        if isinstance(node, ast.Subscript):
            return self._known(self.place(node.value, scope), "*")
        if isinstance(node, ast.Attribute):
            return "" if node.attr == "config" else self._known(self.place(node.value, scope), node.attr)
        if isinstance(node, ast.Call):
            return self._made(node)
        return None

    def _known(self, place: str | None, key: str) -> str | None:
        below = None if place is None else _join(place, key)
        return below if below in self.places else None

    def _made(self, call: ast.Call) -> str | None:
        """`decode(…, type=Config)` gives one."""
        return next((self._annotated(keyword.value) for keyword in call.keywords if keyword.arg == "type"), None)

    def _annotated(self, annotation: ast.AST | None) -> str | None:
        names = [] if annotation is None else [ast.unparse(part) for part in _alternatives(annotation)]
        return next((self.by_type[name] for name in names if name in self.by_type), None)

    def _with_names(self, tree: ast.AST, scope: Scope) -> Scope:
        """`scope` with the parameters of a function and what it binds; twice, for a name bound to a name bound later."""
        if isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            arguments = [*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs]
            for argument in arguments:
                _bind(scope, argument.arg, self._annotated(argument.annotation) if argument.arg != "self" else scope.get("self"))
        for _ in range(2):
            for node in _own_nodes(tree):
                for target, place in self._bound(node, scope):
                    if isinstance(target, ast.Name):
                        _bind(scope, target.id, place)
        return scope

    def _bound(self, node: ast.AST, scope: Scope) -> Iterator[tuple[ast.AST, str | None]]:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                yield from self._assigned(target, node.value, scope)
        elif isinstance(node, ast.AnnAssign):
            yield node.target, self._annotated(node.annotation)
        elif isinstance(node, ast.For | ast.comprehension):
            yield from self._looped(node.target, node.iter, scope)

    def _assigned(self, target: ast.AST, value: ast.AST, scope: Scope) -> Iterator[tuple[ast.AST, str | None]]:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            yield from ((name, self.place(one, scope)) for name, one in zip(target.elts, value.elts, strict=True))
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Call) and _called(value) == "load":
            yield target.elts[0], ""  # config.load gives the Config and its origins
        else:
            yield target, self.place(value, scope)

    def _looped(self, target: ast.AST, over: ast.AST, scope: Scope) -> Iterator[tuple[ast.AST, str | None]]:
        """Values of a table of sections."""
        if isinstance(over, ast.Call) and isinstance(over.func, ast.Attribute) and over.func.attr in ("values", "items"):
            one = self._known(self.place(over.func.value, scope), "*")
            yield (target.elts[-1] if isinstance(target, ast.Tuple) else target), one


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def _own_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes below `tree`; of functions inside it only themselves."""
    for child in ast.iter_child_nodes(tree):
        yield child
        if not isinstance(child, _FUNCTIONS):
            yield from _own_nodes(child)


def _properties(source: str, owner: str) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == owner:
            yield from ((method.name, method) for method in node.body if isinstance(method, ast.FunctionDef))


def _imported_types(tree: ast.Module) -> set[str]:
    """Names that a module takes from the configuration's: a `Student` of its own is another."""
    taken = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("config")]
    return {alias.asname or alias.name for node in taken for alias in node.names}


def _alternatives(annotation: ast.AST) -> list[ast.AST]:
    """`Config | None` -> Config, None."""
    if isinstance(annotation, ast.BinOp):
        return [*_alternatives(annotation.left), *_alternatives(annotation.right)]
    return [annotation]


def _called(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[2]


def _bind(scope: Scope, name: str, place: str | None) -> None:
    """A name that is bound to something else as well keeps its place: this only ever asks whether a key is read at all."""
    if place is not None:
        scope[name] = place


def _is_section(hint: object) -> bool:
    return isinstance(hint, type) and issubclass(hint, Section)


def _join(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key
