"""Metrics of each epoch for DVC's plots and for the VS Code extension, while training runs."""

from pathlib import Path

from dvclive import Live

from anomaly_detection.trainer import Callback


class _Epochs(Live):
    """DVCLive's files without its experiments.

    What it does here to save experiments fails in a repository without a commit, and makes a new
    DVC repository where there is none.
    """

    def _init_dvc(self) -> None:
        pass


class DVCLiveLogger(Callback):
    """Writes each epoch's metrics as DVC reads them, while training runs.

    Works without git and without a commit, and changes no file outside of `folder`.

    Args:
        folder: Where DVCLive writes; emptied first. After a resume it holds all epochs.
    """

    live: Live

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.logged = 0

    def on_fit_start(self) -> None:
        """Begin anew with the epochs that were trained before."""
        self.live = _Epochs(str(self.folder), dvcyaml=None, save_dvc_exp=False)
        self.logged = 0
        self._log()

    def on_train_epoch_start(self, epoch: int) -> None:
        """Write the epoch before, which is complete now."""
        self._log()

    def on_fit_end(self) -> None:
        """Write the last epoch."""
        self._log()
        self.live.end()

    def _log(self) -> None:
        for row in self.trainer.history[self.logged :]:
            self.live.step = int(row["epoch"])
            for name, value in row.items():
                if name != "epoch":
                    self.live.log_metric(name, value)
            self.live.next_step()
            self.logged += 1
