"""The published recipes: every number of the releases, and what a run makes of them."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch.func import functional_call
from torchvision import transforms
from torchvision.transforms import ToTensor

from efft_kernels import KAdaptation, attach
from efft_kernels.methods import METHODS
from efft_kernels.papers.recipes import recipe_facts, task_facts, task_names
from efft_kernels.training import images
from efft_kernels.training.loop import Schedule
from efft_kernels.training.recipe import recipe_for
from efft_kernels.training.reproducible import epoch_seed
from efft_kernels.training.run import WARMUP_LR, fit, prepare

DATA = Path("images")
LOADING: dict[str, Any] = {"batch_size": 64, "workers": 0, "shuffle": True}


def test_training_is_that_of_both_releases() -> None:
    """execute.py of EFFT; fact_tt.py, fact_tk.py and vtab.py of FacT."""
    settings = recipe_for("vtab").settings(DATA)
    expected = {
        "model": "vit_base_patch16_224.orig_in21k",
        "epochs": 100,
        "batch_size": 64,
        "drop_last": True,
        "lr": 1e-3,
        "weight_decay": 1e-4,
        "warmup_epochs": 10,
        "min_lr": 1e-5,
        "schedule": "epoch",
        "drop_path": 0.1,
        "seed": 42,
        "img_size": 224,
        "normalize": "imagenet",
        "augment": False,
        "amp": "none",
        "recipe": "vtab",
        "task": None,
    }
    assert {name: getattr(settings, name) for name in expected} == expected
    assert recipe_facts()["training"]["warmup_lr"] == WARMUP_LR == 1e-6


def test_the_backbone_is_the_original_of_imagenet_21k() -> None:
    config = timm.get_pretrained_cfg(recipe_for("vtab").model)
    assert config.tag == "orig_in21k" and config.input_size == (3, 224, 224)
    assert timm.get_pretrained_cfg("vit_base_patch16_224").tag != "orig_in21k"


EFFT2 = {  # configs/EFFT2.json: rank, scale, the two letters
    "cifar": (16, 1, "vv"),
    "caltech101": (32, 1, "vv"),
    "dtd": (8, 0.01, "vv"),
    "oxford_flowers102": (16, 10, "vv"),
    "oxford_iiit_pet": (16, 1, "vv"),
    "svhn": (32, 80, "vu"),
    "sun397": (16, 0.5, "vv"),
    "patch_camelyon": (32, 10, "vv"),
    "eurosat": (16, 100, "vv"),
    "resisc45": (16, 10, "vv"),
    "diabetic_retinopathy": (8, 1, "vv"),
    "clevr_count": (32, 5, "vu"),
    "clevr_dist": (32, 0.05, "vu"),
    "dmlab": (32, 10, "vu"),
    "kitti": (16, 10, "vv"),
    "dsprites_loc": (32, 30, "vv"),
    "dsprites_ori": (16, 10, "vu"),
    "smallnorb_azi": (32, 50, "vu"),
    "smallnorb_ele": (16, 10, "vu"),
}


@pytest.mark.parametrize("task", EFFT2)
def test_efft2_has_the_releases_rank_scale_and_zeros(task: str) -> None:
    """set_ViT_EFFT: "v" zeroes V [r, d] of the attention, and V [r, 4d] of the FFN: our U."""
    rank, scale, letters = EFFT2[task]
    method: Any = recipe_for("vtab", task, "efft2").settings(DATA).method_config()
    assert (method.rank, method.scale, method.dropout) == (rank, scale, 0.1)
    assert (method.cores, method.factor_init) == ("shared", "release")
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=48, num_heads=3)
    bank = attach(model, method).bank
    assert not bank.mhsa.V.any() and bank.mhsa.U.all()
    on_4d, on_d = bank.ffn.U, bank.ffn.V
    assert (on_4d.shape[0], on_d.shape[0]) == (192, 48)
    zero, random = (on_4d, on_d) if letters == "vv" else (on_d, on_4d)
    assert not zero.any() and random.all()


def test_twelve_tasks_need_the_ffns_own_letter() -> None:
    methods = [recipe_for("vtab", task).method_options for task in task_names()]
    assert [m["init"] == m["ffn_init"] for m in methods].count(False) == 12


@pytest.mark.parametrize(
    ("task", "method", "expected"),
    [
        ("svhn", "efft1", {"rank": 32, "scale": 50, "init": "u"}),
        ("cifar", "efft1", {"rank": 8, "scale": 100, "init": "v"}),
        ("clevr_dist", "fact_tt", {"rank": 4, "scale": 10.0, "factor_init": "release"}),
        ("cifar", "fact_tk", {"rank": 32, "scale": 0.1, "factor_init": "release"}),
        ("cifar", "lora", {"rank": 8, "scale": 1.0, "factor_init": "release"}),
    ],
)
def test_other_methods_options(task: str, method: str, expected: dict[str, Any]) -> None:
    config = recipe_for("vtab", task, method).settings(DATA).method_config()
    expected = {"dropout": 0.1} | expected
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_method_without_published_options_keeps_its_own() -> None:
    settings = recipe_for("vtab", "cifar", "kadaptation").settings(DATA)
    assert settings.method_config() == KAdaptation()


@pytest.mark.parametrize(
    ("method", "options", "parameters"),
    [
        ("fact_tt", {}, 36_649),
        ("fact_tk", {}, 69_333),
        ("efft1", {}, 109_847),
        ("efft2", {"cores": "per_layer"}, 151_680),
        ("efft2", {}, 116_832),
    ],
)
def test_mean_counts_of_the_ranks(method: str, options: dict[str, Any], parameters: int) -> None:
    """FacT's 0.037 and 0.069 million are means over the groups' means of the tasks' counts. EFFT's
    0.16 and 0.245 are not: they are the counts of the largest rank."""

    @functools.cache
    def count(rank: int) -> int:
        with torch.device("meta"):
            model = timm.create_model("vit_base_patch16_224")
        given = recipe_for("vtab", None, method).method_options | options | {"rank": rank}
        return attach(model, METHODS[method](**given)).num_parameters()

    groups = [
        [count(task_facts(task)[method]["rank"]) for task in tasks]
        for tasks in recipe_facts()["groups"].values()
    ]
    assert round(sum(sum(group) / len(group) for group in groups) / 3) == parameters
    if method == "fact_tt":
        tasks = [number for group in groups for number in group]
        assert round(sum(tasks) / len(tasks)) == 39_734


def test_the_tasks_are_vtabs() -> None:
    assert [len(tasks) for tasks in recipe_facts()["groups"].values()] == [7, 4, 8]
    assert set(task_names()) == set(recipe_facts()["tasks"]) == set(EFFT2)
    classes = [task_facts(task)["classes"] for task in task_names()]
    assert classes == [100, 102, 47, 102, 37, 10, 397, 2, 10, 45, 5, 8, 6, 6, 4, 16, 16, 18, 9]


def test_what_is_given_wins() -> None:
    recipe = recipe_for("vtab", "svhn")
    options = {"ffn_init": "u", "ffn_rank": 4}
    settings = recipe.settings(DATA, epochs=40, rank=(4, 2), lr=0.01, options=options)
    assert (settings.epochs, settings.lr, settings.resolved_warmup_epochs) == (40, 0.01, 4)
    method: Any = settings.method_config()
    assert (method.rank, method.ffn_rank, method.scale) == ((4, 2), 4, 80)
    assert (method.ffn_init, method.factor_init) == ("u", "release")
    assert recipe.settings(DATA, epochs=40, warmup_epochs=0).resolved_warmup_epochs == 0
    assert recipe.settings(DATA).options["ffn_init"] == "v"


def test_a_recipe_is_for_its_method() -> None:
    assert recipe_for("vtab", "svhn").settings(DATA, method="efft2").method == "efft2"
    with pytest.raises(ValueError, match=r"method must be efft2, whose options .* got 'lora'"):
        recipe_for("vtab", "svhn").settings(DATA, method="lora")


def test_unknown_names_are_named() -> None:
    for arguments, text in (
        (("vtab2",), "recipe must be one of vtab, got 'vtab2'"),
        (("vtab", "cifer"), r"task must be one of .* got 'cifer'; did you mean cifar\?"),
        (("vtab", "xyz", "kadaptation"), "task must be one of .* got 'xyz'; cifar, caltech101"),
        (("vtab", None, "magic"), "method must be one of .* got 'magic'"),
    ):
        with pytest.raises(ValueError, match=text):
            recipe_for(*arguments)


def released_rates() -> list[float]:
    """The learning rate of each epoch of execute.py: timm's CosineLRScheduler, t_initial 100,
    warmup_t 10, lr_min 1e-5, warmup_lr_init 1e-6, `step(ep)` after epoch ep."""

    def at(t: int) -> float:
        if t < 10:
            return 1e-6 + t * (1e-3 - 1e-6) / 10
        return 1e-5 + (1e-3 - 1e-5) / 2 * (1 + math.cos(math.pi * t / 100))

    return [1e-6, *(at(epoch - 1) for epoch in range(1, 100))]


def test_the_learning_rate_lags_an_epoch_as_in_the_releases() -> None:
    schedule = Schedule(100, 1e-3, 1e-4, 10, 1e-6, min_lr=1e-5, step="epoch")
    optimizer, scheduler = schedule.start([torch.nn.Parameter(torch.zeros(1))], 15)
    rates = []
    for update in range(1500):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step_update(update + 1)
    assert rates == pytest.approx([rate for rate in released_rates() for _ in range(15)])
    assert rates[0] == rates[29] == 1e-6  # epochs 0 and 1
    assert rates[150] == pytest.approx(9.0e-4, rel=2e-3)  # epoch 10
    assert sum(rates) == pytest.approx(0.683, abs=5e-4)


def test_a_thousand_images_are_fifteen_updates() -> None:
    samples = [("absent.png", 0)] * 1000
    loaders = [
        images.make_loader(samples, ToTensor(), **LOADING, drop_last=drop_last)
        for drop_last in (True, False)
    ]
    assert [len(loader) for loader in loaders] == [15, 16]


def test_images_are_the_releases(tmp_path: Path) -> None:
    """vtab.py: Resize((224, 224), bicubic), ToTensor, Normalize with ImageNet's numbers."""
    pixels = np.random.default_rng(0).integers(0, 256, (150, 301, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    released = transforms.Compose(
        [
            transforms.Resize((224, 224), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    for transform in images.make_transforms(model, img_size=224, normalize="imagenet"):
        torch.testing.assert_close(transform(image), released(image), rtol=0, atol=1e-6)
    own, _ = images.make_transforms(model, img_size=224)
    difference = (own(image) - released(image)).abs().mean().item()
    assert difference > 0.3  # a ViT's own are 0.5 and 0.5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(10):
            colour = (200 * (label == "a"), 10 * index, 100)
            Image.new("RGB", (9, 9), colour).save(tmp_path / "images" / label / f"{index}.png")
    return tmp_path / "images"


SMALL = {
    "model": "vit_tiny_patch16_224",
    "pretrained": False,
    "img_size": 32,
    "device": "cpu",
    "batch_size": 6,
    "epochs": 2,
}


def test_a_run_records_its_recipe_and_leaves_the_last_batch_out(
    folder: Path, tmp_path: Path
) -> None:
    settings = recipe_for("vtab", "cifar").settings(folder, **SMALL, rank=2)
    run = prepare(settings, tmp_path / "run")
    assert [len(targets) for _, targets in run.train_loader] == [6, 6]  # of 16
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (recorded["settings"]["recipe"], recorded["settings"]["task"]) == ("vtab", "cifar")
    assert recorded["settings"]["options"] == {"ffn_init": "u", "factor_init": "release"}
    assert recorded["method"]["ffn_init"] == "u" and recorded["method"]["rank"] == 2

    with pytest.raises(ValueError, match="batch_size must be at most the 16 images to train"):
        prepare(dataclasses.replace(settings, batch_size=17), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_images_may_come_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    train = tuple((str(folder / "a" / f"{i}.png"), 0) for i in range(8))
    train += tuple((str(folder / "b" / f"{i}.png"), 1) for i in range(8))
    val = ((str(folder / "a" / "9.png"), 0), (str(folder / "b" / "9.png"), 1))
    (folder / "a" / "3.png").write_bytes(b"broken")
    splits = images.ImageSplits(folder, ("a", "b"), train, val, held_out=False)
    given = SMALL | {"skip_bad_images": True, "rank": 2}
    settings = recipe_for("vtab", "cifar").settings(folder, **given)
    run = prepare(settings, tmp_path / "run", splits=splits)
    assert run.config["images"] == {"train": 15, "val": 2}
    assert run.config["identity"]["skipped_images"] == ["a/3.png"]


def test_a_run_trains_as_the_releases_loop(folder: Path, tmp_path: Path) -> None:
    """fact_tt.py's loop, on the plain model with the weights W0 + ΔW (FacT, Eq. 8) and the run's
    first factors and batches: AdamW, timm's CosineLRScheduler stepped with ep after epoch ep."""
    given = SMALL | {"epochs": 3, "rank": 3, "dropout": 0.0, "drop_path": 0.0, "layers": (0,)}
    settings = recipe_for("vtab", "svhn", "fact_tt").settings(folder, **given)
    assert settings.scale == 100.0
    run = prepare(settings, tmp_path / "run")
    plain = timm.create_model(settings.model, img_size=32, num_classes=2).train()
    names = dict(plain.named_parameters())
    plain.load_state_dict({name: run.model.state_dict()[name] for name in plain.state_dict()})
    group: Any = run.adapter.bank.all
    u, v, core = (t.detach().clone().requires_grad_() for t in (group.U, group.V, group.core))
    head = [names["head.weight"], names["head.bias"]]

    def weights() -> dict[str, torch.Tensor]:
        slices = settings.scale * u @ core @ v.T  # [12, d, d] as x·W
        fc1, fc2 = torch.cat([*slices[4:8].mT]), torch.cat([*slices[8:].mT], 1)
        deltas = {"attn.qkv": torch.cat([*slices[:3].mT]), "attn.proj": slices[3].T}
        deltas |= {"mlp.fc1": fc1, "mlp.fc2": fc2}
        keys = {f"blocks.0.{name}.weight": delta for name, delta in deltas.items()}
        return {key: names[key].detach() + delta for key, delta in keys.items()}

    for name, parameter in names.items():
        parameter.requires_grad_(name.startswith("head."))
    optimizer = torch.optim.AdamW([u, v, core, *head], lr=1e-3, weight_decay=1e-4)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=3, warmup_t=0, lr_min=1e-5, warmup_lr_init=1e-6
    )
    for epoch in range(3):
        assert run.train_loader.generator is not None
        run.train_loader.generator.manual_seed(epoch_seed(42, epoch + 1))
        for x, y in run.train_loader:
            loss = torch.nn.functional.cross_entropy(functional_call(plain, weights(), (x,)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step(epoch)
    start = group.U.detach().clone()
    fit(run)
    assert (group.U - start).abs().max() > 1e-4
    for found, expected in ((group.U, u), (group.V, v), (group.core, core)):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(run.model.head.weight, head[0], rtol=1e-3, atol=1e-6)  # type: ignore[union-attr, arg-type]
