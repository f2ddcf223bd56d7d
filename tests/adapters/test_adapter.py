"""The adapter's handle: finding it again, merging, detaching, its state."""

from __future__ import annotations

import copy

import pytest
import torch

from efft_kernels import EFFT1, EFFT2, Adapter, FusedEFFTLinear, LoRA, attach

METHODS = [EFFT1(rank=3, scale=0.5), EFFT2(rank=(3, 2), init="u", cores="shared", learn_scale=True)]
IMAGES = torch.linspace(-1, 1, 384).view(2, 3, 8, 8)


def bits(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


class TestHandle:
    def test_found_again_on_the_model(self, adapted):
        model, adapter = adapted()
        again = Adapter(model)
        assert again.method == adapter.method and again.sites == adapter.sites
        assert again.modules_to_train == ("head",)
        assert all(a is b for a, b in zip(again.parameters(), adapter.parameters(), strict=True))

    def test_refuses_a_model_without_one(self, make_vit):
        with pytest.raises(
            ValueError, match="model must carry an adapter, got a VisionTransformer"
        ):
            Adapter(make_vit())

    def test_num_parameters_counts_the_factors(self, adapted):
        model, adapter = adapted()
        assert adapter.num_parameters() == 5 * 12 * 3 + 3 * 2 * 9
        assert adapter.num_parameters() == sum(p.numel() for p in model.factor_bank.parameters())

    def test_repr(self, adapted):
        _, adapter = adapted()
        assert "EFFT1(rank=3" in repr(adapter) and "8 linears of VisionTransformer" in repr(adapter)


class TestMerge:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("method", METHODS, ids=repr)
    def test_unmerge_restores_every_bit(self, adapted, method, dtype):
        model, adapter = adapted(method, dtype=dtype)
        before, parameters = bits(model), dict(model.named_parameters())
        output = model(IMAGES.to(dtype))
        adapter.merge()
        assert adapter.merged
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert changed == {f"{site.name}.weight" for site in adapter.sites}
        adapter.unmerge()
        assert not adapter.merged and same_bits(bits(model), before)
        assert all(p is parameters[name] for name, p in model.named_parameters())
        assert torch.equal(model(IMAGES.to(dtype)), output)

    @pytest.mark.parametrize("distilled", [False, True])
    @pytest.mark.parametrize("method", METHODS, ids=repr)
    def test_merged_model_is_the_same_function(self, adapted, method, distilled, make_vit):
        model, adapter = adapted(method, distilled, torch.float64)
        expected = model(IMAGES.double())
        plain = make_vit(distilled, torch.float64).eval()
        plain.head.load_state_dict(model.head.state_dict())
        assert (expected - plain(IMAGES.double())).abs().max() > 1e-3
        adapter.merge()
        torch.testing.assert_close(model(IMAGES.double()), expected, rtol=1e-10, atol=1e-10)

    def test_adds_delta_weights(self, adapted):
        model, adapter = adapted()
        deltas = adapter.delta_weights()
        base = {name: layer.weight.clone() for name, layer in adapter.layers().items()}
        adapter.merge()
        for name, delta in deltas.items():
            assert torch.equal(model.get_submodule(name).weight, base[name] + delta)
            assert delta.dtype == torch.float32 and not delta.requires_grad
        assert all(torch.equal(d, deltas[n]) for n, d in adapter.delta_weights().items())

    def test_training_while_merged_is_refused(self, adapted):
        model, adapter = adapted()
        adapter.merge()
        model.train()
        with pytest.raises(RuntimeError, match=r"merged.*unmerge\(\)"):
            model(IMAGES)
        adapter.unmerge()
        model(IMAGES).sum().backward()
        assert all(p.grad is not None for p in adapter.parameters())

    def test_moved_while_merged(self, adapted):
        model, adapter = adapted()
        before = bits(model)
        adapter.merge()
        model.to(torch.float64)
        adapter.unmerge()
        assert same_bits(bits(model), {name: t.double() for name, t in before.items()})

    def test_moved_while_merged_it_is_the_same_tensor(self, adapted):
        """As with torch's own parameters: an optimizer, or another linear, may hold it too."""
        model, adapter = adapted()
        weights = {name: layer.weight for name, layer in adapter.layers().items()}
        adapter.merge()
        model.to("cpu").to(torch.float64)
        adapter.unmerge()
        for name, layer in adapter.layers().items():
            assert layer.weight is weights[name] and layer.weight.dtype == torch.float64


class TestDetach:
    @pytest.mark.parametrize("distilled", [False, True])
    def test_gives_the_plain_model_back(self, make_vit, randomize, unchanged, distilled):
        model = make_vit(distilled)
        model.blocks[0].attn.qkv.weight.requires_grad_(False)
        model.head.bias.requires_grad_(False)
        seen = []
        model.blocks[1].mlp.fc1.register_forward_hook(lambda *_: seen.append(1))
        output = model.eval()(IMAGES)
        with unchanged(model, swapped=True):
            adapter = attach(model, METHODS[0])
            randomize(adapter)
            assert not torch.allclose(model(IMAGES), output)
            assert adapter.detach() is model
        plain = make_vit(distilled)
        for (name, module), expected in zip(model.named_modules(), plain.modules(), strict=True):
            assert vars(module).keys() == vars(expected).keys(), name
        seen.clear()
        assert torch.equal(model(IMAGES), output) and seen == [1]

    def test_keeps_what_the_head_learnt(self, adapted):
        model, adapter = adapted()
        head = model.head.weight.clone()
        adapter.detach()
        assert torch.equal(model.head.weight, head)

    def test_after_merge_keeps_the_merged_weights(self, adapted):
        model, adapter = adapted()
        expected = model(IMAGES)
        adapter.merge()
        merged = bits(model)
        adapter.detach()
        assert not any(isinstance(module, FusedEFFTLinear) for module in model.modules())
        torch.testing.assert_close(model(IMAGES), expected)
        assert all(torch.equal(t, merged[name]) for name, t in model.state_dict().items())
        assert all(p.requires_grad for p in model.parameters())

    def test_handle_is_dead_afterwards(self, adapted, tmp_path):
        _, adapter = adapted()
        adapter.detach()
        for use in (
            adapter.detach,
            adapter.merge,
            adapter.delta_weights,
            lambda: adapter.save(tmp_path / "a.safetensors"),
        ):
            with pytest.raises(RuntimeError, match="detached"):
                use()
        assert list(tmp_path.iterdir()) == []

    def test_attach_after_detach(self, adapted):
        model, adapter = adapted()
        adapter.detach()
        again = attach(model, EFFT2(rank=2))
        assert again.num_parameters() == 7 * 12 * 2 + 12 * 4


class TestStateDict:
    def test_keys(self, adapted):
        _, adapter = adapted(METHODS[1])
        assert sorted(adapter.state_dict()) == sorted(
            [f"factors.{g}.{n}" for g in ("mhsa", "ffn") for n in ("U", "V", "core", "scale")]
            + ["modules.head.weight", "modules.head.bias"]
        )

    def test_round_trip(self, adapted, make_vit):
        model, adapter = adapted(METHODS[1])
        other = make_vit().eval()
        twin = attach(other, METHODS[1])
        twin.load_state_dict({name: t.clone() for name, t in adapter.state_dict().items()})
        assert torch.equal(other(IMAGES), model(IMAGES))

    @pytest.mark.parametrize(
        ("change", "texts"),
        [
            (lambda s: s.pop("factors.all.U"), ["missing", "factors.all.U"]),
            (lambda s: s.update(extra=torch.ones(1)), ["unknown", "extra"]),
            (
                lambda s: s.update({"factors.all.V": torch.ones(3, 12)}),
                ["factors.all.V must be [12, 3]", "[3, 12]"],
            ),
            (
                lambda s: s.update({"modules.head.bias": torch.ones(4)}),
                ["modules.head.bias must be [5]", "[4]"],
            ),
        ],
    )
    def test_nothing_is_copied_unless_all_fits(self, adapted, change, texts):
        model, adapter = adapted()
        before = bits(model)
        state = {name: torch.full_like(t, 9.0) for name, t in adapter.state_dict().items()}
        change(state)
        with pytest.raises(ValueError) as error:
            adapter.load_state_dict(state)
        assert all(text in str(error.value) for text in texts), str(error.value)
        assert same_bits(bits(model), before)

    def test_refused_while_merged(self, adapted):
        _, adapter = adapted()
        state = copy.deepcopy(adapter.state_dict())
        adapter.merge()
        with pytest.raises(ValueError, match=r"merged.*unmerge\(\)"):
            adapter.load_state_dict(state)


def test_trainable_parameters_are_printed_factors_and_head(make_vit, capsys):
    model = make_vit()
    adapter = attach(model, LoRA(rank=2))
    adapter.print_trainable_parameters()
    head = 12 * 5 + 5
    trained, total = adapter.num_parameters() + head, sum(p.numel() for p in model.parameters())
    assert capsys.readouterr().out == (
        f"trainable parameters: {trained:,} of {total:,} ({100 * trained / total:.2f} %):"
        f" {adapter.num_parameters():,} in factors, {head} in head\n"
    )
    model.norm.bias.requires_grad_(True)
    adapter.print_trainable_parameters()
    out = capsys.readouterr().out
    assert f"{head} in head, 12 in no part of the adapter (norm.bias)\n" in out
