"""Train STFPM on one category with the library alone, without DVC, and evaluate it.

python experiments/train_stfpm.py --category mono

Without --mvtec-dir, the built-in solar cells are written to data/elpv. The best epoch is chosen on
normal training images that are kept apart, never on test images.
"""

import argparse
import sys
from pathlib import Path

from torch.utils.data import random_split

from anomaly_detection.config import load_experiment_config
from anomaly_detection.data import (
    MVTecDataset,
    create_dataloader,
    get_test_transforms,
    get_train_transforms,
    write_elpv,
)
from anomaly_detection.errors import UserError
from anomaly_detection.evaluator import evaluate
from anomaly_detection.metrics import plot_roc_curve
from anomaly_detection.models.stfpm import STFPMLoss, STFPMModel, STFPMTrainer
from anomaly_detection.trainer import seed_everything


def main(arguments: list[str] | None = None) -> None:
    """Train, evaluate and print the metrics."""
    config = load_experiment_config("stfpm", "mvtec")
    model_config, training = config["model"], config["training"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--category", required=True, help="such as mono, or bottle")
    parser.add_argument("--mvtec-dir", type=Path, help="folder of the categories")
    parser.add_argument("--epochs", type=int, default=training["num_epochs"])
    parser.add_argument("--image-size", type=int, default=config.get("image_size", 256))
    parser.add_argument("--backbone", default=model_config["backbone"])
    parser.add_argument("--weights", default="local", help="local, timm, random or a file")
    parser.add_argument("--checkpoint-dir", type=Path, default=Path(config["checkpoint_dir"]))
    options = parser.parse_args(arguments)

    root = options.mvtec_dir
    if root is None:
        root = Path("data/elpv")
        if not (root / options.category / "train").is_dir():
            write_elpv(root)

    seed_everything(training["seed"])
    train_transform = get_train_transforms(options.image_size)
    normal = MVTecDataset(root, options.category, "train", train_transform)
    test = MVTecDataset(root, options.category, "test", get_test_transforms(options.image_size))
    train, val = random_split(normal, [0.85, 0.15])
    size, workers = training["batch_size"], training["num_workers"]
    train_loader = create_dataloader(train, size, shuffle=True, num_workers=workers)
    val_loader = create_dataloader(val, size, num_workers=workers)
    test_loader = create_dataloader(test, config["evaluation"]["batch_size"], num_workers=workers)

    same = options.backbone == model_config["backbone"]
    layers = model_config["layers"] if same else None
    model = STFPMModel(options.backbone, layers, options.weights)
    folder = options.checkpoint_dir / f"stfpm-{options.category}"
    trainer = STFPMTrainer(
        model, STFPMLoss(), training["device"], folder, learning_rate=training["learning_rate"]
    )
    trainer.fit(train_loader, val_loader, options.epochs)
    trainer.load_best_model()

    metrics, scores, labels, _ = evaluate(model, test_loader, training["device"])
    for name in ("image_auroc", "image_f1_max", "pixel_auroc", "aupro"):
        if name in metrics:
            print(f"{name}: {metrics[name]:.4f}")
    plot_roc_curve(scores, labels, folder / "roc.png")
    print(f"{folder / 'best_model.pth'}, {folder / 'roc.png'}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
