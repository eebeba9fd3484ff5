"""The shape of the house: imports only go down, siblings never see each other, and each single place is single."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"schemas"},
    {"slots", "topology", "errors", "assets", "layout", "extras", "tasks"},
    {"methods", "config", "stream", "watch", "worker"},
    {"prompts", "generate", "grade", "score", "pack", "learn", "sync", "evaluate"},
    {"doctor"},
    {"services"},
    {"cli"},
]
SIBLINGS = FLOORS[3] | {"services"}
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> list[tuple[str, Path]]:
    """("streamopd.learn.trainer", path) of every module, the two linked folders under their import names."""
    found = []
    linked = {"schemas": "streamopd.schemas", "services": "streamopd.services"}
    for base, name in ((ROOT / folder, linked.get(folder, folder)) for folder in ("streamopd", *linked)):
        for file in sorted(base.rglob("*.py")):
            if any(part.is_symlink() for part in file.parents if part != base and base in part.parents):
                continue
            dotted = ".".join((name, *file.relative_to(base).with_suffix("").parts))
            found.append((dotted.removesuffix(".__init__"), file))
    return found


def imports(module: str, file: Path) -> set[str]:
    """What a module imports, as dotted names; relative ones resolved."""
    names = set()
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module or "") if part)
            names |= {f"{origin}.{alias.name}" for alias in node.names} | {origin}
    return names


def room(dotted: str) -> str | None:
    parts = dotted.split(".")
    return parts[1] if parts[0] == "streamopd" and len(parts) > 1 and parts[1] in FLOOR else None


@pytest.mark.parametrize(("module", "file"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_only_go_down_and_siblings_never_see_each_other(module: str, file: Path) -> None:
    here = room(module)
    for name in imports(module, file):
        there = room(name)
        if here is None or there is None or here == there:
            continue
        assert FLOOR[there] <= FLOOR[here], f"{module} (floor {FLOOR[here]}) imports {name} (floor {FLOOR[there]})"
        if FLOOR[there] == FLOOR[here]:
            assert here not in SIBLINGS, f"{module} imports its sibling {name}"


def test_services_do_not_import_each_other() -> None:
    for module, file in modules():
        if room(module) == "services":
            others = {n for n in imports(module, file) if n.startswith("streamopd.services.") and n != module}
            assert not others, f"{module} imports {others}"


def test_there_is_no_import_cycle() -> None:
    known = dict(modules())
    edges = {module: {n for n in imports(module, file) if n in known and n != module} for module, file in known.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module):], module))
        if module in done:
            return
        for name in edges[module]:
            if not module.startswith(name + "."):  # a package's __init__ is loaded before its parts
                visit(name, (*path, module))
        done.add(module)

    for module in edges:
        visit(module, ())


@pytest.mark.parametrize(
    ("library", "rooms"),
    [
        ("redis", {"stream"}),
        ("vllm", {"generate", "score"}),
        ("torch", {"generate", "score", "learn", "sync", "evaluate"}),
        ("transformers", {"generate", "score", "learn", "sync", "evaluate"}),
    ],
)
def test_a_library_is_known_in_its_rooms_only(library: str, rooms: set[str]) -> None:
    for module, file in modules():
        if any(name.split(".")[0] == library for name in imports(module, file)):
            assert room(module) in rooms, f"{module} imports {library}"


def test_nothing_unpickles() -> None:
    for module, file in modules():
        assert not {"pickle", "marshal", "shelve", "dill", "cloudpickle"} & imports(module, file), module
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)}
        assert "torch.load" not in calls, module


def test_everything_is_caught_in_the_run_loop_only() -> None:
    for module, file in modules():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ExceptHandler):
                broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
                passed_on = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
                assert not broad or passed_on or room(module) == "worker", f"{module}:{node.lineno} catches everything"
