"""params.yaml: what it may say, and what a category's model is told."""

from pathlib import Path
from typing import Any

import pytest
from builders.projects import ABSENT, PARAMS, parameters, write_params

from anomaly_detection import models
from anomaly_detection.config import ConfigError, load_config


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(changes: dict[str, Any]):
    write_params(changes)
    return load_config()


def load_text(key: str, line: str):
    """Loads the project's params.yaml with the line of one key replaced by other text."""
    lines = PARAMS.read_text(encoding="utf-8").splitlines()
    (position,) = [i for i, old in enumerate(lines) if old.strip().startswith(f"{key}:")]
    lines[position] = line
    Path("params.yaml").write_text("\n".join(lines), encoding="utf-8")
    return load_config()


def fault(changes: dict[str, Any]) -> str:
    """The one line by which the file is refused."""
    with pytest.raises(ConfigError) as error:
        load(changes)
    (line,) = str(error.value).splitlines()
    return line


def by_path(sections: dict[str, dict]) -> dict[str, Any]:
    return {f"{name}.{key}": x for name, section in sections.items() for key, x in section.items()}


def told(config, category="mono") -> dict[str, Any]:
    """What a category's model is told, by the paths of the parameters."""
    name, values = config.for_category(category)
    return by_path(values.by_section(name))


def test_params_of_the_project_are_valid():
    config, written = load_config(PARAMS), parameters()
    assert config._own == {name: written.pop(name) for name in models.names() if name in written}
    assert config.model_dump() == written


@pytest.mark.parametrize("name", models.names())
def test_every_value_may_be_the_models_own(name):
    assert told(load({"model.name": name})) == by_path(models.parameters(name)().by_section(name))


@pytest.mark.parametrize("changes", [{"stfpm.hard_fraction": "auto"}, {"stfpm": ABSENT}])
def test_auto_and_an_absent_section_of_a_model_leave_its_own_value(changes):
    assert told(load(changes))["stfpm.hard_fraction"] == 0.1


def test_values_are_read_as_yaml_1_2_has_them():
    assert told(load_text("weight_decay", "  weight_decay: 1e-3"))["training.weight_decay"] == 0.001
    for word in ("no", "yes", "on", "off"):
        assert told(load_text("backbone", f"  backbone: {word}"))["model.backbone"] == word


def test_values_at_the_edges_of_their_rules_are_taken():
    edges = {
        "training.early_stopping_patience": None,
        "stfpm.hard_fraction": 1,
        "hardware.device": "cuda:1",
        "data.categories": ["no", "metal_nut", "x-1.5+b", "ß"],
        "model.layers": ["layer1"],
        "model.top_fraction": 1,
        "data.image_size": 32,
        "data.validation_fraction": 0.5,
        "data.calibration_fraction": 0.4,
        "data.tile_size": 64,
        "data.tile_overlap": 32,
        "training.batch_size": 6,
        "training.num_processes": 3,
    }
    config = load(edges)
    read = told(config, "no") | by_path(config.model_dump(exclude={"model", "training"}))
    assert {key: read[key] for key in edges} == edges
    assert type(read["stfpm.hard_fraction"]) is float
    assert told(load({"model.layers": None}))["model.layers"] is None


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("training.learnin_rate", "training.learning_rate"),
        ("training.backbone", "model.backbone"),
        ("training.hard_fraction", "stfpm.hard_fraction"),
        ("training.device", "hardware.device"),
        ("stfpm.hard_fractoin", "stfpm.hard_fraction"),
        ("patchcore.bank_siz", "patchcore.bank_size"),  # of a model that is not used
        ("own", None),
        ("data.catgories", "data.categories"),
        ("learning_rate", "training.learning_rate"),
        ("trainning", "training"),
        ("plots.zzz", None),
        ("overrides.widget.modle", "overrides.widget.model"),
        ("overrides.widget.training.num_epoch", "overrides.widget.training.num_epochs"),
        ("overrides.widget.training.backbone", "overrides.widget.model.backbone"),
        ("overrides.widget.stfpm.momentun", None),
    ],
)
def test_unknown_key_names_the_nearest_valid_one(key, nearest):
    line = fault({key: 1})
    assert line.startswith(f"params.yaml: {key} is not a parameter; did you mean ")
    assert nearest is None or line.endswith(f"did you mean {nearest}?")


@pytest.mark.parametrize("section", ["data", "evaluation", "export", "hardware", "plots"])
def test_overrides_of_what_all_categories_share_are_refused(section):
    line = fault({f"overrides.widget.{section}.seed": 1})
    assert line.startswith(f"params.yaml: overrides.widget.{section} is not a")


RATE, EPOCHS, PATIENCE = (
    f"training.{name}" for name in ("learning_rate", "num_epochs", "early_stopping_patience")
)
MODELS = "must be 'efficientad', 'ensemble', 'gaussian', 'patchcore' or 'stfpm'"
PRECISIONS = "must be 'auto', 'float32', 'bfloat16' or 'float16'"
WRONG = {
    "must be a valid number": [
        *((RATE, value) for value in ("abc", True, None)),
        (f"overrides.widget.{RATE}", "abc"),
    ],
    "must be greater than 0": [
        *((RATE, 0), ("stfpm.hard_fraction", 0), ("data.pixel_size", 0)),
        ("evaluation.false_reject_rate", 0),
    ],
    "must be a finite number": [(RATE, float("nan")), (RATE, float("inf"))],
    "must be a valid integer": [(EPOCHS, 2.0), (EPOCHS, "2")],
    "must be greater than or equal to 1": [
        *((EPOCHS, 0), ("patchcore.bank_size", 0), (PATIENCE, 0), ("plots.gallery_size", 0))
    ],
    "must be less than or equal to 1": [
        *(("stfpm.hard_fraction", 2), ("overrides.widget.stfpm.hard_fraction", 2)),
        ("evaluation.aupro_limit", 1.1),
    ],
    "must be a section of keys and values": [
        *(("stfpm", 3), ("stfpm", None), ("training", 3), ("model", None), ("data", None)),
        *(("overrides", None), ("overrides.widget", 3), ("overrides.widget.training", 3)),
    ],
    "must be greater than or equal to 0": [("training.seed", -1), ("data.tile_overlap", -1)],
    "must be less than 4294967296": [("training.seed", 2**32)],
    "must be auto, cpu, cuda, cuda:<number> or mps": [
        *(("hardware.device", "gpu"), ("hardware.device", "cuda:"))
    ],
    PRECISIONS: [("training.precision", "half"), ("evaluation.precision", "half")],
    "must be greater than or equal to 32": [("data.image_size", 31), ("data.tile_size", 31)],
    "must be less than or equal to 4096": [("data.image_size", 4097)],
    "must be left, top, right, bottom, with left < right and top < bottom": [
        ("data.crop", [4, 0, 4, 9])
    ],
    "must have at least 4 items after validation, not 3": [("data.crop", [1, 2, 3])],
    "must be a regular expression, but missing ), unterminated subpattern at position 0": [
        ("data.group", "(a")
    ],
    "must be 'auto', 'mvtec', 'btad', 'visa', 'csv' or 'folder'": [("data.layout", "coco")],
    "must be greater than or equal to 9": [("data.bit_depth", 8)],
    "must be less than 1": [("data.validation_fraction", 1.0)],
    "must be less than 1 together with data.validation_fraction": [
        ("data.calibration_fraction", 0.85)
    ],
    "must be a valid string": [("data.root", 3)],
    "must be a valid list": [("data.categories", "mono")],
    "must have at least 1 item after validation, not 0": [
        *(("data.categories", []), ("model.layers", []))
    ],
    "must not name a category twice": [("data.categories", ["a", "a"])],
    "must not name a format twice": [("export.formats", ["onnx", "onnx"])],
    "must be 'false_reject_rate', 'adaptive', 'quantile' or 'manual'": [
        ("evaluation.threshold_method", "best")
    ],
    "must be 'cividis', 'inferno', 'magma', 'plasma', 'viridis' or 'gray'": [
        ("plots.colormap", "jet")
    ],
    MODELS: [
        *(("model.name", "padim"), ("overrides.widget.model.name", "padim")),
        *(("overrides.widget.model.name", [1]), ("model.name", ["stfpm"])),
    ],
}


@pytest.mark.parametrize(
    ("rule", "key", "value"), [(rule, *case) for rule, cases in WRONG.items() for case in cases]
)
def test_wrong_value_is_one_line_with_path_rule_and_value(rule, key, value):
    assert fault({key: value}) == f"params.yaml: {key} {rule}, got {value!r}."


@pytest.mark.parametrize("key", ["training", "overrides", "hardware", "data.seed"])
def test_what_is_missing_is_named(key):
    assert fault({key: ABSENT}) == f"params.yaml: {key} is missing."


@pytest.mark.parametrize(
    "name", ["a b", "a@b", "a/b", "a\\b", "", ".", "..", ".hidden", "-a", "a,b", "mean", "a\n"]
)
def test_names_that_cannot_be_categories_are_refused(name):
    line = fault({"data.categories": ["mono", name]})
    assert line.startswith("params.yaml: data.categories.1 must ")
    assert line.endswith(f"got {name!r}.")


def test_values_that_do_not_go_together_are_refused():
    line = fault({"data.tile_size": 64, "data.tile_overlap": 33})
    assert "data.tile_overlap must be at most half of data.tile_size, got 33." in line
    line = fault({"training.batch_size": 6, "training.num_processes": 4})
    assert "training.num_processes must divide training.batch_size, got 4" in line


def test_every_wrong_value_gets_a_line():
    changes = {"data.root": 1, "model.nam": "stfpm", "stfpm.hard_fraction": 7}
    with pytest.raises(ConfigError) as error:
        load(changes | {"evaluation.quantile": ABSENT})
    assert sorted(str(error.value).splitlines()) == [
        "params.yaml: data.root must be a valid string, got 1.",
        "params.yaml: evaluation.quantile is missing.",
        "params.yaml: model.nam is not a parameter; did you mean model.name?",
        "params.yaml: stfpm.hard_fraction must be less than or equal to 1, got 7.",
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, r"must be a readable YAML file: .*No such"),
        (b"training: [", "must be a readable YAML file"),
        (b"a: 1\nb: 2\na: 3\n", 'duplicate key "a"'),
        (b"stfpm:\n  x: 0.9\n  x: 0.8\n", 'found duplicate key "x"'),
        (b"data: !!python/object:os.system x", "must be a readable YAML file"),
        (b"\xff\xfe\x00", "must be a readable YAML file"),
        (b"", "must be a section of keys and values, got None."),
        (b"- data\n", r"must be a section of keys and values, got \['data'\]."),
    ],
)
def test_file_that_holds_no_parameters_is_refused_in_one_line(tmp_path, content, reason):
    path = tmp_path / "other.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as error:
        load_config(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))


def test_overrides_change_model_and_training_of_their_category_only():
    config = load(
        {
            "training.num_epochs": 20,
            "model.top_fraction": 0.5,
            "overrides.widget.training.num_epochs": 3,
            "overrides.widget.model.top_fraction": 0,
            "overrides.widget.stfpm.hard_fraction": 0.5,
        }
    )
    changed = {"training.num_epochs": 3, "model.top_fraction": 0, "stfpm.hard_fraction": 0.5}
    assert told(config, "widget") == told(config, "gadget") | changed
    assert told(config, "gadget")["training.num_epochs"] == 20


def test_a_category_with_another_model_starts_from_the_values_of_that():
    """The values of the file are for its own model, but the seed is for all."""
    config = load(
        {
            "training.learning_rate": 0.1,
            "training.batch_size": 7,
            "training.seed": 5,
            "patchcore.bank_size": 100,
            "overrides.widget.model.name": "patchcore",
            "overrides.widget.model.top_fraction": 0.5,
        }
    )
    name, values = config.for_category("widget")
    assert name == "patchcore"
    assert values == models.parameters("patchcore")(seed=5, bank_size=100, top_fraction=0.5)
    assert told(config, "gadget")["training.learning_rate"] == 0.1


@pytest.mark.parametrize(("key", "value"), [(RATE, 0.1), (EPOCHS, 3), (PATIENCE, None)])
@pytest.mark.parametrize("override", ["", "overrides.widget."])
def test_what_a_model_has_no_use_for_must_be_auto(key, value, override):
    reason = f"must be auto: patchcore is not trained by gradients, got {value}."
    found = fault({f"{override}model.name": "patchcore", f"{override}{key}": value})
    assert found == f"params.yaml: {override}{key} {reason}"


def test_configuration_cannot_be_changed_after_its_validation():
    with pytest.raises(ValueError, match="frozen"):
        load({}).for_category("mono")[1].num_epochs = 0
