"""Feature pyramids: their levels, weights and errors, and the folding of BatchNorm."""

import os
from functools import cache

import huggingface_hub
import pytest
import timm
import torch
from skimage import data
from torchvision.transforms.functional import center_crop, resize

from anomaly_detection.features.pyramid import FeaturePyramid, available_levels, check_backbone
from anomaly_detection.features.weights import BUNDLED, BackboneError, _bundled

SMALL = "test_resnet"  # timm's own, 0.5 million parameters, with the level names of a ResNet
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def features(pyramid):
    return pyramid.eval()(IMAGES)


@torch.no_grad()
def features_inside(model, layers):
    """What the named modules of timm's whole classifier return."""
    found = {}
    for layer in layers:
        model.get_submodule(layer).register_forward_hook(
            lambda _module, _inputs, output, layer=layer: found.update({layer: output})
        )
    model.eval()(IMAGES)
    return found


def batch_norms(model):
    return [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]


def with_statistics(model):
    """The model with other running statistics than those of a fresh one."""
    torch.manual_seed(0)
    for norm in batch_norms(model):
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 2)
    return model


@cache
def small_classifier():
    torch.manual_seed(0)
    return with_statistics(timm.create_model(SMALL))


@cache
def bundled_classifier():
    model = timm.create_model(BUNDLED)
    model.load_state_dict(_bundled(BUNDLED))
    return model.eval()


def weights_file(folder, content):
    torch.save(content, folder / "weights.pth")
    return str(folder / "weights.pth")


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert all(tensor.abs().max() > 0 for tensor in one.values())


def assert_small_features(pyramid):
    """Those of the small classifier whose state dict was saved."""
    assert_same(features(pyramid), features_inside(small_classifier(), pyramid.layers))


def refusal(backbone, layers=None, weights="random"):
    """The error of making a pyramid, which the check finds without making it."""
    with pytest.raises(BackboneError) as checked:
        check_backbone(backbone, layers, weights)
    with pytest.raises(BackboneError) as made:
        FeaturePyramid(backbone, layers, weights)
    assert str(checked.value) == str(made.value)
    return str(made.value)


RESNET18 = {"layer1": 64, "layer2": 128, "layer3": 256}
WIDE = {"layer1": 256, "layer2": 512, "layer3": 1024}


@pytest.mark.parametrize(
    ("backbone", "channels"),
    [
        (BUNDLED, {"blocks.1": 24, "blocks.2": 40, "blocks.4": 112}),
        ("resnet18", RESNET18),
        pytest.param("wide_resnet50_2", WIDE, marks=pytest.mark.exhaustive),
    ],
)
def test_default_levels_are_those_at_strides_4_8_and_16(backbone, channels):
    pyramid = FeaturePyramid(backbone)
    shapes = {name: tuple(level.shape) for name, level in features(pyramid).items()}
    assert pyramid.layers == list(channels)
    assert shapes == {
        name: (2, channels[name], 64 // stride, 64 // stride)
        for name, stride in zip(channels, (4, 8, 16), strict=True)
    }


@pytest.mark.parametrize(
    "backbone", [SMALL, BUNDLED, pytest.param("resnet18", marks=pytest.mark.exhaustive)]
)
def test_every_level_has_the_stride_that_is_announced(backbone):
    levels = available_levels(backbone)
    shapes = features(FeaturePyramid(backbone, list(levels)))
    expected = {name: (64 // stride, 64 // stride) for name, stride in levels.items()}
    assert {name: tuple(level.shape[-2:]) for name, level in shapes.items()} == expected


@pytest.mark.parametrize(
    ("backbone", "layers", "blocks"),
    [
        (SMALL, None, None),
        (SMALL, ["layer2"], None),
        (BUNDLED, None, 5),
        (BUNDLED, ["blocks.1"], 2),
        (BUNDLED, ["blocks.0", "blocks.6"], 7),
        pytest.param("resnet18", None, None, marks=pytest.mark.exhaustive),
        pytest.param("wide_resnet50_2", None, None, marks=pytest.mark.exhaustive),
    ],
)
def test_the_cut_off_network_gives_what_the_whole_one_gives(backbone, layers, blocks):
    pyramid = FeaturePyramid(backbone, layers)
    whole = timm.create_model(backbone, features_only=True)
    state = whole.state_dict()
    pyramid.net.load_state_dict({name: state[name] for name in pyramid.net.state_dict()})
    with torch.no_grad():
        levels = dict(zip(whole.feature_info.module_name(), whole.eval()(IMAGES), strict=True))
    assert_same(features(pyramid), {name: levels[name] for name in pyramid.layers})
    assert blocks is None or len(pyramid.net.blocks) == blocks


@pytest.mark.parametrize(
    ("backbone", "layers", "remaining"),
    [
        (SMALL, None, 0),
        (BUNDLED, ["blocks.0", "blocks.6"], 0),
        ("densenet121", ["features.denseblock1"], 6),  # it normalises before it convolves, too
        pytest.param("resnet18", None, 0, marks=pytest.mark.exhaustive),
    ],
)
def test_folded_batch_norm_gives_the_same_features(backbone, layers, remaining):
    pyramid = with_statistics(FeaturePyramid(backbone, layers))
    expected, before = features(pyramid), torch.get_rng_state()
    pyramid.fold_batch_norm()
    assert len(batch_norms(pyramid)) == remaining
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(features(pyramid), expected, rtol=1e-4, atol=1e-4)


def test_a_network_that_uses_what_it_normalises_stays_as_it_is():
    pyramid = with_statistics(FeaturePyramid("ghostnet_100", ["conv_stem", "blocks.1"]))
    expected = features(pyramid)
    pyramid.fold_batch_norm()
    assert batch_norms(pyramid)
    assert_same(features(pyramid), expected)


def test_the_order_of_the_layers_and_their_repetition_do_not_matter(tmp_path):
    path = weights_file(tmp_path, small_classifier().state_dict())
    one = FeaturePyramid(SMALL, ["layer1", "layer3"], path)
    other = FeaturePyramid(SMALL, ["layer3", "layer1", "layer3"], path)
    assert one.layers == other.layers == list(features(one)) == ["layer1", "layer3"]
    assert_same(features(one), features(other))


def test_random_weights_are_drawn_anew():
    one, other = features(FeaturePyramid(SMALL)), features(FeaturePyramid(SMALL))
    assert not torch.equal(one["layer1"], other["layer1"])


@pytest.mark.parametrize(
    ("backbone", "weights", "mean"),
    [("resnet18", "random", (0.485, 0.456, 0.406)), (BUNDLED, "bundled", (0.5, 0.5, 0.5))],
)
def test_the_normalisation_is_that_of_the_weights(backbone, weights, mean):
    normalisation = FeaturePyramid(backbone, weights=weights).normalisation
    assert normalisation.mean.flatten().tolist() == pytest.approx(mean)


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_file_gives_the_features_of_the_model_that_was_saved(key, prefix, tmp_path):
    state = {prefix + name: tensor for name, tensor in small_classifier().state_dict().items()}
    path = weights_file(tmp_path, {key: state} if key else state)
    assert_small_features(FeaturePyramid(SMALL, None, path))


def test_a_file_may_lack_the_classifier_or_have_one_of_other_classes(tmp_path):
    state = small_classifier().state_dict()
    del state["fc.weight"], state["fc.bias"]
    for classifier in ({}, {"fc.weight": torch.zeros(3, 256), "fc.bias": torch.zeros(3)}):
        path = weights_file(tmp_path, state | classifier)
        assert_small_features(FeaturePyramid(SMALL, ["layer1"], path))


def test_a_file_serves_a_model_of_which_timm_knows_no_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: None)
    path = weights_file(tmp_path, small_classifier().state_dict())
    assert_small_features(FeaturePyramid(SMALL, ["layer1"], path))


@pytest.mark.parametrize("lacks", ["layer1.0.conv1.weight", "bn1.running_mean", "layer4"])
def test_a_file_that_lacks_tensors_is_refused(lacks, tmp_path):
    state = small_classifier().state_dict()
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(lacks)}
    message = refusal(SMALL, None, weights_file(tmp_path, kept))
    assert f"must have all tensors of {SMALL}, " in message
    assert f" such as {lacks}" in message


def test_a_file_of_another_architecture_or_with_other_shapes_is_refused(tmp_path):
    state = small_classifier().state_dict()
    path = weights_file(tmp_path, state)
    assert "must have all tensors of resnet18" in refusal("resnet18", None, path)
    weights_file(tmp_path, state | {"layer1.0.conv1.weight": torch.zeros(1, 2, 3, 3)})
    with pytest.raises(BackboneError, match=r"weights\.pth' for test_resnet cannot be loaded"):
        FeaturePyramid(SMALL, None, path)


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [1, 2], 5, {"state_dict": 3}, {1: 2}, {"epoch": 3}, {}]
)
def test_a_file_without_a_state_dict_is_refused(content, tmp_path):
    path = weights_file(tmp_path, content)
    assert f"model.weights {path} must " in refusal(SMALL, None, path)


@pytest.mark.parametrize("content", [b"", b"no weights", b"\x80\x02c__main__\nTrap\n."])
def test_a_file_that_torch_cannot_load_is_refused(content, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    message = refusal(SMALL, None, str(path))
    assert "must be a PyTorch state dict, but cannot be loaded" in message


def test_code_in_a_file_is_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    path = weights_file(tmp_path, {"state_dict": Code()})
    assert "must be a PyTorch state dict, but cannot be loaded" in refusal(SMALL, None, path)
    assert not (tmp_path / "made").exists()


def test_a_missing_file_or_unknown_source_is_refused_with_the_sources_there_are(tmp_path):
    for weights in (str(tmp_path / "missing.pth"), str(tmp_path), "imagenet"):
        rule = f"must be bundled, timm, random or a file, got {weights!r}"
        assert rule in refusal(SMALL, None, weights)


def test_bundled_weights_are_of_one_backbone_and_the_error_names_the_other_sources():
    message = refusal("resnet18", None, "bundled")
    for part in (BUNDLED, "model.backbone resnet18", "timm", "a file with a state dict", "random"):
        assert part in message


def test_without_a_network_the_error_names_the_weights_that_need_none(monkeypatch, capfd):
    """The home folder of the tests holds no downloads, so that an offline hub has nothing."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError) as error:
        FeaturePyramid(SMALL, None, "timm")
    message = str(error.value)
    assert f"model.weights 'timm' for {SMALL} cannot be loaded" in message
    assert f"use a file with a state dict, or {BUNDLED} with model.weights bundled" in message
    assert "\n" not in message
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("photograph", "classes"),
    [
        (data.chelsea, range(281, 286)),  # cats
        (data.coffee, (967, 968)),  # espresso, cup
        (data.rocket, (657, 744)),  # missile, projectile
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@torch.no_grad()
def test_the_bundled_weights_recognise_photographs(photograph, classes):
    image = torch.from_numpy(photograph().copy()).permute(2, 0, 1)[None] / 255
    image = center_crop(resize(image, 224, antialias=True), 224)
    top = bundled_classifier()((image - 0.5) / 0.5)[0].topk(5).indices.tolist()
    assert set(top) & set(classes)


def test_the_features_of_bundled_weights_are_those_of_the_whole_classifier():
    pyramid = FeaturePyramid(BUNDLED, None, "bundled")
    assert_same(features(pyramid), features_inside(bundled_classifier(), pyramid.layers))


@pytest.mark.parametrize(
    ("backbone", "nearest"), [("resnet19", "resnet18"), ("zzzzqq", BUNDLED), ("", BUNDLED)]
)
def test_an_unknown_backbone_is_answered_with_the_nearest_names(backbone, nearest):
    message = refusal(backbone)
    assert f"got {backbone!r}; the nearest: " in message
    assert nearest in message.partition("the nearest: ")[2]


def test_an_unknown_layer_is_answered_with_the_levels_there_are():
    message = refusal("resnet18", ["layer1", "layer9", "conv1"])
    assert "must be levels of resnet18, got layer9, conv1;" in message
    assert "layer1 (stride 4), layer2 (stride 8), layer3 (stride 16)" in message


def test_no_layers_at_all_are_refused():
    assert "model.layers must name at least one level" in refusal(SMALL, [])


@pytest.mark.parametrize(
    ("backbone", "levels"),
    [
        ("levit_128", "stages.0 (stride 16), stages.1 (stride 32), stages.2 (stride 64)"),
        # three levels, but all of one stride
        ("vit_tiny_patch16_224", "blocks.9 (stride 16), blocks.10 (stride 16), blocks.11"),
    ],
)
def test_a_backbone_without_strides_4_8_and_16_needs_its_layers_named(backbone, levels):
    message = refusal(backbone)
    assert f"model.layers must be named for {backbone}" in message
    assert levels in message


def test_a_backbone_without_a_pyramid_is_refused_with_ones_that_have_it(monkeypatch):
    """All that timm 1.0 has give pyramids; what it does not support, it refuses like this."""

    def without_pyramid(features_only=False, **_options):
        if features_only:
            raise RuntimeError("features_only not implemented for this one.")
        return torch.nn.Identity()

    entrypoints = timm.models._registry._model_entrypoints
    monkeypatch.setitem(entrypoints, "without_pyramid", without_pyramid)
    message = refusal("without_pyramid")
    assert "must support features_only, but without_pyramid does not" in message
    assert "(features_only not implemented for this one.)" in message
    assert f"{BUNDLED} and resnet18 do" in message


def test_the_check_downloads_nothing_and_passes_what_can_be_made():
    check_backbone("resnet18", None, "timm")
    check_backbone(BUNDLED, ["blocks.0"], "bundled")
