"""From folders of images to batches.

Names are imported from their modules on first use, so that code without need of PyTorch or
torchvision does not wait for them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "arrays": ["PreparedArrays"],
        "audit": ["audit_prepared"],
        "auxiliary": ["AuxiliaryDataset"],
        "layouts": ["available_categories", "scan_category"],
        "loader": ["create_dataloader"],
        "mvtec": ["MVTecDataset"],
        "prepare": ["prepare_category"],
        "prepared": ["PreparedDataset"],
        "elpv": ["write_elpv"],
        "sample": ["Sample"],
        "splits": ["draw_folds", "split_normal_images"],
        "transforms": ["get_test_transforms", "get_train_transforms"],
    },
)
