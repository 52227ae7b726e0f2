"""Who may import whom, read from the code, and what a fresh interpreter loads."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import vlm_local

ROOT = Path(vlm_local.__file__).parent

# A module imports from its own layer and from those above it in this list, never from those below.
LAYERS = (
    {"errors", "types", "files", "logs", "plain", "interrupts", "processes", "progress", "relay"},
    {"provenance", "grammar", "actions", "primitives", "bounds", "fields", "wire", "embodiments"},
    {"prompts", "models", "registry", "checkpoint", "weights", "machine"},
    {"decoding"},
    {"engines"},
    {
        "answers",
        "context",
        "examples",
        "policy",
        "marks",
        "thinking",
        "inspect_robots_policy",
        "safety",
        "client",
        "remote_policy",
        "policy_options",
        "resolved_options",
        "assembly",
    },
    {"server", "lab", "training", "bench", "doctor", "checkup"},
    {"cli", "__main__"},
)
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}
# Every layer may import these, but they import little themselves.
BESIDE = {
    "data": {"types", "primitives", "errors", "files", "embodiments"},
    "sim": {"types", "primitives", "errors", "actions"},
    "environments": {"types", "errors", "files", "actions", "embodiments", "sim"},
}
SEPARATE = ({"server", "lab"}, {"server", "sim"}, {"server", "environments"})  # neither imports the other
OWNERS = {
    "torch": {"engines", "decoding", "training", "bench", "machine"},
    "transformers": {"engines", "decoding", "training", "bench", "machine"},
    "flask": {"server"},
    "mujoco": {"sim", "environments"},
    "metaworld": {"environments"},
    "libero": {"environments"},
    "mani_skill": {"environments"},
    "pyarrow": {"data"},
    "av": {"data"},
}


def walk_statements(node: ast.AST) -> Iterator[ast.AST]:
    """As ast.walk, without the expressions, which hold no statement and are most of a file."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield child
            yield from walk_statements(child)


@cache
def list_imports() -> list[tuple[tuple[str, ...], str, str]]:
    """(importing module below vlm_local, imported name, file and line) of every import statement, nested ones too."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        module = path.relative_to(ROOT).with_suffix("").parts
        for node in walk_statements(ast.parse(path.read_text())):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                found += [(module, f"{node.module}.{alias.name}", where) for alias in node.names]
            elif isinstance(node, ast.Import):
                found += [(module, alias.name, where) for alias in node.names]
    return found


def list_own_imports() -> Iterator[tuple[tuple[str, ...], tuple[str, ...], str]]:
    """As `list_imports`, of vlm_local itself: the imported name below vlm_local, without `vlm_local`."""
    for module, name, where in list_imports():
        package, *parts = name.split(".")
        if package == "vlm_local" and parts and parts != ["__version__"] and module != ("__init__",):
            yield module, tuple(parts), where


def test_imports_go_down_the_layers():
    for (part, *_), (other, *_), where in list_own_imports():
        if part in BESIDE:
            assert other == part or other in BESIDE[part], f"{where}: {part} must not import {other}"
        elif other not in BESIDE:
            assert LAYER_OF[other] <= LAYER_OF[part], f"{where}: {part} imports {other}, which is built on it"
        assert {part, other} not in SEPARATE, f"{where}: {part} and {other} must not import each other"


def test_studies_import_the_shared_modules_of_the_lab_and_never_one_another():
    studies = {path.parent.name for path in (ROOT / "lab").glob("*/__init__.py")}
    assert {"offline", "detector", "closed_loop", "spatial", "ceiling", "evidence"} <= studies
    for module, imported, where in list_own_imports():
        if module[0] == imported[0] == "lab" and imported[1] in studies and module[1] != "evidence":
            assert module[1] == imported[1], f"{where}: {module[1]} must not import the study {imported[1]}"


def test_heavy_libraries_are_imported_by_their_packages_only():
    for (part, *_), name, where in list_imports():
        owners = OWNERS.get(name.partition(".")[0])
        assert owners is None or part in owners, f"{where}: {name} may be imported by {owners}, not by {part}"


def list_loaded(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `code`."""
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


HEAVY = set(OWNERS) | {"outlines", "bitsandbytes", "matplotlib", "gymnasium", "openai", "peft"}


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import vlm_local", set()),
        ("from vlm_local.cli import build_parser; build_parser().format_help()", set()),
        ("import vlm_local.policy, vlm_local.client, vlm_local.engines.scripted", set()),
        ("import vlm_local.wire, vlm_local.data", set()),
        ("import vlm_local.lab.statistics, vlm_local.lab.formats, vlm_local.lab.results", set()),
        ("import vlm_local.server", {"flask"}),
    ],
)
def test_a_fresh_interpreter_loads_no_more_than_it_needs(code, allowed):
    assert not list_loaded(code) & (HEAVY - allowed)


def test_the_command_line_needs_no_numpy_for_its_help():
    assert "numpy" not in list_loaded("from vlm_local.cli import build_parser; build_parser().format_help()")


def test_importing_the_package_leaves_json_and_logging_alone():
    code = (
        "import json, logging, sys; before = (json.dumps, json.loads, list(sys.path))\n"
        "import vlm_local.policy, vlm_local.client, vlm_local.wire, vlm_local.server\n"
        "assert before == (json.dumps, json.loads, list(sys.path))\n"
        "assert not logging.getLogger().handlers\n"
    )
    list_loaded(code)


def test_nothing_runs_between_fork_and_exec():
    """Popen's preexec_fn hangs for ever where another thread held a lock; processes.tie_to_parent does without."""
    assert [str(path) for path in ROOT.rglob("*.py") if "preexec_fn=" in path.read_text(encoding="utf-8")] == []


@pytest.mark.slow
def test_what_is_copied_to_a_station_is_written_for_python_3_8(tmp_path):
    project = {"include": [str(ROOT / name) for name in ("client.py", "relay.py")], "pythonVersion": "3.8"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({**project, "typeCheckingMode": "standard"}))
    command = [sys.executable, "-m", "basedpyright", "-p", str(tmp_path), "--pythonpath", sys.executable]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout
