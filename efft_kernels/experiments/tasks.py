"""The tasks of VTAB-1K and the fine-grained few-shot sets: groups, classes, other names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "Natural": (
            "cifar",
            "caltech101",
            "dtd",
            "oxford_flowers102",
            "oxford_iiit_pet",
            "svhn",
            "sun397",
        ),
        "Specialized": ("patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy"),
        "Structured": (
            "clevr_count",
            "clevr_dist",
            "dmlab",
            "kitti",
            "dsprites_loc",
            "dsprites_ori",
            "smallnorb_azi",
            "smallnorb_ele",
        ),
    }
)
TASKS: tuple[str, ...] = tuple(task for group in GROUPS.values() for task in group)

CLASSES: Mapping[str, int] = MappingProxyType(
    {
        "cifar": 100,
        "caltech101": 102,
        "dtd": 47,
        "oxford_flowers102": 102,
        "oxford_iiit_pet": 37,
        "svhn": 10,
        "sun397": 397,
        "patch_camelyon": 2,
        "eurosat": 10,
        "resisc45": 45,
        "diabetic_retinopathy": 5,
        "clevr_count": 8,
        "clevr_dist": 6,
        "dmlab": 6,
        "kitti": 4,
        "dsprites_loc": 16,
        "dsprites_ori": 16,
        "smallnorb_azi": 18,
        "smallnorb_ele": 9,
        "fgvc_aircraft": 100,
        "food101": 101,
        "flowers102": 102,
        "pets": 37,
        "stanford_cars": 196,
    }
)

FEWSHOT: tuple[str, ...] = ("fgvc_aircraft", "pets", "food101", "stanford_cars", "flowers102")
SHOTS = (1, 2, 4, 8, 16)

_VTAB_ALIASES = {
    "cifar": ("cifar100",),
    "caltech101": ("caltech",),
    "dtd": ("describable_textures",),
    "oxford_flowers102": ("oxford_flowers", "flowers102", "flowers", "flower102"),
    "oxford_iiit_pet": ("oxford_pet", "oxford_pets", "pets", "pet", "iiit_pet"),
    "svhn": ("svhn_cropped",),
    "sun397": ("sun",),
    "patch_camelyon": ("camelyon", "pcam"),
    "eurosat": (),
    "resisc45": ("resisc",),
    "diabetic_retinopathy": ("retinopathy", "diabetic"),
    "clevr_count": ("clevr_count_all", "clevr_cnt"),
    "clevr_dist": ("clevr_distance", "clevr_closest_object_distance"),
    "dmlab": (),
    "kitti": ("kitti_dist", "kitti_distance", "kitti_closest_vehicle_distance"),
    "dsprites_loc": ("dsprites_location", "dsprites_x_position", "dspr_loc", "dsprite_loc"),
    "dsprites_ori": ("dsprites_orientation", "dspr_ori", "dsprite_ori"),
    "smallnorb_azi": ("smallnorb_azimuth", "smallnorb_azim", "snorb_azim", "snorb_azi"),
    "smallnorb_ele": ("smallnorb_elevation", "smallnorb_elev", "snorb_ele", "snorb_elev"),
}
_FEWSHOT_ALIASES = {
    "fgvc_aircraft": ("aircraft", "fgvc"),
    "pets": ("oxford_pets", "oxford_pet", "oxford_iiit_pet"),
    "food101": ("food",),
    "stanford_cars": ("standford_cars", "cars"),  # the release's own spelling
    "flowers102": ("oxford_flowers102", "oxford_flowers", "flowers"),
}
ALIASES: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"vtab": MappingProxyType(_VTAB_ALIASES), "fewshot": MappingProxyType(_FEWSHOT_ALIASES)}
)


def _plain(name: str) -> str:
    """A name in small letters without -, _ and blanks."""
    return re.sub(r"[-_\s]", "", name.lower())


def canonical(name: str, suite: str) -> str:
    """The task that a name stands for; a name that is none of them stays as it is.

    Args:
        name: a task, one of its aliases, or a task of the user's own.
        suite: "vtab" or "fewshot".
    """
    for task, others in ALIASES[suite].items():
        if _plain(name) in map(_plain, (task, *others)):
            return task
    return name.strip()


def choose(names: Sequence[str], suite: str) -> list[str]:
    """The tasks that a list of names stands for; "all" is the whole suite.

    Raises:
        ValueError: no name, or two names for one task.
    """
    known = TASKS if suite == "vtab" else FEWSHOT
    chosen: dict[str, str] = {}
    for name in names:
        if not name.strip():
            raise ValueError(f"tasks must be names or all, got {','.join(names)!r}")
        for task in known if _plain(name) == "all" else (canonical(name, suite),):
            if task in chosen:
                both = dict.fromkeys((chosen[task], name.strip()))
                raise ValueError(
                    f"tasks must name each task once, got {' and '.join(both)} for {task}"
                )
            chosen[task] = name.strip()
    return list(chosen)
