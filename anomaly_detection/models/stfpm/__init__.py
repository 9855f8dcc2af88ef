"""STFPM: student-teacher feature pyramid matching (Wang et al., BMVC 2021, arXiv:2103.04257)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "stfpm": [
            "AnomalyMapGenerator",
            "STFPMLoss",
            "STFPMModel",
            "compute_anomaly_map",
            "feature_distance",
        ],
        "trainer": ["STFPMTrainer"],
    },
)
