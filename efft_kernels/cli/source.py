"""Options of the commands that open what training left: predict, merge, export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Device
from .terminal import note

if TYPE_CHECKING:
    from ..training.trained import Trained

Source = Annotated[
    Path, typer.Argument(help="A run's folder, its adapter.safetensors, or a merged model.")
]


@dataclass(frozen=True)
class BackboneOptions:
    """Where the backbone's weights come from, and where the model runs."""

    checkpoint: Annotated[
        Path | None, typer.Option(help="Local weights; default: those trained on.")
    ] = None
    pretrained: Annotated[
        bool | None, typer.Option(help="Fetch timm's weights; default: as in training.")
    ] = None
    device: Device = "auto"

    def open(self, source: Path, *, merge: bool) -> Trained:
        """The model; raises as `open_trained`."""
        from ..training.trained import open_trained

        return open_trained(
            source,
            checkpoint=self.checkpoint,
            pretrained=self.pretrained,
            merge=merge,
            device=self.device,
            notify=note,
        )
