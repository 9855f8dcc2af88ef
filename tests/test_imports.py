"""DVC does not follow imports, so the deps in dvc.yaml must name what a stage imports."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from anomaly_detection import models

ROOT = Path(__file__).parent.parent
PACKAGES = ("anomaly_detection", "stages")
STAGES = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]


def module_file(name: str) -> Path | None:
    path = ROOT.joinpath(*name.split("."))
    for candidate in (path / "__init__.py", path.with_suffix(".py")):
        if candidate.is_file():
            return candidate
    return None


def lazily_exported(package: Path) -> dict[str, str]:
    """The names that a package's `lazy_loader.attach` gives, with the submodules they are in."""
    for node in ast.walk(ast.parse(package.read_text())):
        if isinstance(node, ast.keyword) and node.arg == "submod_attrs":
            exported = ast.literal_eval(node.value)
            return {name: module for module, names in exported.items() for name in names}
    return {}


def imported_modules(path: Path) -> set[str]:
    """Modules of this project that a file imports itself, with the packages above them."""
    names, waiting = set(), []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            waiting += [(node.module, alias.name) for alias in node.names]
    while waiting:
        module, name = waiting.pop()
        names |= {module, f"{module}.{name}"}
        file = module_file(module) if module.split(".")[0] in PACKAGES else None
        if file and file.name == "__init__.py" and name in (exported := lazily_exported(file)):
            waiting.append((f"{module}.{exported[name]}", name))
    names = {name for name in names if name.split(".")[0] in PACKAGES}
    parents = {
        ".".join(parts[:i]) for name in names for parts in [name.split(".")] for i in (1, 2, 3)
    }
    return {name for name in names | parents if module_file(name)}


def transitive_files(*names: str) -> set[Path]:
    files, waiting = set(), list(names)
    while waiting:
        file = module_file(waiting.pop())
        if file not in files:
            files.add(file)
            waiting += imported_modules(file)
    return files | {ROOT / name.split(".")[0] / "__init__.py" for name in names}


# What the stages import by a model's name: these modules of the models' folders. The folders
# themselves reach DVC through checked/<category>.json.
BY_NAME = {"check": "config"} | dict.fromkeys(("pretrain", "train", "evaluate", "export"), "spec")


def reached_files(stage: str) -> set[Path]:
    files = transitive_files(f"stages.{stage}")
    for name in models.names() if stage in BY_NAME else ():
        module = f"anomaly_detection.models.{name}.{BY_NAME[stage]}"
        files |= {x for x in transitive_files(module) if models.folder(name) not in x.parents}
    return files


def named_files(dep: str) -> set[Path]:
    path = ROOT / dep
    return set(path.rglob("*.py")) if path.is_dir() else {path}


@pytest.mark.parametrize("stage", STAGES)
def test_the_deps_of_a_stage_name_what_it_imports_and_nothing_that_it_does_not_reach(stage):
    deps = [dep for dep in STAGES[stage]["deps"] if dep.split("/")[0] in PACKAGES]
    reached = reached_files(stage)
    assert reached <= set().union(*map(named_files, deps))
    assert [dep for dep in deps if not named_files(dep) & reached] == []


def test_no_stage_but_check_depends_on_the_folder_of_a_single_model():
    folders = {models.folder(name) for name in models.names()}
    for stage in set(STAGES) - {"check"}:
        for dep in STAGES[stage]["deps"]:
            assert not any(folders & {path, *path.parents} for path in named_files(dep))


def test_every_stage_is_run_as_a_module_of_its_name():
    for name, stage in STAGES.items():
        command = f"python -m stages.{name}"
        assert stage["cmd"] == command + " ${item.category}" * ("matrix" in stage)
    scripts = {path.stem for path in (ROOT / "stages").glob("[!_]*.py")}
    assert scripts - {"fitting", "live", "provenance"} == set(STAGES)  # what stages share


def module_name(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")


LIBRARY = sorted((ROOT / "anomaly_detection").rglob("*.py"))


@pytest.mark.parametrize("path", LIBRARY, ids=module_name)
def test_the_library_does_not_know_the_stages(path):
    assert not any(name.split(".")[0] in ("stages", "tools") for name in imported_modules(path))


def test_the_library_does_not_import_dvc():
    for path in LIBRARY:
        assert not re.search(r"^\s*(import|from) dvc", path.read_text(), re.MULTILINE), path


# The one-way stairs: what each room of the library may use, besides the files at its top.
MAY_USE = {
    "data": set(),
    "metrics": set(),
    "trainer": set(),
    "features": {"data"},
    "models": {"features", "trainer", "metrics"},
    "config": {"models"},
    "evaluation": {"data", "evaluator", "metrics"},
    "inference": {"data", "models", "trainer"},
    "export": {"data", "inference"},
    "report": {"data", "metrics"},
    "line": {"data", "inference"},
}
FOUNDATION = {"errors", "files", "parameters", "progress"}


@pytest.mark.parametrize("room", MAY_USE)
def test_a_room_uses_only_the_rooms_below_it(room):
    used = {
        name.split(".")[1]
        for path in (ROOT / "anomaly_detection" / room).rglob("*.py")
        for name in imported_modules(path)
        if name.count(".")
    }
    assert used - FOUNDATION - {room} <= MAY_USE[room]


def test_the_foundation_uses_no_room():
    for name in FOUNDATION:
        used = imported_modules(ROOT / "anomaly_detection" / f"{name}.py")
        assert used <= {"anomaly_detection", *(f"anomaly_detection.{x}" for x in FOUNDATION)}


NAMES_OTHERS = models.folder("ensemble") / "config.py"  # its default members


@pytest.mark.parametrize("name", models.names())
def test_a_model_is_named_nowhere_but_in_its_folder(name):
    """Nothing outside asks which model it is."""
    for path in [*LIBRARY, *(ROOT / "stages").glob("*.py")]:
        if models.folder(name) not in path.parents and path != NAMES_OTHERS:
            code = ast.unparse(without_docstrings(ast.parse(path.read_text())))
            assert not re.search(rf"\b{name}\b", code, re.IGNORECASE), path


def without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            node.body = body[1:] or [ast.Pass()]
    return tree


@pytest.mark.parametrize(
    "what",
    [
        "import stages.check; stages.check.load_config()",
        "from anomaly_detection import models\n"
        "for name in models.names(): models.parameters(name)().check()",
    ],
    ids=["params.yaml", "defaults"],
)
def test_checking_parameters_imports_no_pytorch(what):
    code = f"{what}\nimport sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
