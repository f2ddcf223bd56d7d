"""A chain's steps in CUDA C++ against plain torch's in float64, on a GPU."""

from __future__ import annotations

import inspect
import json

import pytest
import torch

from efft_kernels.ops import chains
from efft_kernels.ops.backends import cuda_backend, cuda_chain, native_library
from efft_kernels.ops.backends.chain_steps import Norm, TorchSteps
from efft_kernels.testing.cuda_kernels import kernel_of, recorded_launches
from efft_kernels.testing.error_budget import assert_within_budget
from efft_kernels.testing.gpu_cases import GELU_CASES, NORM_CASES, NormCase, plans_are_known

pytest.importorskip("triton")

from efft_kernels.ops.backends.triton import chain as triton_chain
from efft_kernels.ops.backends.triton import configs
from efft_kernels.ops.backends.triton import device as triton_device
from efft_kernels.ops.backends.triton.chain import TritonSteps, configs_for

pytestmark = pytest.mark.usefixtures("poisoned_memory")
UNAVAILABLE = "no CUDA device" if not torch.cuda.is_available() else cuda_backend.unavailable()
SMALL = NormCase(37, 128, 5, torch.bfloat16)


def operands(case: NormCase, device: str, far: float = 0.5) -> dict[str, torch.Tensor]:
    """`far`: the mean of the rows; those of a stream are near 0."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size, dtype=torch.float32):
        return torch.randn(size, generator=generator, device=device).to(dtype)

    half = {"dtype": case.dtype}
    return {
        "z": draw(case.M, case.K) + far,
        "y": draw(case.M, case.K, **half),
        "weight": 1 + draw(case.K) / 4,
        "bias": draw(case.K) / 4,
        "down": draw(case.K, case.rank, **half),
        "dout": draw(case.M, case.K, **half),
        "residual": draw(case.M, case.K),
        "s": draw(case.M, case.rank, **half),
        "b": draw(case.K, case.rank, **half),
        "p": draw(case.M, case.rank, **half),
    }


def forward(steps, o, case, dtype):
    norm = Norm(o["weight"], o["bias"], 1e-6)
    got = steps.norm(o["z"], o["y"] if case.branch else None, norm, o["down"], dtype)
    return got._replace(mean=got.mean.view(-1), rstd=got.rstd.view(-1))


def backward(steps, o, normed):
    """The gradients, from the same stream and statistics for all."""
    norm = Norm(o["weight"], o["bias"], 1e-6)
    given = o["dout"], normed.z, normed.mean, normed.rstd, norm, o["residual"], o["s"]
    got = steps.norm_grad(*given, (o["b"], o["p"]))
    pair_down, pair_b = steps.pair_grad(o["y"], o["dout"], o["down"], o["b"])
    sums = {"d_down": got.sum_down, "pair's d_down": pair_down, "pair's d_B": pair_b}
    sums["d_B before"] = got.sum_b
    found = {"dz": got.dz, "dy": got.dy, "S before": got.s}
    return found | {name: added(t, o) for name, t in sums.items()}


def added(total, o):
    """A sum of parts, which are zero beyond the rank."""
    rank = o["s"].shape[1]
    if total.dim() == 2:
        return total
    assert not total[..., rank:].any()
    return total.sum(0)[:, :rank]


def doubled(values):
    return {name: t.double() for name, t in values.items()}


@pytest.mark.gpu
@pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
class TestOnAGpu:
    @pytest.mark.parametrize("case", NORM_CASES, ids=str)
    def test_is_the_step_of_plain_torch(self, case):
        o = operands(case, "cuda")
        configs = configs_for(case.K, case.rank, 0)
        steps = cuda_chain.CudaSteps(configs, pair_grad=True, before=case.before)
        with recorded_launches() as launches:
            found = forward(steps, o, case, case.dtype)
            torch.cuda.synchronize()
        plain, exact = (
            forward(TorchSteps(), x, case, dtype)._asdict()
            for x, dtype in ((o, case.dtype), (doubled(o), torch.float64))
        )
        assert_within_budget(found._asdict(), plain, exact)
        with recorded_launches() as more:
            gradients = backward(steps, o, found)
            torch.cuda.synchronize()
        plain = backward(TorchSteps(), o, found)
        wide = found._replace(**doubled(found._asdict()))
        assert_within_budget(gradients, plain, backward(TorchSteps(), doubled(o), wide))
        again = backward(steps, o, found)
        assert all(torch.equal(value, again[name]) for name, value in gradients.items())
        if plans_are_known():
            seen = [kernel_of(name) for name in (*launches, *more)]
            assert [kernel for kernel in seen if kernel] == case.plan

    @pytest.mark.parametrize("case", GELU_CASES, ids=str)
    def test_is_plain_torch_s_gelu_and_its_gradient(self, case):
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(*size):
            return torch.randn(size, generator=generator, device="cuda").to(case.dtype)

        da, h, s = draw(case.M, case.C), 2 * draw(case.M, case.C), draw(case.M, case.after)
        b, p = draw(case.C, case.before), draw(case.M, case.before)
        down = draw(case.C, case.after)

        def results(steps, as_=lambda t: t):
            a, p_after = steps.gelu(as_(h), as_(down))
            d_b, d_down = (as_(b).new_empty(case.C, r) for r in (case.before, case.after))
            dh, s_in = steps.gelu_grad(*map(as_, (da.clone(), h, s, b, p)), d_b, d_down, [])
            made = {"a": a, "P": p_after, "dh": dh}
            return made | {"S": s_in, "d_B": d_b, "d_down": d_down}

        configs = configs_for(case.C, max(case.before, case.after), 0)
        steps = cuda_chain.CudaSteps(configs, gelu=True, gelu_grad=True)
        with recorded_launches() as launches:
            found = results(steps)
            torch.cuda.synchronize()
        assert_within_budget(
            found, results(TorchSteps()), results(TorchSteps(), torch.Tensor.double)
        )
        assert all(torch.equal(value, found[name]) for name, value in results(steps).items())
        if plans_are_known():
            assert list(filter(None, map(kernel_of, launches))) == case.plan

    def test_a_mean_far_from_zero_cancels_nothing(self):
        """The mean is a thousand times the spread."""
        case = NormCase(64, 768, 16, torch.bfloat16, branch=False)
        o = operands(case, "cuda", far=1000.0)
        steps = cuda_chain.CudaSteps(configs_for(case.K, case.rank, 0))
        found = forward(steps, o, case, case.dtype)
        exact = forward(TorchSteps(), doubled(o), case, torch.float64)
        assert ((found.rstd - exact.rstd).abs() < 1e-4 * exact.rstd).all()

    def test_operands_off_16_bytes_take_the_other_kernels(self):
        o = operands(SMALL, "cuda")
        storage = o["z"].new_empty(o["z"].numel() + 1)
        o["z"] = storage[1:].view(o["z"].shape).copy_(o["z"])
        steps = cuda_chain.CudaSteps(configs_for(SMALL.K, SMALL.rank, 0))
        found = forward(steps, o, SMALL, SMALL.dtype)
        plain, exact = (
            forward(TorchSteps(), x, SMALL, dtype)._asdict()
            for x, dtype in ((o, SMALL.dtype), (doubled(o), torch.float64))
        )
        assert_within_budget(found._asdict(), plain, exact)

    @pytest.mark.parametrize("place", range(5))
    def test_a_wrong_operand_is_named(self, place):
        o = operands(SMALL, "cuda")
        names = ("z", "y", "weight", "bias", "down")
        given = [o[name] for name in names]
        given[place] = given[place].double()
        with pytest.raises(RuntimeError, match=rf"{names[place]} must be "):
            torch.ops.efft_kernels.native_norm(*given, 1e-6)
        given = [o[name] for name in names]
        given[place] = given[place][:-1]
        with pytest.raises(RuntimeError, match="must be "):
            torch.ops.efft_kernels.native_norm(*given, 1e-6)

    @pytest.mark.parametrize("place", range(4))
    def test_a_wrong_operand_of_the_pair_is_named(self, place):
        o = operands(SMALL, "cuda")
        names = ("x", "dy", "down", "b")
        given = [o[name] for name in ("y", "dout", "down", "b")]
        for wrong in (given[place].double(), given[place][:-1], given[place][:, 1:]):
            operand = [*given[:place], wrong, *given[place + 1 :]]
            with pytest.raises(RuntimeError, match=r"^(x|dy|down|b) must be ") as caught:
                torch.ops.efft_kernels.native_pair_grad(*operand)
            # The sizes of all others follow from x and down.
            assert place in (0, 2) or str(caught.value).startswith(names[place])


@pytest.mark.parametrize(
    ("k", "rank", "capability", "expected"),
    [
        (768, 16, (9, 0), True),
        (1024, 1, (10, 0), True),
        (1280, 16, (9, 0), True),
        (1344, 16, (9, 0), False),
        (1000, 16, (9, 0), False),
        (768, 17, (9, 0), False),
        (768, 16, (8, 0), False),
        (768, 16, (12, 0), False),
    ],
)
def test_what_they_take(monkeypatch, k, rank, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(native_library, "cuda_unavailable", lambda: None)
    monkeypatch.setattr(native_library, "device_rejected", lambda _: None)
    assert cuda_chain.takes(k, rank, 0) is expected


def test_a_device_of_another_build(monkeypatch):
    """Another GPU beside it can run the library."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    monkeypatch.setattr(native_library, "cuda_unavailable", lambda: None)
    monkeypatch.setattr(native_library, "device_rejected", lambda _: "built for 9.0a")
    assert not cuda_chain.takes(768, 16, 0)


def test_without_the_library_triton_does_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(native_library, "cuda_unavailable", lambda: "not built")
    assert not cuda_chain.takes(768, 16, 0)


def test_a_measured_table_chooses(monkeypatch, tmp_path):
    table = tmp_path / "table.json"
    rows = {
        cuda_chain.chosen_key("before", 768, 12): {"14": [1]},
        cuda_chain.chosen_key("gelu_grad", 768, 16): {"14": [0], "15": [1]},
        cuda_chain.chosen_key("pair_grad", 768, 20): {"14": [1]},
    }
    table.write_text(json.dumps({"device": "NVIDIA_H200", "rows": rows}))
    h200 = triton_device.Device("NVIDIA_H200", 90, 132, 227 * 1024)
    monkeypatch.setattr(triton_device, "properties", lambda _: h200)
    nothing = dict.fromkeys(cuda_chain.CHOSEN, False)
    monkeypatch.setenv(configs.ENVIRONMENT_VARIABLE, str(table))
    configs.measured_table.cache_clear()
    try:
        assert cuda_chain.chosen(768, 16, 12608, 0) == nothing | {"before": True}
        assert cuda_chain.chosen(768, 16, 1000, 0) == nothing  # too few rows
        assert cuda_chain.chosen(1024, 16, 12608, 0) == nothing
        # As a chain asks for it, once for sizes that are alike.
        monkeypatch.setattr(cuda_chain, "takes", lambda *_: True)
        monkeypatch.setattr(triton_chain, "configs_for", lambda *_: None)
        for cached in (chains._steps, chains._in_cuda):
            cached.cache_clear()
        many, alike, few = (chains.steps_for(torch.empty(n, 768), 16) for n in (9000, 12608, 500))
        assert many._before
        assert not (many._native_pair or many._native_gelu or many._native_gelu_grad)
        assert alike is many and not few._before
        # 12,608 rows are of the bucket 14, and take no other's answer.
        assert not many._native_gelu_grad
        assert chains.steps_for(torch.empty(20000, 768), 16)._native_gelu_grad
    finally:
        for cached in (chains._steps, chains._in_cuda, configs.measured_table):
            cached.cache_clear()


@pytest.mark.parametrize(
    ("k", "hidden", "expected"),
    [
        (768, 3072, cuda_chain.CHOSEN),
        (1024, 4096, ("pair_grad", "gelu", "gelu_grad")),
        (1280, 5120, ("gelu_grad",)),
        (384, 1000, ("pair_grad", "before")),
    ],
)
def test_what_there_is_to_choose(k, hidden, expected):
    assert cuda_chain.choices(k, hidden) == list(expected)


def test_without_a_table_nothing_is_chosen(monkeypatch):
    h200 = triton_device.Device("NVIDIA_H200", 90, 132, 227 * 1024)
    monkeypatch.setattr(triton_device, "properties", lambda _: h200)
    assert cuda_chain.chosen(768, 16, 12608, 0) == dict.fromkeys(cuda_chain.CHOSEN, False)
    options = list(inspect.signature(cuda_chain.CudaSteps).parameters)
    assert options[1:] == list(cuda_chain.CHOSEN)


class TestWithoutAGpu:
    """Plain torch in the place of both operators, in float64."""

    @pytest.fixture
    def called(self):
        assert native_library.load_cpu() is None
        names, plain = [], TorchSteps()

        def norm(z, y, weight, bias, down, eps):
            names.append("norm")
            found = plain.norm(z, y, Norm(weight, bias, eps), down, z.dtype)
            return (found.z.clone() if y is not None else z.new_empty(0), *found[1:])

        def norm_grad(dout, z, mean, rstd, weight, bias, residual, s, b, p):
            names.append("norm_grad" if b is None else "norm_grad with S before")
            norm, before = Norm(weight, bias, 1e-6), None if b is None else (b, p)
            got = plain.norm_grad(dout, z, mean, rstd, norm, residual, s, before)
            twice = torch.stack([got.sum_down] * 2)
            if b is None:
                return got.dz, got.dy + 0, twice, z.new_empty(0), z.new_empty(0)
            return got.dz, got.dy + 0, twice, got.s, torch.stack([got.sum_b] * 2)

        def pair_grad(x, dy, down, b):
            names.append("pair_grad")
            return tuple(torch.stack([t, t]) for t in plain.pair_grad(x, dy, down, b))

        def gelu(h, down):
            names.append("gelu")
            return plain.gelu(h, down)

        def gelu_grad(da, h, s, b, p):
            names.append("gelu_grad")
            d_b, d_down = h.new_empty(b.shape), h.new_empty(h.shape[1], s.shape[1])
            dh, s_in = plain.gelu_grad(da, h, s, b, p, d_b, d_down, [])
            da.copy_(dh)
            return tuple(torch.stack([t, t]) for t in (s_in, d_b, d_down))

        with torch.library._scoped_library("efft_kernels", "IMPL") as library:
            library.impl("native_gelu", gelu, "CPU")
            library.impl("native_gelu_grad", gelu_grad, "CPU")
            library.impl("native_norm", norm, "CPU")
            library.impl("native_norm_grad", norm_grad, "CPU")
            library.impl("native_pair_grad", pair_grad, "CPU")
            yield names

    @pytest.mark.parametrize("branch", [False, True])
    def test_steps(self, called, branch):
        case = NormCase(6, 8, 3, torch.float64, branch=branch)
        o = doubled(operands(case, "cpu"))
        steps = cuda_chain.CudaSteps(None)
        found, plain = (forward(each, o, case, torch.float64) for each in (steps, TorchSteps()))
        torch.testing.assert_close(found, plain)
        assert branch or found.z is o["z"]
        given = o["dout"], *found[:1], found.mean, found.rstd
        rest = Norm(o["weight"], o["bias"], 1e-6), o["residual"], o["s"]
        got = steps.norm_grad(*given, *rest)
        expected = TorchSteps().norm_grad(*given, *rest)
        torch.testing.assert_close(got[:2], expected[:2])
        torch.testing.assert_close(got.sum_down, torch.stack([expected.sum_down] * 2))
        assert got.s is got.sum_b is None
        assert called == ["norm", "norm_grad"]

    def test_the_linear_before_is_asked_for(self, called, monkeypatch):
        monkeypatch.setattr(TritonSteps, "thin_grad", TorchSteps().thin_grad)
        o = doubled(operands(NormCase(6, 8, 3, torch.float64), "cpu"))
        normed = forward(TorchSteps(), o, NormCase(6, 8, 3, torch.float64), torch.float64)
        norm = Norm(o["weight"], o["bias"], 1e-6)
        given = o["dout"], o["z"], normed.mean, normed.rstd, norm, o["residual"], o["s"]
        off_16 = o["b"].new_empty(o["b"].numel() + 1)[1:].view(o["b"].shape).copy_(o["b"])
        expected = TorchSteps().norm_grad(*given, (o["b"], o["p"]))
        asked, default = cuda_chain.CudaSteps(None, before=True), cuda_chain.CudaSteps(None)
        for steps, b, own in (
            (asked, o["b"], True),
            (asked, off_16, False),
            (default, o["b"], False),
        ):
            got = steps.norm_grad(*given, (b, o["p"]))
            torch.testing.assert_close(got.s, expected.s)
            parts = torch.stack([expected.sum_b] * 2) if own else expected.sum_b
            torch.testing.assert_close(got.sum_b, parts)
            torch.testing.assert_close(got[:2], expected[:2])
            torch.testing.assert_close(got.sum_down, torch.stack([expected.sum_down] * 2))
        monkeypatch.setattr(cuda_chain, "MOST_WIDTH_BEFORE", 4)
        torch.testing.assert_close(asked.norm_grad(*given, (o["b"], o["p"])).sum_b, expected.sum_b)
        assert called == ["norm_grad with S before", *["norm_grad"] * 3]

    def test_the_pair_is_asked_for(self, called, monkeypatch):
        monkeypatch.setattr(TritonSteps, "pair_grad", TorchSteps().pair_grad)
        o = doubled(operands(NormCase(6, 8, 3, torch.float64), "cpu"))
        x, dy, down, b = (o[name] for name in ("y", "dout", "down", "b"))
        off_16 = x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
        asked, default = cuda_chain.CudaSteps(None, pair_grad=True), cuda_chain.CudaSteps(None)
        expected = TorchSteps().pair_grad(x, dy, down, b)
        native = tuple(torch.stack([t, t]) for t in expected)
        for steps, given, right in (
            (asked, (x, dy, down, b), native),
            (asked, (x.T.contiguous().T, dy.T.contiguous().T, down, b), native),
            (asked, (off_16, dy, down, b), expected),
            (asked, (x[:, :6].contiguous(), dy, down[:6].contiguous(), b), None),
            (default, (x, dy, down, b), expected),
        ):
            found = steps.pair_grad(*given)
            if right is not None:
                torch.testing.assert_close(found, right)
        assert called == ["pair_grad"] * 2

    def test_gelu_is_asked_for(self, called, monkeypatch):
        monkeypatch.setattr(TritonSteps, "gelu", TorchSteps().gelu)
        h, down = torch.randn(6, 64, dtype=torch.float64), torch.randn(64, 3, dtype=torch.float64)
        off_16 = down.new_empty(down.numel() + 1)[1:].view(down.shape).copy_(down)
        asked, default = cuda_chain.CudaSteps(None, gelu=True), cuda_chain.CudaSteps(None)
        narrow = h[:, :60].contiguous(), down[:60].contiguous()
        wide = torch.randn(2, 4160, dtype=torch.float64), torch.randn(4160, 3, dtype=torch.float64)
        for steps, given, own in (
            (asked, (h, down), True),
            (asked, (h, off_16), False),
            (asked, narrow, False),
            (asked, wide, False),
            (default, (h, down), False),
        ):
            count = len(called)
            torch.testing.assert_close(steps.gelu(*given), TorchSteps().gelu(*given))
            assert own == (len(called) > count)
        assert called == ["gelu"]

    def test_gelus_gradient_is_asked_for(self, called, monkeypatch):
        monkeypatch.setattr(TritonSteps, "gelu_grad", TorchSteps().gelu_grad)
        monkeypatch.setattr(TritonSteps, "_finish", lambda self, sums, few: add_up(sums))
        generator = torch.Generator().manual_seed(0)

        def add_up(sums):
            for parts, out in sums:
                out.copy_(parts.sum(0) / 2 if parts.dim() == 3 else parts)
            sums.clear()

        def draw(*size):
            return torch.randn(size, generator=generator, dtype=torch.float64)

        da, h, s, p = draw(6, 64), draw(6, 64), draw(6, 4), draw(6, 3)
        b, other = draw(64, 3), (draw(5, 4), torch.empty(5, 4, dtype=torch.float64))
        off_16 = b.new_empty(b.numel() + 1)[1:].view(b.shape).copy_(b)
        asked, default = cuda_chain.CudaSteps(None, gelu_grad=True), cuda_chain.CudaSteps(None)
        narrow = da[:, :60].contiguous(), h[:, :60].contiguous(), s, b[:60].contiguous(), p
        for steps, given, own in (
            (asked, (da, h, s, b, p), True),
            (asked, (da, h, s, off_16, p), False),
            (asked, narrow, False),
            (default, (da, h, s, b, p), False),
        ):
            count, outs = len(called), [draw(len(given[3]), r) for r in (3, 4)]
            expected = TorchSteps().gelu_grad(*given, *(out := [t.clone() for t in outs]), [])
            later, written = [other], given[0].clone()
            found = steps.gelu_grad(written, *given[1:], *outs, later)
            torch.testing.assert_close((*found, *outs), (*expected, *out))
            torch.testing.assert_close(other[1], other[0])
            assert not later and (found[0] is written) == own == (len(called) > count)
            other[1].zero_()
        assert called == ["gelu_grad"]

    @pytest.mark.parametrize("name", ["z", "y", "weight", "bias", "down"])
    def test_operands_off_16_bytes(self, called, monkeypatch, name):
        """Triton's steps take them."""
        case = NormCase(6, 8, 3, torch.float64)
        o = doubled(operands(case, "cpu"))
        o[name] = o[name].new_empty(o[name].numel() + 1)[1:].view(o[name].shape).copy_(o[name])
        steps, plain = cuda_chain.CudaSteps(None), TorchSteps()
        for step in ("norm", "norm_grad"):
            monkeypatch.setattr(TritonSteps, step, getattr(plain, step))
        found = forward(steps, o, case, torch.float64)
        torch.testing.assert_close(found, forward(plain, o, case, torch.float64))
        if name in ("weight", "bias"):
            given = o["dout"], o["z"], found.mean, found.rstd
            rest = Norm(o["weight"], o["bias"], 1e-6), o["residual"], o["s"]
            torch.testing.assert_close(
                steps.norm_grad(*given, *rest), plain.norm_grad(*given, *rest)
            )
        assert not called


def test_addresses_between_16_bytes_are_found():
    storage = torch.zeros(64)
    aligned, shifted = storage[4:8], storage[5:9]
    assert cuda_chain._on_16_bytes(aligned, None, storage)
    assert not cuda_chain._on_16_bytes(aligned, shifted, None)
