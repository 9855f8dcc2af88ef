import os
import subprocess
import sys
from functools import cache

import pytest
import timm
import torch
from skimage import data
from torchvision.transforms.functional import center_crop, resize

from anomaly_detection.features.pyramid import (
    FeaturePyramid,
    available_levels,
    check_backbone,
)
from anomaly_detection.features.weights import BUNDLED, BackboneError, _bundled

SMALL = "test_resnet"  # timm's own, 0.5 million parameters, with the level names of a ResNet
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def features(pyramid, images=IMAGES):
    return pyramid.eval()(images)


@torch.no_grad()
def features_inside(model, layers, images=IMAGES):
    """What the named modules of timm's whole classifier return."""
    found = {}
    for layer in layers:
        model.get_submodule(layer).register_forward_hook(
            lambda _module, _inputs, output, layer=layer: found.update({layer: output})
        )
    model.eval()(images)
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


def weights_file(folder, content):
    torch.save(content, folder / "weights.pth")
    return str(folder / "weights.pth")


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert all(tensor.abs().max() > 0 for tensor in one.values())


@pytest.mark.parametrize(
    ("backbone", "channels"),
    [
        ("resnet18", {"layer1": 64, "layer2": 128, "layer3": 256}),
        ("wide_resnet50_2", {"layer1": 256, "layer2": 512, "layer3": 1024}),
        (BUNDLED, {"blocks.1": 24, "blocks.2": 40, "blocks.4": 112}),
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


@pytest.mark.parametrize("backbone", [SMALL, "resnet18", BUNDLED])
def test_every_level_has_the_stride_that_is_announced(backbone):
    levels = available_levels(backbone)
    shapes = features(FeaturePyramid(backbone, list(levels)))
    assert {name: 64 // level.shape[-1] for name, level in shapes.items()} == levels
    assert {name: 64 // level.shape[-2] for name, level in shapes.items()} == levels


@pytest.mark.parametrize(
    ("backbone", "layers"),
    [
        ("resnet18", None),
        ("resnet18", ["layer2"]),
        ("wide_resnet50_2", None),
        (BUNDLED, None),
        (BUNDLED, ["blocks.1"]),
        (BUNDLED, ["blocks.0", "blocks.6"]),
    ],
)
def test_the_cut_off_network_gives_what_the_whole_one_gives(backbone, layers):
    pyramid = FeaturePyramid(backbone, layers)
    whole = timm.create_model(backbone, features_only=True)
    state = whole.state_dict()
    pyramid.net.load_state_dict({name: state[name] for name in pyramid.net.state_dict()})
    names = whole.feature_info.module_name()
    with torch.no_grad():
        expected = dict(zip(names, whole.eval()(IMAGES), strict=True))
    assert_same(features(pyramid), {name: expected[name] for name in pyramid.layers})


@pytest.mark.parametrize(("last", "blocks"), [("blocks.1", 2), ("blocks.4", 5), ("blocks.6", 7)])
def test_blocks_behind_the_last_level_are_cut_off(last, blocks):
    assert len(FeaturePyramid(BUNDLED, ["blocks.0", last]).net.blocks) == blocks


@pytest.mark.parametrize(
    ("backbone", "layers", "remaining"),
    [
        (SMALL, None, 0),
        ("resnet18", None, 0),
        (BUNDLED, ["blocks.0", "blocks.6"], 0),
        ("densenet121", ["features.denseblock1"], 6),  # it normalises before it convolves, too
    ],
)
def test_folded_batch_norm_gives_the_same_features(backbone, layers, remaining):
    pyramid = with_statistics(FeaturePyramid(backbone, layers))
    expected, before = features(pyramid), torch.get_rng_state()
    pyramid.fold_batch_norm()
    assert len(batch_norms(pyramid)) == remaining
    assert torch.equal(torch.get_rng_state(), before)
    for name, level in features(pyramid).items():
        torch.testing.assert_close(level, expected[name], rtol=1e-4, atol=1e-4)


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


# Weights


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_file_gives_the_features_of_the_model_that_was_saved(key, prefix, tmp_path):
    state = {prefix + name: tensor for name, tensor in small_classifier().state_dict().items()}
    pyramid = FeaturePyramid(SMALL, None, weights_file(tmp_path, {key: state} if key else state))
    expected = features_inside(small_classifier(), ["layer1", "layer2", "layer3"])
    assert_same(features(pyramid), expected)


def test_a_file_may_lack_the_classifier_or_have_one_of_other_classes(tmp_path):
    state = small_classifier().state_dict()
    del state["fc.weight"], state["fc.bias"]
    pyramid = FeaturePyramid(SMALL, ["layer1"], weights_file(tmp_path, state))
    expected = features_inside(small_classifier(), ["layer1"])
    assert_same(features(pyramid), expected)
    state |= {"fc.weight": torch.zeros(3, 256), "fc.bias": torch.zeros(3)}
    pyramid = FeaturePyramid(SMALL, ["layer1"], weights_file(tmp_path, state))
    assert_same(features(pyramid), expected)


def test_a_file_serves_a_model_of_which_timm_knows_no_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: None)
    path = weights_file(tmp_path, small_classifier().state_dict())
    expected = features_inside(small_classifier(), ["layer1"])
    assert_same(features(FeaturePyramid(SMALL, ["layer1"], path)), expected)


@pytest.mark.parametrize("lacks", ["layer1.0.conv1.weight", "bn1.running_mean", "layer4"])
def test_a_file_that_lacks_tensors_is_refused(lacks, tmp_path):
    state = small_classifier().state_dict()
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(lacks)}
    path = weights_file(tmp_path, kept)
    with pytest.raises(
        BackboneError, match=rf"must have all tensors of {SMALL}, .* such as {lacks}"
    ):
        FeaturePyramid(SMALL, None, path)


def test_a_file_of_another_architecture_is_refused(tmp_path):
    path = weights_file(tmp_path, small_classifier().state_dict())
    with pytest.raises(BackboneError, match="must have all tensors of resnet18"):
        FeaturePyramid("resnet18", None, path)


def test_a_file_with_tensors_of_other_shapes_is_refused(tmp_path):
    state = small_classifier().state_dict() | {"layer1.0.conv1.weight": torch.zeros(1, 2, 3, 3)}
    with pytest.raises(BackboneError, match=r"weights\.pth' for test_resnet cannot be loaded"):
        FeaturePyramid(SMALL, None, weights_file(tmp_path, state))


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [1, 2], 5, {"state_dict": 3}, {1: 2}, {"epoch": 3}, {}]
)
def test_a_file_without_a_state_dict_is_refused(content, tmp_path):
    with pytest.raises(BackboneError, match=r"model\.weights .*weights\.pth must "):
        FeaturePyramid(SMALL, None, weights_file(tmp_path, content))


@pytest.mark.parametrize("content", [b"", b"no weights", b"\x80\x02c__main__\nTrap\n."])
def test_a_file_that_torch_cannot_load_is_refused(content, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(BackboneError, match="must be a PyTorch state dict, but cannot be loaded"):
        FeaturePyramid(SMALL, None, str(path))


def test_a_missing_file_or_unknown_source_is_refused_with_the_sources_there_are(tmp_path):
    for weights in (str(tmp_path / "missing.pth"), str(tmp_path), "imagenet"):
        with pytest.raises(BackboneError) as error:
            FeaturePyramid(SMALL, None, weights)
        rule = f"must be bundled, timm, random or a file, got {weights!r}"
        assert rule in str(error.value)


def test_bundled_weights_are_of_one_backbone_and_the_error_names_the_other_sources():
    with pytest.raises(BackboneError) as error:
        FeaturePyramid("resnet18", None, "bundled")
    for part in (BUNDLED, "model.backbone resnet18", "timm", "a file with a state dict", "random"):
        assert part in str(error.value)


def test_without_a_network_the_error_names_the_weights_that_need_none(tmp_path):
    # The hub reads HF_HUB_OFFLINE once, when it is imported: so a process of its own.
    code = f"""
from anomaly_detection.features import BackboneError, FeaturePyramid
try:
    FeaturePyramid({SMALL!r}, None, "timm")
except BackboneError as error:
    print(error)
"""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | offline, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"model.weights 'timm' for {SMALL} cannot be loaded" in done.stdout
    assert f"use a file with a state dict, or {BUNDLED} with model.weights bundled" in done.stdout
    assert len(done.stdout.splitlines()) == 1


# The bundled weights are ImageNet's


@cache
def bundled_classifier():
    model = timm.create_model(BUNDLED)
    model.load_state_dict(_bundled(BUNDLED))
    return model.eval()


@pytest.mark.parametrize(
    ("picture", "classes"),
    [
        (data.chelsea, range(281, 286)),  # cats
        (data.coffee, (967, 968)),  # espresso, cup
        (data.rocket, (657, 744)),  # missile, projectile
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@torch.no_grad()
def test_the_bundled_weights_recognise_photographs(picture, classes):
    image = torch.from_numpy(picture().copy()).permute(2, 0, 1)[None] / 255
    image = center_crop(resize(image, 224, antialias=True), 224)
    top = bundled_classifier()((image - 0.5) / 0.5)[0].topk(5).indices.tolist()
    assert set(top) & set(classes)


def test_the_features_of_bundled_weights_are_those_of_the_whole_classifier():
    pyramid = FeaturePyramid(BUNDLED, None, "bundled")
    assert_same(features(pyramid), features_inside(bundled_classifier(), pyramid.layers))


# Errors


@pytest.mark.parametrize(
    ("backbone", "nearest"), [("resnet19", "resnet18"), ("zzzzqq", BUNDLED), ("", BUNDLED)]
)
def test_an_unknown_backbone_is_answered_with_the_nearest_names(backbone, nearest):
    with pytest.raises(BackboneError, match=rf"got '{backbone}'; the nearest: .*{nearest}"):
        FeaturePyramid(backbone)


def test_an_unknown_layer_is_answered_with_the_levels_there_are():
    with pytest.raises(BackboneError) as error:
        FeaturePyramid("resnet18", ["layer1", "layer9", "conv1"])
    assert "must be levels of resnet18, got layer9, conv1;" in str(error.value)
    assert "layer1 (stride 4), layer2 (stride 8), layer3 (stride 16)" in str(error.value)


@pytest.mark.parametrize(
    ("backbone", "levels"),
    [
        ("levit_128", "stages.0 (stride 16), stages.1 (stride 32), stages.2 (stride 64)"),
        # three levels, but all of one stride
        ("vit_tiny_patch16_224", "blocks.9 (stride 16), blocks.10 (stride 16), blocks.11"),
    ],
)
def test_a_backbone_without_strides_4_8_and_16_needs_its_layers_named(backbone, levels):
    with pytest.raises(BackboneError) as error:
        FeaturePyramid(backbone)
    assert f"model.layers must be named for {backbone}" in str(error.value)
    assert levels in str(error.value)


def without_pyramid(pretrained=False, features_only=False, **_options):
    if features_only:
        raise RuntimeError("features_only not implemented for this one.")
    return torch.nn.Identity()


def test_a_backbone_without_a_pyramid_is_refused_with_ones_that_have_it(monkeypatch):
    # All that timm 1.0 has give pyramids; what it does not support, it refuses like this.
    registry = timm.models._registry
    monkeypatch.setitem(registry._model_entrypoints, "without_pyramid", without_pyramid)
    with pytest.raises(BackboneError) as error:
        FeaturePyramid("without_pyramid")
    assert "must support features_only, but without_pyramid does not" in str(error.value)
    assert "(features_only not implemented for this one.)" in str(error.value)
    assert f"{BUNDLED} and resnet18 do" in str(error.value)


def test_no_layers_at_all_are_refused():
    with pytest.raises(BackboneError, match=r"model\.layers"):
        FeaturePyramid(SMALL, [])


@pytest.mark.parametrize(
    ("backbone", "layers", "weights"),
    [
        ("resnet19", None, "random"),
        (SMALL, ["layer9"], "random"),
        (SMALL, None, "bundled"),
        (SMALL, None, "missing.pth"),
    ],
)
def test_the_check_finds_what_making_the_pyramid_finds(backbone, layers, weights):
    with pytest.raises(BackboneError) as checked:
        check_backbone(backbone, layers, weights)
    with pytest.raises(BackboneError) as made:
        FeaturePyramid(backbone, layers, weights)
    assert str(checked.value) == str(made.value)


def test_the_check_downloads_nothing_and_passes_what_can_be_made():
    check_backbone("resnet18", None, "timm")
    check_backbone(BUNDLED, ["blocks.0"], "bundled")
