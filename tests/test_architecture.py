"""The house rules that a reader can rely on: imports run one way, files and functions stay small, deciding code is pure.

Read with ast, so a violation is found without importing anything. The table is the one of docs/design.md.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.pure

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "ecotone"
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_EXAMPLE_LINES = 600, 60, 80

DATA = {
    "units", "schema", "graph", "cluster", "accuracy", "profile", "plan", "plancost", "planset", "llmplan", "linktrace",
    "llmprofile", "radio", "offload", "media", "workload",
}  # fmt: skip
PLANNER = DATA | {"cost", "llmcost", "sharing", "contention"}
PROTOCOL = PLANNER | {"planner", "trace"}
RUNTIME = DATA | {
    "trace", "cost", "llmcost", "sharing", "contention", "planner", "protocol", "codec", "model", "executors", "wire",
    "profiling", "trust",
}  # fmt: skip
MAY_IMPORT: dict[str, set[str]] = {
    "units": set(),
    "schema": {"units"},
    "graph": {"units", "schema"},
    "cluster": {"units", "schema", "media"},
    "trust": {"units", "schema"},
    "accuracy": {"units", "schema"},
    "profile": {"units", "schema", "graph", "cluster", "accuracy"},
    "plancost": {"units", "schema", "cluster"},
    "plan": {"units", "schema", "graph", "cluster"},
    "planset": {"units", "schema", "graph", "cluster", "plan"},
    "llmplan": {"units", "schema", "cluster"},
    "llmprofile": {"units", "schema", "cluster"},
    "llmcost": DATA,
    "linktrace": {"units", "schema"},
    "radio": {"units", "schema"},
    "offload": {"units", "schema"},
    "media": {"units", "schema", "radio"},
    "workload": {"units", "schema", "cluster"},
    "trace": {"units", "schema", "plan"},
    "cost": DATA,
    "sharing": {"units", "schema", "media"},
    "contention": DATA | {"cost", "sharing"},
    "planner": PLANNER,
    "protocol": PROTOCOL,
    "decoding": PROTOCOL | {"protocol"},
    "simulator": PROTOCOL | {"protocol", "decoding"},
    "policies": PROTOCOL | {"protocol", "simulator"},
    "codec": {"units", "schema", "plan"},
    "model": {"units", "schema", "graph"},
    "executors": {"units", "schema", "graph", "model"},
    "wire": {"units", "schema", "protocol", "codec", "trust"},
    "profiling": DATA | {"codec", "model", "executors", "wire"},
    "runtime": RUNTIME,
    "serving": RUNTIME | {"runtime", "decoding"},
    "llm": RUNTIME | {"runtime", "decoding"},
    "lab": DATA | {"trace", "trust", "runtime"},
    "web": {"units", "schema", "plan", "trace"},
    "cli": {"*"},
    "__init__": {"*"},
    "__main__": {"*"},
}
PURE = DATA | {"trace", "cost", "llmcost", "planner", "protocol", "decoding", "simulator", "policies"}
NO_TORCH = (PURE - {"policies"}) | {"web"}  # learned policies decide with tensors
# What would let deciding code see the world. schema and cluster read and write files by design (the door of the data).
IMPURE_MODULES = {
    "socket", "subprocess", "threading", "multiprocessing", "asyncio", "time", "random", "urllib", "http", "select",
    "signal", "zenoh", "uvicorn", "starlette", "requests", "httpx",
}  # fmt: skip
ALLOWED_IMPURE = {("planner", "time")}  # an anytime search must know when to stop; it is given its limit
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def parts() -> list[tuple[str, Path]]:
    """(part, file) of every source file; the part is the file's name at the top or its folder."""
    return [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in sorted(PACKAGE.rglob("*.py"))]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imported_modules(node: ast.AST) -> Iterator[str]:
    """Dotted names that an import statement may load, `from ecotone import x` as ecotone.x."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: relative import; write ecotone.…"
        if node.module == "ecotone":
            yield from (f"ecotone.{alias.name}" for alias in node.names)
        elif node.module:
            yield node.module


def our_imports(path: Path) -> set[str]:
    """Parts of our own package that a file imports."""
    names = (name for node in ast.walk(tree(path)) for name in imported_modules(node))
    return {name.split(".")[1] for name in names if name.startswith("ecotone.")}


def test_every_part_has_a_row_in_the_table() -> None:
    assert {part for part, _ in parts()} <= set(MAY_IMPORT)


def test_no_two_test_files_have_one_name() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert not {name for name in names if names.count(name) > 1}  # pytest would import one and refuse the other


def test_imports_run_one_way() -> None:
    wrong = []
    for part, path in parts():
        allowed = MAY_IMPORT[part]
        if "*" not in allowed:
            wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in our_imports(path) - allowed - {part}]
        if part not in ("cli", "__main__") and "cli" in our_imports(path):
            wrong.append(f"{path.relative_to(ROOT)} imports the cli")
    assert not wrong, "\n".join(wrong)


def test_no_cycle_between_files() -> None:
    files = {".".join(("ecotone", *path.relative_to(PACKAGE).with_suffix("").parts)): path for _, path in parts()}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    arrows = {name: set(_file_imports(path, files)) - {name} for name, path in files.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "cycle: " + " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in sorted(arrows[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(arrows):
        visit(name, ())


def _file_imports(path: Path, files: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module in files:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from [name for name in inner if name in files]
            if any(name not in files for name in inner):
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)


def test_no_import_of_ours_inside_a_function() -> None:
    wrong = []
    for _, path in parts():
        for function in ast.walk(tree(path)):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = [n for node in ast.walk(function) for n in imported_modules(node) if n.split(".")[0] == "ecotone"]
                wrong += [f"{path.relative_to(ROOT)}:{function.name} imports {name}" for name in inner]
    assert not wrong, "\n".join(wrong)


def test_files_and_functions_stay_small() -> None:
    wrong = []
    for path in [p for _, p in parts()] + sorted((ROOT / "benchmarks").glob("*.py")):
        count = len(path.read_text().splitlines())
        if count > MAX_FILE_LINES:
            wrong.append(f"{path.relative_to(ROOT)} has {count} lines, at most {MAX_FILE_LINES}")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > MAX_FUNCTION_LINES:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.name} has {size} lines, at most {MAX_FUNCTION_LINES}")
    for path in sorted((ROOT / "examples").glob("*.py")):
        count = len(path.read_text().splitlines())
        if count > MAX_EXAMPLE_LINES:
            wrong.append(f"{path.relative_to(ROOT)} has {count} lines, at most {MAX_EXAMPLE_LINES}")
    assert not wrong, "\n".join(wrong)


def test_deciding_code_sees_no_world() -> None:
    wrong = []
    for part, path in parts():
        for node in ast.walk(tree(path)):
            roots = {name.split(".")[0] for name in imported_modules(node)}
            if part in NO_TORCH and "torch" in roots:
                wrong.append(f"{path.relative_to(ROOT)} imports torch")
            if part in PURE:
                seen = {r for r in roots & IMPURE_MODULES if (part, r) not in ALLOWED_IMPURE}
                wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in seen]
    assert not wrong, "\n".join(wrong)


def test_nothing_runs_code_from_data() -> None:
    wrong = []
    for _, path in parts():
        for node in ast.walk(tree(path)):
            if "pickle" in {name.split(".")[0] for name in imported_modules(node)}:
                wrong.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)} imports pickle")
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in FORBIDDEN_CALLS or called in ("torch.load", "pickle.loads", "marshal.loads"):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} calls {called}")
    assert not wrong, "\n".join(wrong)
