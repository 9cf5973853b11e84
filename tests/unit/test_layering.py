"""Who may import whom, read from the source: the table of the design, section 1."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Lowest first. A module may import what lies in a lower row; modules of one row do not know each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("secrets", "terminal", "reading"),  # below everything
    ("errors", "files", "processes", "local_store", "wire"),
    ("rendezvous", "manifest", "interruption"),
    ("record",),
    ("data", "logps", "attention", "objectives", "families", "losses", "router"),  # the pure layer
    ("reference_store",),
    ("yaml12", "strategy", "paths"),  # what config is made of
    ("sections",),
    ("foreign", "sound"),
    ("hints",),
    ("explain",),
    ("objective_checks",),
    ("checks",),
    ("config",),
    ("status", "weights"),
    ("machine", "footprint"),  # of `dspref doctor` and the start of a run
    ("inputs",),
    ("slurm",),
    ("preflight", "agreement"),
    ("doctor",),
    ("distributed", "lock"),
    ("watch", "meeting"),
    ("adapter_files", "liger"),
    ("admission", "filedigest", "adapters", "trust_region", "filling", "finite"),
    ("model", "shards"),
    ("engine",),
    ("reference",),
    ("performance",),
    ("run_folder", "trackers"),
    ("checkpoint", "metrics", "console", "numbers"),
    ("saving", "export", "gradient", "advice", "outcome"),
    ("preparation",),
    ("stages", "evaluate"),
    ("trainer", "scorer", "consolidate", "survey"),
    ("launcher",),
    ("cli",),
)
PURE = {"data", "logps", "attention", "objectives", "families", "losses", "router"}

# Within the pure layer: who may import whom there. `data` is one package, and its modules know each other.
WITHIN_PURE: dict[str, set[str]] = {
    "logps": {"data", "objectives", "families"},
    "attention": {"data"},
    "router": {"data"},
    "objectives": {"losses", "families"},
    "families": {"losses"},
    "losses": set(),
    "data": set(),
}

# The pure layer never sees a rank, a device string or a config object, and config stands apart from the rest.
CONFIG = (
    "config", "sections", "checks", "objective_checks", "explain", "foreign", "hints", "sound", "paths", "strategy",
    "yaml12",
)  # fmt: skip
FORBIDDEN = {module: {"config", "sections", "strategy", "yaml12", "distributed"} for module in PURE} | {
    **{name: {*PURE, "distributed"} - {"objectives", "families", "losses"} for name in CONFIG},
    "distributed": {*PURE, "config", "sections", "strategy", "yaml12"},
}

# Packages that only some modules may import.
OWNERS: dict[str, set[str]] = {
    "deepspeed": {"engine", "shards"},
    "torch.distributed": {"distributed", "engine"},
    "transformers": {"admission", "adapters", "model", "attention", "data.tokenize", "data.pieces", "checkpoint", "export"},
    "peft": {"adapters", "adapter_files"},
    "bitsandbytes": {"engine"},
    "liger_kernel": {"liger"},
    "wandb": {"trackers"},
    "torch.utils.tensorboard": {"trackers"},
    "tensorboard": {"trackers"},
    "typer": {"cli"},
    "rich": {"console", "cli"},
    "pydantic": {"config", "sections", "explain", "paths"},
    "datasets": {"data.sources"},
    "huggingface_hub": {"data.sources", "weights", "adapter_files"},
}

# `check` and `submit` answer at once on a login node: none of these loads torch, however deep. The store needs none.
NO_TORCH = {
    *CONFIG, "errors", "files",
    "objectives", "families", "losses", "launcher", "cli", "reference_store", "slurm", "status", "secrets", "processes",
    "terminal", "local_store", "rendezvous", "reading", "weights", "manifest", "record", "interruption",
    "machine", "footprint", "inputs", "preflight", "agreement", "doctor",
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
    package = ROOT / "dspref"
    paths = {path: path.relative_to(package).with_suffix("").parts for path in sorted(package.rglob("*.py"))}
    return {".".join(parts).removesuffix(".__init__") or "__init__": path for path, parts in paths.items()}


MODULES = modules()
IMPORTS = [found for name, path in MODULES.items() for found in imports_of(path, name)]


def top(module: str) -> str:
    return module.split(".")[0]


def ours(found: Import) -> str | None:
    """The top-level module of dspref that an import reaches, if any; the package itself holds only its version."""
    parts = found.imported.split(".")
    if parts[0] != "dspref" or len(parts) == 1:
        return None
    return parts[1] if (ROOT / "dspref" / parts[1]).is_dir() or parts[1] in MODULES else None


def rank(module: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if module in layer)


def belongs(imported: str, package: str) -> bool:
    return imported == package or imported.startswith(f"{package}.")


def shown(violations: list[Import]) -> str:
    return "; ".join(f"dspref/{v.importer.replace('.', '/')}.py:{v.line} imports {v.imported}" for v in violations)


def test_every_module_has_its_place() -> None:
    known = {module for layer in LAYERS for module in layer}
    assert {top(name) for name in MODULES} - {"__init__", "__main__"} <= known
    assert len(IMPORTS) > 200  # the walk sees the package
    assert any(found.lazy for found in IMPORTS)
    assert any(found.typing_only for found in IMPORTS)


def test_modules_import_only_what_lies_below_them() -> None:
    """Types count too: a lower layer has no words for what lies above it."""
    violations = []
    for found in IMPORTS:
        importer, imported = top(found.importer), ours(found)
        if imported is None or importer in ("__init__", "__main__") or importer == imported:
            continue
        if importer in PURE and imported in PURE:
            allowed = imported in WITHIN_PURE[importer]
        else:
            allowed = rank(imported) < rank(importer)
        if not allowed:
            violations.append(found)
    assert not violations, shown(violations)


@pytest.mark.parametrize("module", sorted(FORBIDDEN))
def test_modules_that_stand_apart(module: str) -> None:
    violations = [f for f in IMPORTS if top(f.importer) == module and ours(f) in FORBIDDEN[module]]
    assert not violations, shown(violations)


@pytest.mark.parametrize("package", sorted(OWNERS))
def test_packages_with_owners(package: str) -> None:
    """As a type, where no code runs, anyone may name what belongs to another."""
    violations = [
        f for f in IMPORTS if belongs(f.imported, package) and f.importer not in OWNERS[package] and not f.typing_only
    ]
    assert not violations, shown(violations)


@pytest.mark.parametrize("package", ["deepspeed", "transformers", "torch.distributed", "wandb", "pydantic", "rich"])
def test_owners_are_found_where_they_are(package: str) -> None:
    """The rule above would hold of nothing otherwise."""
    assert any(belongs(f.imported, package) and f.importer in OWNERS[package] for f in IMPORTS)


def test_the_pure_layer_needs_only_torch_and_numpy() -> None:
    """Besides what reads files (datasets, pyarrow) and text (transformers), and the kernels of `attention`."""
    allowed = {"torch", "numpy", "dspref", "jaxtyping", "__future__"}
    readers = {
        "attention": {"transformers", "flash_attn", "flash_attn_interface", "flash_attn_config"},
        "data.sources": {"datasets"},
        "data.rowfiles": {"pyarrow"},
        "data.splits": {"yaml"},
        "data.tokenize": {"transformers"},
        "data.pieces": {"transformers"},
    }
    import sys

    violations = [
        f
        for f in IMPORTS
        if top(f.importer) in PURE
        and not f.typing_only
        and top(f.imported) not in allowed | set(sys.stdlib_module_names) | readers.get(f.importer, set())
    ]
    assert not violations, shown(violations)


@pytest.mark.parametrize("module", sorted(NO_TORCH & set(MODULES)))
def test_no_torch_before_the_config_is_good(module: str) -> None:
    """Followed through dspref's own imports, those in functions aside."""
    seen, queue = set(), [module]
    while queue:
        current = queue.pop()
        seen.add(current)
        for found in IMPORTS:
            if found.importer != current or found.lazy or found.typing_only:
                continue
            assert not any(belongs(found.imported, p) for p in ("torch", "transformers", "deepspeed")), shown([found])
            parts = found.imported.split(".")[1:] if belongs(found.imported, "dspref") else []
            names = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
            queue += [name for name in names & set(MODULES) if name not in seen]


def test_launch_knows_only_the_entrance() -> None:
    """launch/*.py are thin: they import the launcher and the standard library."""
    import sys

    paths = sorted((ROOT / "launch").glob("*.py"))
    assert paths
    for path in paths:
        for found in imports_of(path, path.stem):
            reached = ours(found)
            assert reached in (None, "launcher", "cli"), f"{path.name}:{found.line}"
            assert reached or top(found.imported) in sys.stdlib_module_names, f"{path.name}:{found.line}"
