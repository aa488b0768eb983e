"""Rooms import downwards only, so that whoever reads one needs nothing of those above."""

from __future__ import annotations

import ast
from pathlib import Path

import qkscope

ROOMS = (
    {"cli"}, {"app"}, {"pipeline"}, {"runner"}, {"jobs"}, {"explain"}, {"evaluate", "target"}, {"tables"}, {"foreign"},
    {"run_folder"}, {"decomposition"}, {"pairs"}, {"training"}, {"residual"}, {"dictionary"}, {"norm"}, {"attention"},
    {"kernels"},
)  # fmt: skip
# Conveniences of a class that reach up when they are called: `dec.trace(...)`, `site.intervene(...)`.
REACH_UP = {("decomposition", "explain"), ("attention", "explain")}


def test_rooms_import_downwards_only() -> None:
    root = Path(qkscope.__file__).parent
    height = {room: -place for place, rooms in enumerate(ROOMS) for room in rooms}
    seen, wrong = set(), []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        room = parts[0].removesuffix(".py")
        for used in imported(ast.parse(path.read_text(encoding="utf-8")), parts[:-1]):
            if {room, used} <= height.keys() and used != room:
                seen.add((room, used))
                if height[used] > height[room] and (room, used) not in REACH_UP:
                    wrong.append(f"{'/'.join(parts)} imports {used}")
    assert not wrong
    assert seen >= REACH_UP | {("app", "explain"), ("evaluate", "tables"), ("training", "dictionary")}


def imported(tree: ast.Module, package: tuple[str, ...]) -> set[str]:
    """Rooms that a module of this package, relative to qkscope, imports from."""
    rooms = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            names = [name for name in base if name] or [alias.name for alias in node.names]
            rooms.add(names[0])
    return rooms
