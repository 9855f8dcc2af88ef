from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from anomaly_detection import models
from anomaly_detection.config import ConfigError, load_config

PARAMS = Path(__file__).parents[1] / "params.yaml"
ABSENT = object()
MODELS = "'efficientad', 'ensemble', 'gaussian', 'patchcore' or 'stfpm'"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads the project's params.yaml with some values changed, by their dotted paths."""
    monkeypatch.chdir(tmp_path)

    def load_changed(changes: dict[str, Any]):
        yaml = YAML(typ="safe", pure=True)
        values = yaml.load(PARAMS.read_text(encoding="utf-8"))
        for path, value in changes.items():
            *parents, key = path.split(".")
            section = values
            for parent in parents:
                section = section.setdefault(parent, {})
            if value is ABSENT:
                del section[key]
            else:
                section[key] = value
        yaml.dump(values, Path("params.yaml"))
        return load_config()

    return load_changed


@pytest.fixture
def load_text(tmp_path, monkeypatch):
    """Loads the project's params.yaml with the line of one key replaced by other text."""
    monkeypatch.chdir(tmp_path)

    def load_replaced(key: str, line: str):
        lines = PARAMS.read_text(encoding="utf-8").splitlines()
        (position,) = [i for i, old in enumerate(lines) if old.strip().startswith(f"{key}:")]
        lines[position] = line
        Path("params.yaml").write_text("\n".join(lines), encoding="utf-8")
        return load_config()

    return load_replaced


def flat(config):
    """The sections that do not depend on the model, by the paths of the parameters."""
    return {
        f"{section}.{key}": value
        for section in ("data", "evaluation", "export", "hardware", "plots")
        for key, value in getattr(config, section).model_dump().items()
    }


def lines_of(error: pytest.ExceptionInfo) -> list[str]:
    return str(error.value).splitlines()


def told(config, category="mono"):
    """What a category's model is told, by the paths of the parameters."""
    name, parameters = config.for_category(category)
    return {
        f"{section}.{key}": value
        for section, values in parameters.by_section(name).items()
        for key, value in values.items()
    }


def test_params_of_the_project_are_valid():
    config = load_config(PARAMS)
    written = YAML(typ="safe", pure=True).load(PARAMS.read_text(encoding="utf-8"))
    read = config.model_dump()
    assert config._own == {name: written.pop(name) for name in models.names() if name in written}
    assert read == written


@pytest.mark.parametrize("name", models.names())
def test_every_value_may_be_the_models_own(load, name):
    config = load({"model.name": name})
    assert told(config) == {
        f"{section}.{key}": value
        for section, values in models.parameters(name)().by_section(name).items()
        for key, value in values.items()
    }


def test_auto_in_the_section_of_a_model_is_its_own_value(load):
    assert told(load({"stfpm.hard_fraction": "auto"}))["stfpm.hard_fraction"] == 0.1


def test_absent_sections_of_single_models_leave_their_own_values(load):
    assert told(load({"stfpm": ABSENT}))["stfpm.hard_fraction"] == 0.1


def test_exponents_without_a_point_are_floats(load_text):
    config = load_text("weight_decay", "  weight_decay: 1e-3")
    assert told(config)["training.weight_decay"] == 0.001


@pytest.mark.parametrize("word", ["no", "yes", "on", "off"])
def test_words_that_old_yaml_read_as_booleans_are_strings(load_text, word):
    assert told(load_text("backbone", f"  backbone: {word}"))["model.backbone"] == word


@pytest.mark.parametrize(
    ("key", "value", "read"),
    [
        ("training.early_stopping_patience", None, None),
        ("stfpm.hard_fraction", 1, 1.0),
        ("hardware.device", "cuda:1", "cuda:1"),
        (
            "data.categories",
            ["no", "metal_nut", "x-1.5+b", "ß"],
            ["no", "metal_nut", "x-1.5+b", "ß"],
        ),
        ("model.layers", ["layer1"], ["layer1"]),
        ("model.layers", None, None),
        ("model.top_fraction", 1, 1.0),
        ("data.image_size", 32, 32),
    ],
)
def test_values_at_the_edges_of_their_rules_are_taken(load, key, value, read):
    config = load({key: value})
    assert (told(config) | flat(config))[key] == read


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("training.learnin_rate", "training.learning_rate"),
        ("training.backbone", "model.backbone"),
        ("training.hard_fraction", "stfpm.hard_fraction"),
        ("training.device", "hardware.device"),
        ("stfpm.hard_fractoin", "stfpm.hard_fraction"),
        ("own", None),
        ("data.catgories", "data.categories"),
        ("learning_rate", "training.learning_rate"),
        ("trainning", "training"),
        ("plots.zzz", None),
        ("overrides.widget.modle", "overrides.widget.model"),
        ("overrides.widget.training.num_epoch", "overrides.widget.training.num_epochs"),
        ("overrides.widget.training.backbone", "overrides.widget.model.backbone"),
    ],
)
def test_unknown_key_names_the_nearest_valid_one(load, key, nearest):
    with pytest.raises(ConfigError) as error:
        load({key: 1})
    (line,) = lines_of(error)
    assert line.startswith(f"params.yaml: {key} is not a parameter; did you mean ")
    if nearest:
        assert line.endswith(f"did you mean {nearest}?")


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("training.learning_rate", "abc", "must be a valid number, got 'abc'."),
        ("training.learning_rate", 0, "must be greater than 0, got 0."),
        ("training.learning_rate", float("nan"), "must be a finite number, got nan."),
        ("training.learning_rate", float("inf"), "must be a finite number, got inf."),
        ("training.learning_rate", True, "must be a valid number, got True."),
        ("training.learning_rate", None, "must be a valid number, got None."),
        ("training.num_epochs", 2.0, "must be a valid integer, got 2.0."),
        ("training.num_epochs", "2", "must be a valid integer, got '2'."),
        ("training.num_epochs", 0, "must be greater than or equal to 1, got 0."),
        ("stfpm.hard_fraction", 2, "must be less than or equal to 1, got 2."),
        ("stfpm.hard_fraction", 0, "must be greater than 0, got 0."),
        ("patchcore.bank_size", 0, "must be greater than or equal to 1, got 0."),
        ("stfpm", 3, "must be a section of keys and values, got 3."),
        ("training.seed", -1, "must be greater than or equal to 0, got -1."),
        ("training.seed", 2**32, "must be less than 4294967296, got 4294967296."),
        ("training.early_stopping_patience", 0, "must be greater than or equal to 1, got 0."),
        ("hardware.device", "gpu", "must be auto, cpu, cuda, cuda:<number> or mps, got 'gpu'."),
        ("hardware.device", "cuda:", "must be auto, cpu, cuda, cuda:<number> or mps"),
        ("training.precision", "half", "must be 'auto', 'float32', 'bfloat16' or 'float16', got"),
        ("evaluation.precision", "half", "must be 'auto', 'float32', 'bfloat16' or 'float16', got"),
        ("data.image_size", 31, "must be greater than or equal to 32, got 31."),
        ("data.image_size", 4097, "must be less than or equal to 4096, got 4097."),
        ("data.crop", [4, 0, 4, 9], "must be left, top, right, bottom, with left < right"),
        ("data.crop", [1, 2, 3], "data.crop must have at least 4 items"),
        ("data.tile_size", 31, "must be greater than or equal to 32, got 31."),
        ("data.tile_overlap", -1, "must be greater than or equal to 0, got -1."),
        ("data.pixel_size", 0, "must be greater than 0, got 0."),
        ("data.per_position", True, "must be false without data.tile_size, got True."),
        (
            "data.group",
            "(a",
            "data.group must be a regular expression, but missing ), unterminated",
        ),
        ("data.layout", "coco", "must be 'auto', 'mvtec', 'btad', 'visa', 'csv' or 'folder'"),
        ("data.bit_depth", 8, "must be greater than or equal to 9, got 8."),
        ("data.validation_fraction", 1.0, "must be less than 1, got 1.0."),
        ("data.root", 3, "must be a valid string, got 3."),
        ("data.categories", "mono", "must be a valid list, got 'mono'."),
        ("data.categories", [], "at least 1 item"),
        ("data.categories", ["a", "a"], "must not name a category twice, got ['a', 'a']."),
        ("model.layers", [], "at least 1 item"),
        (
            "evaluation.threshold_method",
            "best",
            "must be 'false_reject_rate', 'adaptive', 'quantile' or",
        ),
        ("evaluation.false_reject_rate", 0, "must be greater than 0, got 0."),
        ("evaluation.aupro_limit", 1.1, "must be less than or equal to 1, got 1.1."),
        ("plots.gallery_size", 0, "must be greater than or equal to 1, got 0."),
        ("plots.colormap", "jet", "must be "),
        ("training", 3, "must be a section of keys and values, got 3."),
        ("data", None, "must be a section of keys and values, got None."),
        ("overrides", None, "must be a"),
        ("overrides.widget", 3, "must be a section of keys and values, got 3."),
        ("training", ABSENT, "is missing."),
        ("overrides", ABSENT, "is missing."),
        ("data.seed", ABSENT, "is missing."),
        ("hardware", ABSENT, "is missing."),
        ("overrides.widget.training.learning_rate", "abc", "must be a valid number, got 'abc'."),
        (
            "overrides.widget.stfpm.hard_fraction",
            2,
            "must be less than or equal to 1, got 2.",
        ),
        ("model.name", "padim", f"must be {MODELS}, got 'padim'."),
        ("overrides.widget.model.name", "padim", f"must be {MODELS}, got 'padim'."),
        ("overrides.widget.training", 3, "must be a"),
        ("overrides.widget.model.name", [1], f"must be {MODELS}, got [1]."),
        ("model.name", ["stfpm"], f"must be {MODELS}, got ['stfpm']."),
        ("model", None, "must be a section of keys and values, got None."),
        ("stfpm", None, "must be a section of keys and values, got None."),
    ],
)
def test_wrong_value_is_one_line_with_path_rule_and_value(load, key, value, rule):
    with pytest.raises(ConfigError) as error:
        load({key: value})
    (line,) = lines_of(error)
    assert line.startswith(f"params.yaml: {key} ")
    assert rule in line


@pytest.mark.parametrize(
    "name", ["a b", "a@b", "a/b", "a\\b", "", ".", "..", ".hidden", "-a", "a,b", "mean", "a\n"]
)
def test_names_that_cannot_be_categories_are_refused(load, name):
    with pytest.raises(ConfigError) as error:
        load({"data.categories": ["mono", name]})
    (line,) = lines_of(error)
    assert line.startswith("params.yaml: data.categories.1 must ")
    assert line.endswith(f"got {name!r}.")


def test_fractions_of_the_splits_must_leave_images_to_fit(load):
    assert load({"data.validation_fraction": 0.5, "data.calibration_fraction": 0.4})
    with pytest.raises(ConfigError, match=r"data.calibration_fraction must be less than 1 togeth"):
        load({"data.validation_fraction": 0.5, "data.calibration_fraction": 0.5})


def test_tiles_share_at_most_half_with_a_neighbour(load):
    assert load({"data.tile_size": 64, "data.tile_overlap": 32, "data.per_position": True})
    with pytest.raises(ConfigError, match=r"tile_overlap must be at most half of data.tile_size"):
        load({"data.tile_size": 64, "data.tile_overlap": 33})


def test_processes_must_divide_the_batch(load):
    assert load({"training.batch_size": 6, "training.num_processes": 3})
    with pytest.raises(ConfigError, match=r"num_processes must divide training.batch_size, got 4"):
        load({"training.batch_size": 6, "training.num_processes": 4})


def test_every_wrong_value_gets_a_line(load):
    changes = {
        "data.root": 1,
        "model.nam": "stfpm",
        "stfpm.hard_fraction": 7,
        "evaluation.quantile": ABSENT,
    }
    with pytest.raises(ConfigError) as error:
        load(changes)
    assert sorted(lines_of(error)) == [
        "params.yaml: data.root must be a valid string, got 1.",
        "params.yaml: evaluation.quantile is missing.",
        "params.yaml: model.nam is not a parameter; did you mean model.name?",
        "params.yaml: stfpm.hard_fraction must be less than or equal to 1, got 7.",
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"training: [", "must be a readable YAML file"),
        (b"a: 1\nb: 2\na: 3\n", 'duplicate key "a"'),
        (b"data: !!python/object:os.system x", "must be a readable YAML file"),
        (b"\xff\xfe\x00", "must be a readable YAML file"),
        (b"", "must be a section of keys and values, got None."),
        (b"- data\n", r"must be a section of keys and values, got \['data'\]."),
    ],
)
def test_file_that_holds_no_parameters_is_refused_in_one_line(tmp_path, content, reason):
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as error:
        load_config(path)
    assert len(lines_of(error)) == 1
    assert str(error.value).startswith(str(path))


def test_absent_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"gone.yaml must be a readable YAML file: .*No such"):
        load_config(tmp_path / "gone.yaml")


def test_key_written_twice_is_refused(load_text):
    with pytest.raises(ConfigError, match='found duplicate key "hard_fraction"'):
        load_text("hard_fraction", "  hard_fraction: 0.9\n  hard_fraction: 0.8")


def test_overrides_change_model_and_training_of_their_category_only(load):
    config = load(
        {
            "training.num_epochs": 20,
            "model.top_fraction": 0.5,
            "overrides.widget.training.num_epochs": 3,
            "overrides.widget.model.top_fraction": 0,
        }
    )
    changed = {"training.num_epochs": 3, "model.top_fraction": 0}
    assert told(config, "widget") == told(config, "gadget") | changed
    assert told(config, "gadget")["training.num_epochs"] == 20


def test_a_category_with_another_model_starts_from_the_values_of_that(load):
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
    name, parameters = config.for_category("widget")
    accepted = models.parameters("patchcore")
    assert (name, type(parameters)) == ("patchcore", accepted)
    assert parameters == accepted(seed=5, bank_size=100, top_fraction=0.5)
    assert told(config, "gadget")["training.learning_rate"] == 0.1


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("training.learning_rate", 0.1, "patchcore is not trained by gradients, got 0.1."),
        ("training.num_epochs", 3, "patchcore is not trained by gradients, got 3."),
        ("training.early_stopping_patience", None, "patchcore is not trained by gradients"),
    ],
)
@pytest.mark.parametrize("override", ["", "overrides.widget."])
def test_what_a_model_has_no_use_for_must_be_auto(load, key, value, reason, override):
    with pytest.raises(ConfigError) as error:
        load({f"{override}model.name": "patchcore", f"{override}{key}": value})
    (line,) = lines_of(error)
    assert line.startswith(f"params.yaml: {override}{key} must be auto: {reason}")


def test_the_section_of_a_model_that_is_not_used_is_checked_all_the_same(load):
    assert load({"model.name": "stfpm", "patchcore.bank_size": 100})
    with pytest.raises(ConfigError, match=r"patchcore.bank_siz is not a parameter; did you mean"):
        load({"patchcore.bank_siz": 100})


def test_overrides_may_hold_the_section_of_a_model(load):
    config = load({"overrides.widget.stfpm.hard_fraction": 0.5})
    assert told(config, "widget")["stfpm.hard_fraction"] == 0.5
    with pytest.raises(ConfigError, match=r"overrides.widget.stfpm.momentun is not a parameter"):
        load({"overrides.widget.stfpm.momentun": 0.5})


@pytest.mark.parametrize("section", ["data", "evaluation", "export", "hardware", "plots"])
def test_overrides_of_what_all_categories_share_are_refused(load, section):
    with pytest.raises(ConfigError, match=f"params.yaml: overrides.widget.{section} is not a"):
        load({f"overrides.widget.{section}.seed": 1})


def test_configuration_cannot_be_changed_after_its_validation(load):
    config = load({})
    with pytest.raises(ValueError, match="frozen"):
        config.for_category("mono")[1].num_epochs = 0
