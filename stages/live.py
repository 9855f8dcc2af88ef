"""Live metrics of each epoch for DVC's plots and the VS Code extension."""

from pathlib import Path

from dvclive import Live

from anomaly_detection.trainer import Callback


class _Epochs(Live):
    """DVCLive's files without its experiments.

    The part skipped here saves experiments; it fails in a repository without a commit, and
    creates a DVC repository where there is none.
    """

    def _init_dvc(self) -> None:
        pass


class DVCLiveLogger(Callback):
    """Write each epoch's metrics for DVC while training runs.

    Works without git or a commit, and changes no file outside `folder`.

    Args:
        folder: Where DVCLive writes; emptied first. After a resume it holds all epochs.
    """

    live: Live

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.logged = 0

    def on_fit_start(self) -> None:
        """Start again with the epochs trained so far."""
        self.live = _Epochs(str(self.folder), dvcyaml=None, save_dvc_exp=False)
        self.logged = 0
        self._log()

    def on_train_epoch_start(self, epoch: int) -> None:
        """Write the previous epoch, which is complete now."""
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
