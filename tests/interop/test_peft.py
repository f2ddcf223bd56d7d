"""PEFT LoRA checkpoints, imported and exported."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from efft_kernels import EFFT1, EFFT2, FacTTK, FacTTT, KAdaptation, LoRA, attach, load, reference
from efft_kernels.interop import export_peft_lora, import_peft_lora
from efft_kernels.interop.peft import _config_for, _exact_pair
from efft_kernels.methods import Factors

IMAGES = torch.linspace(-1, 1, 768).view(4, 3, 8, 8)


def make_hf_vit(seed=7):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=5,
        hidden_dropout_prob=0.0,
    )
    return transformers.ViTForImageClassification(config)


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
        "r": 2,
        "lora_alpha": 3,
        "rank_pattern": {"fc1": 4, r"\d\.mlp\.fc2": 1},
        "alpha_pattern": {"fc1": 7},
    },
}


class TestImportPeft:
    @pytest.mark.parametrize("config", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS)
    @pytest.mark.parametrize("kind", ["timm", "hf"])
    def test_outputs_are_those_of_the_trained_peft_model(
        self, make_vit, outputs, tmp_path, kind, config
    ):
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

    def test_swin_head_by_its_peft_name(self, outputs, make_swin, tmp_path):
        model = make_swin()
        plain = copy.deepcopy(model)
        images = torch.linspace(-1, 1, 3072).view(4, 3, 16, 16)
        trained = train_with_peft(
            model, images, r=2, target_modules=["qkv"], modules_to_save=["head"]
        )
        trained.save_pretrained(tmp_path)
        adapter = import_peft_lora(plain, tmp_path)
        assert adapter.modules_to_train == ("head.fc",)  # the part of "head" that has numbers
        torch.testing.assert_close(
            outputs(plain, images), outputs(trained, images), rtol=0, atol=1e-6
        )

    def test_old_checkpoints_of_torch_save(self, make_vit, outputs, tmp_path):
        model, again = make_vit().eval(), make_vit().eval()
        peft = train_with_peft(model, r=2, target_modules=["qkv"], modules_to_save=["head"])
        peft.save_pretrained(tmp_path, safe_serialization=False)
        if not (tmp_path / "adapter_model.bin").exists():
            safe = tmp_path / "adapter_model.safetensors"
            torch.save(load_file(safe), tmp_path / "adapter_model.bin")
            safe.unlink()
        import_peft_lora(again, tmp_path)
        torch.testing.assert_close(outputs(again), outputs(peft), rtol=0, atol=1e-6)

    def test_comes_back_from_our_own_file(self, make_vit, outputs, tmp_path):
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


def holding(name, tensor):
    return lambda tensors: tensors.update({f"base_model.model.{name}": tensor})


QKV = "base_model.model.blocks.0.attn.qkv"
LORA_A = "blocks.0.attn.qkv.lora_A.weight"


class TestRefusedPeft:
    def test_the_unspoilt_one_is_taken(self, make_vit, checkpoint):
        assert import_peft_lora(make_vit(), checkpoint()).method.scale == 2.0
        for init in (True, False, "gaussian", "Orthogonal"):
            import_peft_lora(make_vit(), checkpoint(init_lora_weights=init))

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
    def test_configurations(self, make_vit, unchanged, checkpoint, fields, message):
        model = make_vit()
        with unchanged(model), pytest.raises(ValueError, match=message):
            import_peft_lora(model, checkpoint(**fields))

    def test_what_a_configuration_leaves_out_is_pefts_own(self, make_vit, checkpoint):
        """r = lora_alpha = 8."""
        folder = checkpoint(lora_alpha=8)
        config = json.loads((folder / "adapter_config.json").read_text())
        for left_out, scale in (("lora_alpha", 4.0), ("r", None)):
            del config[left_out]
            (folder / "adapter_config.json").write_text(json.dumps(config))
            if scale is not None:
                assert import_peft_lora(make_vit(), folder).method.scale == scale
        with pytest.raises(ValueError, match=r"lora_A \[r=8, K\]"):
            import_peft_lora(make_vit(), folder)

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
                holding("head.bias", torch.zeros(6)),
                ValueError,
                r"head.bias must be \[5\], got \[6\]",
            ),
            (lambda t: t.pop(f"{QKV}.lora_B.weight"), ValueError, "lora_B.weight, got .* without"),
            (
                holding("blocks.0.attn.qkv.lora_magnitude_vector", torch.ones(36)),
                ValueError,
                "got .*lora_magnitude_vector",
            ),
            (
                holding(LORA_A, torch.zeros(2, 13)),
                ValueError,
                r"lora_A.weight must be \[r, K\]=\[2, 12\], got \[2, 13\]",
            ),
            (holding(LORA_A, torch.zeros(2, 12, 1, 1)), ValueError, r"got \[2, 12, 1, 1\]"),
            (
                holding("blocks.0.attn.qkv.lora_B.weight", torch.zeros(35, 2)),
                ValueError,
                r"lora_B.weight must be \[N, r\]=\[36, 2\], got \[35, 2\]",
            ),
            (
                holding(LORA_A, torch.zeros(2, 12).long()),
                ValueError,
                "must be floating, got torch.int64",
            ),
            (
                lambda t: [t.pop(key) for key in list(t) if "lora" in key],
                ValueError,
                "at least one lora_A.weight",
            ),
        ],
    )
    def test_tensors(self, make_vit, unchanged, checkpoint, change, error, message):
        model = make_vit()
        with unchanged(model), pytest.raises(error, match=message):
            import_peft_lora(model, checkpoint(change))

    def test_a_rank_that_does_not_fit_every_linear(self, make_vit, checkpoint):
        def of_rank(r):
            sides = {"A": torch.randn(r, 12), "B": torch.randn(36, r)}
            named = {f"{QKV}.lora_{side}.weight": factor for side, factor in sides.items()}
            return checkpoint(lambda t: t.update(named), rank_pattern={"blocks.0.attn.qkv": r})

        assert import_peft_lora(make_vit(), of_rank(12)).method.rank == 12
        with pytest.raises(ValueError, match=r"r must be at most min\(K, N\)=12 .*, got 13"):
            import_peft_lora(make_vit(), of_rank(13))

    def test_a_linear_of_two_names_goes_by_the_first(self, make_vit, unchanged, checkpoint):
        model = make_vit()
        model.blocks[1].attn.qkv = model.blocks[0].attn.qkv
        with (
            unchanged(model),
            pytest.raises(ValueError, match=r"first .* got blocks\.1\.attn\.qkv"),
        ):
            import_peft_lora(model, checkpoint())

    def test_a_module_within_another_one_is_saved_with_it(self, make_vit, checkpoint):
        model = make_vit()
        mlp = {f"base_model.model.blocks.1.{n}": t for n, t in model.blocks[1].state_dict().items()}
        kept = {name: tensor for name, tensor in mlp.items() if ".mlp." in name}
        folder = checkpoint(lambda t: t.update(kept), modules_to_save=["fc1", "mlp", "head"])
        assert import_peft_lora(model, folder).modules_to_train == ("blocks.1.mlp", "head")

    def test_files(self, make_vit, unchanged, checkpoint, tmp_path):
        model = make_vit()
        with unchanged(model):
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

    def test_of_two_pairs_as_small_the_factors_themselves_are_taken(self):
        down, up = torch.randn(5, 4).double(), torch.randn(2, 3, 2).double()
        a, _ = _exact_pair(Factors(down, torch.randn(2, 4, 2).double(), up))  # Ra = G·Rb
        assert torch.equal(a, down.T)
        for rank, same in ((4, True), (5, False)):  # min(K, N), and more
            down, up = torch.randn(4, rank).double(), torch.randn(1, 4, rank).double()
            a, b = _exact_pair(Factors(down, None, up))
            assert torch.equal(a, down.T if same else torch.eye(4).double())
            assert torch.equal(b, up[0] if same else up[0] @ down.T)

    def test_a_rank_beyond_the_outputs_is_that_of_the_outputs(self):
        down, up = torch.randn(6, 4).double(), torch.randn(1, 2, 4).double()
        a, b = _exact_pair(Factors(down, None, up))
        assert torch.equal(a, up[0] @ down.T) and torch.equal(b, torch.eye(2).double())

    def test_the_configuration_is_one_of_pefts(self, make_vit, tmp_path):
        adapter = attach(make_vit(depth=1), LoRA(rank=2, matrices=("o", "fc1")))
        export_peft_lora(adapter, tmp_path / "peft")
        expected = {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": None,
            "inference_mode": True,
            "r": 2,
            "lora_alpha": 2,
            "rank_pattern": {},
            "alpha_pattern": {},
            "target_modules": ["blocks.0.attn.proj", "blocks.0.mlp.fc1"],
            "modules_to_save": ["head"],
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
        }
        text = (tmp_path / "peft" / "adapter_config.json").read_text()
        assert text == json.dumps(expected, indent=2) + "\n"

    def test_a_pattern_names_a_longer_name_before_its_end(self):
        """PEFT takes the first that fits, and "fc1" fits both."""
        config = _config_for({"fc1": 2, "mlp.fc1": 3}, ())
        assert list(config["rank_pattern"].items()) == [("mlp.fc1", 3), ("fc1", 2)]
        assert config["modules_to_save"] is None

    def test_peft_serves_every_method_on_vit(self, make_vit, randomize, outputs, tmp_path, method):
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
        "method",
        [EFFT2(rank=[2, 3]), FacTTK(rank=[2, 3]), LoRA(rank=2), KAdaptation(products=2)],
        ids=repr,
    )
    def test_swin(self, randomize, outputs, make_swin, tmp_path, method):
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

    def test_hugging_face(self, randomize, outputs, tmp_path):
        peft = pytest.importorskip("peft")
        model, plain = make_hf_vit().eval(), make_hf_vit().eval()
        adapter = attach(model, EFFT2(rank=3, scale=0.7))
        randomize(adapter)
        assert set(export_peft_lora(adapter, tmp_path / "peft").values()) == {3}
        served = peft.PeftModel.from_pretrained(plain, tmp_path / "peft").eval()
        torch.testing.assert_close(outputs(served), outputs(model), rtol=0, atol=1e-6)

    def test_a_rank_pattern_comes_back_as_it_was(self, make_vit, outputs, tmp_path):
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
        with pytest.warns(UserWarning, match="qkv_bias_separate") as told:
            export_peft_lora(adapter, tmp_path / "peft")
        assert told[0].filename == __file__

    def test_warns_of_buffers_that_peft_has_no_place_for(self, make_vit, tmp_path):
        model = make_vit()
        model.register_buffer("seen", torch.zeros(()))
        adapter = attach(model, LoRA(rank=2))
        model.seen += 1
        with pytest.warns(UserWarning, match=r"no place for the 1 buffers .*\(seen\)") as told:
            export_peft_lora(adapter, tmp_path / "peft")
        assert told[0].filename == __file__
