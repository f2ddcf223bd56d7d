"""The groups of EFFT and FacT: where a site sits in the tensor, and what its linears share."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from efft_kernels import EFFT1, EFFT2, FacTTK, FacTTT
from efft_kernels.methods import Site
from efft_kernels.methods.tensor_train import Placement, TensorTrainGroup, _Family
from efft_kernels.ops.reference import delta_weight

D = 8
BLOCK = ("q", "kv", "o", "fc1", "fc2")
METHODS = [
    EFFT1(rank=2, dropout=0.0),
    EFFT1(rank=2, dropout=0.0, attention_side="in"),
    EFFT2(rank=(3, 2), dropout=0.0, scale=2.5),
    EFFT2(rank=2, dropout=0.0, learn_scale=True, cores="shared"),
    FacTTT(rank=(2, 3), dropout=0.0),
    FacTTK(rank=2, layer_rank=3, dropout=0.0),
]


def site(role, block=0):
    shapes = {"kv": (D, 2 * D), "fc1": (D, 4 * D), "fc2": (4 * D, D)}
    return Site(f"blocks.{block}.{role}", role, block, 0, *shapes.get(role, (D, D)))


@pytest.fixture
def groups(randomize):
    """The groups of a method on small blocks, with random factors."""

    def make(method, blocks=2):
        sites = [site(role, block) for block in range(blocks) for role in BLOCK]
        found = list(method.build(sites).values())
        for group in found:
            randomize(group)
        return found

    return make


@pytest.mark.parametrize("method", METHODS, ids=str)
class TestPosition:
    def test_gives_the_factors_of_the_name(self, groups, method):
        for group in groups(method):
            for name in group.placements:
                found, expected = group.factors_at(group.position(name), True), group(name, True)
                for ours, theirs in zip(found, expected, strict=True):
                    assert ours is theirs is None or torch.equal(ours, theirs)
                assert len(found.up) == 1  # for all slices
                sum(t.sum() for t in found if t is not None).backward()
                place = group.position(name.replace(".0.", ".1.")).place
                assert group.position(name).place == place

    def test_follows_the_cores(self, groups, method):
        group = groups(method)[0]
        position = group.position("blocks.1.kv")
        assert group.to("meta") is group and position.cores.is_meta
        state = {name: torch.ones(p.shape) for name, p in group.named_parameters()}
        group.load_state_dict(state, assign=True)
        assert not position.cores.is_meta
        assert group.factors_at(position, False) is not None
        group.core = nn.Parameter(group.core.to("meta"))
        assert group.factors_at(position, False) is None


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_sites_of_one_key_have_one_down(groups, method):
    for group in groups(method):
        found = {name: (group.down_key(name), group(name, False).down) for name in group.placements}
        for (key, down), (other_key, other) in itertools.combinations(found.values(), 2):
            assert (key is not None and key == other_key) == torch.equal(down, other)


@pytest.mark.parametrize(
    ("method", "role"), [(METHODS[0], "fc2"), (METHODS[2], "fc2"), (METHODS[4], "q")]
)
def test_what_is_used_whole_is_the_parameter_itself(groups, method, role):
    """A slice or a product by ones would have a gradient of its size, for every linear."""
    group = groups(method)[-1]
    assert group(f"blocks.0.{role}", True).down is group.U


def test_a_fused_kv_is_its_two_matrices_on_the_input_side(randomize):
    method = EFFT1(rank=(3, 2), attention_side="in")
    fused, apart = (method.build([site(r) for r in roles])["all"] for roles in (["kv"], ["k", "v"]))
    randomize(fused)
    apart.load_state_dict(fused.state_dict())
    k_and_v = [delta_weight(*apart(f"blocks.0.{name}", False), 1) for name in "kv"]
    for factors in (fused("blocks.0.kv", False), fused.joint_factors(False)["blocks.0.kv"]):
        torch.testing.assert_close(delta_weight(*factors, 2), torch.cat(k_and_v))
    assert fused.stack_plan(["blocks.0.kv"]) is None


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_stacks_of_few_blocks(groups, method, blocks):
    for group in groups(method, blocks):
        products = group.joint_products(False)
        made = group.from_products(products)
        assert max(len(factors.up) for factors in made.values()) <= 4  # FacT's slices of fc1
        for role in {name.rpartition(".")[2] for name in group.placements}:
            sites = [f"blocks.{block}.{role}" for block in range(blocks)]
            plan = group.stack_plan(sites)
            if group.placements[sites[0]].u_chunks == 1:
                down, b = group.stacked(products, plan)
                assert torch.equal(down, torch.stack([made[s].down for s in sites]))
                assert torch.equal(b, torch.stack([made[s].up.flatten(0, 1) for s in sites]))


@pytest.mark.parametrize(
    ("cores", "chosen", "even"),
    [
        ((3, 1, 3, 1), (0, 2), True),
        ((3, 3, 1), (0, 1), False),  # one more at the end
        ((3, 1, 1, 1), (0, 1), False),  # more cores than the other
        ((3, 1, 3, 1, 3, 1), (0, 2), False),  # one of them is left out
        ((1, 2, 1, 1, 1, 1, 2), (0, 2, 5), False),  # two others between, then one
    ],
)
def test_sites_at_uneven_distances_have_no_plan(cores, chosen, even):
    starts = itertools.accumulate(cores, initial=0)
    places = {str(i): Placement(next(starts), n, "in", (0, D)) for i, n in enumerate(cores)}
    sizes = {"dims": (D, D), "rank": (2, 2), "cores": sum(cores)}
    group = TensorTrainGroup(places, **sizes, scale=1.0, learn_scale=False)
    assert (group.stack_plan([str(i) for i in chosen]) is not None) is even


def test_cores_at_even_distances_are_one_slice():
    def picked(*indices):
        places = {str(i): Placement(first, 1, "in", (0, D)) for i, first in enumerate(indices)}
        family = _Family.of(places)
        return family.cores, family.times

    runs = slice(4, 9, 2), slice(9, 10, 1), slice(9, 10, 1), slice(2, 4, 1)
    assert picked(4, 6, 8, 9, 9, 2, 3) == (runs, 1)
    assert picked(1, 2, 1, 2) == ((slice(1, 3, 1),), 2)
