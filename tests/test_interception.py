"""Watching a network run: keys, the stack of modules, what is muted, and that nothing stays behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quantdebug.interception import (
    Frame,
    Interception,
    OpKey,
    call_site,
    clean_path,
    exact_kernels,
    has_compiled,
    is_batched,
)
from lightning_quantdebug.operations import operation_name

torch.set_num_threads(1)


class Log(Interception):
    """Remembers the keys and the modules left."""

    def __init__(self, root: nn.Module, scope: str = "") -> None:
        super().__init__(root, scope)
        self.keys: list[OpKey] = []
        self.left: list[str] = []
        self.opaque: list[str] = []

    def operation(self, key: OpKey, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if operation_name(key.func) != "ones":  # the tests' own inputs
            self.keys.append(key)
        return key.func(*args, **kwargs)

    def module_left(self, frame: Frame, args: Any, output: Any) -> None:
        self.left.append(frame.path)

    def out_of_reach(self, func: Callable[..., Any], frame: Frame, why: str) -> None:
        self.opaque.append(operation_name(func))

    def seen(self) -> list[tuple[str, str]]:
        """Path and name of each operation."""
        return [(key.path, operation_name(key.func)) for key in self.keys]


def watch(model: nn.Module, call: Callable[[], Any], step: bool = False, scope: str = "") -> Log:
    log = Log(model, scope)
    with log.active(step):
        call()
    return log


def surroundings() -> tuple[Any, ...]:
    module = nn.modules.module
    hooks = [len(getattr(module, name)) for name in dir(module) if name.startswith("_global_") and "hooks" in name]
    checkpoint = torch.utils.checkpoint
    return (
        hooks,
        torch._C._len_torch_function_stack(),
        torch.backends.mha.get_fastpath_enabled(),
        checkpoint._checkpoint_without_reentrant_generator,
        "apply" in vars(checkpoint.CheckpointFunction),
    )


class Twice(nn.Module):
    """The same operations on one line, in a loop, in a helper, and in two calls of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def helper(self, x: Tensor) -> Tensor:
        return torch.sin(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.layer(x))
        for _ in range(2):
            x = torch.tanh(x)
        x = torch.cos(x) + torch.cos(x)
        return self.helper(self.helper(x))


def test_every_operation_has_a_key_of_its_own_and_the_same_in_every_run() -> None:
    model, x = Twice(), torch.randn(1, 2)
    first, second = watch(model, lambda: model(x)), watch(model, lambda: model(x * 2))
    own = [key for key in first.keys if operation_name(key.func) != "mul"]
    assert len(set(own)) == len(own) == 9
    assert own == [key for key in second.keys if operation_name(key.func) != "mul"]
    by_name = {name: [key for key in own if operation_name(key.func) == name] for _, name in first.seen()}
    assert [(key.call, key.occurrence) for key in by_name["linear"]] == [(0, 0), (1, 0)]
    assert [key.occurrence for key in by_name["tanh"]] == [0, 1]
    assert len({key.site for key in by_name["tanh"]}) == 1
    assert len({key.site for key in by_name["cos"]}) == 2
    assert len({key.site for key in by_name["sin"]}) == 2, "two calls of one helper are two places"


def test_a_branch_shifts_no_key_behind_it() -> None:
    class Branch(nn.Module):
        extra = False

        def forward(self, x: Tensor) -> Tensor:
            if self.extra:
                x = torch.relu(x)
            return torch.relu(x)

    model, x = Branch(), torch.randn(2)
    short = watch(model, lambda: model(x)).keys
    model.extra = True
    long = watch(model, lambda: model(x)).keys
    assert long[1:] == short


def test_the_place_does_not_depend_on_who_calls_the_module() -> None:
    model, x = Twice(), torch.randn(1, 2)

    def from_afar() -> Tensor:
        return (lambda: model(x))()

    assert watch(model, from_afar).keys == watch(model, lambda: model(x)).keys


def test_inside_an_autograd_function_there_is_no_site() -> None:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return torch.sin(x)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    model = nn.Identity()
    log = watch(model, lambda: torch.cos(Function.apply(torch.ones(1))), step=True)
    assert log.opaque == ["sin"]
    assert [name for _, name in log.seen()] == ["cos"]
    assert call_site(None) == ()


# The stack of modules.


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(x)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Inner(), nn.Sequential(Inner(), nn.Tanh())])
        self.loss = nn.MSELoss()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        made_now = nn.Softplus()
        return made_now(x) + self.loss(x, x)


def test_operations_carry_the_path_of_their_module() -> None:
    model = Outer()
    log = watch(model, lambda: model(torch.ones(2)))
    assert log.seen() == [("blocks.0", "exp"), ("blocks.1.0", "exp"), ("blocks.1.1", "tanh"), ("softplus", "softplus"),
                          ("", "add")]  # fmt: skip
    assert log.left == ["blocks.0", "blocks.1.0", "blocks.1.1", "blocks.1", "softplus", ""]


def test_losses_and_metrics_are_muted() -> None:
    from torchmetrics.classification import MulticlassAccuracy

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.metric, self.loss = nn.Tanh(), MulticlassAccuracy(3), nn.CrossEntropyLoss()

    model = Step()
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])

    def step() -> None:
        out = model.net(x)
        model.metric(out, y)
        model.loss(out, y)

    assert watch(model, step, step=True).seen() == [("net", "tanh")]


def test_only_the_scope_is_watched() -> None:
    model = Outer()
    log = watch(model, lambda: model(torch.ones(2)), scope="blocks.1")
    assert log.seen() == [("blocks.1.0", "exp"), ("blocks.1.1", "tanh")]
    assert log.left == ["blocks.1.0", "blocks.1.1", "blocks.1"]


def test_a_step_counts_calls_of_the_root() -> None:
    model = Inner()
    log = watch(model, lambda: (torch.cos(model(torch.ones(1))), model(torch.ones(1))), step=True)
    assert [(key.path, key.call) for key in log.keys] == [("", 0), ("", -1), ("", 1)]


def test_an_error_that_the_network_catches_leaves_the_stack_right() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch.sin(x)
            raise ValueError

    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fails = Fails()

        def forward(self, x: Tensor) -> Tensor:
            try:
                self.fails(x)
            except ValueError:
                return torch.cos(x)
            return x

    model = Catches()
    log = watch(model, lambda: model(torch.ones(1)))
    assert log.seen() == [("fails", "sin"), ("", "cos")]
    assert log.left == [""], "a module that raised has no result"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_stays_behind(error: type[BaseException]) -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise error

    before = surroundings()
    log = Log(Fails())
    inside: list[Any] = []
    with pytest.raises(error), log.active():  # noqa: PT012 - the way out is what is tested
        inside.append(surroundings())
        log.root(torch.ones(1))
    assert surroundings() == before
    assert inside[0] != before
    assert inside[0][2] is False, "the fast path of attention was on"
    assert log.stack == []


def test_nested_activity_does_not_hook_twice() -> None:
    model = Inner()
    log = Log(model)
    with log.active():
        once = surroundings()
        with log.active():
            assert surroundings() == once
            model(torch.ones(1))
        model(torch.ones(1))
    assert len(log.keys) == 2


def test_other_threads_are_not_watched() -> None:
    model = nn.Sequential(Inner(), Inner())
    log = Log(model)
    results: list[Tensor] = []
    with log.active():
        thread = threading.Thread(target=lambda: results.append(model(torch.ones(1))))
        thread.start()
        thread.join()
        assert log.stack[1:] == []
        model(torch.ones(1))
    assert len(results) == 1
    assert log.seen() == [("0", "exp"), ("1", "exp")]


def test_a_module_that_another_thread_leaves_stays_on_the_stack() -> None:
    class Spawns(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if threading.current_thread() is threading.main_thread():
                thread = threading.Thread(target=lambda: self(x))
                thread.start()
                thread.join()
            return torch.exp(x)

    model = nn.Sequential(Spawns())
    assert watch(model, lambda: model(torch.ones(1))).seen() == [("0", "exp")]


@pytest.mark.filterwarnings("ignore:Using `torch.compile")  # our global hooks are meant to see every module
def test_nothing_is_compiled_while_watching() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = nn.Sequential(torch.compile(Inner(), backend=backend))
    assert watch(model, lambda: model(torch.ones(1))).seen() == [("0", "exp")]
    assert graphs == []
    model(torch.ones(1))
    assert len(graphs) == 1


def test_a_recomputation_on_another_thread_is_watched() -> None:
    """Autograd recomputes a checkpointed block on a thread of its own where there is an accelerator."""
    model = Inner()
    log = Log(model)
    with log.active(step=True):
        again = log.watched_again(lambda: model(torch.ones(1)), first_is_direct=False)
        thread = threading.Thread(target=again)
        thread.start()
        thread.join()
        torch.cos(torch.ones(1))
    assert [name for _, name in log.seen()] == ["exp", "cos"]


def test_attention_is_taken_apart_bit_exactly() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    padding = torch.tensor([[False, False, True], [False, False, False]])
    for settings in ({"need_weights": False}, {"need_weights": True}, {"key_padding_mask": padding}):
        with exact_kernels():
            plain = attention(x, x, x, **settings)
        results: list[Any] = []
        log = watch(
            attention, lambda settings=settings, results=results: results.append(attention(x, x, x, **settings))
        )
        for got, wanted in zip(results[0], plain, strict=True):
            assert got is wanted if wanted is None else torch.equal(got, wanted)
        names = [name for _, name in log.seen()]
        assert names.count("linear") == 2
        assert "multi_head_attention_forward" not in names


# Small questions.


def test_paths_without_the_compilers_level() -> None:
    assert [clean_path(path) for path in ("", "_orig_mod", "a._orig_mod.b", "_orig_mod.a")] == ["", "", "a.b", "a"]


def test_what_is_compiled_is_known() -> None:
    plain = nn.Sequential(Inner())
    assert not has_compiled(plain)
    assert has_compiled(nn.Sequential(torch.compile(Inner(), backend="eager")))
    plain[0].compile(backend="eager")
    assert has_compiled(plain)


def test_tensors_of_a_transform_are_known() -> None:
    seen: list[bool] = []
    torch.func.vmap(lambda x: seen.append(is_batched(x)) or x)(torch.ones(2))
    torch.func.grad(lambda x: seen.append(is_batched(x)) or x.sum())(torch.ones(2))
    assert [*seen, is_batched(torch.ones(2))] == [True, True, False]


@pytest.mark.parametrize("enabled", [True, False])
def test_exact_kernels_are_a_loan(enabled: bool) -> None:
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        with pytest.raises(KeyError), exact_kernels():  # noqa: PT012 - the way out is what is tested
            assert not torch.backends.mha.get_fastpath_enabled()
            raise KeyError
        assert torch.backends.mha.get_fastpath_enabled() is enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_functional_attention_takes_part() -> None:
    log = watch(nn.Identity(), lambda: F.scaled_dot_product_attention(*[torch.ones(1, 2, 2)] * 3), step=True)
    assert [name for _, name in log.seen()] == ["scaled_dot_product_attention"]
