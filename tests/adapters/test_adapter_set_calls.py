"""Who and what a batch of several tasks reaches: threads, coroutines, layouts, ways to call."""

from __future__ import annotations

import asyncio
import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from efft_kernels import EFFT2, AdapterSet, KAdaptation, LoRA, attach
from efft_kernels.adapters import batch_layout

METHODS = [
    EFFT2(rank=3, scale=0.7),
    LoRA(rank=2),
    KAdaptation(products=2, rank=1),
]


def images(rows=2):
    torch.manual_seed(1)
    return torch.randn(rows, 3, 8, 8)


@pytest.fixture
def fill(randomize):
    def make(model, method, **options):
        tasks = AdapterSet(attach(model.eval(), method, **options))
        for name in "ab":
            randomize(tasks.adapter)
            for module in tasks.adapter.modules_to_train:
                randomize(model.get_submodule(module))
            tasks.add(name)
        tasks.use("a")
        return tasks

    return make


@torch.no_grad()
def mixed(tasks, ids, x):
    with tasks.tasks(ids):
        return tasks.model(x)


@torch.no_grad()
def alone(tasks, ids, x):
    rows = []
    for i, name in enumerate(ids):
        tasks.use(name)
        rows.append(tasks.model(x[i : i + 1]))
    return torch.cat(rows)


def test_rows_are_those_of_the_first_tensor_that_has_any():
    x = torch.ones(4, 2)
    assert batch_layout.batch_rows((torch.tensor(3.0), "x", x), {}) == 4
    assert batch_layout.batch_rows((None,), {"scale": torch.tensor(3.0), "x": x}) == 4
    assert batch_layout.batch_rows((torch.tensor(3.0), 7), {}) is None


@pytest.mark.parametrize(
    ("before", "after", "rows", "expected"),
    [
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9, 9], 3, True),
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 9, 9], 3, False),
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 9], 6, True),
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9, 9], 6, False),
        ([1, 2, 3], [1, 2, 3, 4], 3, False),
        ([0, 0], [0.009, -1], 2, True),
        ([0, 0], [-0.011, 1], 2, False),
        ([0, 3], [3, 0], 2, False),
        ([-2, -2, -2 - 1.9e-5], None, 3, True),  # no image reaches it, and its rows are equal
        ([-2, -2, -2 - 2.1e-5], None, 3, False),
        ([2, 2.5, 2], None, 3, False),
        ([0, 0, 0], None, 3, True),
        ([], None, 2, True),
    ],
)
def test_whether_the_last_image_changes_its_own_rows_alone(before, after, rows, expected):
    a, b = (torch.tensor(prints, dtype=torch.float64) for prints in (before, after or before))
    assert batch_layout._only_last_changes(a, b, rows) is expected


def test_what_is_exchanged_of_a_call():
    """The last image: of every tensor with as many rows, but for masks and what is empty."""
    x, indices = torch.randn(3, 2), torch.tensor([4, 7, 6])
    same = [torch.ones(3) > 0, torch.ones(3, 0).long(), torch.tensor(2.0), torch.ones(2), None, "x"]
    seen, linear = [], nn.Linear(2, 2)

    def forward(*args, **kwargs):
        seen.append((args, kwargs))
        linear(args[0])

    batch_layout.check_batch_major(forward, (x, *same), {"indices": indices}, {"it": linear})
    (args, kwargs), (others, other_kwargs) = seen
    assert args == (x, *same) and kwargs == {"indices": indices}
    assert all(a is b for a, b in zip(others[1:], same, strict=True))
    assert torch.equal(others[0], torch.cat([x[:-1], 1 - 2 * x[-1:]]))
    assert other_kwargs["indices"].tolist() == [4, 7, 5]
    assert not linear._forward_pre_hooks
    for single in ((x[:1],), (None,)):
        batch_layout.check_batch_major(forward, single, {}, {"it": linear})
    assert len(seen) == 2


def test_a_linear_of_one_row_leaves_one_print():
    linear = nn.Linear(3, 2)
    ((name, prints),) = batch_layout._prints(linear, (torch.ones(3),), {}, {"it": linear})
    assert (name, prints.shape) == ("it", (1,))


class TestThreads:
    def test_another_thread_gets_the_models_own_adapter(self, make_vit, fill):
        tasks = fill(make_vit(), METHODS[0])
        x = images()
        with torch.no_grad():
            plain, expected = tasks.model(x), mixed(tasks, "bb", x)
        assert (plain - expected).abs().max() > 1e-2
        with ThreadPoolExecutor(1) as pool, torch.no_grad(), tasks.tasks("bb"):
            call = torch.no_grad()(tasks.model)
            assert torch.equal(pool.submit(call, x).result(), plain)
            assert pool.submit(call, images(5)).result().shape == (5, 5)
            found = pool.submit(mixed, tasks, "ab", x).result()
            torch.testing.assert_close(found[0], plain[0], rtol=1e-4, atol=1e-4)
            assert torch.equal(tasks.model(x), expected)

    @pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
    def test_many_at_once(self, make_vit, fill, method):
        """Each with tasks of its own, while others enter and leave theirs."""
        tasks = fill(make_vit(), method)
        x = images()
        with torch.no_grad():
            expected = {"": tasks.model(x)}
        expected |= {ids: mixed(tasks, ids, x) for ids in ("ab", "ba", "bb")}
        start = threading.Barrier(4)

        def serve(ids):
            start.wait(20)
            for _ in range(15):
                found = mixed(tasks, ids, x) if ids else torch.no_grad()(tasks.model)(x)
                torch.testing.assert_close(found, expected[ids], rtol=1e-4, atol=1e-4)

        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(serve, ids) for ids in expected]:
                done.result(60)
        assert tasks.adapter.bank.mixing == 0

    def test_coroutines_that_take_turns(self, make_vit, fill):
        tasks = fill(make_vit(), METHODS[0])
        x = images()
        expected = {ids: mixed(tasks, ids, x) for ids in ("ab", "ba")}

        async def serve(ids):
            with tasks.tasks(ids):
                for _ in range(3):
                    await asyncio.sleep(0)
                    assert torch.equal(tasks.model(x), expected[ids])

        async def both():
            await asyncio.gather(serve("ab"), serve("ba"))

        with torch.no_grad():
            asyncio.run(both())

    def test_sets_of_two_models_within_each_other(self, make_vit, fill):
        one, other = fill(make_vit(), METHODS[0]), fill(make_vit(seed=8), METHODS[0])
        x = images()
        expected = mixed(one, "ab", x), mixed(other, "ba", x)
        with torch.no_grad(), one.tasks("ab"), other.tasks("ba"):
            assert torch.equal(one.model(x), expected[0])
            assert torch.equal(other.model(x), expected[1])

    def test_a_copy_made_within_is_in_no_context(self, make_vit, fill):
        tasks = fill(make_vit(), METHODS[0])
        x = images()
        with torch.no_grad():
            plain = tasks.model(x)
            with tasks.tasks("bb"):
                copied = copy.deepcopy(tasks.model)
            assert torch.equal(copied(x), plain)
        copied.factor_bank.group("blocks.0.attn.qkv")
        assert copied.factor_bank.mixing == 0

    def test_nothing_holds_the_model_afterwards(self, make_vit, fill):
        tasks = fill(make_vit(), METHODS[0])
        mixed(tasks, "ab", images())
        bank = weakref.ref(tasks.adapter.bank)
        del tasks
        gc.collect()
        assert bank() is None

    def test_nothing_changes_the_model_while_a_thread_is_within(self, make_vit, fill):
        tasks = fill(make_vit(), METHODS[0])
        adapter, layer = tasks.adapter, tasks.model.blocks[0].attn.qkv
        with ThreadPoolExecutor(1) as pool, tasks.tasks("ab"):
            for change in (adapter.merge, adapter.detach, layer.merge):
                for call in (change, lambda change=change: pool.submit(change).result()):
                    with pytest.raises(RuntimeError, match=r"within AdapterSet\.tasks"):
                        call()
            assert not adapter.merged and type(tasks.model.blocks[0].attn.qkv) is type(layer)
        adapter.merge()
        assert adapter.merged

    def test_a_layer_that_was_merged_meanwhile(self, make_vit, fill):
        """As by a thread between the checks of tasks() and its entry."""
        tasks = fill(make_vit(), METHODS[0])
        layer = tasks.model.blocks[1].mlp.fc2
        with torch.no_grad(), tasks.tasks("ab"):
            layer._base_weight = (layer.weight,)
            with pytest.raises(RuntimeError, match=r"needs the factors: call unmerge\(\)"):
                tasks.model(images())

    def test_training_within(self, make_vit, fill):
        tasks = fill(make_vit(), METHODS[0])
        with tasks.tasks("ab"), pytest.raises(RuntimeError, match=r"inference: call model\.eval"):
            tasks.model.train()(images())

    def test_compiled(self, mixers):
        """A graph from outside the context is not used inside, nor the other way round."""
        tasks = mixers("batch")
        x = tokens(2)
        compiled = torch.compile(tasks.model, backend="eager")
        with torch.no_grad():
            plain = tasks.model(x)
            for _ in range(2):
                torch.testing.assert_close(compiled(x), plain, rtol=1e-4, atol=1e-4)
                for ids in ("ab", "bb"):
                    expected = mixed(tasks, ids, x)
                    with tasks.tasks(ids):
                        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)


class Mixer(nn.Module):
    """Adapted linears over tokens that are then mixed, in several layouts of the batch.

    Args:
        layout: "batch" [B, T, K]; "tokens" [T, B, K]; "flat" [B·T, K]; "flat tokens" [T·B, K];
            "windows" [B·w, T/w, K]; "windows first" [w·B, T/w, K].
    """

    def __init__(self, layout):
        super().__init__()
        torch.manual_seed(2)
        self.layout = layout
        self.embed = nn.Linear(3, 6)
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def arrange(self, x):
        b, t, k = x.shape
        if self.layout == "batch":
            return x, lambda y: y
        if self.layout == "tokens":
            return x.transpose(0, 1), lambda y: y.transpose(0, 1)
        if self.layout == "flat":
            return x.reshape(b * t, k), lambda y: y.view(b, t, -1)
        if self.layout == "flat tokens":
            return (
                x.transpose(0, 1).reshape(t * b, k),
                lambda y: y.view(t, b, -1).transpose(0, 1),
            )
        windows = x.view(b, 2, t // 2, k)
        if self.layout == "windows":
            return windows.reshape(b * 2, t // 2, k), lambda y: y.view(b, t, -1)
        return (
            windows.transpose(0, 1).reshape(2 * b, t // 2, k),
            lambda y: y.view(2, b, t // 2, -1).transpose(0, 1).reshape(b, t, -1),
        )

    def forward(self, x):
        x, back = self.arrange(self.embed(x))
        x = back(self.fc2(self.fc1(x).relu()))
        x = self.arrange(x + x.mean(1, keepdim=True))[0]
        return self.head(back(self.fc2(self.fc1(x).relu())).mean(1))


@pytest.fixture
def mixers(fill):
    def make(layout):
        return fill(Mixer(layout), LoRA(rank=2, matrices=None), targets=["fc1", "fc2"])

    return make


def tokens(rows, count=4):
    torch.manual_seed(5)
    return torch.randn(rows, count, 3)


class TestLayout:
    @pytest.mark.parametrize("rows", [2, 4, 3])
    @pytest.mark.parametrize("layout", ["batch", "flat", "windows"])
    def test_batch_major_is_computed(self, mixers, layout, rows):
        tasks, ids = mixers(layout), "abab"[:rows]
        expected = alone(tasks, ids, tokens(rows))
        torch.testing.assert_close(mixed(tasks, ids, tokens(rows)), expected)

    @pytest.mark.parametrize("rows", [2, 4])
    @pytest.mark.parametrize("layout", ["tokens", "flat tokens", "windows first"])
    def test_another_is_refused(self, mixers, layout, rows):
        """As many tokens as rows, or a multiple: the shapes would do."""
        tasks = mixers(layout)
        for _ in range(2):
            with pytest.raises(ValueError, match="batch in the leading dimension, got FusedEFFTL"):
                mixed(tasks, "abab"[:rows], tokens(rows))
        assert tasks.model(tokens(rows)).shape == (rows, 3)

    def test_shapes_that_would_not_do(self, mixers):
        with pytest.raises(ValueError, match="batch must be the leading dimension"):
            mixed(mixers("tokens"), "aaa", tokens(3))

    @pytest.mark.parametrize("layout", ["tokens", "windows first"])
    def test_one_task_is_right_in_any(self, mixers, layout):
        tasks = mixers(layout)
        expected = alone(tasks, "bb", tokens(2))
        torch.testing.assert_close(mixed(tasks, "bb", tokens(2)), expected)

    @pytest.mark.parametrize("batch_first", [True, False])
    def test_torchs_own_encoder(self, fill, batch_first):
        encoder = nn.TransformerEncoderLayer(6, 2, 8, batch_first=batch_first, dropout=0.0)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            targets = ["linear1", "linear2"]
            tasks = fill(encoder, LoRA(rank=2), targets=targets, modules_to_train=())
            x = torch.randn(4, 4, 6)
            if batch_first:
                expected = alone(tasks, "abba", x)
                torch.testing.assert_close(mixed(tasks, "abba", x), expected)
            else:
                with pytest.raises(ValueError, match="batch_first=False"):
                    mixed(tasks, "abba", x)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)

    def test_it_is_looked_at_once(self, mixers, monkeypatch):
        tasks, looked = mixers("batch"), []
        check = batch_layout._prints
        monkeypatch.setattr(batch_layout, "_prints", lambda *a: looked.append(1) or check(*a))
        for ids in ("aa", "ab", "ba", "ab"):
            mixed(tasks, ids, tokens(2))
        assert len(looked) == 2

    def test_equal_rows_and_zeros(self, mixers):
        """The exchanged image differs from any."""
        for x in (tokens(1).expand(2, -1, -1), torch.zeros(2, 4, 3), torch.ones(2, 4, 3)):
            mixed(mixers("batch"), "ab", x)
            with pytest.raises(ValueError, match="batch in the leading dimension"):
                mixed(mixers("windows first"), "ab", x)

    def test_what_is_made_of_no_image(self, fill):
        """A query for each row of the batch has its task; a table of biases has none."""

        class Query(Mixer):
            def forward(self, x):
                queries = self.query if self.table else self.query[:1].expand(len(x), -1, -1)
                x = x.mean((1, 2), keepdim=True) + self.fc2(self.fc1(queries)).mean(1, keepdim=True)
                return self.head(x.mean(1).expand(-1, 6))

        for table in (False, True):
            model = Query("batch")
            model.table, model.query = table, nn.Parameter(torch.randn(4, 2, 6))
            tasks = fill(model, LoRA(rank=2, matrices=None), targets=["fc1", "fc2"])
            if table:
                with pytest.raises(ValueError, match="or none of any image"):
                    mixed(tasks, "abab", tokens(4))
            else:
                expected = alone(tasks, "abab", tokens(4))
                torch.testing.assert_close(mixed(tasks, "abab", tokens(4)), expected)

    @pytest.mark.parametrize("layout", ["batch", "windows first"])
    def test_images_that_hardly_matter(self, mixers, layout):
        tasks = mixers(layout)
        nn.init.normal_(tasks.model.embed.weight, std=1e-4)
        if layout == "batch":
            expected = alone(tasks, "ab", tokens(2))
            torch.testing.assert_close(mixed(tasks, "ab", tokens(2)), expected)
        else:
            with pytest.raises(ValueError, match="leading dimension"):
                mixed(tasks, "ab", tokens(2))

    @pytest.mark.parametrize("layout", ["batch", "windows first"])
    def test_images_of_whole_numbers(self, fill, layout):
        class Bytes(Mixer):
            def forward(self, x):
                return super().forward(x / 255)

        tasks = fill(Bytes(layout), LoRA(rank=2), targets=["fc1", "fc2"])
        x = torch.randint(0, 256, (2, 4, 3), dtype=torch.uint8)
        if layout == "batch":
            torch.testing.assert_close(mixed(tasks, "ab", x), alone(tasks, "ab", x))
        else:
            with pytest.raises(ValueError, match="leading dimension"):
                mixed(tasks, "ab", x)

    def test_images_of_indices_stay_among_those_that_are_there(self, fill):
        class Indexed(Mixer):
            def __init__(self):
                super().__init__("batch")
                self.embed = nn.Embedding(7, 6)

        tasks = fill(Indexed(), LoRA(rank=2), targets=["fc1", "fc2"])
        x = torch.tensor([[3, 5, 4, 6], [6, 3, 4, 3]])
        torch.testing.assert_close(mixed(tasks, "ab", x), alone(tasks, "ab", x))

    def test_a_broken_image_among_others(self, mixers):
        x = tokens(3)
        x[0, 0, 0] = torch.nan
        found = mixed(mixers("windows"), "aba", x)
        assert found[0].isnan().all() and not found[1:].isnan().any()
        with pytest.raises(ValueError, match="leading dimension"):
            mixed(mixers("windows first"), "aba", x)

    def test_a_head_over_another_layout(self, fill):
        class TokensFirstHead(Mixer):
            def forward(self, x):
                x = self.fc2(self.fc1(self.embed(x)).relu())
                return self.head(x.transpose(0, 1)).mean(0)

        tasks = fill(TokensFirstHead("batch"), LoRA(rank=2), targets=["fc1", "fc2"])
        with pytest.raises(ValueError, match="got Linear 'head'"):
            mixed(tasks, "abab", tokens(4))


class TestKeywords:
    def test_a_head_and_a_linear_called_by_keyword(self, fill):
        class ByKeyword(Mixer):
            def forward(self, x):
                x = self.fc2(input=self.fc1(input=self.embed(x)).relu())
                return self.head(input=x.mean(1))

        tasks = fill(ByKeyword("batch"), LoRA(rank=2), targets=["fc1", "fc2"])
        expected = alone(tasks, "ba", tokens(2))
        torch.testing.assert_close(mixed(tasks, "ba", tokens(2)), expected)

    def test_the_model_called_by_keyword(self, mixers):
        tasks = mixers("batch")
        expected = alone(tasks, "ba", tokens(2))
        with torch.no_grad(), tasks.tasks("ba"):
            torch.testing.assert_close(tasks.model(x=tokens(2)), expected)
        tasks = mixers("tokens")
        with pytest.raises(ValueError, match="leading dimension"), tasks.tasks("ba"):
            tasks.model(x=tokens(2))


class TestUncompiled:
    """`AdapterSet.compiled` where torch.compile gives back what it is given."""

    @pytest.fixture(autouse=True)
    def options(self, monkeypatch):
        """What torch.compile was told, call by call."""
        seen = []
        monkeypatch.setattr(torch, "compile", lambda call, **told: seen.append(told) or call)
        return seen

    def test_a_head_called_by_keyword_and_arguments_of_any_kind(self, fill):
        class ByKeyword(Mixer):
            def forward(self, x, scale, how):
                assert how == "mean"
                return self.head(input=scale * super().forward(x).repeat(1, 2))

        tasks = fill(ByKeyword("batch"), LoRA(rank=2), targets=["fc1", "fc2"])
        given = (tokens(3), torch.tensor(2.0))
        run = tasks.compiled()
        for ids in ("bab", "bbb"):
            with torch.no_grad(), tasks.tasks(ids):
                expected = tasks.model(*given, how="mean")
            torch.testing.assert_close(run(ids, *given, how="mean"), expected)

    @pytest.mark.parametrize("ids", ["ab", "bb"])
    def test_sizes_that_a_graph_leaves_open(self, fill, monkeypatch, ids):
        """Of a batch of one task as well, so that it needs no graph of its own."""

        class Further(Mixer):
            def forward(self, x, table):
                return super().forward(x) + table.sum()

        def open_dimensions(tensor):
            return getattr(tensor, "_dynamo_weak_dynamic_indices", set())

        given = []
        tasks = fill(Further("batch"), LoRA(rank=2), targets=["fc1", "fc2"])
        monkeypatch.setattr(
            torch, "compile", lambda call, **_: lambda *x: given.append(x) or call(*x)
        )
        tasks.compiled()(ids, tokens(2), table=torch.ones(7))
        traced, (images,), further = given[0]
        assert open_dimensions(images) == open_dimensions(traced.task_of_row) == {0}
        assert open_dimensions(further["table"]) == set()
        for stacked, dimensions in ((traced.factors, {0}), (traced.heads, {0, 1})):
            tensors = [t for pair in stacked.values() for t in pair if t is not None]
            assert tensors and {len(t) for t in tensors} == {2}
            assert all(open_dimensions(t) == dimensions for t in tensors)

    def test_another_layout_is_refused(self, mixers):
        tasks = mixers("windows first")
        with pytest.raises(ValueError, match="batch in the leading dimension, got FusedEFFTL"):
            tasks.compiled()("ab", tokens(2))

    def test_one_graph_unless_it_is_told_otherwise(self, mixers, options):
        tasks = mixers("batch")
        tasks.compiled(backend="eager")
        tasks.compiled(fullgraph=False)
        assert options == [{"fullgraph": True, "backend": "eager"}, {"fullgraph": False}]


def test_a_hooked_weight_of_a_head_is_refused(make_vit):
    model = make_vit()
    nn.utils.spectral_norm(model.head)
    with pytest.raises(TypeError, match="head must hold its weight as a parameter"):
        AdapterSet(attach(model, EFFT2(rank=2)))
