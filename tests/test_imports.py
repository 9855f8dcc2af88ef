"""DVC does not follow imports, so the deps in dvc.yaml must name what a stage imports."""

import ast
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
PACKAGES = ("anomaly_detection", "stages")
STAGES = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]


def module_file(name: str) -> Path | None:
    path = ROOT.joinpath(*name.split("."))
    for candidate in (path / "__init__.py", path.with_suffix(".py")):
        if candidate.is_file():
            return candidate
    return None


def imported_modules(path: Path) -> set[str]:
    """Modules of this project that a file imports itself, with the packages above them."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    names = {name for name in names if name.split(".")[0] in PACKAGES}
    parents = {
        ".".join(parts[:i]) for name in names for parts in [name.split(".")] for i in (1, 2, 3)
    }
    return {name for name in names | parents if module_file(name)}


def transitive_files(name: str) -> set[Path]:
    files, waiting = set(), [name]
    while waiting:
        file = module_file(waiting.pop())
        if file not in files:
            files.add(file)
            waiting += imported_modules(file)
    return files | {ROOT / name.split(".")[0] / "__init__.py"}


def named_files(stage: str) -> set[Path]:
    files = set()
    for dep in STAGES[stage]["deps"]:
        path = ROOT / dep
        if dep.split("/")[0] in PACKAGES:
            files |= set(path.rglob("*.py")) if path.is_dir() else {path}
    return files


@pytest.mark.parametrize("stage", STAGES)
def test_the_deps_of_a_stage_are_exactly_what_it_imports(stage):
    assert named_files(stage) == transitive_files(f"stages.{stage}")


def test_every_stage_is_run_as_a_module_of_its_name():
    for name, stage in STAGES.items():
        command = f"python -m stages.{name}"
        assert stage["cmd"] == command + " ${item.category}" * ("matrix" in stage)
    scripts = {path.stem for path in (ROOT / "stages").glob("[!_]*.py")}
    # Two are for the command line, and provenance is a part of report.
    assert scripts - {"compare", "offline_plots", "provenance"} == set(STAGES)


def module_name(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "anomaly_detection").rglob("*.py")), ids=module_name
)
def test_the_library_does_not_know_the_stages(path):
    assert not any(name.startswith("stages") for name in imported_modules(path))


@pytest.mark.parametrize("name", ["config", "seed", "trainer", "metrics", "data"])
def test_the_foundations_import_no_sibling(name):
    path = ROOT / "anomaly_detection" / name
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    own = {"anomaly_detection", "anomaly_detection.errors"}
    imported = set().union(*map(imported_modules, files)) - own
    assert all(module.startswith(f"anomaly_detection.{name}") for module in imported)
