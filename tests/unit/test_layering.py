"""Who may enter which room, read from the source and from the doors: from the ground up."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dspref"

# What lies below the rooms, lowest first. A file may import what stands in a lower row, and any room imports these.
GROUND: tuple[tuple[str, ...], ...] = (
    ("secrets", "terminal", "reading", "lazily"),
    ("errors", "files", "processes"),
    ("hub", "own_code"),
)
# Of these, `distributed` is entered as a room is.
ABOVE = {
    "distributed": {"ranks"},
    "launcher": {"config", "distributed", "ranks", "training", "watch"},
    "commandline": {"config"},
    "looking": {
        "commandline",
        "config",
        "convert",
        "launcher",
        "machine",
        "objectives",
        "report",
        "run",
        "slurm",
        "training",
    },
    "cli": {"chat", "commandline", "config", "launcher", "looking", "machine", "ranks", "slurm", "training"},
    "__main__": {"cli"},
}

# Packages that only some modules, or the modules of some rooms, may import.
OWNERS: dict[str, set[str]] = {
    "deepspeed": {"engine.accelerator", "engine.engine", "engine.plain", "engine.shards"},
    "torch.distributed": {"distributed", "engine.engine", "engine.sequence"},
    "transformers": {
        *("data.pieces", "data.sight", "data.tokenize", "data.vocabulary"),
        *("engine.optimizer", "model", "run.checkpoint", "run.export"),
    },
    "peft": {"model.adapter_files", "model.adapters"},
    "bitsandbytes": {"engine.optimizer"},
    "liger_kernel": {"model.liger"},
    "wandb": {"report.tracking"},
    "torch.utils.tensorboard": {"report.tracking"},
    "tensorboard": {"report.tracking"},
    "mlflow": {"report.tracking"},
    "trackio": {"report.tracking"},
    "comet_ml": {"report.tracking"},
    "swanlab": {"report.tracking"},
    "typer": {"cli", "commandline", "looking"},
    "rich": {"chat.sides", "report.census", "report.closeup", "report.console", "report.plan_table"},
    "matplotlib": {"report.plots"},
    "pydantic": {"config"},
    "datasets": {"data.parts"},
    "huggingface_hub": {"data.sources", "hub", "run.publish"},
}  # fmt: skip

# The rooms below get sections of a config, or values: where these see it whole, they are handed out. (The room's door only
# passes the name on, and the command line what it has read.)
SEE_CONFIG = {
    "config.sections", "config.load", "config.checks", "config.outcome_checks", "machine.context",
    "training.consolidate", "training.scorer", "training.stages", "training.trainer",
}  # fmt: skip

# The pure rooms never see a rank, a device string or a config object.
PURE = {"data", "objectives"}
PURE_FILES = {"model.attention", "model.exchange", "model.logits", "model.logps", "model.router"}

# `check` and `submit` answer at once on a login node: none of these loads torch, however deep, nor does a door.
NO_TORCH_ROOMS = {"config", "convert", "machine", "objectives", "ranks", "slurm"}
NO_TORCH = {
    "cli", "commandline", "engine.builds", "errors", "files", "hub", "launcher", "lazily", "looking", "model.freezing",
    "model.head_room", "model.weights", "own_code", "processes", "reading", "reference.store", "report.charts",
    "report.page", "report.plots", "report.specs", "report.tables", "report.written", "run.curves", "run.finding",
    "run.history", "run.manifest", "run.publish", "run.record", "run.status", "secrets", "terminal",
    "watch.interruption", "watch.lock",
}  # fmt: skip


class Import(NamedTuple):
    importer: str
    """Module within dspref: `config`, `data.batch`."""
    imported: str
    """Dotted name: `dspref.config.Config`, `torch.distributed`."""
    typing_only: bool
    lazy: bool
    line: int


def imports_of(path: Path, importer: str) -> Iterator[Import]:
    """Every import of a file, in functions too, and calls of `__import__` and `import_module` on a literal."""
    tree = ast.parse(path.read_text(encoding="utf-8"))

    def walk(node: ast.AST, typing_only: bool, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(importer, alias.name, typing_only, lazy, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                yield Import(importer, f"{node.module}.{alias.name}", typing_only, lazy, node.lineno)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("__import__", "import_module")):
            names = [a.value for a in node.args if isinstance(a, ast.Constant)]
            yield from (Import(importer, name, typing_only, lazy, node.lineno) for name in names)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                yield from walk(child, True, lazy)
            for child in node.orelse:
                yield from walk(child, typing_only, lazy)
            return
        inner = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, typing_only, inner)

    yield from walk(tree, False, False)


def modules() -> dict[str, Path]:
    paths = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in sorted(PACKAGE.rglob("*.py"))}
    return {".".join(parts).removesuffix(".__init__") or "__init__": path for path, parts in paths.items()}


MODULES = modules()
IMPORTS = [found for name, path in MODULES.items() for found in imports_of(path, name)]
ROOMS = {name for name in MODULES if MODULES[name].name == "__init__.py"} - {"__init__"}
BESIDE = {name for name in MODULES if "." not in name} - ROOMS - {"__init__"}


def top(module: str) -> str:
    return module.split(".")[0]


def ours(found: Import) -> str | None:
    """The module of dspref that an import reaches, if any; the package itself holds only its version."""
    parts = found.imported.split(".")
    if parts[0] != "dspref" or len(parts) == 1:
        return None
    names = [".".join(parts[1:n]) for n in range(len(parts), 1, -1)]
    return next((name for name in names if name in MODULES), None)


def listed(room: str, label: str) -> set[str]:
    """What the door of a room says behind `Enters:` or `Shows:`."""
    text = ast.get_docstring(ast.parse(MODULES[room].read_text(encoding="utf-8"))) or ""
    found = re.search(rf"^{label}: ([^.]*)\.$", text, re.MULTILINE)
    return set(re.split(r",\s+", found[1])) - {"nothing"} if found else set()


ENTERS = {room: listed(room, "Enters") for room in ROOMS} | ABOVE


def belongs(imported: str, package: str) -> bool:
    return imported == package or imported.startswith(f"{package}.")


def shown(violations: list[Import]) -> str:
    return "; ".join(f"dspref/{v.importer.replace('.', '/')}.py:{v.line} imports {v.imported}" for v in violations)


def test_every_module_has_its_place() -> None:
    assert {*(name for row in GROUND for name in row), *ABOVE} == BESIDE
    assert len(IMPORTS) > 200  # the walk sees the package
    assert any(found.lazy for found in IMPORTS)
    assert any(found.typing_only for found in IMPORTS)


def test_every_door_says_what_its_room_is_for() -> None:
    for room in ROOMS:
        prose = ast.get_docstring(ast.parse(MODULES[room].read_text(encoding="utf-8"))) or ""
        chapters = {name.split(".")[1] for name in MODULES if top(name) == room and "." in name}
        assert len(prose.split("\n\nEnters:")[0].splitlines()) <= 15, room
        assert f"Enters: {', '.join(sorted(ENTERS[room])) or 'nothing'}." in " ".join(prose.split()), f"{room}: in order"
        assert all(f"`{chapter}`" in prose for chapter in chapters), f"{room} does not tell of {chapters}"
        assert listed(room, "Shows") <= chapters


def test_rooms_are_entered_from_above_only() -> None:
    """As each door says; and no door leads back. Types count too: a lower room has no words for what lies above it."""
    ground = {name for row in GROUND for name in row}
    violations = []
    for found in IMPORTS:
        importer, imported = top(found.importer), top(ours(found) or "")
        if imported in ("", importer) or importer == "__init__":
            continue
        if importer in ground:
            rank = {name: n for n, row in enumerate(GROUND) for name in row}
            allowed = rank.get(imported, len(GROUND)) < rank[importer]
        else:
            allowed = imported in ground or imported in ENTERS[importer]
        if not allowed:
            violations.append(found)
    assert not violations, shown(violations)
    reached = {room: set(rooms) for room, rooms in ENTERS.items()}
    for _ in reached:
        reached = {room: rooms.union(*(reached[other] for other in rooms)) for room, rooms in reached.items()}
    assert not [room for room, rooms in reached.items() if room in rooms], "a circle of rooms"


def test_a_door_names_no_room_that_is_not_entered() -> None:
    for room, rooms in ENTERS.items():
        used = {top(name) for found in IMPORTS if top(found.importer) == room and (name := ours(found))}
        assert rooms <= used, f"{room} does not enter {rooms - used}"


def test_only_what_a_room_shows_is_imported_from_outside() -> None:
    violations, used = [], set()
    for found in IMPORTS:
        name = ours(found) or ""
        if top(name) not in ROOMS or top(found.importer) in (top(name), "__init__") or "." not in name:
            continue
        used.add(name)
        if name.split(".")[1] not in listed(top(name), "Shows"):
            violations.append(found)
    assert not violations, shown(violations)
    assert {f"{room}.{chapter}" for room in ROOMS for chapter in listed(room, "Shows")} == used, "shown, and not used"


def test_no_circle_between_files() -> None:
    """Doors aside: an import of a chapter goes through its door, which python takes as it finds it."""
    below = {
        name: {n for f in IMPORTS if f.importer == name and not f.lazy and (n := ours(f)) in MODULES} for name in MODULES
    }
    below = {name: {n for n in names if MODULES[n].name != "__init__.py"} for name, names in below.items()}
    done: set[str] = set()
    while ready := [name for name in below if name not in done and below[name] <= done]:
        done.update(ready)
    assert not set(below) - done


def test_nothing_outgrows_one_reading() -> None:
    """Lines of a file, a function, a class."""
    large = []
    for name, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > 350:
            large.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            limit = {ast.FunctionDef: 60, ast.ClassDef: 200}.get(type(node))
            if limit and (lines := node.end_lineno - node.lineno + 1) > limit:
                large.append(f"{name}.{node.name}: {lines} lines")
    assert not large, large


def test_who_sees_a_whole_config() -> None:
    seen = {
        name
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Name) and node.id == "Config")
        or (isinstance(node, ast.Attribute) and node.attr == "Config")
        or (isinstance(node, ast.ImportFrom) and path.name != "__init__.py" and "Config" in {a.name for a in node.names})
    }
    assert seen == SEE_CONFIG and len(seen) <= 9


@pytest.mark.parametrize("room", sorted(PURE))
def test_the_pure_rooms_stand_apart(room: str) -> None:
    violations = [f for f in IMPORTS if top(f.importer) == room and top(ours(f) or room) not in {room, *sum(GROUND, ())}]
    assert not violations, shown(violations)


@pytest.mark.parametrize("package", sorted(OWNERS))
def test_packages_with_owners(package: str) -> None:
    """As a type, where no code runs, anyone may name what belongs to another."""
    violations = [
        f
        for f in IMPORTS
        if belongs(f.imported, package) and not {f.importer, top(f.importer)} & OWNERS[package] and not f.typing_only
    ]
    assert not violations, shown(violations)


@pytest.mark.parametrize("package", ["deepspeed", "transformers", "torch.distributed", "wandb", "pydantic", "rich"])
def test_owners_are_found_where_they_are(package: str) -> None:
    """The rule above would hold of nothing otherwise."""
    assert any(belongs(f.imported, package) and {f.importer, top(f.importer)} & OWNERS[package] for f in IMPORTS)


def test_pure_files_need_only_torch_and_numpy() -> None:
    """Besides what reads files (datasets, pyarrow), images (PIL) and text (transformers), and the kernels of `attention`."""
    allowed = {"torch", "numpy", "dspref", "jaxtyping", "__future__", *sys.stdlib_module_names}
    readers = {
        "model.attention": {"transformers", "flash_attn", "flash_attn_interface", "flash_attn_config"},
        "data.parts": {"datasets"},
        "data.rowfiles": {"pyarrow"},
        "data.splits": {"yaml"},
        "data.tokenize": {"transformers"},
        "data.pieces": {"transformers"},
        "data.vocabulary": {"transformers"},
        "data.sight": {"transformers", "PIL"},
        "data.image_files": {"PIL"},
    }
    violations = [
        f
        for f in IMPORTS
        if (top(f.importer) in PURE or f.importer in PURE_FILES)
        and not f.typing_only
        and top(f.imported) not in allowed | readers.get(f.importer, set())
    ]
    violations += [
        f for f in IMPORTS if f.importer in PURE_FILES and top(ours(f) or "data") not in {"model", *PURE, *sum(GROUND, ())}
    ]
    assert not violations, shown(violations)


@pytest.mark.parametrize("module", sorted({*NO_TORCH, *ROOMS} | {name for name in MODULES if top(name) in NO_TORCH_ROOMS}))
def test_no_torch_before_the_config_is_good(module: str) -> None:
    """Followed through dspref's own imports and the doors on the way, those in functions aside."""
    seen, queue = set(), [module]
    while queue:
        current = queue.pop()
        seen.add(current)
        for found in IMPORTS:
            if found.importer != current or found.lazy or found.typing_only:
                continue
            assert not any(belongs(found.imported, p) for p in ("torch", "transformers", "deepspeed")), shown([found])
            name = ours(found)
            queue += list({name, top(name)} - seen) if name else []


def test_launch_knows_only_the_entrance() -> None:
    """launch/*.py are thin: they import the launcher and the standard library."""
    paths = sorted((ROOT / "launch").glob("*.py"))
    assert paths
    for path in paths:
        for found in imports_of(path, path.stem):
            reached = ours(found)
            assert reached in (None, "launcher", "cli"), f"{path.name}:{found.line}"
            assert reached or top(found.imported) in sys.stdlib_module_names, f"{path.name}:{found.line}"
