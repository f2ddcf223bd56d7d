"""Adapters of the FacT release, imported."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch

from efft_kernels import FacTTT
from efft_kernels.interop import import_fact


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


def as_released(model, tensors, kind, scale):
    """The plain model with the release's increments added by hooks on its linears.

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
    return model


FC1 = "blocks.1.mlp.fc1_FacTs.weight"
Q = "blocks.{}.attn.q_FacTs.weight"


class TestImportFacT:
    @pytest.mark.parametrize("kind", ["fact_tt", "fact_tk"])
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)]
    )
    def test_outputs_are_the_releases(self, make_vit, outputs, tmp_path, kind, dtype, tolerance):
        model = make_vit(dtype=dtype).eval()
        base = outputs(model)
        tensors = fact_file(kind, tmp_path / "task.pt")
        expected = outputs(as_released(model, tensors, kind, 0.7))
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
            ("fact_tt", {FC1: torch.zeros(3, 12)}, rf"{FC1} must be \[12, 3\], got \[3, 12\]"),
            ("fact_tt", {Q.format(1): None}, f"missing {Q.format(1)}"),
            ("fact_tt", {Q.format(2): torch.zeros(3, 3)}, f"unknown {Q.format(2)}"),
            ("fact_tt", {"FacTu.weight": torch.zeros(3, 12).int()}, "must be floating"),
            ("fact_tk", {"FacTp": torch.zeros(3, 144)}, r"FacTp must be \[3, 24\], got \[3, 144\]"),
            ("fact_tk", {"FacTc": None}, "missing FacTc"),
            ("fact_tt", {"head.weight": torch.zeros(6, 12)}, r"head.weight must be \[5, 12\]"),
            ("fact_tt", {"head.bias": None}, "must hold head.bias"),
            ("fact_tt", {"neck.bias": torch.zeros(2)}, "with neck.bias"),
            ("fact_tt", {"head.bias": "x"}, "head.bias must be a dense tensor"),
        ],
    )
    def test_bad_files_leave_the_model_alone(
        self, make_vit, unchanged, tmp_path, kind, changes, message
    ):
        model = make_vit()
        fact_file(kind, tmp_path / "task.pt", **changes)
        with unchanged(model), pytest.raises(ValueError, match=message):
            import_fact(model, tmp_path / "task.pt", method=kind, scale=1.0)

    def test_the_wrong_method(self, make_vit, tmp_path):
        for kind, other in (("fact_tt", "fact_tk"), ("fact_tk", "fact_tt")):
            fact_file(kind, tmp_path / "task.pt")
            with pytest.raises(ValueError, match=f"method must be '{kind}' .*, got '{other}'"):
                import_fact(make_vit(), tmp_path / "task.pt", method=other, scale=1.0)
        with pytest.raises(ValueError, match="method must be one of"):
            import_fact(make_vit(), tmp_path / "task.pt", method="lora", scale=1.0)

    def test_bad_arguments_and_files(self, make_vit, unchanged, tmp_path):
        path = tmp_path / "task.pt"
        model = make_vit()
        with unchanged(model):
            with pytest.raises(FileNotFoundError, match="found none at"):
                import_fact(model, path, method="fact_tt", scale=1.0)
            with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
                import_fact("vit", path, method="fact_tt", scale=1.0)
            with pytest.raises(TypeError, match="scale must be a number"):
                import_fact(model, path, method="fact_tt", scale="1")
            with pytest.raises(ValueError, match="dropout must be"):
                import_fact(model, path, method="fact_tt", scale=1.0, dropout=1.0)
            fact_file("fact_tt", path)
            whole = path.read_bytes()
            pickled = pickle.dumps(Path("harmful"), protocol=2)
            for content in (b"", whole[: len(whole) // 2], pickled):
                path.write_bytes(content)
                with pytest.raises(ValueError, match="must be a whole file of tensors"):
                    import_fact(model, path, method="fact_tt", scale=1.0)
            torch.save([torch.zeros(2)], path)
            with pytest.raises(ValueError, match=r"dictionary of named tensors, got .* with list"):
                import_fact(model, path, method="fact_tt", scale=1.0)

    def test_other_models_are_refused(self, make_vit, unchanged, tmp_path):
        fact_file("fact_tt", tmp_path / "task.pt")
        for model in (make_vit(mlp_ratio=2), make_vit(embed_dim=24), make_vit(depth=3)):
            message = r"model must be timm's|must be \[|missing"
            with unchanged(model), pytest.raises(ValueError, match=message):
                import_fact(model, tmp_path / "task.pt", method="fact_tt", scale=1.0)
