"""`efft-kernels analyse`: subspace, intrinsic-dimension, ablation, scales."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..methods import METHODS
from ..methods.base import Method
from . import parse
from .errors import failures, input_errors, interruptible
from .options import BudgetOptions, DataOptions, TaskOptions, with_options
from .terminal import note

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..analysis.task import Task

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The analyses the papers ran: subspaces, intrinsic dimension, layers, scales.",
)

Seeds = Annotated[int, typer.Option(min=1, help="How many seeds to average, counted from 0.")]
Methods = Annotated[
    list[str] | None, typer.Option("--method", help=f"Of {', '.join(METHODS)}; repeatable.")
]
RankOption = Annotated[int, typer.Option(help="r.")]
Output = Annotated[Path, typer.Option(help="Folder for the files.")]


@contextmanager
def _user_errors() -> Iterator[None]:
    with interruptible("interrupted; nothing was written"), failures(), input_errors():
        yield


def _open_tasks(
    data: DataOptions, options: TaskOptions, console: Console, most: int | None = 1
) -> list[Task]:
    """The data sets.

    Args:
        data: which.
        options: how they are read, and the backbone.
        console: where to say what takes long.
        most: how many there may be; None for any number.

    Raises:
        ValueError: none or too many, or one that cannot be opened.
    """
    from ..analysis.task import digits_task, folder_task

    folders = data.data or []
    if data.digits == bool(folders):
        raise ValueError("give either --data FOLDER or --digits")
    if most is not None and len(folders) > most:
        raise ValueError(f"--data must be given once, got {len(folders)}")
    if data.digits:
        console.print("training the demo's backbone on the digits 0 to 4", highlight=False)
        return [
            digits_task(
                batch_size=20 if options.batch_size is None else options.batch_size,
                source_epochs=options.source_epochs,
                device=options.device,
            )
        ]
    return [
        folder_task(
            folder,
            model=options.model,
            checkpoint=options.checkpoint,
            pretrained=options.pretrained,
            img_size=options.img_size,
            val_split=options.val_split,
            batch_size=64 if options.batch_size is None else options.batch_size,
            workers=options.workers,
            device=options.device,
            notify=note,
        )
        for folder in folders
    ]


def _settings(
    data: DataOptions, options: TaskOptions, training: BudgetOptions, **more: Any
) -> dict[str, Any]:
    """What the results came from, in JSON's own types."""
    settings = {**asdict(data), **asdict(options), **asdict(training), **more}
    settings["data"] = [str(folder) for folder in data.data or ()]
    settings["checkpoint"] = None if options.checkpoint is None else str(options.checkpoint)
    return settings


def _methods(names: Sequence[str] | None, rank: int, scale: float | None) -> list[Method]:
    methods: list[Method] = []
    for name in names or ("efft1", "efft2"):
        if name not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
        options: dict[str, Any] = {"rank": rank}
        if scale is not None:
            options["scale"] = scale
        methods.append(METHODS[name](**options))
    return methods


def _make_folder(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"output must be a folder, got the file {output}")
    output.mkdir(parents=True, exist_ok=True)


def _write(
    output: Path, name: str, content: dict[str, Any], figures: dict[str, Figure], console: Console
) -> None:
    """Write OUTPUT/NAME.json and the pictures, each replaced in one step."""
    from ..analysis.plots import save
    from ..atomic_files import write_text

    paths = [output / f"{name}.json"]
    write_text(paths[0], json.dumps(content, indent=2, allow_nan=False) + "\n")
    for figure_name, figure in figures.items():
        paths += save(figure, output, figure_name)
    console.print(f"wrote {', '.join(path.name for path in paths)} to {output}", highlight=False)


@app.command()
def subspace(
    adapter: Annotated[Path, typer.Argument(help="An adapter file.")],
    other: Annotated[
        Path | None, typer.Argument(help="Another, e.g. of another seed, to compare with.")
    ] = None,
    limit: Annotated[int, typer.Option("--max", min=1, help="Largest i and j.")] = 16,
    top: Annotated[int, typer.Option(min=1, help="i = j between blocks.")] = 4,
    output: Output = Path("runs/analyse/subspace"),
) -> None:
    """How alike the subspaces of an adapter's groups and blocks are, or those of two adapters."""
    console = Console(soft_wrap=True)
    with _user_errors():
        from ..analysis import subspace as analysis
        from ..analysis.plots import draw_blocks, draw_comparisons
        from ..analysis.tables import block_table, comparison_table

        first = analysis.load_alone(adapter)
        comparisons: list[analysis.Comparison] = []
        blocks: list[analysis.BlockComparison] = []
        if other is not None:
            comparisons = analysis.between_seeds(first, analysis.load_alone(other), limit)
        else:
            comparisons = analysis.between_groups(first, limit)
            for role in analysis.roles(first):
                for side in analysis.SIDES:
                    blocks += analysis.between_blocks(first, role, side, top)
        if not comparisons and not blocks:
            raise ValueError(
                f"{adapter} must adapt both MHSA and FFN, or several blocks, to compare them"
            )
        _make_folder(output)
        content = {
            "adapter": str(adapter),
            "other": None if other is None else str(other),
            "comparisons": [item.to_json() for item in comparisons],
            "blocks": [item.to_json() for item in blocks],
        }
        figures: dict[str, Figure] = {}
        if comparisons:
            console.print(comparison_table(comparisons))
            figures["subspace"] = draw_comparisons(comparisons)
        if blocks:
            console.print(block_table(blocks))
            figures["subspace-blocks"] = draw_blocks(blocks)
        _write(output, "subspace", content, figures, console)


@app.command("intrinsic-dimension")
@with_options
def intrinsic_dimension(
    *,
    data: DataOptions,
    modules: Annotated[
        str, typer.Option(help="Modules to measure.")
    ] = "blocks.0.attn,blocks.0.mlp",
    dims: Annotated[
        str | None, typer.Option(help="Dimensions d to try, rising; 0: the head alone.")
    ] = None,
    fraction: Annotated[float, typer.Option(help="Of the full accuracy to reach.")] = 0.9,
    reference: Annotated[
        str, typer.Option(help="Full accuracy: of the whole model trained, or of the module.")
    ] = "model",
    theta_lr: Annotated[
        str | None,
        typer.Option(help="Learning rates of the subspace to try; default: from --lr."),
    ] = None,
    head_lr: Annotated[
        float | None, typer.Option(help="Of the head beside the subspace; default: --lr.")
    ] = None,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="Try every d, for the whole curve.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    options: TaskOptions,
    training: BudgetOptions,
    output: Output = Path("runs/analyse/intrinsic-dimension"),
) -> None:
    """The smallest random subspace of a module's parameters that learns the task."""
    console = Console(soft_wrap=True)
    with _user_errors():
        from ..analysis import intrinsic_dimension as analysis
        from ..analysis.plots import draw_dimensions
        from ..analysis.tables import dimension_table, percent
        from ..analysis.task import Budget

        budget = Budget(**asdict(training))
        tried = analysis.DEFAULT_DIMS if dims is None else parse.integers(dims, "dims")
        theta_lrs = None if theta_lr is None else parse.floats(theta_lr, "theta-lr")
        names = modules.split(",")
        _make_folder(output)
        (task,) = _open_tasks(data, options, console)
        settings = analysis.Settings(
            tried, fraction, reference, theta_lrs, head_lr, exhaustive=exhaustive, seed=seed
        )

        def show(module: str, dim: int | None, top1: float) -> None:
            what = "full training" if dim is None else f"{module}, d = {dim}"
            console.print(f"{what}: top-1 {percent(top1)} %", highlight=False)

        results = analysis.intrinsic_dimensions(task, names, budget, settings, on_result=show)
        console.print(dimension_table(results))
        content = {
            "settings": _settings(data, options, training, **asdict(settings)),
            "task": task.name,
            "results": [item.to_json() for item in results],
        }
        figures = {"intrinsic-dimension": draw_dimensions(results)}
        _write(output, "intrinsic-dimension", content, figures, console)


@app.command()
@with_options
def ablation(
    *,
    data: DataOptions,
    layers: Annotated[
        str | None,
        typer.Option(help="Rows, e.g. all,0-2,5-8; default: the paper's for 12 blocks."),
    ] = None,
    parts: Annotated[str, typer.Option(help="Of mhsa, ffn, both.")] = "mhsa,ffn",
    method: Methods = None,
    rank: RankOption = 16,
    scale: Annotated[float | None, typer.Option(help="s; default: the method's.")] = None,
    seeds: Seeds = 1,
    options: TaskOptions,
    training: BudgetOptions,
    output: Output = Path("runs/analyse/ablation"),
) -> None:
    """Adapt MHSA or FFN of some layers alone, against the full adaptation (EFFT, Table 4)."""
    console = Console(soft_wrap=True)
    with _user_errors():
        from ..analysis import ablation as analysis
        from ..analysis.plots import draw_ablation
        from ..analysis.tables import ablation_table, layers_word, percent
        from ..analysis.task import Budget

        budget = Budget(**asdict(training))
        configured = _methods(method, rank, scale)
        ranges = None if layers is None else parse.block_ranges(layers)
        _make_folder(output)
        (task,) = _open_tasks(data, options, console)

        def show(cell: analysis.Cell) -> None:
            console.print(
                f"{cell.method}, {cell.part}, layers {layers_word(cell.layers)}:"
                f" top-1 {percent(cell.top1_percent)} %, {cell.parameters:,} parameters",
                highlight=False,
            )

        result = analysis.ablate(
            task,
            configured,
            budget,
            parts=parts.split(","),
            ranges=ranges,
            seeds=range(seeds),
            on_result=show,
        )
        console.print(ablation_table(result))
        more = {"methods": [item.to_config() for item in configured], "seeds": seeds}
        content = {"settings": _settings(data, options, training, **more), **result.to_json()}
        _write(output, "ablation", content, {"ablation": draw_ablation(result)}, console)


@app.command()
@with_options
def scales(
    *,
    data: DataOptions,
    scale: Annotated[str, typer.Option(help="Scales s to try.")] = "0.1,1,10,100",
    method: Methods = None,
    rank: RankOption = 16,
    seeds: Seeds = 1,
    options: TaskOptions,
    training: BudgetOptions,
    output: Output = Path("runs/analyse/scales"),
) -> None:
    """Sweep the scale of ΔW over methods and data sets; --data is repeatable (Figs. 7 and 8)."""
    console = Console(soft_wrap=True)
    with _user_errors():
        from ..analysis import ablation as analysis
        from ..analysis.plots import draw_scales
        from ..analysis.tables import percent, scale_table
        from ..analysis.task import Budget

        budget = Budget(**asdict(training))
        configured = _methods(method, rank, None)
        swept = parse.floats(scale, "scale")
        _make_folder(output)
        tasks = _open_tasks(data, options, console, most=None)

        def show(task: str, name: str, s: float, top1: float) -> None:
            console.print(f"{task}, {name}, s = {s:g}: top-1 {percent(top1)} %", highlight=False)

        result = analysis.sweep_scales(
            tasks, configured, budget, scales=swept, seeds=range(seeds), on_result=show
        )
        console.print(scale_table(result))
        more = {"methods": [item.to_config() for item in configured], "seeds": seeds}
        content = {"settings": _settings(data, options, training, **more), **result.to_json()}
        _write(output, "scales", content, {"scales": draw_scales(result)}, console)
