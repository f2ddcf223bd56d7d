"""The training loop: what an epoch reports, the schedule, what a step keeps for its backward."""

from __future__ import annotations

import math
import types
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from efft_kernels.training import loop, replica
from efft_kernels.training.loop import (
    NonFiniteLossError,
    Schedule,
    _Constant,
    evaluate,
    saved_for_backward_mib,
    train_epochs,
    train_one_epoch,
    trained_parameters,
)
from efft_kernels.training.rank_batches import IGNORED
from efft_kernels.training.ranks import ALONE, Ranks
from efft_kernels.training.reproducible import epoch_seed
from efft_kernels.training.updates import Updates


def test_an_epoch_reports_its_mean_loss_and_steps() -> None:
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batches = [
        (torch.randn(7, 5), torch.randint(3, (7,))),
        (torch.randn(2, 5), torch.tensor([0, 2])),
    ]
    steps: list[tuple[int, float]] = []
    result = train_one_epoch(
        model, batches, optimizer, device="cpu", on_step=lambda *step: steps.append(step)
    )
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(model(x), y).item())
    assert (result.images, len(result.step_ms)) == (9, 2)
    losses = [torch.nn.functional.cross_entropy(model(x), y).item() for x, y in batches]
    assert steps == [(step, pytest.approx(loss)) for step, loss in enumerate(losses)]
    one = [(torch.randn(1, 5), torch.tensor([1]))]
    assert train_one_epoch(model, one, optimizer, device="cpu").images == 1
    right = (model(x).argmax(1) == y).float().mean().item()
    assert evaluate(model, batches, device="cpu", num_classes=3) == pytest.approx(100 * right)
    with pytest.raises(ValueError, match="at least one batch"):
        train_one_epoch(model, [], optimizer, device="cpu")
    assert train_one_epoch(model, iter(batches), optimizer, device="cpu").images == 9
    for scheduler, accumulate in ((_Constant(), 1), (None, 2)):
        with pytest.raises(TypeError, match="loader must have a length"):
            train_one_epoch(
                model,
                iter(batches),
                optimizer,
                device="cpu",
                scheduler=scheduler,
                updates=Updates(accumulate=accumulate),
            )


class Beside(Ranks):
    """One of two processes; the other one's loss is always 3, of 2 images."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values + torch.tensor([3.0, 2.0]) if values.ndim else values

    def gather(self, value: Any) -> list[Any]:
        return [value, None]


def test_one_process_of_two_trains_on_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes' gradients are averaged, so that each is of twice its part of the mean."""
    shared: list[Any] = []
    counting: list[bool] = []

    def synced(model: Any, ranks: Ranks, *, counts: bool) -> Any:
        counting.append(counts)
        return nullcontext()

    monkeypatch.setattr(replica.dist, "broadcast", lambda *buffer: shared.append(buffer))
    monkeypatch.setattr(loop, "synced_batch_norm", synced)
    model, x, y = torch.nn.Linear(5, 3), torch.randn(4, 5), torch.randint(3, (4,))
    model.register_buffer("seen", torch.zeros(1))
    own = torch.nn.functional.cross_entropy(model(x), y, reduction="sum")
    (grad,) = torch.autograd.grad(own, model.weight)
    expected = model.weight.detach() - grad * 2 / (4 + 2)
    batches = [(x, y), (x[:1], torch.tensor([IGNORED]))]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    result = train_one_epoch(model, batches, optimizer, device="cpu", ranks=Beside(0, 2))
    torch.testing.assert_close(model.weight.detach(), expected)
    assert (result.loss, result.images) == (pytest.approx((own.item() + 3 + 3) / 8), 8)
    assert counting == [True, False]
    assert shared == [(model.seen, 0)]


@pytest.mark.parametrize("ranks", [ALONE, Beside(0, 2)], ids=["alone", "two"])
def test_processes_count_together(monkeypatch: pytest.MonkeyPatch, ranks: Ranks) -> None:
    asked: list[bool] = []
    real = loop.MulticlassAccuracy

    def recording(*args: Any, sync_on_compute: bool, **options: Any) -> Any:
        asked.append(sync_on_compute)
        return real(*args, sync_on_compute=sync_on_compute, **options)

    monkeypatch.setattr(loop, "MulticlassAccuracy", recording)
    batches = [(torch.eye(3), torch.tensor([0, 1, IGNORED]))]
    accuracy = evaluate(torch.nn.Identity(), batches, device="cpu", num_classes=3, ranks=ranks)
    assert (accuracy, asked) == (100.0, [ranks is not ALONE])


def test_a_nan_loss_stops_before_the_update() -> None:
    model = torch.nn.Linear(5, 3)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    batch = (torch.full((2, 5), float("nan")), torch.tensor([0, 1]))
    with pytest.raises(NonFiniteLossError, match="loss is nan in epoch 5, step 1"):
        train_one_epoch(model, [batch], optimizer, device="cpu", epoch=4)
    with pytest.raises(NonFiniteLossError, match="loss is nan in epoch 1, step 1"):
        train_one_epoch(model, [batch], optimizer, device="cpu")
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_beyond_float_range_is_named(kind: Any) -> None:
    """Torch refuses a factor that the parameters' dtype lacks, with an error of its own."""
    model = torch.nn.Linear(5, 3)
    batches = [(torch.randn(4, 5), torch.randint(3, (4,)))] * 2
    optimizer = kind(model.parameters(), lr=1e39)
    with pytest.raises(NonFiniteLossError, match="step is not finite in epoch 2, step 1"):
        train_one_epoch(model, batches, optimizer, device="cpu", epoch=1)


def test_another_error_of_the_optimizer_is_its_own() -> None:
    class Fails(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise RuntimeError("another")

    model = torch.nn.Linear(5, 3)
    batch = (torch.randn(4, 5), torch.randint(3, (4,)))
    with pytest.raises(RuntimeError, match=r"^another$"):
        train_one_epoch(model, [batch], Fails(model.parameters()), device="cpu")


class Poison(torch.optim.SGD):
    """Its step number `at` gives one number of every parameter a value."""

    def __init__(self, parameters: Any, at: int, value: float):
        super().__init__(parameters, lr=0.0)
        self.steps, self.at, self.value = 0, at, value

    def step(self, closure: Any = None) -> None:
        self.steps += 1
        if self.steps == self.at:
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.view(-1)[-1] = self.value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_last_update_that_diverges_is_noticed(value: float) -> None:
    model = torch.nn.Linear(5, 3)
    model.frozen = torch.nn.Parameter(torch.tensor([math.inf]), requires_grad=False)
    batches = [(torch.randn(4, 5), torch.randint(3, (4,)))] * 3
    train_one_epoch(model, batches, Poison([model.weight], 4, value), device="cpu", epoch=1)
    with pytest.raises(NonFiniteLossError, match="weight is not finite after epoch 2"):
        train_one_epoch(model, batches, Poison([model.weight], 3, value), device="cpu", epoch=1)


@pytest.mark.parametrize(("ranks", "left"), [(ALONE, 2), (Beside(0, 2), 0)], ids=["alone", "two"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_logits_that_mean_nothing_have_no_accuracy(value: float, ranks: Ranks, left: int) -> None:
    model = torch.nn.Linear(5, 3)
    with torch.no_grad():
        model.weight.fill_(value)
    batches = iter([(torch.ones(4, 5), torch.zeros(4, dtype=torch.long))] * 3)
    with pytest.raises(NonFiniteLossError, match="logits are not finite"):
        evaluate(model.train(), batches, device="cpu", num_classes=3, ranks=ranks)
    assert model.training
    assert len(list(batches)) == left  # not looked at; two processes stay in step


def test_a_class_that_is_masked_out_does_not_count_against_the_others() -> None:
    def masked(x: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[-math.inf, 1.0, 0.0]]).expand(len(x), 3)

    model = torch.nn.Module()
    model.forward = masked  # type: ignore[method-assign]
    batches = [(torch.ones(4, 5), torch.tensor([0, 1, 1, 2]))]
    assert evaluate(model, batches, device="cpu", num_classes=3) == 50.0


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_runs_in_evaluation_mode_and_keeps_the_models(training: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Dropout(0.5)).train(training)
    modes: list[tuple[bool, bool]] = []
    model[1].register_forward_hook(
        lambda module, *_: modes.append((module.training, torch.is_inference_mode_enabled()))
    )
    batches = [(torch.randn(4, 5), torch.randint(3, (4,)))]
    evaluate(model, batches, device="cpu", num_classes=3)
    assert modes == [(False, True)]
    assert model.training is model[1].training is training
    train_one_epoch(model, batches, torch.optim.SGD(model.parameters(), lr=0.0), device="cpu")
    assert modes == [(False, True), (True, False)]


def test_the_scheduler_counts_updates_over_all_epochs() -> None:
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    data = TensorDataset(torch.randn(12, 5), torch.randint(3, (12,)))
    events: list[Any] = []

    class Recorder:
        def step_update(self, num_updates: int) -> None:
            events.append(num_updates)

    optimizer.register_step_post_hook(lambda *_: events.append("step"))
    loader = DataLoader(data, 4)
    for _ in train_epochs(
        model, loader, optimizer, range(1, 3), device="cpu", scheduler=Recorder()
    ):
        events.append("epoch")
    expected = ["step", 4, "step", 5, "step", 6, "epoch", "step", 7, "step", 8, "step", 9, "epoch"]
    assert events == expected


class RecordingScaler(torch.amp.GradScaler):
    """A GradScaler of the CPU that says what is asked of it."""

    def __init__(self) -> None:
        super().__init__("cpu", init_scale=1024.0)
        self.calls: list[str] = []

    def scale(self, outputs: Any) -> Any:
        self.calls.append("scale")
        return super().scale(outputs)

    def step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls.append("step")
        return super().step(optimizer, *args, **kwargs)

    def update(self, new_scale: Any = None) -> None:
        self.calls.append("update")
        super().update(new_scale)


def test_a_scaled_step_is_the_plain_one_and_skips_what_overflows() -> None:
    x, y = torch.randn(6, 5), torch.randint(3, (6,))
    plain, scaled = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    scaled.load_state_dict(plain.state_dict())
    scaler = RecordingScaler()
    for model, options in ((plain, {}), (scaled, {"scaler": scaler})):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        train_one_epoch(model, [(x, y)] * 2, optimizer, device="cpu", **options)
    assert scaler.calls == ["scale", "step", "update"] * 2
    torch.testing.assert_close(scaled.weight, plain.weight)

    before = scaled.weight.detach().clone()
    scaled.weight.register_hook(lambda grad: grad * float("inf"))
    optimizer = torch.optim.SGD(scaled.parameters(), lr=1.0)
    train_one_epoch(scaled, [(x, y)], optimizer, device="cpu", scaler=scaler)
    assert torch.equal(scaled.weight, before)
    assert scaler.get_scale() == 512.0


def test_saved_bytes_count_each_storage_once_without_parameters() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False), torch.nn.ReLU())
    x, y = torch.randn(16, 64), torch.zeros(16, dtype=torch.long)
    modes: list[bool] = []
    model.register_forward_hook(lambda module, *_: modes.append(module.training))
    generator = torch.get_rng_state()
    mib = saved_for_backward_mib(model.eval(), x, y)
    # the input, the ReLU's output, the log-probabilities, the targets and the loss's total weight
    assert mib * 2**20 == 4 * (16 * 64 + 16 * 32 + 16 * 32 + 1) + 8 * 16
    assert modes == [True] and not model.training
    assert model[0].weight.grad is None
    assert torch.equal(torch.get_rng_state(), generator)


def test_what_is_saved_and_freed_again_counts_too() -> None:
    """Also where a forward goes backward itself, as one that returns an energy's gradient."""

    class Force(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(20):
                energy = (x * self.weight[0]).exp().sum()  # saves x and the exponential
                x = x + torch.autograd.grad(energy, self.weight)[0][0]
            return super().forward(x)

    model, x, y = Force(64, 4, bias=False), torch.randn(16, 64), torch.zeros(16, dtype=torch.long)
    mib = saved_for_backward_mib(model, x, y)
    last = 4 * (16 * 64 + 16 * 4 + 1) + 8 * 16  # x, and what the loss saves
    assert mib * 2**20 == last + 20 * 2 * 4 * 16 * 64


def test_the_learning_rate_rises_and_falls() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    schedule = Schedule(
        epochs=10, lr=0.5, weight_decay=0.1, warmup_epochs=2, warmup_lr=0.1, min_lr=0.01
    )
    optimizer, scheduler = schedule.start([weight], updates_per_epoch=4)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    rates = [optimizer.param_groups[0]["lr"]]
    for update in range(1, 41):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:8] == pytest.approx([0.1 + 0.05 * update for update in range(8)])
    assert rates[8:] == sorted(rates[8:], reverse=True)
    assert rates[20] == pytest.approx((0.5 + 0.01) / 2 + (0.5 - 0.01) / 2 * math.cos(math.pi / 2))
    assert rates[40] == 0.01


@pytest.mark.parametrize("step", ["update", "epoch", "constant"])
def test_the_optimizer_is_the_one_that_is_named(step: str) -> None:
    rest = {"epochs": 2, "lr": 0.5, "weight_decay": 0.1, "warmup_epochs": 0, "warmup_lr": 0.1}
    for kind in (torch.optim.AdamW, torch.optim.SGD):
        schedule = Schedule(**rest, step=step, optimizer=kind.__name__.lower())  # type: ignore[arg-type]
        optimizer, _ = schedule.start([torch.nn.Parameter(torch.zeros(1))], updates_per_epoch=4)
        assert type(optimizer) is kind
        assert optimizer.param_groups[0].get("momentum", 0.9) == 0.9
        assert optimizer.param_groups[0]["weight_decay"] == 0.1
        assert schedule.min_lr == 0


def test_once_an_epoch_the_learning_rate_is_that_of_the_epoch_before() -> None:
    """timm's scheduler.step(e) after epoch e, counted from 0."""
    rest: Any = {"lr": 0.5, "weight_decay": 0.0, "warmup_lr": 0.1, "min_lr": 0.01, "step": "epoch"}
    schedule = Schedule(epochs=4, warmup_epochs=2, **rest)
    optimizer, scheduler = schedule.start([torch.nn.Parameter(torch.zeros(1))], 3)
    rates = [optimizer.param_groups[0]["lr"]]
    for update in range(1, 12):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    half = 0.01 + (0.5 - 0.01) / 2
    assert rates == pytest.approx([0.1] * 3 + [0.1] * 3 + [0.3] * 3 + [half] * 3)


def test_a_step_is_timed_when_the_device_has_done_it(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_post_hook(lambda *_: events.append("step"))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_synchronize", lambda device: events.append(device.type))
        patch.setattr(loop, "time", types.SimpleNamespace(perf_counter=iter((1.0, 1.25)).__next__))
        batch = (torch.randn(7, 5), torch.randint(3, (7,)))
        assert train_one_epoch(model, [batch], optimizer, device="cpu").step_ms == [250.0]
    monkeypatch.setattr(torch.cuda, "synchronize", events.append)
    for name in ("cpu", "cuda:1"):
        loop._synchronize(torch.device(name))
    assert events == ["cpu", "step", "cpu", torch.device("cuda:1")]


def test_a_seeded_epoch_does_not_depend_on_what_was_drawn_before() -> None:
    data = TensorDataset(torch.randn(12, 5), torch.randint(3, (12,)))

    def weights_after(epochs: range, drawn: int = 0) -> torch.Tensor:
        loader = DataLoader(data, 4, shuffle=True, generator=torch.Generator())
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(5, 3))
        schedule = Schedule(epochs=2, lr=0.1, weight_decay=0.0, warmup_epochs=0, warmup_lr=0.1)
        optimizer, scheduler = schedule.start(trained_parameters(model), len(loader))
        torch.rand(drawn)
        for epoch, result in train_epochs(
            model, loader, optimizer, epochs, device="cpu", scheduler=scheduler, seed=3
        ):
            assert epoch in epochs
            own = epoch_seed(3, epoch + 1)
            assert loader.generator is not None
            assert (loader.generator.initial_seed(), torch.initial_seed()) == (own, own)
            assert result.images == 12
        return model[1].weight.detach()

    assert torch.equal(weights_after(range(1)), weights_after(range(1), drawn=7))
    assert not torch.equal(weights_after(range(1)), weights_after(range(1, 2)))
