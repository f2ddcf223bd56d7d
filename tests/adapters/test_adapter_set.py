"""Many tasks on one backbone: mixed batches against each row alone, swapping, memory."""

from __future__ import annotations

import gc
from collections import OrderedDict

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from efft_kernels import EFFT1, EFFT2, AdapterSet, FacTTK, FacTTT, KAdaptation, LoRA, attach, load
from efft_kernels.adapters.adapter_set import _leave_open, _padded

METHODS = [
    EFFT1(rank=3, scale=0.7),
    EFFT2(rank=(3, 2), scale=0.7, learn_scale=True),
    EFFT2(rank=2, scale=0.7, cores="shared"),
    FacTTT(rank=(2, 3)),
    FacTTK(rank=3, layer_rank=4, learn_scale=True),
    LoRA(rank=2, scale=0.5),
    LoRA(rank=2, matrices=None),
    KAdaptation(products=2, rank=1, matrices=("q", "k", "v", "o", "fc1", "fc2")),
]


@pytest.fixture
def make_swin():
    def make(dtype=torch.float64):
        torch.manual_seed(5)
        model = timm.create_model(
            "swin_tiny_patch4_window7_224",
            img_size=64,
            window_size=2,
            embed_dim=8,
            depths=(2, 1, 1, 1),
            num_heads=(2, 2, 4, 4),
            num_classes=5,
        ).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    return make


@pytest.fixture
def filled(make_vit, make_swin, randomize):
    """(model, set of tasks "a", "b", "c" with factors and heads of their own)."""

    def make(kind="vit", method=METHODS[1], names="abc", dtype=torch.float64, **options):
        model = make_vit(dtype=dtype) if kind == "vit" else make_swin(dtype)
        adapter = attach(model.eval(), method, **options)
        tasks = AdapterSet(adapter)
        for name in names:
            randomize(adapter)
            for module in adapter.modules_to_train:
                randomize(model.get_submodule(module))
            tasks.add(name)
        return model, tasks

    return make


def images(count=5, size=8, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(count, 3, size, size, dtype=dtype)


@torch.no_grad()
def alone(model, tasks, x, ids):
    """Each row by itself, with its own adapter in place."""
    rows = []
    for row, name in zip(x, ids, strict=True):
        tasks.use(name)
        rows.append(model(row[None])[0])
    return torch.stack(rows)


def assert_nothing_is_left(model):
    assert model.factor_bank.tasks is None
    for module in model.modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            assert hook.__self__ in (model.factor_bank.joint_factors, model.factor_bank.calls)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize(("kind", "size"), [("vit", 8), ("swin", 64)])
def test_mixed_batch_is_each_row_alone(filled, kind, size, method):
    model, tasks = filled(kind, method)
    x = images(5, size)
    for ids in ("cabca", "bbbbb", "aabbc"):
        expected = alone(model, tasks, x, ids)
        with tasks.tasks(list(ids)), torch.no_grad():
            found = model(x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert_nothing_is_left(model)
    distinct = alone(model, tasks, x[:1].expand(3, -1, -1, -1), "abc")
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (distinct[i] - distinct[j]).abs().max() > 1e-2


@pytest.mark.parametrize(("kind", "size"), [("vit", 8), ("swin", 64)])
def test_the_increments_alone_and_the_heads_alone(filled, randomize, kind, size):
    """Tasks that differ in their factors only, and in their heads only."""
    model, tasks = filled(kind, names="")
    adapter, (head,) = tasks.adapter, tasks.adapter.modules_to_train
    randomize(adapter)
    tasks.add("first")
    randomize(model.get_submodule(head))
    tasks.add("other head")
    randomize(adapter)
    tasks.add("other factors")
    ids = ["other head", "first", "other factors", "first"]
    x = images(1, size).expand(4, -1, -1, -1)
    expected = alone(model, tasks, x, ids)
    with tasks.tasks(ids), torch.no_grad():
        found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(found[1], found[3])
    assert (found[0] - found[1]).abs().max() > 1e-2 and (found[0] - found[2]).abs().max() > 1e-2


def test_features_without_a_head(filled):
    model, tasks = filled(modules_to_train=())
    x = images(3)
    expected = alone(model, tasks, x, "bac")
    with tasks.tasks("bac"), torch.no_grad():
        found, features = model(x), model.forward_features(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert features.shape[0] == 3


def test_parts_run_once_the_layout_is_known(filled):
    model, tasks = filled(modules_to_train=())
    x = images(3)
    with tasks.tasks("aaa"), torch.no_grad():
        model.forward_features(x)
    with tasks.tasks("bac", batch_first=True), torch.no_grad():
        expected = model.forward_features(x)
    with tasks.tasks("bac"), torch.no_grad():
        with pytest.raises(RuntimeError, match=r"call it once before its parts, or pass .*batch_f"):
            model.forward_features(x)
        model(x)
        assert torch.equal(model.forward_features(x), expected)


def test_both_heads_of_distilled_deit(make_vit, randomize):
    model = make_vit(distilled=True, dtype=torch.float64).eval()
    adapter = attach(model, METHODS[1])
    tasks = AdapterSet(adapter)
    for name in "ab":
        randomize(model)
        tasks.add(name)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    x = images(2)
    expected = alone(model, tasks, x, "ba")
    with tasks.tasks("ba"), torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)


def test_models_own_factors_do_not_matter_within(filled, randomize):
    model, tasks = filled()
    x = images(3)
    expected = alone(model, tasks, x, "cab")
    randomize(tasks.adapter)
    randomize(model.head)
    with tasks.tasks("cab"), torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(filled, dtype):
    model, tasks = filled(dtype=dtype)
    x = images(4, dtype=dtype)
    expected = alone(model, tasks, x, "cabc").double()
    with tasks.tasks("cabc"), torch.no_grad():
        found = model(x)
    assert found.dtype == dtype
    tolerance = 50 * torch.finfo(dtype).eps * expected.abs().max()
    assert (found.double() - expected).abs().max() < tolerance


def test_autocast(filled):
    model, tasks = filled(dtype=torch.float32)
    x = images(3, dtype=torch.float32)
    exact = alone(model, tasks, x, "cab")
    with tasks.tasks("cab"), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize(("stored", "rows"), [("float16", "bfloat16"), ("bfloat16", "float16")])
def test_factors_stored_in_another_half_precision_than_the_rows(
    filled, randomize, stored, rows, method
):
    """Their products are made in neither: one has not the other's range, that one not its bits."""
    model, tasks = filled(method=method, dtype=torch.float32, names="")
    rows = getattr(torch, rows)
    model.factor_bank.to(getattr(torch, stored))
    model.head.to(getattr(torch, stored))
    # Beyond float16 in core·V and A·u alone, as U and v are small.
    large, small = (("core", "P", "V", "A", "u."), ("U", "v."))
    for name in "abc":
        randomize(tasks.adapter)
        with torch.no_grad():
            for key, p in model.factor_bank.named_parameters():
                part = key.split(".", 1)[1]
                if stored == "float16" and not isinstance(method, LoRA):
                    p.mul_(2e3 if part.startswith(large) else 1e-5 if part.startswith(small) else 1)
        tasks.add(name)
    x = images(3, dtype=torch.float32)
    with torch.autocast("cpu", rows):
        expected = alone(model, tasks, x, "cab")
        with tasks.tasks("cab"), torch.no_grad():
            found = model(x)
    assert found.dtype == rows and expected.isfinite().all()
    atol = 4 * torch.finfo(rows).eps * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def test_hot_swap_by_name(filled, randomize):
    model, tasks = filled()
    x = images(2)
    base = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    values = {n: p.detach().clone() for n, p in base.items()}
    outputs = {}
    for name in tasks.names:
        tasks.use(name)
        assert tasks.current == name
        outputs[name] = model(x).detach()
    tasks.use("a")
    assert torch.equal(model(x), outputs["a"])
    assert (outputs["a"] - outputs["b"]).abs().max() > 1e-2
    now = dict(model.named_parameters())
    assert all(now[n] is p and torch.equal(p, values[n]) for n, p in base.items())

    randomize(tasks.adapter)  # as training would
    trained = model(x).detach()
    tasks.use("b")
    tasks.use("a")
    assert torch.equal(model(x), outputs["a"])
    randomize(tasks.adapter)
    trained = model(x).detach()
    tasks.update("a")
    tasks.use("b")
    assert torch.equal(model(x), outputs["b"])
    tasks.use("a")
    assert torch.equal(model(x), trained)


def test_the_set_keeps_copies(filled, randomize):
    model, tasks = filled(names="")
    state = {key: tensor.clone() for key, tensor in tasks.adapter.state_dict().items()}
    tasks.add("mine", state)
    tasks.use("mine")
    expected = model(images()).detach()
    for tensor in state.values():
        tensor.fill_(float("nan"))
    randomize(tasks.adapter)
    tasks.use("mine")
    assert torch.equal(model(images()), expected)


def test_names(filled):
    _, tasks = filled()
    assert tasks.names == ("a", "b", "c") and len(tasks) == 3 and "b" in tasks
    tasks.use("b")
    tasks.remove("b")
    assert tasks.names == ("a", "c") and tasks.current is None and "b" not in tasks
    with pytest.raises(ValueError, match="name must be new in the set, got 'a'; remove it first"):
        tasks.add("a")
    for use in (tasks.use, tasks.remove, tasks.update):
        with pytest.raises(KeyError, match=r"no adapter 'b' in the set; it has a, c"):
            use("b")
    with pytest.raises(KeyError, match="no adapter 'z'"), tasks.tasks(["a", "z"]):
        pass


def test_from_files(filled, make_vit, randomize, tmp_path):
    model, tasks = filled(names="")
    expected = {}
    for name in "ab":
        other = make_vit(dtype=torch.float64).eval()
        adapter = attach(other, METHODS[1])
        randomize(adapter)
        randomize(other.head)
        adapter.save(tmp_path / name)
        expected[name] = other(images(1)).detach()[0]
        tasks.add(name, tmp_path / name)
    with tasks.tasks("ba"), torch.no_grad():
        found = model(images(1).expand(2, -1, -1, -1))
    torch.testing.assert_close(found, torch.stack([expected["b"], expected["a"]]))
    with pytest.raises(FileNotFoundError):
        tasks.add("c", tmp_path / "none")
    assert tasks.names == ("a", "b")


DIFFERENT = [
    (EFFT2(rank=3), {}, EFFT2(rank=2), {}, r"must be \[48, 3\], got \[48, 2\]"),
    (EFFT2(rank=3), {}, EFFT2(rank=3, scale=2.0), {}, "scale 10.0, got 2.0"),
    (EFFT2(rank=3), {}, EFFT2(rank=3), {"layers": 0}, "must adapt the set's linears"),
    (EFFT2(rank=3), {}, FacTTT(rank=3), {}, "adapter of 'efft2', got 'fact_tt'"),
    (EFFT2(rank=3), {}, EFFT2(rank=3, learn_scale=True), {}, "set's learn_scale False, got True"),
    (LoRA(rank=2), {}, LoRA(rank=2, matrices=("q", "k")), {}, r"matrices.*'q', 'v'.*'q', 'k'"),
    (
        KAdaptation(products=2, matrices=("q",)),
        {},
        KAdaptation(products=2, matrices=("v",)),
        {},
        "matrices.*'q'.*'v'",
    ),
    (EFFT2(rank=3), {}, EFFT2(rank=3), {"modules_to_train": ()}, "missing or unknown.*head"),
]


@pytest.mark.parametrize("case", range(len(DIFFERENT)))
def test_adapters_of_another_kind_are_refused(make_vit, tmp_path, case):
    method, options, other, other_options, text = DIFFERENT[case]
    attach(make_vit(), other, **other_options).save(tmp_path / "other")
    tasks = AdapterSet(attach(make_vit(), method, **options))
    with pytest.raises(ValueError, match=text):
        tasks.add("other", tmp_path / "other")
    assert not tasks.names


@pytest.mark.parametrize(
    "other",
    [
        EFFT2(rank=(3, 3)),
        EFFT2(rank=3, dropout=0.5),
        EFFT2(rank=3, init="u"),
        EFFT2(rank=[3], ffn_rank=3),
    ],
    ids=str,
)
def test_what_matters_in_training_alone_may_differ(make_vit, tmp_path, other):
    attach(make_vit(), other).save(tmp_path / "other")
    tasks = AdapterSet(attach(make_vit(), EFFT2(rank=3)))
    tasks.add("other", tmp_path / "other")
    assert "other" in tasks


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("targets", None, "a readable header, got .*: 'targets'"),
        ("targets", "nope", "a readable header"),
        ("targets", "[]", "a readable header, got .*expected a list of module names"),
        ("method", None, "a readable header, got .*: 'method'"),
        ("method", "{}", "a readable header, got .*method must be one of .* got None"),
        ("method", "[]", "a readable header"),
    ],
)
def test_a_file_with_a_broken_header_is_refused(make_vit, tmp_path, key, value, text):
    adapter = attach(make_vit(), EFFT2(rank=3))
    tasks = AdapterSet(adapter)
    adapter.save(tmp_path / "a")
    with safe_open(tmp_path / "a", framework="pt") as file:
        header = {**file.metadata(), key: value}
    header = {name: entry for name, entry in header.items() if entry is not None}
    save_file(load_file(tmp_path / "a"), tmp_path / "b", metadata=header)
    with pytest.raises(ValueError, match=f"source must .*{text}"):
        tasks.add("b", tmp_path / "b")
    assert not tasks.names


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("factors.mhsa.U"), r"missing or unknown \['factors.mhsa.U'\]"),
        (lambda s: s.update(more=torch.ones(1)), r"missing or unknown \['more'\]"),
        (lambda s: s.update({"factors.mhsa.V": torch.ones(12, 4)}), r"V must be \[12, 3\]"),
        (lambda s: s.update({"modules.head.bias": torch.ones(7)}), r"bias must be \[5\], got \[7"),
    ],
)
def test_states_that_do_not_fit_are_refused(make_vit, change, text):
    adapter = attach(make_vit(), EFFT2(rank=3))
    tasks = AdapterSet(adapter)
    state = dict(adapter.state_dict())
    change(state)
    with pytest.raises(ValueError, match=text):
        tasks.add("bad", state)
    assert not tasks.names


class TestRefusals:
    @pytest.mark.parametrize("count", [1, 3, 4, 8, 2])
    def test_a_batch_of_another_size(self, filled, count):
        """A multiple as well: each of the four images has a task of its own."""
        model, tasks = filled()
        context = tasks.tasks("ab")
        with context, torch.no_grad():
            if count == 2:
                assert model(images(2)).shape == (2, 5)
            else:
                with pytest.raises(ValueError, match=f"one task per row.* got 2 for .*{count}"):
                    model(images(count))
        assert_nothing_is_left(model)

    @pytest.mark.parametrize("count", [1, 4])
    def test_a_batch_of_another_size_by_keyword(self, filled, count):
        model, tasks = filled()
        with tasks.tasks("ab"), pytest.raises(ValueError, match="one task per row"):
            model(x=images(count))

    @pytest.mark.parametrize("count", [1, 4, 6])
    def test_a_batch_of_another_size_on_swin(self, filled, count):
        model, tasks = filled("swin")
        with tasks.tasks("ab"), pytest.raises(ValueError, match="one task per row"):
            model(images(count, 64))
        assert_nothing_is_left(model)

    def test_no_names(self, filled):
        _, tasks = filled()
        with pytest.raises(ValueError, match="got none"), tasks.tasks([]):
            pass

    def test_training(self, filled):
        model, tasks = filled()
        model.train()
        with pytest.raises(RuntimeError, match=r"call model.eval\(\) first"), tasks.tasks("a"):
            pass
        assert_nothing_is_left(model)

    def test_merged(self, filled):
        model, tasks = filled()
        tasks.adapter.merge()
        with pytest.raises(RuntimeError, match=r"call unmerge\(\) first"), tasks.tasks("a"):
            pass
        with pytest.raises(ValueError, match=r"call unmerge\(\) first"):
            tasks.use("a")
        with pytest.raises(ValueError, match="adapter must not be merged"):
            AdapterSet(tasks.adapter)
        assert_nothing_is_left(model)

    def test_within_itself(self, filled):
        """The outer context goes on unharmed."""
        model, tasks = filled()
        x = images(2)
        expected = alone(model, tasks, x, "ab")
        with tasks.tasks("ab"), torch.no_grad():
            with pytest.raises(RuntimeError, match="within itself"), tasks.tasks("cc"):
                pass
            torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
        assert_nothing_is_left(model)

    def test_a_trained_module_that_is_no_linear(self, make_vit):
        adapter = attach(make_vit(), EFFT2(rank=3), modules_to_train=("head", "norm"))
        with pytest.raises(ValueError, match=r"nn\.Linear alone .* got LayerNorm at 'norm'"):
            AdapterSet(adapter)

    def test_detached(self, filled):
        _, tasks = filled()
        tasks.adapter.detach()
        with pytest.raises(RuntimeError, match="detached"):
            tasks.use("a")
        with pytest.raises(RuntimeError, match="detached"), tasks.tasks("a"):
            pass


def test_nothing_is_left_after_an_error_within(filled):
    model, tasks = filled()
    x = images(2)
    tasks.use("c")
    expected = model(x).detach()
    with pytest.raises(ArithmeticError), tasks.tasks("ab"):
        raise ArithmeticError
    assert_nothing_is_left(model)
    assert torch.equal(model(x), expected)


def test_factors_get_no_gradients_but_inputs_do(filled):
    model, tasks = filled()
    x = images(2).requires_grad_()
    with tasks.tasks("ab"):
        model(x).sum().backward()
    assert x.grad.norm() > 0
    assert all(p.grad is None for p in tasks.adapter.parameters())


def tensors_alive():
    gc.collect()
    plain = (torch.Tensor, nn.Parameter)  # what torch.compile traces with has no storage
    found = [t for t in gc.get_objects() if type(t) in plain and t.device.type == "cpu"]
    return [t for t in found if not torch._is_functional_tensor(t)]


def bytes_beyond(kept):
    """Bytes of every storage alive that none of the kept tensors shares."""
    known = {t.untyped_storage().data_ptr() for t in kept}
    storages = {}
    for tensor in tensors_alive():
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(size for pointer, size in storages.items() if pointer not in known)


def test_a_thousand_adapters_cost_their_factors_alone(make_vit, randomize):
    model = make_vit().eval()
    adapter = attach(model, EFFT2(rank=2))
    randomize(adapter)
    tasks = AdapterSet(adapter)
    x = images(2, dtype=torch.float32)
    each = 4 * (adapter.num_parameters() + sum(p.numel() for p in model.head.parameters()))
    base = 4 * sum(p.numel() for p in model.parameters() if not p.requires_grad)
    kept = tensors_alive()
    for i in range(1000):
        tasks.add(f"task {i}")
    assert bytes_beyond(kept) == 1000 * each and each * 4 < base
    with tasks.tasks(["task 999", "task 0"]), torch.no_grad():
        model(x)
        held = bytes_beyond(kept) - 1000 * each
    assert 2 * each <= held <= 3 * each  # the batch's two tasks, not the set's thousand
    for i in range(1000):
        tasks.remove(f"task {i}")
    assert bytes_beyond(kept) == 0


def test_a_saved_task_is_the_sets(filled, make_vit, tmp_path):
    model, tasks = filled()
    tasks.use("b")
    tasks.adapter.save(tmp_path / "b")
    twin = make_vit(dtype=torch.float64).eval()
    load(twin, tmp_path / "b")
    expected = alone(model, tasks, images(1), "b")
    torch.testing.assert_close(twin(images(1)), expected, rtol=1e-12, atol=1e-12)


def test_head_without_bias(make_vit, randomize):
    model = make_vit(dtype=torch.float64).eval()
    model.head = nn.Linear(12, 5, bias=False, dtype=torch.float64)
    adapter = attach(model, EFFT2(rank=2, scale=1.0))
    tasks = AdapterSet(adapter)
    for name in "ab":
        randomize(adapter)
        randomize(model.head)
        tasks.add(name)
    x = images(2)
    expected = alone(model, tasks, x, "ba")
    with tasks.tasks("ba"), torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_a_head_of_every_token(randomize):
    """Segmentation's: [B, T, K] goes through the head, and each row's tokens through its own."""
    linears = [nn.Linear(6, n, dtype=torch.float64) for n in (6, 3)]
    model = nn.Sequential(OrderedDict(zip(("fc1", "head"), linears, strict=True))).eval()
    adapter = attach(model, LoRA(rank=2, matrices=None), targets="fc1", modules_to_train="head")
    tasks = AdapterSet(adapter)
    for name in "ab":
        randomize(adapter)
        randomize(model.head)
        tasks.add(name)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    expected = alone(model, tasks, x, "ba")
    with tasks.tasks("ba"), torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_heads_of_different_sizes(make_vit, randomize, tmp_path, bias):
    outputs = {"a": 2, "b": 12, "c": 5}  # 12 as many as its inputs
    expected, paths = {}, {}
    x = images(3)
    for name, count in outputs.items():
        other = make_vit(dtype=torch.float64).eval()
        other.head = nn.Linear(12, count, bias=bias, dtype=torch.float64)
        adapter = attach(other, METHODS[1])
        randomize(adapter)
        randomize(other.head)
        paths[name] = tmp_path / name
        adapter.save(paths[name])
        expected[name] = other(x).detach()
    model = make_vit(dtype=torch.float64).eval()
    model.head = nn.Linear(12, 5, bias=bias, dtype=torch.float64)
    tasks = AdapterSet(attach(model, METHODS[1]))
    for name, path in paths.items():
        tasks.add(name, path)
    with tasks.tasks("abc"), torch.no_grad():
        found = model(x)
    assert found.shape == (3, 12)
    for i, name in enumerate("abc"):
        torch.testing.assert_close(found[i, : outputs[name]], expected[name][i])
        assert (found[i, outputs[name] :] == -torch.inf).all()
    assert model.head.out_features == 5
    for name in "bcab":
        randomize(model.head)  # as training would: the set keeps its own
        tasks.use(name)
        torch.testing.assert_close(model(x), expected[name])
        assert model.head.out_features == outputs[name] and model.head.weight.requires_grad
        assert model.num_classes == outputs[name]
    tasks.adapter.save(tmp_path / "saved")
    tasks.add("saved", tmp_path / "saved")
    tasks.update("a")
    tasks.use("a")
    torch.testing.assert_close(model(x), expected["b"])
    state = tasks.adapter.state_dict() | {"modules.head.weight": torch.ones(4, 11)}
    with pytest.raises(ValueError, match=r"head.weight must be \[4, 12\], got \[4, 11\]"):
        tasks.add("narrow", state)


def test_a_merged_model_keeps_its_head(make_vit):
    model = make_vit(dtype=torch.float64).eval()
    adapter = attach(model, METHODS[1])
    tasks = AdapterSet(adapter)
    state = adapter.state_dict()
    state |= {"modules.head.weight": torch.ones(9, 12), "modules.head.bias": torch.ones(9)}
    tasks.add("nine", state)
    adapter.merge()
    with pytest.raises(ValueError, match="merged"):
        tasks.use("nine")
    assert model.head.out_features == 5


def test_the_loss_of_transformers_counts_the_classes_of_the_head_in_use():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "image_size": 8, "patch_size": 4}
    config = transformers.ViTConfig(**sizes, num_labels=3)
    model = transformers.ViTForImageClassification(config)
    adapter = attach(model, EFFT2(rank=2))
    tasks = AdapterSet(adapter)
    tasks.add("three")
    five = adapter.state_dict()
    five["modules.classifier.weight"] = torch.zeros(5, 8)
    five["modules.classifier.bias"] = torch.zeros(5)
    tasks.add("five", five)
    for name, classes in (("five", 5), ("three", 3)):
        tasks.use(name)
        assert model.num_labels == model.config.num_labels == classes
        images, labels = torch.ones(2, 3, 8, 8), torch.tensor([0, classes - 1])
        assert model(pixel_values=images, labels=labels).loss.isfinite()


@pytest.mark.parametrize("biased", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("outputs", [(3, 3), (3, 5), (5, 3)])
def test_heads_are_padded_to_the_widest(biased, outputs):
    heads = [nn.Linear(2, n, bias=own) for n, own in zip(outputs, biased, strict=True)]
    weight, bias = _padded([h.weight for h in heads], [h.bias for h in heads])
    if not any(biased) and len(set(outputs)) == 1:
        assert torch.equal(weight, torch.stack([h.weight for h in heads])) and bias is None
        return
    for task, head in enumerate(heads):
        n = head.out_features
        assert torch.equal(weight[task, :n], head.weight) and not weight[task, n:].any()
        expected = torch.zeros(n) if head.bias is None else head.bias
        assert torch.equal(bias[task, :n], expected)
        assert (bias[task, n:] == -torch.inf).all()


def test_dimensions_that_a_graph_leaves_open():
    one, two = torch.ones(2, 1), torch.ones(1, 2)
    _leave_open([None, one, two], 1)
    assert two._dynamo_weak_dynamic_indices == {1}
    assert not hasattr(one, "_dynamo_weak_dynamic_indices")
