"""Other projects' files and our own format: PEFT both ways, the FacT release, the JSON schema."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from efft_kernels import EFFT1, EFFT2, FacTTK, FacTTT, KAdaptation, LoRA, attach, load, reference
from efft_kernels.interop import export_peft_lora, import_fact, import_peft_lora
from efft_kernels.interop.peft import _exact_pair
from efft_kernels.methods import METHODS, Factors

IMAGES = torch.linspace(-1, 1, 768).view(4, 3, 8, 8)
EVERY_METHOD = [
    EFFT1(rank=3, scale=0.7),
    EFFT1(rank=(4, 3), scale=0.7, learn_scale=True),
    EFFT2(rank=3, scale=0.7),
    EFFT2(rank=(5, 3), ffn_rank=2, init="u", cores="shared"),
    FacTTT(rank=3, scale=0.7),
    FacTTK(rank=3, scale=0.7, layer_rank=2),
    LoRA(rank=3, scale=0.7),
    LoRA(rank=2, matrices=None),
    KAdaptation(products=2, rank=1, scale=0.7),
]


def make_hf_vit(seed=7):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=24,
        image_size=8, patch_size=4, num_labels=5, hidden_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def make_swin(dtype=torch.float32):
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(7)
    model = SwinTransformer(
        img_size=16, patch_size=2, embed_dim=8, depths=(2, 2), num_heads=(2, 4), window_size=4,
        num_classes=5,
    )  # fmt: skip
    return model.to(dtype).eval()


def outputs(model, images=IMAGES):
    with torch.no_grad():
        out = model(images.to(next(model.parameters()).dtype))
    return out.logits if hasattr(out, "logits") else out


def snapshot(model):
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [(name, id(module)) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
    )


def assert_untouched(model, before):
    state, *identities = snapshot(model)
    assert identities == list(before[1:])
    assert state.keys() == before[0].keys()
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in state.items())


def train_with_peft(model, images=IMAGES, steps=3, **config):
    """A PEFT model after a few steps of a large learning rate."""
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.5)
    labels = torch.arange(len(images)) % 5
    for _ in range(steps):
        out = wrapped(images)
        logits = out.logits if hasattr(out, "logits") else out
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return wrapped.eval()


def peft_delta_weights(folder):
    """ΔW of each module in float64, straight from the files; pattern keys must be whole names."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    deltas = {}
    for key in (key for key in tensors if key.endswith("lora_A.weight")):
        a, b = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
        root = a.shape[0] ** (0.5 if config["use_rslora"] else 1)
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        deltas[name] = config["alpha_pattern"].get(name, config["lora_alpha"]) / root * b @ a
    return deltas


PEFT_CONFIGS = {
    "plain": {"r": 3, "lora_alpha": 6},
    "rank-stabilised": {"r": 3, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "r": 2, "lora_alpha": 3, "rank_pattern": {"fc1": 4, r"\d\.mlp\.fc2": 1},
        "alpha_pattern": {"fc1": 7},
    },
}  # fmt: skip


class TestImportPeft:
    @pytest.mark.parametrize("config", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS)
    @pytest.mark.parametrize("kind", ["timm", "hf"])
    def test_outputs_are_those_of_the_trained_peft_model(self, make_vit, tmp_path, kind, config):
        if kind == "timm":
            model = make_vit().eval()
            targets, head = ["attn.qkv", "attn.proj", "fc1", "fc2"], "head"
        else:
            model = make_hf_vit()
            targets, head = ["q_proj", "v_proj", "fc1", "fc2"], "classifier"
        plain = copy.deepcopy(model)
        untrained = outputs(plain)
        trained = train_with_peft(model, target_modules=targets, modules_to_save=[head], **config)
        trained.save_pretrained(tmp_path)
        adapter = import_peft_lora(plain, tmp_path)
        plain.eval()

        torch.testing.assert_close(outputs(plain), outputs(trained), rtol=0, atol=1e-6)
        assert (outputs(plain) - untrained).abs().max() > 0.1
        assert adapter.modules_to_train == (head,)
        assert {site.name.rpartition(".")[2] for site in adapter.sites} == {
            target.rpartition(".")[2] for target in targets
        }

    @pytest.mark.parametrize("config", ["plain", "rank-stabilised"])
    def test_delta_weights_are_exact(self, make_vit, tmp_path, config):
        model = make_vit()
        plain = copy.deepcopy(model).double()
        settings = PEFT_CONFIGS[config]
        train_with_peft(model, target_modules=["qkv", "fc2"], **settings).save_pretrained(tmp_path)
        adapter = import_peft_lora(plain, tmp_path)
        expected = peft_delta_weights(tmp_path)
        assert expected.keys() == adapter.delta_weights().keys()
        for name, delta in adapter.delta_weights().items():
            torch.testing.assert_close(delta, expected[name], rtol=1e-14, atol=1e-16)
        assert adapter.modules_to_train == ()

    def test_padded_ranks_stay_zero_in_training(self, make_vit, tmp_path):
        model = make_vit()
        plain = copy.deepcopy(model)
        settings = PEFT_CONFIGS["patterns"]
        trained = train_with_peft(model, target_modules=["qkv", "fc1", "fc2"], **settings)
        trained.save_pretrained(tmp_path)
        adapter = import_peft_lora(plain, tmp_path)
        ranks = {"qkv": 2, "fc1": 4, "fc2": 1}
        optimizer = torch.optim.Adam(adapter.parameters(), lr=0.1)
        for _ in range(2):
            plain(IMAGES).square().mean().backward()
            optimizer.step()
        for site in adapter.sites:
            group, rank = adapter.bank.group(site.name), ranks[site.name.rpartition(".")[2]]
            assert group.A.shape[1] == 4
            assert group.A[:, :rank].all() and not group.A[:, rank:].any()
            assert group.B[:, :, :rank].any() and not group.B[:, :, rank:].any()

    @pytest.mark.parametrize("classifier", ["head", "head.fc"])
    def test_swin_head_by_its_peft_name(self, tmp_path, classifier):
        model = make_swin()
        model.pretrained_cfg = {"classifier": classifier}
        plain = copy.deepcopy(model)
        images = torch.linspace(-1, 1, 3072).view(4, 3, 16, 16)
        trained = train_with_peft(
            model, images, r=2, target_modules=["qkv"], modules_to_save=["head"]
        )
        trained.save_pretrained(tmp_path)
        adapter = import_peft_lora(plain, tmp_path)
        assert adapter.modules_to_train == (classifier,)
        torch.testing.assert_close(
            outputs(plain, images), outputs(trained, images), rtol=0, atol=1e-6
        )

    def test_old_checkpoints_of_torch_save(self, make_vit, tmp_path):
        model, again = make_vit().eval(), make_vit().eval()
        peft = train_with_peft(model, r=2, target_modules=["qkv"], modules_to_save=["head"])
        peft.save_pretrained(tmp_path, safe_serialization=False)
        if not (tmp_path / "adapter_model.bin").exists():
            safe = tmp_path / "adapter_model.safetensors"
            torch.save(load_file(safe), tmp_path / "adapter_model.bin")
            safe.unlink()
        import_peft_lora(again, tmp_path)
        torch.testing.assert_close(outputs(again), outputs(peft), rtol=0, atol=1e-6)

    def test_comes_back_from_our_own_file(self, make_vit, tmp_path):
        model, second, third = (make_vit().eval() for _ in range(3))
        train_with_peft(model, r=2, target_modules=["qkv"]).save_pretrained(tmp_path)
        import_peft_lora(second, tmp_path).save(tmp_path / "own.safetensors")
        load(third, tmp_path / "own.safetensors")
        assert torch.equal(outputs(second), outputs(third))


@pytest.fixture
def checkpoint(tmp_path):
    """A small checkpoint to spoil: LoRA of both qkv and the head, of rank 2."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    prefix = "base_model.model."
    tensors = {f"{prefix}head.weight": torch.randn(5, 12), f"{prefix}head.bias": torch.randn(5)}
    for block in range(2):
        name = f"{prefix}blocks.{block}.attn.qkv"
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, 12)
        tensors[f"{name}.lora_B.weight"] = torch.randn(36, 2)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "modules_to_save": ["head"]}

    def write(change=None, **fields):
        (change or (lambda tensors: None))(tensors)
        (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return write


def renamed(old, new):
    def change(tensors):
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


QKV = "base_model.model.blocks.0.attn.qkv"


class TestRefusedPeft:
    def test_the_unspoilt_one_is_taken(self, make_vit, checkpoint):
        assert import_peft_lora(make_vit(), checkpoint()).method.scale == 2.0

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"peft_type": "LOHA"}, "peft_type 'LORA', got 'LOHA'"),
            ({"peft_type": None}, "got None"),
            ({"use_dora": True}, "plain LoRA, got use_dora=True"),
            ({"bias": "all"}, "bias='none', got bias='all'"),
            ({"lora_bias": True}, "got lora_bias=True"),
            ({"fan_in_fan_out": True}, "got fan_in_fan_out=True"),
            ({"target_parameters": ["w"]}, "got target_parameters"),
            ({"trainable_token_indices": [1]}, "got trainable_token_indices"),
            ({"layer_replication": [[0, 1]]}, "got layer_replication"),
            ({"something_new": {"x": 1}}, "got something_new"),
            ({"init_lora_weights": "pissa_niter_4"}, "got init_lora_weights='pissa_niter_4'"),
            ({"init_lora_weights": "olora"}, "got init_lora_weights='olora'"),
            ({"r": 0}, "whole numbers from 1 as ranks, got 0"),
            ({"r": True}, "got True"),
            ({"rank_pattern": {"qkv": "2"}}, "got '2'"),
            ({"rank_pattern": ["qkv"]}, "an object as rank_pattern"),
            ({"lora_alpha": None}, "finite numbers as alphas, got None"),
            ({"lora_alpha": float("nan")}, "got nan"),
            ({"alpha_pattern": {"(": 1}}, "regular expressions as keys, got '\\('"),
            ({"modules_to_save": "head"}, "names in modules_to_save"),
            ({"r": 3}, r"lora_A \[r=3, K\] and lora_B \[N, r=3\], got \[2, 12\] and \[36, 2\]"),
            ({"modules_to_save": None}, "modules trained whole \\(none\\), got .*head"),
            ({"modules_to_save": ["norm"]}, "modules trained whole \\(none\\), got .*head"),
        ],
    )
    def test_configurations(self, make_vit, checkpoint, fields, message):
        model = make_vit()
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            import_peft_lora(model, checkpoint(**fields))
        assert_untouched(model, before)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (renamed(".0.attn.qkv", ".7.attn.qkv"), ValueError, "adapted module 'blocks.7.attn"),
            (renamed(".0.attn.qkv", ".0.norm1"), TypeError, "'blocks.0.norm1' must be an nn.Lin"),
            (renamed("lora_A", "lora_embedding_A"), ValueError, "got .*lora_embedding_A"),
            (renamed("base_model.model.", ""), ValueError, "under 'base_model.model.'"),
            (renamed("head.bias", "head.lora_bias"), ValueError, "got .*head.lora_bias"),
            (renamed("head.bias", "norm.bias"), ValueError, "with norm.bias"),
            (lambda t: t.pop("base_model.model.head.bias"), ValueError, "must hold head.bias"),
            (
                lambda t: t.update({"base_model.model.head.bias": torch.zeros(6)}),
                ValueError, r"head.bias must be \[5\], got \[6\]",
            ),
            (lambda t: t.pop(f"{QKV}.lora_B.weight"), ValueError, "lora_B.weight, got .* without"),
            (
                lambda t: t.update({f"{QKV}.lora_magnitude_vector": torch.ones(36)}),
                ValueError, "got .*lora_magnitude_vector",
            ),
            (
                lambda t: t.update({f"{QKV}.lora_A.weight": torch.zeros(2, 13)}),
                ValueError, r"lora_A.weight must be \[r, K\]=\[2, 12\], got \[2, 13\]",
            ),
            (
                lambda t: t.update({f"{QKV}.lora_A.weight": torch.zeros(2, 12, 1, 1)}),
                ValueError, r"got \[2, 12, 1, 1\]",
            ),
            (
                lambda t: t.update({f"{QKV}.lora_A.weight": torch.zeros(2, 12).long()}),
                ValueError, "must be floating, got torch.int64",
            ),
            (
                lambda t: [t.pop(key) for key in list(t) if "lora" in key],
                ValueError, "at least one lora_A.weight",
            ),
        ],
    )  # fmt: skip
    def test_tensors(self, make_vit, checkpoint, change, error, message):
        model = make_vit()
        before = snapshot(model)
        with pytest.raises(error, match=message):
            import_peft_lora(model, checkpoint(change))
        assert_untouched(model, before)

    def test_a_rank_that_does_not_fit_every_linear(self, make_vit, checkpoint):
        def widen(tensors):
            tensors[f"{QKV}.lora_A.weight"] = torch.randn(13, 12)
            tensors[f"{QKV}.lora_B.weight"] = torch.randn(36, 13)

        with pytest.raises(ValueError, match=r"r must be at most min\(K, N\)=12 .*, got 13"):
            import_peft_lora(make_vit(), checkpoint(widen, rank_pattern={"blocks.0.attn.qkv": 13}))

    def test_files(self, make_vit, checkpoint, tmp_path):
        model = make_vit()
        before = snapshot(model)
        with pytest.raises(FileNotFoundError, match="path must be a PEFT checkpoint folder"):
            import_peft_lora(model, tmp_path / "none")
        with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
            import_peft_lora(model, tmp_path)
        folder = checkpoint()
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-9])
        with pytest.raises(ValueError, match="must be a whole safetensors file"):
            import_peft_lora(model, folder)
        weights.unlink()
        with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
            import_peft_lora(model, folder)
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(Path("harmful"), protocol=2))
        with pytest.raises(ValueError, match="must be a whole file of tensors"):
            import_peft_lora(model, folder)
        (folder / "adapter_config.json").write_text("{")
        with pytest.raises(ValueError, match="must be JSON"):
            import_peft_lora(model, folder)
        assert_untouched(model, before)

    def test_models(self, make_vit, checkpoint):
        model = make_vit()
        attach(model, LoRA(rank=2))
        with pytest.raises(ValueError, match="model must carry no adapter"):
            import_peft_lora(model, checkpoint())
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
            import_peft_lora("vit", checkpoint())


@st.composite
def operands(draw):
    """(down, core, up) of any shape the operator takes, some rank indices zero."""
    k, rows, slices, ra, rb = (draw(st.integers(1, 7)) for _ in range(5))
    cored, shared = draw(st.booleans()), draw(st.booleans())
    down = torch.randn(k, ra, dtype=torch.float64)
    core = torch.randn(slices, ra, rb, dtype=torch.float64) if cored else None
    up = torch.randn(1 if cored and shared else slices, rows, rb if cored else ra).double()
    dead = draw(st.sets(st.integers(0, ra - 1)))
    down[:, list(dead)] = 0
    (up if core is None else core.mT)[..., list(dead)] = 0
    return Factors(down, core, up)


class TestExportPeft:
    @given(operands())
    def test_the_pair_is_exact_and_as_small_as_its_factors(self, factors):
        a, b = _exact_pair(factors)
        down, core, up = factors
        slices = up.shape[0] if core is None else core.shape[0]
        delta = reference.delta_weight(down, core, up, slices)
        torch.testing.assert_close(b @ a, delta, rtol=1e-12, atol=1e-12)
        assert torch.linalg.matrix_rank(delta) <= a.shape[0] == b.shape[1]
        assert a.shape[0] <= min(down.shape[1], slices * up.shape[2], *delta.shape)

    @pytest.mark.parametrize("method", EVERY_METHOD, ids=repr)
    def test_peft_serves_every_method_on_vit(self, make_vit, randomize, tmp_path, method):
        peft = pytest.importorskip("peft")
        model, plain = make_vit(depth=6).eval(), make_vit(depth=6).eval()  # 24 targets
        base = outputs(plain)
        adapter = attach(model, method)
        randomize(adapter)
        with torch.no_grad():
            model.head.weight.add_(0.1)
        expected, ranks = outputs(model), export_peft_lora(adapter, tmp_path / "peft")
        assert outputs(model).equal(expected)
        served = peft.PeftModel.from_pretrained(plain, tmp_path / "peft").eval()
        torch.testing.assert_close(outputs(served), expected, rtol=2e-6, atol=2e-6)
        assert (expected - base).abs().max() > 0.1

        deltas = peft_delta_weights(tmp_path / "peft")
        assert deltas.keys() == ranks.keys() == adapter.layers().keys()
        for name, layer in adapter.layers().items():
            down, core, up = (None if t is None else t.detach() for t in layer.current_factors())
            slices = up.shape[0] if core is None else core.shape[0]
            assert ranks[name] == min(down.shape[1], slices * up.shape[2], *layer.weight.shape)
            assert ranks[name] >= torch.linalg.matrix_rank(deltas[name])

    @pytest.mark.parametrize(
        ("method", "expected"),
        [
            (EFFT1(rank=3), {"qkv": 3, "proj": 3, "fc1": 3, "fc2": 3}),
            (EFFT2(rank=(5, 3), ffn_rank=2), {"qkv": 5, "proj": 3, "fc1": 2, "fc2": 2}),
            (EFFT2(rank=(7, 2)), {"qkv": 6, "proj": 2, "fc1": 2, "fc2": 2}),
            (FacTTT(rank=3), {"qkv": 3, "proj": 3, "fc1": 3, "fc2": 3}),
            (FacTTK(rank=3), {"qkv": 3, "proj": 3, "fc1": 3, "fc2": 3}),
            (LoRA(rank=3), {"qkv": 6}),
            (LoRA(rank=3, matrices=("q", "fc1")), {"qkv": 3, "fc1": 3}),
            (LoRA(rank=5, matrices=("q", "k", "v")), {"qkv": 12}),  # 15 columns of a 12-wide input
            (KAdaptation(products=2, rank=1), {"qkv": 12, "proj": 4}),
        ],
        ids=repr,
    )
    def test_ranks(self, make_vit, randomize, tmp_path, method, expected):
        adapter = attach(make_vit(dtype=torch.float64), method)
        randomize(adapter)
        ranks = export_peft_lora(adapter, tmp_path / "peft")
        assert {name.rpartition(".")[2]: rank for name, rank in ranks.items()} == expected
        deltas = peft_delta_weights(tmp_path / "peft")
        for name, delta in adapter.delta_weights().items():
            torch.testing.assert_close(deltas[name], delta, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize(
        "method", [EFFT2(rank=[2, 3]), FacTTK(rank=[2, 3]), LoRA(rank=2), KAdaptation(products=2)],
        ids=repr,
    )  # fmt: skip
    def test_swin(self, randomize, tmp_path, method):
        peft = pytest.importorskip("peft")
        model, plain = make_swin(torch.float64), make_swin(torch.float64)
        images = torch.linspace(-1, 1, 3072).view(4, 3, 16, 16)
        adapter = attach(model, method)
        randomize(adapter)
        with torch.no_grad():
            model.head.fc.weight.add_(0.1)
        ranks = export_peft_lora(adapter, tmp_path / "peft")
        if isinstance(getattr(method, "rank", None), list):
            assert {ranks["layers.0.blocks.1.attn.qkv"], ranks["layers.1.blocks.0.mlp.fc2"]} == {
                2,
                3,
            }
        served = peft.PeftModel.from_pretrained(plain, tmp_path / "peft").double().eval()
        torch.testing.assert_close(
            outputs(served, images), outputs(model, images), rtol=1e-12, atol=1e-12
        )

    def test_hugging_face(self, randomize, tmp_path):
        peft = pytest.importorskip("peft")
        model, plain = make_hf_vit().eval(), make_hf_vit().eval()
        adapter = attach(model, EFFT2(rank=3, scale=0.7))
        randomize(adapter)
        assert set(export_peft_lora(adapter, tmp_path / "peft").values()) == {3}
        served = peft.PeftModel.from_pretrained(plain, tmp_path / "peft").eval()
        torch.testing.assert_close(outputs(served), outputs(model), rtol=0, atol=1e-6)

    def test_a_rank_pattern_comes_back_as_it_was(self, make_vit, tmp_path):
        model, plain = make_vit(), make_vit()
        settings = PEFT_CONFIGS["patterns"]
        trained = train_with_peft(model, target_modules=["qkv", "fc1", "fc2"], **settings)
        trained.save_pretrained(tmp_path / "theirs")
        ranks = export_peft_lora(import_peft_lora(plain, tmp_path / "theirs"), tmp_path / "ours")
        expected = {"qkv": 2, "fc1": 4, "fc2": 1}
        assert {name.rpartition(".")[2]: rank for name, rank in ranks.items()} == expected
        config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
        assert config["rank_pattern"] == config["alpha_pattern"] == ranks
        again = make_vit().eval()
        import_peft_lora(again, tmp_path / "ours")
        torch.testing.assert_close(outputs(again), outputs(trained), rtol=0, atol=1e-6)

    def test_a_fresh_adapter_keeps_its_rank(self, make_vit, tmp_path):
        adapter = attach(make_vit(), LoRA(rank=3, matrices=("o",)), modules_to_train=())
        ranks = export_peft_lora(adapter, str(tmp_path / "peft"))
        assert set(ranks.values()) == {3}
        assert not any("head" in k for k in load_file(tmp_path / "peft/adapter_model.safetensors"))

    def test_a_zero_adapter_has_rank_one(self, make_vit, randomize, tmp_path):
        adapter = attach(make_vit(), FacTTT(rank=3))
        randomize(adapter, std=0.0)
        assert set(export_peft_lora(adapter, tmp_path / "peft").values()) == {1}

    def test_merged_and_unmerged_write_the_same(self, make_vit, randomize, tmp_path):
        adapter = attach(make_vit(), EFFT1(rank=2))
        randomize(adapter)
        export_peft_lora(adapter, tmp_path / "a")
        adapter.merge()
        export_peft_lora(adapter, tmp_path / "b")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    def test_never_overwrites(self, make_vit, tmp_path):
        adapter = attach(make_vit(), LoRA(rank=2))
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "keep").touch()
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileExistsError, match="must not exist or be an empty folder"):
            export_peft_lora(adapter, tmp_path / "full")
        with pytest.raises(FileNotFoundError):
            export_peft_lora(adapter, tmp_path / "none" / "peft")
        export_peft_lora(adapter, tmp_path / "empty")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full"]

    def test_a_failed_write_leaves_nothing(self, make_vit, tmp_path, monkeypatch):
        def fail(*args, **kwargs):
            raise OSError("disk full")

        monkeypatch.setattr("efft_kernels.interop.peft.save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            export_peft_lora(attach(make_vit(), LoRA(rank=2)), tmp_path / "peft")
        assert not list(tmp_path.iterdir())

    def test_bad_adapters(self, make_vit, tmp_path):
        with pytest.raises(TypeError, match="adapter must be an Adapter, got VisionTransformer"):
            export_peft_lora(make_vit(), tmp_path / "peft")
        adapter = attach(make_vit(), LoRA(rank=2))
        adapter.detach()
        with pytest.raises(RuntimeError, match="detached"):
            export_peft_lora(adapter, tmp_path / "peft")

    def test_warns_where_peft_would_pass_the_qkv_by(self, tmp_path):
        from timm.models.beit import Beit

        model = Beit(img_size=8, patch_size=4, embed_dim=12, depth=1, num_heads=3, num_classes=5)
        adapter = attach(model, LoRA(rank=2))
        with pytest.warns(UserWarning, match="qkv_bias_separate"):
            export_peft_lora(adapter, tmp_path / "peft")


def fact_file(kind, path, d=12, r=3, blocks=2, classes=5, **changes):
    """Random tensors under the release's names; `changes` replace or, if None, remove some."""
    shapes = {"FacTu.weight": (r, d), "FacTv.weight": (d, r)}
    shapes |= {"head.weight": (classes, d), "head.bias": (classes,)}
    if kind == "fact_tk":
        shapes |= {"FacTp": (r, 12 * blocks), "FacTc": (r, r, r)}
    else:
        for i in range(blocks):
            for name in ("q", "k", "v", "proj"):
                shapes[f"blocks.{i}.attn.{name}_FacTs.weight"] = (r, r)
            shapes[f"blocks.{i}.mlp.fc1_FacTs.weight"] = (4 * r, r)
            shapes[f"blocks.{i}.mlp.fc2_FacTs.weight"] = (r, 4 * r)
    tensors = {name: torch.randn(shape) * 0.4 for name, shape in shapes.items()}
    tensors = {k: t for k, t in {**tensors, **changes}.items() if t is not None}
    torch.save(tensors, path)
    return tensors


def run_as_released(model, tensors, kind, scale, images):
    """Outputs of the plain model with the release's increments added by hooks on its linears.

    Every token goes through FacTu, its cores and FacTv in turn, as the release's forward does.
    """
    model = copy.deepcopy(model)
    t = {name: tensor.to(next(model.parameters()).dtype) for name, tensor in tensors.items()}
    model.head.load_state_dict({name: t[f"head.{name}"] for name in ("weight", "bias")})
    r = t["FacTu.weight"].shape[0]

    def u(x):
        return x @ t["FacTu.weight"].T

    def v(x):
        return x @ t["FacTv.weight"].T

    def mix(first, count):  # FacT-TK: [r, r, count]
        return t["FacTc"] @ t["FacTp"][:, first : first + count]

    def attention(i, x, names):
        if kind == "fact_tk":
            mixed = mix(12 * i, 4)
            return [v(u(x) @ mixed[:, :, "qkvp".index(name[0])]) for name in names]
        return [v(u(x) @ t[f"blocks.{i}.attn.{name}_FacTs.weight"].T) for name in names]

    def fc1(i, x):
        core = (
            mix(12 * i + 4, 8)[:, :, :4].reshape(r, 4 * r)
            if kind == "fact_tk"
            else t[f"blocks.{i}.mlp.fc1_FacTs.weight"].T
        )
        return v((u(x) @ core).unflatten(-1, (4, r))).flatten(-2)

    def fc2(i, x):
        core = (
            mix(12 * i + 4, 8)[:, :, 4:].reshape(r, 4 * r).T
            if kind == "fact_tk"
            else t[f"blocks.{i}.mlp.fc2_FacTs.weight"].T
        )
        return v(u(x.unflatten(-1, (4, -1))).flatten(-2) @ core)

    for i, block in enumerate(model.blocks):
        increments = {
            block.attn.qkv: lambda x, i=i: torch.cat(attention(i, x, ["q", "k", "v"]), -1),
            block.attn.proj: lambda x, i=i: attention(i, x, ["proj"])[0],
            block.mlp.fc1: lambda x, i=i: fc1(i, x),
            block.mlp.fc2: lambda x, i=i: fc2(i, x),
        }
        for linear, increment in increments.items():
            linear.register_forward_hook(
                lambda _, args, out, add=increment: out + scale * add(args[0])
            )
    return outputs(model, images)


class TestImportFacT:
    @pytest.mark.parametrize("kind", ["fact_tt", "fact_tk"])
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)]
    )
    def test_outputs_are_the_releases(self, make_vit, tmp_path, kind, dtype, tolerance):
        model = make_vit(dtype=dtype).eval()
        base = outputs(model)
        tensors = fact_file(kind, tmp_path / "task.pt")
        expected = run_as_released(model, tensors, kind, 0.7, IMAGES)
        adapter = import_fact(model, tmp_path / "task.pt", method=kind, scale=0.7)
        torch.testing.assert_close(outputs(model), expected, rtol=tolerance, atol=tolerance)
        assert (expected - base).abs().max() > 0.5
        assert adapter.method == FacTTT(rank=3, scale=0.7, dropout=0.1)
        assert adapter.modules_to_train == ("head",)
        assert adapter.num_parameters() == 2 * 12 * 3 + 12 * 2 * 9

    def test_without_a_head_nothing_else_is_trained(self, make_vit, tmp_path):
        headless = {"head.weight": None, "head.bias": None}
        fact_file("fact_tt", tmp_path / "task.pt", **headless)
        adapter = import_fact(make_vit(), tmp_path / "task.pt", method="fact_tt", scale=1)
        assert adapter.modules_to_train == ()

    @pytest.mark.parametrize(
        ("kind", "changes", "message"),
        [
            ("fact_tt", {"FacTu.weight": None}, "file of the FacT release, got .*FacTu.weight"),
            ("fact_tt", {"FacTu.weight": torch.zeros(3)}, "FacTu.weight must be a matrix"),
            ("fact_tt", {"FacTv.weight": torch.zeros(3, 12)}, r"\[12, 3\], got \[3, 12\]"),
            (
                "fact_tt", {"blocks.1.mlp.fc1_FacTs.weight": torch.zeros(3, 12)},
                r"fc1_FacTs.weight must be \[12, 3\], got \[3, 12\]",
            ),
            (
                "fact_tt", {"blocks.1.attn.q_FacTs.weight": None},
                "missing blocks.1.attn.q_FacTs.weight",
            ),
            (
                "fact_tt", {"blocks.2.attn.q_FacTs.weight": torch.zeros(3, 3)},
                "unknown blocks.2.attn.q_FacTs.weight",
            ),
            ("fact_tt", {"FacTu.weight": torch.zeros(3, 12).int()}, "must be floating"),
            ("fact_tk", {"FacTp": torch.zeros(3, 144)}, r"FacTp must be \[3, 24\], got \[3, 144\]"),
            ("fact_tk", {"FacTc": None}, "missing FacTc"),
            ("fact_tt", {"head.weight": torch.zeros(6, 12)}, r"head.weight must be \[5, 12\]"),
            ("fact_tt", {"head.bias": None}, "must hold head.bias"),
            ("fact_tt", {"neck.bias": torch.zeros(2)}, "with neck.bias"),
            ("fact_tt", {"head.bias": "x"}, "head.bias must be a dense tensor"),
        ],
    )  # fmt: skip
    def test_bad_files_leave_the_model_alone(self, make_vit, tmp_path, kind, changes, message):
        model = make_vit()
        before = snapshot(model)
        fact_file(kind, tmp_path / "task.pt", **changes)
        with pytest.raises(ValueError, match=message):
            import_fact(model, tmp_path / "task.pt", method=kind, scale=1.0)
        assert_untouched(model, before)

    def test_the_wrong_method(self, make_vit, tmp_path):
        for kind, other in (("fact_tt", "fact_tk"), ("fact_tk", "fact_tt")):
            fact_file(kind, tmp_path / "task.pt")
            with pytest.raises(ValueError, match=f"method must be '{kind}' .*, got '{other}'"):
                import_fact(make_vit(), tmp_path / "task.pt", method=other, scale=1.0)
        with pytest.raises(ValueError, match="method must be one of"):
            import_fact(make_vit(), tmp_path / "task.pt", method="lora", scale=1.0)

    def test_bad_arguments_and_files(self, make_vit, tmp_path):
        path = tmp_path / "task.pt"
        model = make_vit()
        before = snapshot(model)
        with pytest.raises(FileNotFoundError, match="found none at"):
            import_fact(model, path, method="fact_tt", scale=1.0)
        with pytest.raises(TypeError, match="scale must be a number"):
            import_fact(model, path, method="fact_tt", scale="1")
        with pytest.raises(ValueError, match="dropout must be"):
            import_fact(model, path, method="fact_tt", scale=1.0, dropout=1.0)
        fact_file("fact_tt", path)
        whole = path.read_bytes()
        for content in (b"", whole[: len(whole) // 2], pickle.dumps(Path("harmful"), protocol=2)):
            path.write_bytes(content)
            with pytest.raises(ValueError, match="must be a whole file of tensors"):
                import_fact(model, path, method="fact_tt", scale=1.0)
        torch.save([torch.zeros(2)], path)
        with pytest.raises(ValueError, match=r"a dictionary of named tensors, got .* with list"):
            import_fact(model, path, method="fact_tt", scale=1.0)
        assert_untouched(model, before)

    def test_other_models_are_refused(self, make_vit, tmp_path):
        fact_file("fact_tt", tmp_path / "task.pt")
        for model in (make_vit(mlp_ratio=2), make_vit(embed_dim=24), make_vit(depth=3)):
            before = snapshot(model)
            with pytest.raises(ValueError, match=r"model must be timm's|must be \[|missing"):
                import_fact(model, tmp_path / "task.pt", method="fact_tt", scale=1.0)
            assert_untouched(model, before)


SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "adapter_format.schema.json").read_text())
_TYPES = {
    "object": dict, "array": list, "string": str, "number": (int, float), "integer": int,
    "boolean": bool, "null": type(None),
}  # fmt: skip


def conforms(value, schema):
    """Whether a value fits a schema; of JSON Schema the keywords that ours uses, and no others."""
    unknown = set(schema) - {
        "$ref", "type", "const", "enum", "oneOf", "required", "properties", "additionalProperties",
        "items", "minItems", "maxItems", "minLength", "minimum", "exclusiveMaximum",
        "contentMediaType", "contentSchema", "title", "description", "x-tensors", "$schema",
        "$defs",
    }  # fmt: skip
    assert not unknown
    if "$ref" in schema:
        return conforms(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")])
    checks = []
    if "type" in schema:
        kind = isinstance(value, _TYPES[schema["type"]])
        checks.append(kind and (schema["type"] == "boolean" or not isinstance(value, bool)))
    if "const" in schema:
        checks.append(value == schema["const"])
    if "enum" in schema:
        checks.append(value in schema["enum"])
    if "oneOf" in schema:
        checks.append(sum(conforms(value, option) for option in schema["oneOf"]) == 1)
    if isinstance(value, str):
        checks.append(len(value) >= schema.get("minLength", 0))
        if "contentSchema" in schema:
            checks.append(conforms(json.loads(value), schema["contentSchema"]))
    if isinstance(value, list):
        checks.append(schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 1e9))
        checks += [conforms(item, schema.get("items", {})) for item in value]
    if isinstance(value, dict):
        checks += [key in value for key in schema.get("required", ())]
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        for key, item in value.items():
            option = properties.get(key, others)
            checks.append(option if isinstance(option, bool) else conforms(item, option))
    if isinstance(value, int | float):
        checks.append(schema.get("minimum", value) <= value)
        checks.append(value < schema.get("exclusiveMaximum", value + 1))
    return all(checks)


def assert_tensors_as_documented(method, shapes):
    """Each factor's name and shape is in x-tensors, a letter meaning one size within a group."""
    declared = SCHEMA["$defs"][method]["x-tensors"]
    seen, sizes = set(), {}
    for name, shape in shapes.items():
        fits = [
            template
            for template in declared
            if re.fullmatch(
                re.escape(template.rstrip("?")).replace(r"\[group\]", r"\w+").replace(
                    r"\[site\]", r"\w+"
                ),
                name,
            )
        ]  # fmt: skip
        assert len(fits) == 1, name
        (template,) = fits
        seen.add(template)
        assert len(shape) == len(declared[template])
        scope = name if "[site]" in template and method == "kadaptation" else name.split(".")[0]
        for letter, size in zip(declared[template], shape, strict=True):
            assert sizes.setdefault((scope, letter), size) == size, (name, letter)
    assert {template for template in declared if not template.endswith("?")} <= seen


class TestOurFormat:
    @pytest.mark.parametrize("method", EVERY_METHOD, ids=repr)
    def test_files_are_as_documented(self, make_vit, tmp_path, method):
        path = tmp_path / "adapter.safetensors"
        attach(make_vit(), method).save(path, metadata={"task": "cifar"})
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        assert conforms(header, SCHEMA)
        factors = {
            name.removeprefix("factors."): shape
            for name, shape in shapes.items()
            if name.startswith("factors.")
        }
        assert_tensors_as_documented(method.name, factors)
        assert set(shapes) - {f"factors.{name}" for name in factors} == {
            "modules.head.weight", "modules.head.bias",
        }  # fmt: skip

    def test_stages_are_as_documented(self, tmp_path):
        path = tmp_path / "adapter.safetensors"
        attach(make_swin(), EFFT2(rank=[2, (3, 2)])).save(path)
        with safe_open(path, framework="pt") as file:
            assert conforms(file.metadata(), SCHEMA)
            assert {"factors.stage0_mhsa.U", "factors.stage1_ffn.core"} <= set(file.keys())

    def test_every_method_and_field_is_in_the_schema(self):
        for name, method in METHODS.items():
            if method.__module__.startswith("efft_kernels."):
                fields = {field.name for field in dataclasses.fields(method)}
                assert set(SCHEMA["$defs"][name]["properties"]) == {"name", *fields}
                assert set(SCHEMA["$defs"][name]["required"]) == {"name", *fields}

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("format", "other"),
            ("format_version", "2"),
            ("targets", "[]"),
            ("method", '{"name": "nothing"}'),
            ("method", '{"name": "lora", "rank": 0, "scale": 1, "matrices": null}'),
            ("method", '{"name": "lora", "rank": 1, "scale": 1, "matrices": null, "x": 1}'),
            ("base_shapes", '{"head.bias": [-1]}'),
        ],
    )
    def test_the_schema_refuses(self, make_vit, tmp_path, key, value):
        path = tmp_path / "adapter.safetensors"
        attach(make_vit(), LoRA(rank=2)).save(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        assert conforms(header, SCHEMA)
        assert not conforms({**header, key: value}, SCHEMA)
        assert not conforms({k: v for k, v in header.items() if k != key}, SCHEMA)
