"""A run's curves: as a picture, and for TensorBoard."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic_files import replacing
from ..figure_style import look, new_figure, tidy

if TYPE_CHECKING:
    from .run import EpochRow


def draw_curves(history: Sequence[EpochRow], kept_epoch: int, path: Path) -> None:
    """Write a PNG of the training loss and the validation accuracy, epoch by epoch.

    Args:
        history: at least one epoch.
        kept_epoch: whose adapter was saved; it is marked.
        path: the file, replaced in one step.
    """
    from matplotlib.ticker import MaxNLocator

    epochs = [row.epoch for row in history]
    figure = new_figure(7, 3)
    panels = (
        ("training loss", [row.train_loss for row in history]),
        ("validation top-1, %", [row.val_top1_percent for row in history]),
    )
    for place, (title, values) in enumerate(panels):
        axes = figure.add_subplot(1, 2, place + 1)
        axes.plot(epochs, values, **look(place).line | {"markersize": 3})
        axes.axvline(kept_epoch, color="0.4", linewidth=0.8, linestyle=":")
        axes.set(title=title, xlabel="epoch (dotted: the one saved)")
        if title.endswith("%"):
            axes.set_ylim(top=min(axes.get_ylim()[1], 100.5))  # half the line above a perfect score
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(axes)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def require_tensorboard() -> None:
    """Check that TensorBoard is installed.

    Raises:
        ValueError: it is not.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "log_dir must be left out where the package tensorboard is not installed: leave it out,"
            " or pip install 'efft-kernels[tensorboard]'"
        )


class TensorBoardLog:
    """Writes a run's epochs for TensorBoard.

    Args:
        folder: the log's.
        done: epochs that are finished already; what an earlier try wrote beyond them is hidden.

    Raises:
        ValueError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, done: int = 0) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=done + 1)

    def __call__(self, row: EpochRow) -> None:
        """Write an epoch."""
        for name, value in (
            ("train/loss", row.train_loss),
            ("train/lr", row.lr),
            ("val/top1_percent", row.val_top1_percent),
            ("seconds", row.seconds),
        ):
            self._writer.add_scalar(name, value, row.epoch)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
