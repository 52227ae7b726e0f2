"""The house's rules about imports, held by reading the code and by what a fresh interpreter loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vlm_local

ROOT = Path(vlm_local.__file__).parent

# Only downwards: a module imports its own floor or one below.
FLOORS = (
    {"errors", "types", "files", "logs", "plain", "interrupts", "processes", "progress"},
    {"provenance", "grammar", "actions", "primitives", "bounds", "wire"},
    {"decoding", "prompts", "models", "checkpoint", "machine"},
    {"engines"},
    {"answers", "policy", "inspect_robots_policy", "safety", "client", "remote_policy", "assembly"},
    {"sim"},
    {"server", "lab", "training", "bench", "doctor"},
    {"cli", "__main__"},
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
STRANGERS = ({"server", "lab"}, {"server", "sim"})
OWNERS = {
    "torch": {"engines", "decoding", "training", "bench", "machine"},
    "transformers": {"engines", "decoding", "training", "bench", "machine"},
    "flask": {"server"},
    "mujoco": {"sim"},
    "pyarrow": {"data"},
    "av": {"data"},
}


def _imports():
    """(module's part, imported name, where) of every import statement in the package."""
    for path in sorted(ROOT.rglob("*.py")):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom) and node.module == "vlm_local":
                yield from ((part, f"vlm_local.{alias.name}", where) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                yield part, node.module, where
            elif isinstance(node, ast.Import):
                yield from ((part, alias.name, where) for alias in node.names)


def test_imports_go_downwards():
    for part, name, where in _imports():
        package, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if package != "vlm_local" or other in ("", "__version__", "data", part) or part == "__init__":
            continue
        if part == "data":
            assert other in ("types", "primitives", "errors", "files"), (
                f"{where}: data stands aside, yet imports {name}"
            )
            continue
        assert FLOOR_OF[other] <= FLOOR_OF[part], f"{where}: {part} imports {name}, which is above it"
        assert {part, other} not in STRANGERS, f"{where}: {part} and {other} must not know each other"


def test_heavy_libraries_stay_in_their_rooms():
    for part, name, where in _imports():
        owners = OWNERS.get(name.partition(".")[0])
        assert owners is None or part in owners, f"{where}: {name} belongs to {owners}, not to {part}"


def _loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `code`."""
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


HEAVY = set(OWNERS) | {"outlines", "bitsandbytes", "matplotlib", "gymnasium", "openai", "peft"}


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import vlm_local", set()),
        ("from vlm_local.cli import build_parser; build_parser()", set()),
        ("import vlm_local.policy, vlm_local.policy, vlm_local.client, vlm_local.engines.scripted", set()),
        ("import vlm_local.wire, vlm_local.data", set()),
        ("import vlm_local.server", {"flask"}),
    ],
)
def test_a_fresh_interpreter_loads_no_more_than_it_needs(code, allowed):
    assert not _loaded_by(code) & (HEAVY - allowed)


def test_the_command_line_and_the_package_do_without_numpy():
    assert "numpy" not in _loaded_by("from vlm_local.cli import build_parser; build_parser()")


def test_importing_the_package_leaves_json_and_logging_alone():
    code = (
        "import json, logging, sys; before = (json.dumps, json.loads, list(sys.path))\n"
        "import vlm_local.policy, vlm_local.client, vlm_local.wire, vlm_local.server\n"
        "assert before == (json.dumps, json.loads, list(sys.path))\n"
        "assert not logging.getLogger().handlers\n"
    )
    _loaded_by(code)
