"""Layouts with a folder for each kind of image: MVTec AD's, and BTAD's with its other names.

<category>/train/good/*                                    normal images; BTAD: train/ok
<category>/test/<good or defect type>/*                    test images; BTAD: test/ok, test/ko
<category>/ground_truth/<defect type>/<stem>_mask.*        masks; optional per defect type
"""

from pathlib import Path

from anomaly_detection.data.sample import NORMAL, SUFFIXES, Sample, only_pictures

MVTEC, BTAD = "good", "ok"  # the folders of normal images
MASKS = {MVTEC: "_mask.png", BTAD: ".png"}  # how the names of their masks end


def is_mvtec(folder: Path) -> bool:
    """Whether a category's folder has MVTec AD's layout."""
    return (folder / "train" / MVTEC).is_dir()


def is_btad(folder: Path) -> bool:
    """Whether a category's folder has BTAD's layout."""
    return (folder / "train" / BTAD).is_dir()


def scan_mvtec(folder: Path) -> tuple[list[Sample], list[str]]:
    """A category's samples and findings in MVTec AD's layout."""
    return _scan(folder, MVTEC)


def scan_btad(folder: Path) -> tuple[list[Sample], list[str]]:
    """A category's samples and findings in BTAD's layout."""
    return _scan(folder, BTAD)


def place_mvtec(folder: Path, kind: str) -> Path:
    """The folder for a further image in MVTec AD's layout."""
    return _place(folder, MVTEC, kind)


def place_btad(folder: Path, kind: str) -> Path:
    """The folder for a further image in BTAD's layout."""
    return _place(folder, BTAD, kind)


def _place(folder: Path, normal: str, kind: str) -> Path:
    if kind == NORMAL:
        return folder / "train" / normal
    if Path(kind).name != kind or kind.startswith(".") or kind.lower() in (MVTEC, BTAD):
        raise ValueError(f"defect_type must be a folder's name other than {normal}, got {kind!r}.")
    if only_pictures(folder / "ground_truth" / kind, []):
        raise ValueError(
            f"images of defect_type {kind!r} must have masks, since the others of it do; name "
            "another type."
        )
    return folder / "test" / kind


def _scan(folder: Path, normal: str) -> tuple[list[Sample], list[str]]:
    findings: list[str] = []
    train = folder / "train"
    samples = [Sample(path, "train", NORMAL) for path in only_pictures(train / normal, findings)]
    if not samples:
        where = train / normal
        findings.append(f"{where}: there must be images ({', '.join(SUFFIXES)}), found none.")
    for other in _folders(train):
        if other.name != normal:
            findings.append(f"{other}: training is on normal images only; move it to test.")
    for parent in (folder, train, folder / "test"):
        for path in only_pictures(parent, []):
            findings.append(f"{path}: must be in a folder of its kind of image; move or remove it.")
    masks: dict[str, dict[str, Path]] = {}
    for truth in _folders(folder / "ground_truth"):
        of_kind = masks[truth.name] = {}
        for path in only_pictures(truth, findings):
            other = of_kind.setdefault(path.stem.removesuffix("_mask"), path)
            if other != path:
                findings.append(f"{path}: a second mask beside {other.name}; remove one.")
    for kind in _folders(folder / "test"):
        if kind.name != normal and kind.name.lower() in (MVTEC, BTAD):
            findings.append(f"{kind}: must be {normal} for normal images, or a defect type.")
        of_kind = masks.pop(kind.name, {})
        images = only_pictures(kind, findings)
        name = NORMAL if kind.name == normal else kind.name
        samples += [Sample(path, "test", name, of_kind.get(path.stem)) for path in images]
        findings += _mask_findings(kind, images, of_kind, normal)
    for kind_name, of_kind in masks.items():
        findings += _mask_findings(folder / "test" / kind_name, [], of_kind, normal)
    return samples, findings


def _folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if path.is_dir() and path.name[0] != ".")


def _mask_findings(
    kind: Path, images: list[Path], masks: dict[str, Path], normal: str
) -> list[str]:
    """Masks without an image, and images without a mask where others of their type have one."""
    stems = {path.stem for path in images}
    findings = [
        f"{mask}: mask without its image {kind / stem}.*; add the image or remove the mask."
        for stem, mask in masks.items()
        if stem not in stems
    ]
    if masks and kind.name != normal:
        findings += [
            f"{path}: has no mask, but others of {kind.name!r} do; "
            f"add {path.stem}{MASKS[normal]} or remove all masks of this type."
            for path in images
            if path.stem not in masks
        ]
    return findings
