"""A recipe rebuilds what was accepted bit for bit, and refuses every other model."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning import LightningModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_quantdebug import Instrumentation, QuantTarget, RecipeError, apply_recipe, instrument, save_recipe
from lightning_quantdebug.adaround import AdaRoundSettings, adaround
from lightning_quantdebug.bias_correction import correct_bias
from lightning_quantdebug.equalization import equalize
from lightning_quantdebug.instrument import batch_runs
from lightning_quantdebug.model_loan import call_with
from lightning_quantdebug.network import Network, NetworkCall, output_tensors
from lightning_quantdebug.recipe import QuantizedModel, Recipe, origin_of
from tests import zoo
from tests.callback_runs import weights
from tests.exporting import PER_GROUP, quantized, simulated

torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent


def _outputs(model: Any, batch: Any) -> list[Tensor]:
    with torch.no_grad():
        return output_tensors(call_with(model, batch))


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("target", ["int8", "w4a8", "tensorrt"])
@pytest.mark.parametrize("name", [*zoo.ZOO])
def test_a_recipe_gives_what_was_accepted_bit_for_bit(name: str, target: str, tmp_path: Path) -> None:
    with quantized(name, target) as (session, batch):
        accepted = simulated(session, batch)
        save_recipe(session, batch, tmp_path / "recipe")
    rebuilt = apply_recipe(zoo.make(name)[0].train(), tmp_path / "recipe")
    assert _equal(_outputs(rebuilt, batch), accepted)
    assert rebuilt.model.training


def _after_remedies(model: nn.Module, batch: Any, tmp_path: Path) -> list[Tensor]:
    with instrument(model, batch, "w4a8_per_tensor") as session:
        session.calibrate([batch])
        runs = batch_runs(session, [batch])
        equalize(session, runs)
        session.calibrate([batch])
        correct_bias(session, runs)
        adaround(session, runs, AdaRoundSettings(iterations=200))
        session.set_mode("quantize")
        learned = session.quantizers["features.1.add"].learn()
        with torch.no_grad():
            learned.ratio.mul_(1.2)
        changes = session.adjustments.values()
        for part in ("weight_scale", "weight_correction", "bias_correction", "bounds_scale"):
            assert any(getattr(change, part) is not None for change in changes), part
        save_recipe(session, batch, tmp_path / "recipe")
        return simulated(session, batch)


def test_after_remedies_and_trained_scales(tmp_path: Path) -> None:
    model, batch = zoo.make("mobilenet")[0], torch.randn(32, 3, 16, 16)
    accepted = _after_remedies(model, batch, tmp_path)
    rebuilt = apply_recipe(model, tmp_path / "recipe")
    assert _equal(_outputs(rebuilt, batch), accepted)
    frozen = [item.name for item in rebuilt.session(NetworkCall((batch,), {})).quantizers.values() if item.frozen]
    assert frozen
    assert all(name.endswith(".weight") for name in frozen)
    files = sorted(path.name for path in (tmp_path / "recipe").iterdir())
    assert files == ["recipe.json", "tensors.safetensors"]


def test_groups_and_another_batch(tmp_path: Path) -> None:
    model, batch = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(6, 8)
    other = torch.randn(3, 8)
    with instrument(model, batch, PER_GROUP) as session:
        session.calibrate([batch])
        session.set_mode("quantize")
        accepted = simulated(session, other)
        save_recipe(session, batch, tmp_path / "recipe")
    rebuilt = apply_recipe(model, tmp_path / "recipe")
    assert _equal(_outputs(rebuilt, other), accepted)
    assert _equal(_outputs(copy.deepcopy(rebuilt), other), accepted)
    assert _equal(_outputs(pickle.loads(pickle.dumps(rebuilt)), other), accepted)


def test_a_branch_that_is_taken_later_is_quantized_too(tmp_path: Path) -> None:
    model, batch = zoo.make("branching")
    other = -batch.abs()
    with instrument(model, batch) as session:
        session.record(lambda: model.__dict__["forward"].original(other), other)
        session.place()
        session.calibrate([batch, other])
        session.set_mode("quantize")
        accepted = [simulated(session, one) for one in (batch, other)]
        save_recipe(session, batch, tmp_path / "recipe")
    rebuilt = apply_recipe(model, tmp_path / "recipe")
    for one, expected in zip((batch, other), accepted, strict=True):
        assert _equal(_outputs(rebuilt, one), expected)


class _Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def test_a_recipe_of_a_part_fits_the_part_alone(tmp_path: Path) -> None:
    holder, batch = _Holder(), torch.randn(16, 4)
    session = Instrumentation(holder, QuantTarget.from_value("int8"))
    session.record(lambda: holder.net(batch), batch, step=True)
    session.place()
    with session.observing(), torch.no_grad():
        session.run(lambda: holder.net(batch), step=True)
    session.set_mode("quantize")
    with torch.no_grad():
        accepted = session.run(lambda: holder.net(batch), step=True)
    network = Network(holder, "net", ("input",))
    Recipe.of(session, network, NetworkCall((batch,), {}), origin_of(holder)).save(tmp_path / "recipe")
    for model in (holder, holder.net):
        assert torch.equal(_outputs(apply_recipe(model, tmp_path / "recipe"), batch)[0], accepted)


def test_the_model_is_as_it_was_also_when_it_raises(tmp_path: Path) -> None:
    with quantized("mobilenet") as (session, batch):
        save_recipe(session, batch, tmp_path / "recipe")
    model = zoo.make("mobilenet")[0].train()
    before = copy.deepcopy(model.state_dict())
    rebuilt = apply_recipe(model, tmp_path / "recipe")
    rebuilt(batch)
    with pytest.raises(RuntimeError):
        rebuilt(torch.randn(2, 5, 16, 16))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert "forward" not in model.__dict__


@pytest.fixture
def made(tmp_path: Path) -> tuple[nn.Module, Path]:
    """A model and its recipe."""
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 4)
    with instrument(model, batch) as session:
        session.calibrate([batch])
        session.set_mode("quantize")
        save_recipe(session, batch, tmp_path / "recipe")
    return model, tmp_path / "recipe"


def test_other_models_are_refused_and_what_differs_is_named(made: tuple[nn.Module, Path]) -> None:
    model, path = made
    with pytest.raises(RecipeError, match=r"belongs to another model .*Linear has no \['0.weight', .*it has \['bias'"):
        apply_recipe(nn.Linear(4, 2), path)
    wider = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2))
    with pytest.raises(RecipeError, match=r"shape of '0.weight' is \[9, 4\], the recipe was made for \[8, 4\]"):
        apply_recipe(wider, path)
    with pytest.raises(RecipeError, match=r"dtype of '0.weight' is float64, the recipe was made for float32"):
        apply_recipe(copy.deepcopy(model).double(), path)
    with torch.no_grad():
        model[2].bias[0] += 1e-6
    with pytest.raises(RecipeError, match=r"1 of 4 weights have other values .*: \['2.bias'\]. Load the checkpoint"):
        apply_recipe(model, path)


def test_changed_code_is_refused_at_the_first_call(made: tuple[nn.Module, Path]) -> None:
    model, path = made
    changed = apply_recipe(nn.Sequential(model[0], nn.Identity(), model[2]), path)
    with pytest.raises(RecipeError, match=r"runs other operations than the recipe was made of: it has no \['1'\]"):
        changed(torch.randn(2, 4))


def test_recipes_of_other_versions_and_damaged_ones_are_refused(made: tuple[nn.Module, Path]) -> None:
    model, path = made
    settings_file = path / "recipe.json"
    content = json.loads(settings_file.read_text())
    settings_file.write_text(json.dumps({**content, "schema_version": 2}))
    with pytest.raises(RecipeError, match=r"has the schema version 2, this version .* reads 1"):
        apply_recipe(model, path)
    settings_file.write_text(json.dumps(content)[:-5])
    with pytest.raises(RecipeError, match="is damaged: JSONDecodeError"):
        apply_recipe(model, path)
    settings_file.write_text(json.dumps(content))
    (path / "tensors.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(RecipeError, match=r"is damaged: .*tensors.safetensors is not the file that recipe.json was"):
        apply_recipe(model, path)
    settings_file.write_text(json.dumps({**content, "tensors": hashlib.sha256(b"\x00" * 20).hexdigest()}))
    with pytest.raises(RecipeError, match="is damaged: SafetensorError"):
        apply_recipe(model, path)
    (path / "tensors.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"Can not read the recipe .*tensors.safetensors"):
        apply_recipe(model, path)
    settings_file.unlink()
    with pytest.raises(RecipeError, match=r"Can not read the recipe .*Give the directory `recipe`"):
        apply_recipe(model, path)


class Own:
    """A quantizer of the user's."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec

    def __call__(self, x: Tensor, encoding: Any) -> Tensor:
        return x


def test_a_recipe_brings_no_code_along(tmp_path: Path) -> None:
    model, batch = nn.Linear(4, 2), torch.randn(8, 4)
    own = f"{__name__}.Own"
    with instrument(model, batch, {"preset": "int8", "quantizer": own}) as session:
        session.calibrate([batch])
        session.set_mode("quantize")
        save_recipe(session, batch, tmp_path / "recipe")
    with pytest.raises(RecipeError, match=rf"made with the quantizer class '{own}', `quantizer` is None: pass"):
        apply_recipe(model, tmp_path / "recipe")
    with torch.no_grad():
        assert torch.equal(apply_recipe(model, tmp_path / "recipe", quantizer=own)(batch), model(batch))


def test_a_full_disk_leaves_the_older_recipe_whole(
    made: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = made
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    recipe = Recipe.load(path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in ("tempfile.mkdtemp", "save_file", "Path.write_text", "_put_in_place"):
        with monkeypatch.context() as patch:
            patch.setattr(f"lightning_quantdebug.recipe.{name}", full)
            with pytest.raises(RecipeError, match=r"Can not write the recipe to .*No space left"):
                recipe.save(path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [file.name for file in path.parent.iterdir()] == ["recipe"]
    recipe.save(path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [file.name for file in path.parent.iterdir()] == ["recipe"]


def test_the_example_is_like_what_the_network_takes(tmp_path: Path) -> None:
    with quantized("bert") as (session, batch):
        save_recipe(session, batch, tmp_path / "recipe")
    call = Recipe.load(tmp_path / "recipe").example_call()
    assert set(call.kwargs) == {"input_ids", "attention_mask"}
    for name, tensor in call.kwargs.items():
        assert (tensor.shape, tensor.dtype) == (batch[name].shape, batch[name].dtype)
        assert batch[name].min() <= tensor.min() <= tensor.max() <= batch[name].max()


# What is rebuilt.


def test_every_weight_that_the_output_depends_on_is_checked(tmp_path: Path) -> None:
    for name in zoo.ZOO:
        with quantized(name) as (session, batch):
            save_recipe(session, batch, tmp_path / name)
        model = zoo.make(name)[0]
        recipe = Recipe.load(tmp_path / name)
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():
                continue
            kept, before = tensor.detach().clone(), _outputs(model, batch)
            with torch.no_grad():
                tensor.mul_(1.25)
            if _equal(_outputs(model, batch), before):
                recipe.check(model)
            else:
                with pytest.raises(RecipeError, match=rf"1 of \d+ weights .*\['{key}'\]|2 of \d+ weights"):
                    recipe.check(model)
            with torch.no_grad():
                tensor.copy_(kept)
        recipe.check(model)


@pytest.mark.parametrize("name", ["bert", "vision_transformer", "lstm", "weight_norm"])
def test_other_data_and_another_batch_size(name: str, tmp_path: Path) -> None:
    with quantized(name, "w4a8") as (session, batch):
        torch.manual_seed(5)
        more = [zoo.ZOO[name].batch() for _ in range(2)]
        if name != "bert":
            more.append(torch.cat(more))
        accepted = [simulated(session, other) for other in more]
        save_recipe(session, batch, tmp_path / "recipe")
    rebuilt = apply_recipe(zoo.make(name)[0], tmp_path / "recipe")
    for other, expected in zip(more, accepted, strict=True):
        assert _equal(_outputs(rebuilt, other), expected)


def test_results_have_the_structure_that_the_network_gives_them(tmp_path: Path) -> None:
    with quantized("bert") as (session, batch):
        save_recipe(session, batch, tmp_path / "recipe")
    with torch.no_grad():
        output = apply_recipe(zoo.make("bert")[0], tmp_path / "recipe")(**batch)
    assert isinstance(output, zoo.BertOutput)
    assert output.pooled is None
    assert isinstance(output.hidden, tuple)


def _passes(model: nn.Module) -> Callable[[Any], Any]:
    """Runs the network past the session, as ``instrument`` records it."""
    return lambda batch: functools.partial(call_with, model.__dict__["forward"].original, batch)


_SMALL = torch.linspace(0.01, 0.1, 16).reshape(2, 8)
_PATHS = {"a": _SMALL, "b": -_SMALL, "a_twice": _SMALL * 40, "b_twice": -_SMALL * 40}


def _saved_with_paths(paths: tuple[str, ...], example: str, directory: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The branching network with a recipe of several paths, and what it gave for each."""
    model, _ = zoo.make("branching")
    with instrument(model, _PATHS[paths[0]]) as session:
        for path in paths[1:]:
            session.record(_passes(model)(_PATHS[path]), _PATHS[path])
        session.place()
        session.calibrate([_PATHS[path] for path in paths])
        session.set_mode("quantize")
        save_recipe(session, _PATHS[example], directory)
        return model, {name: simulated(session, batch) for name, batch in _PATHS.items()}


@pytest.mark.parametrize("paths", [("a", "b"), ("b", "a_twice"), ("a", "a_twice", "b"), ("b_twice", "a", "b")])
def test_paths_may_be_taken_in_any_order(paths: tuple[str, ...], tmp_path: Path) -> None:
    for example in paths:
        model, accepted = _saved_with_paths(paths, example, tmp_path / example)
        for order in itertools.permutations(paths):
            rebuilt = apply_recipe(model, tmp_path / example)
            for path in (*order, order[0]):
                assert _equal(_outputs(rebuilt, _PATHS[path]), accepted[path]), (example, order, path)


def test_paths_have_their_quantizers_in_another_process_too(tmp_path: Path) -> None:
    _, accepted = _saved_with_paths(("a", "a_twice", "b"), "a_twice", tmp_path / "recipe")
    torch.save(accepted, tmp_path / "accepted.pt")
    source = f"""
import torch
from lightning_quantdebug import apply_recipe
from tests import zoo
from tests.test_recipe import _PATHS
rebuilt = apply_recipe(zoo.make("branching")[0], {str(tmp_path / "recipe")!r})
accepted = torch.load({str(tmp_path / "accepted.pt")!r})
for path in ("b", "a_twice", "a", "b_twice"):
    assert torch.equal(rebuilt(_PATHS[path]), accepted[path][0]), path
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_path_that_was_never_calibrated_is_refused_first_and_runs_in_fp32_later(tmp_path: Path) -> None:
    model, accepted = _saved_with_paths(("a",), "a", tmp_path / "recipe")
    rebuilt = apply_recipe(model, tmp_path / "recipe")
    with pytest.raises(RecipeError, match=r"no \['a.weight', 'relu'.*or these data take a path that was never calibr"):
        rebuilt(_PATHS["b"])
    assert _equal(_outputs(rebuilt, _PATHS["a"]), accepted["a"])
    with pytest.raises(RecipeError, match="path that was never calibrated"):
        apply_recipe(model, tmp_path / "recipe")(_PATHS["b"])


def test_weights_of_all_paths_are_checked(tmp_path: Path) -> None:
    model, _ = _saved_with_paths(("a", "b"), "a", tmp_path / "recipe")
    with torch.no_grad():
        model.b.bias[0] += 1.0
    with pytest.raises(RecipeError, match=r"1 of 8 weights have other values .*\['b.bias'\]"):
        apply_recipe(model, tmp_path / "recipe")


class _Joins(nn.Module):
    """A branch with a concatenation, whose inputs and output share one quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.head(torch.cat([a, self.b(x)]) if x.sum() > 0 else a)


def test_quantizers_that_depend_on_paths_not_taken_are_told_and_never_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = _Joins(), torch.rand(3, 4)
    with instrument(model, -x) as session:
        session.record(_passes(model)(x), x)
        session.place()
        session.calibrate([x, -x])
        session.set_mode("quantize")
        accepted = [simulated(session, batch) for batch in (x, -x)]
        save_recipe(session, x, tmp_path / "recipe")
        with pytest.raises(RecipeError, match=r"operation 'a' are \['a.weight', 'input'\], the recipe has"):
            save_recipe(session, -x, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    rebuilt = apply_recipe(model, tmp_path / "recipe")
    with pytest.raises(RecipeError, match=r"it has no \['cat'\]|the network takes several paths"):
        rebuilt(-x)
    for batch, expected in zip((x, -x), accepted, strict=True):
        assert _equal(_outputs(rebuilt, batch), expected)


class _Two(nn.Module):
    """Two inputs of very different ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor, flag: Tensor | None = None) -> Tensor:
        out = self.a(x) * torch.sigmoid(self.b(y))
        return out if flag is None else out * flag


class _Ways(_Joins):
    """The same with a branch that reaches neither of the two."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) if x.sum() < -100 else super().forward(x)


def test_a_quantizer_that_sits_elsewhere_is_told_at_the_call(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = _Ways(), torch.rand(3, 4)
    model.head = nn.Linear(4, 2)
    batches = (x, -x, -1000 * x)
    with instrument(model, x) as session:
        for batch in batches[1:]:
            session.record(_passes(model)(batch), batch)
        session.place()
        session.calibrate(batches)
        session.set_mode("quantize")
        accepted = [simulated(session, batch) for batch in batches]
        with pytest.raises(RecipeError, match=r"operation 'head' are \['head', 'head.weight'\], .*'input'\] there"):
            save_recipe(session, x, tmp_path / "recipe")
        save_recipe(session, batches[2], tmp_path / "recipe")
    rebuilt = apply_recipe(model, tmp_path / "recipe")
    for index in (2, 0, 1, 2):
        assert _equal(_outputs(rebuilt, batches[index]), accepted[index])
    rebuilt = apply_recipe(model, tmp_path / "recipe")
    for _ in range(2):
        assert _equal(_outputs(rebuilt, batches[2]), accepted[2])
        with pytest.raises(
            RecipeError, match=r"operation 'a' are \['a.weight', 'input'\], the recipe has .*'cat', 'inp"
        ):
            rebuilt(batches[1])


class _Outside(nn.Module):
    """What the step does ahead of it has a quantizer of the name that an operation inside could have."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.lin(x)
        return out + out.flip(0) if x[0, 0] < 0 else out


def test_what_was_never_seen_runs_in_fp32_whatever_its_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = _Outside().eval(), torch.randn(8, 4)
    x[0] = x[-1] = 0.5

    def step(batch: Tensor) -> Any:
        return lambda: model(batch + batch.flip(0))

    session = Instrumentation(model, QuantTarget.from_value("int8"))
    session.record(step(x), x, step=True)
    # A step that never calls the network says nothing of what its calls reach.
    session.record(lambda: None, None, step=True)
    session.place()
    with session.observing(), torch.no_grad():
        session.run(step(x), step=True)
    assert "add" in session.quantizers
    network = Network(model, "", ("add",))
    Recipe.of(session, network, NetworkCall((x + x.flip(0),), {})).save(tmp_path / "recipe")
    rebuilt = apply_recipe(model, tmp_path / "recipe")
    with torch.no_grad(), session.modes("quantize"):
        for sign in (1, -1):
            expected = session.run(step(sign * x), step=True)
            on_grid = session.quantizers["input"](sign * x)
            assert torch.equal(rebuilt(on_grid + on_grid.flip(0)), expected), sign
    assert session.unseen == {"add": 1}


class _Counts(nn.Module):
    """Counts its calls in a buffer and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.drawn = torch.rand(1)
        return self.lin(x)


def test_looking_at_a_model_counts_for_nothing(tmp_path: Path) -> None:
    model, x = _Counts(), torch.randn(3, 4)
    with instrument(model, x) as session:
        session.calibrate([x])
        save_recipe(session, x, tmp_path / "recipe")
    assert model.calls.item() == 0
    torch.manual_seed(7)
    first = torch.rand(1)
    torch.manual_seed(7)
    apply_recipe(model, tmp_path / "recipe")(x)
    assert model.calls.item() == 1
    assert torch.equal(model.drawn, first)


def test_arguments_have_their_quantizers_however_they_are_passed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, y = _Two(), torch.randn(8, 4), torch.randn(8, 4) * 100
    with instrument(model, {"x": x, "y": y}) as session:
        session.calibrate([{"x": x, "y": y}])
        session.set_mode("quantize")
        (accepted,) = simulated(session, {"x": x, "y": y})
        save_recipe(session, {"y": y, "x": x}, tmp_path / "recipe")
    for args, kwargs in (((), {"x": x, "y": y}), ((), {"y": y, "x": x}), ((x, y), {}), ((x,), {"y": y})):
        with torch.no_grad():
            assert torch.equal(apply_recipe(model, tmp_path / "recipe")(*args, **kwargs), accepted)
    with torch.no_grad():
        assert torch.equal(apply_recipe(model, tmp_path / "recipe")(x, y, torch.ones(4)), accepted)


def test_arguments_with_other_names_go_by_their_order(made: tuple[nn.Module, Path]) -> None:
    model, path = made

    class Other(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    batch = torch.randn(5, 4)
    expected = _outputs(apply_recipe(model, path), batch)
    assert _equal(_outputs(apply_recipe(Other(*model), path), batch), expected)
    assert _equal(_outputs(apply_recipe(torch.compile(model), path), batch), expected)  # type: ignore[arg-type]


def test_a_part_that_was_quantized_and_patterns_that_were_excluded(tmp_path: Path) -> None:
    class Whole(_Holder):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.net(x))

    torch.manual_seed(0)
    model, batch = Whole(), torch.randn(16, 4)
    with instrument(model, batch, module="net", exclude=["net.0.*"]) as session:
        session.calibrate([batch])
        session.set_mode("quantize")
        accepted = simulated(session, batch)
        save_recipe(session, batch, tmp_path / "recipe")
    rebuilt = apply_recipe(model, tmp_path / "recipe")
    assert _equal(_outputs(rebuilt, batch), accepted)
    quantizers = rebuilt.session(NetworkCall((batch,), {})).quantizers
    assert set(quantizers) == set(session.quantizers) == {"input", "net.1", "net.2.weight", "net.2"}


class _Plain(LightningModule):
    """A LightningModule whose step calls its network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


class _NoWeights(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x) * 2


@pytest.mark.parametrize("net", [lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), _NoWeights])
def test_a_recipe_of_a_lightning_module_fits_its_network_alone(net: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, batch = _Plain(net()), torch.randn(16, 4)
    session = Instrumentation(module, QuantTarget.from_value("int8"))
    session.record(lambda: module.net(batch), batch, step=True)
    session.place()
    with session.observing(), torch.no_grad():
        session.run(lambda: module.net(batch), step=True)
    with session.modes("quantize"), torch.no_grad():
        accepted = session.run(lambda: module.net(batch), step=True)
    network = Network(module, "net", ("input",))
    Recipe.of(session, network, NetworkCall((batch,), {}), origin_of(module)).save(tmp_path / "recipe")
    for model in (module, module.net):
        model.train()
        rebuilt = apply_recipe(model, tmp_path / "recipe")
        assert torch.equal(_outputs(rebuilt, batch)[0], accepted)
        assert rebuilt.model is model
        assert module.net.training
        assert list(dict(module.named_modules())) == list(dict(_Plain(net()).named_modules()))


@pytest.mark.parametrize("grad", ["none", "enabled", "inference"])
def test_gradients_are_as_the_caller_wants_them(made: tuple[nn.Module, Path], grad: str) -> None:
    model, path = made
    rebuilt, batch = apply_recipe(model, path), torch.randn(3, 4)
    context = {"none": torch.no_grad, "enabled": torch.enable_grad, "inference": torch.inference_mode}[grad]
    with context():
        first = rebuilt(batch)
    assert first.requires_grad is (grad == "enabled")
    assert torch.equal(rebuilt(batch), first)
    if grad == "enabled":
        first.sum().backward()
        assert model[0].weight.grad is not None


class _Asks(nn.Module):
    """Asks torch something that no recording notes."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        assert x.get_device() < 0
        return self.lin(x)


def test_what_can_not_be_recorded_is_not_recorded_again_and_again(tmp_path: Path) -> None:
    model, batch = _Asks(), torch.randn(2, 4)
    with instrument(model, batch) as session:
        session.calibrate([batch])
        save_recipe(session, batch, tmp_path / "recipe")
    rebuilt = apply_recipe(model, tmp_path / "recipe")
    rebuilt(batch)
    assert rebuilt.session(NetworkCall((batch,), {})).unseen == {"get_device": 1}
    rebuilt(batch)
    model.calls = 0
    rebuilt(batch)
    rebuilt(batch)
    assert model.calls == 2


# The model is not changed.


class _Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(16, 2))
        self.fails = False
        self.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.net(x)
        if self.fails:
            raise KeyError("on purpose")
        return x


def _everything(model: nn.Module) -> list[Any]:
    return [
        weights(model),
        list(model.state_dict()),
        [(name, part.training, sorted(vars(part))) for name, part in model.named_modules()],
        [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()],
        len(nn.modules.module._global_forward_hooks),
        torch._C._len_torch_function_stack(),
        torch.get_rng_state().tolist(),
    ]


@pytest.mark.parametrize("fails", ["never", "first", "later"])
def test_nothing_of_the_model_is_changed(fails: str, tmp_path: Path) -> None:
    model, batch = _Raises().eval(), torch.randn(2, 3, 2, 2)
    with instrument(model, batch) as session:
        session.calibrate([batch])
        save_recipe(session, batch, tmp_path / "recipe")
    model.train()
    model.net[1].eval()
    before = _everything(model)
    rebuilt = apply_recipe(model, tmp_path / "recipe")
    assert _everything(model) == before
    if fails != "first":
        rebuilt(batch)
        assert _everything(model) == before
    if fails != "never":
        model.fails = True
        with pytest.raises(KeyError, match="on purpose"):
            rebuilt(batch)
        model.fails = False
        assert _everything(model) == before
    one, other = rebuilt(batch), QuantizedModel(model, Recipe.load(tmp_path / "recipe"))(batch)
    assert torch.equal(one, other)
    assert _everything(model) == before


def test_copies_have_a_model_and_a_session_of_their_own(made: tuple[nn.Module, Path]) -> None:
    model, path = made
    rebuilt, batch = apply_recipe(model, path), torch.randn(3, 4)
    expected = _outputs(rebuilt, batch)
    for copied in (copy.deepcopy(rebuilt), pickle.loads(pickle.dumps(rebuilt))):
        with torch.no_grad():
            copied.model[0].weight.zero_()
        assert not _equal(_outputs(copied, batch), expected)
        assert _equal(_outputs(rebuilt, batch), expected)
        with pytest.raises(RecipeError, match=r"1 of 4 weights have other values"):
            copy.deepcopy(copied)


# The files.


@pytest.fixture
def session() -> Iterator[Instrumentation]:
    model, batch = nn.Sequential(nn.Linear(4, 2)), torch.randn(4, 4)
    with instrument(model, batch) as found:
        found.calibrate([batch])
        yield found


def _listing(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_nothing_but_a_recipe_is_ever_written_over(session: Instrumentation, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("precious")
    (tmp_path / "recipe.json").write_text("{}")
    before = _listing(tmp_path)
    with pytest.raises(
        RecipeError, match=r"holds other files than a recipe \(\['notes.txt'\]\), which writing it would"
    ):
        save_recipe(session, torch.randn(4, 4), tmp_path)
    with pytest.raises(RecipeError, match=r"Can not write the recipe to .*notes.txt"):
        save_recipe(session, torch.randn(4, 4), tmp_path / "notes.txt")
    with pytest.raises(RecipeError, match=r"Can not write the recipe to .*notes.txt"):
        save_recipe(session, torch.randn(4, 4), tmp_path / "notes.txt" / "recipe")
    assert _listing(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == 2


def test_an_older_recipe_is_replaced_as_a_whole(
    session: Instrumentation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe").mkdir()
    assert save_recipe(session, torch.ones(4, 4), tmp_path / "recipe") == tmp_path / "recipe"
    before = _listing(tmp_path)
    for quantizer in session.quantizers.values():
        quantizer.encoding = None if quantizer.name == "input" else quantizer.encoding
    (tmp_path / "link").symlink_to(tmp_path / "recipe")
    save_recipe(session, torch.ones(4, 4), tmp_path / "link")
    after = _listing(tmp_path)
    assert after.keys() == before.keys() == {"recipe/recipe.json", "recipe/tensors.safetensors"}
    assert all(after[name] != before[name] for name in before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "recipe"]
    assert (tmp_path / "link").is_symlink()
    monkeypatch.chdir(tmp_path)
    save_recipe(session, torch.ones(4, 4), "recipe")
    assert _listing(tmp_path) == after
    assert (tmp_path / "recipe").stat().st_mode & 0o777 == 0o755


def test_an_older_recipe_comes_back_if_the_new_one_can_not_take_its_place(
    session: Instrumentation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_recipe(session, torch.randn(4, 4), tmp_path / "recipe")
    before = _listing(tmp_path)
    plain, moves = Path.replace, []

    def second_fails(self: Path, target: Path) -> Path:
        moves.append(target)
        if len(moves) == 2:
            raise OSError(5, "Input/output error")
        return plain(self, target)

    monkeypatch.setattr(Path, "replace", second_fails)
    with pytest.raises(RecipeError, match="Input/output error"):
        save_recipe(session, torch.randn(4, 4), tmp_path / "recipe")
    assert len(moves) == 3
    assert _listing(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["recipe"]


def test_files_hold_plain_values_and_tensors_alone(made: tuple[nn.Module, Path]) -> None:
    _, path = made
    content = json.loads((path / "recipe.json").read_text(encoding="utf-8"))
    tensors = load_file(path / "tensors.safetensors")
    assert content["schema_version"] == 1
    assert set(content["quantizers"]) == {key.partition("/")[2] for key in tensors}
    assert {key.partition("/")[0] for key in tensors} == {"scale", "zero_point"}
    assert content["origin"]["torch"] == str(torch.__version__)
    assert content["origin"]["model"] == "torch.nn.modules.container.Sequential"
    assert {*content["model"]} == {"0.weight", "0.bias", "2.weight", "2.bias"}


def _rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Path:
    """A recipe whose content was changed, with the right hash."""
    other = path.parent / "rewritten"
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(path, other)
    content = json.loads((path / "recipe.json").read_text())
    tensors = load_file(path / "tensors.safetensors")
    change(content, tensors)
    save_file(tensors, other / "tensors.safetensors")
    content["tensors"] = hashlib.sha256((other / "tensors.safetensors").read_bytes()).hexdigest()
    (other / "recipe.json").write_text(json.dumps(content))
    return other


_DAMAGES: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "no scale": (lambda c, t: t.pop("scale/0.weight"), "'0.weight' has no scale and zero point"),
    "no zero point": (lambda c, t: t.pop("zero_point/1"), "'1' has no scale and zero point"),
    "not calibrated": (lambda c, t: c["quantizers"]["1"].update(calibrated=False), "has no scale and zero point"),
    "negative scale": (lambda c, t: t.update({"scale/1": -t["scale/1"]}), "`scale` must be positive"),
    "axis": (lambda c, t: c["quantizers"]["1"].update(channel_axis=0), "`channel_axis` must be None"),
    "frozen": (lambda c, t: c["quantizers"]["1"].update(frozen=1), "yes or no is expected for '1', not 1"),
    "symmetric": (lambda c, t: c["quantizers"]["1"]["spec"].update(symmetric=0), "yes or no are expected in Quant"),
    "narrow": (lambda c, t: c["target"]["weights"].update(narrow_range=0), "yes or no are expected in QuantSpec"),
    "name": (lambda c, t: c["target"].update(name=3), "a string is expected, not 3"),
    "class": (lambda c, t: c["target"].update(quantizer=["a.B"]), "a string is expected"),
    "part": (lambda c, t: c["adjustments"].update({"0": ["weight"]}), r"\['weight'\] are not known"),
    "no part": (lambda c, t: c["adjustments"].update({"0": ["bias_scale"]}), "KeyError: 'bias_scale/0'"),
    "version": (lambda c, t: c.update(schema_version=True), "has the schema version True"),
    "list": (lambda c, t: c.update(exclude="all"), "a list is expected"),
    "arguments": (lambda c, t: c["network"].update(arguments=["input", "other"]), "damaged: ValueError: zip"),
    "text": (lambda c, t: c["network"].update(path=3), "a string is expected"),
}


@pytest.mark.parametrize("name", _DAMAGES)
def test_what_is_missing_or_no_grid_is_refused(made: tuple[nn.Module, Path], name: str) -> None:
    _, path = made
    change, message = _DAMAGES[name]
    with pytest.raises(RecipeError, match=message):
        Recipe.load(_rewritten(path, change))


def test_every_top_level_key_is_checked(made: tuple[nn.Module, Path]) -> None:
    _, path = made
    for key in json.loads((path / "recipe.json").read_text()):
        for value in (None, 5, "text", [1], {"a": 1}):
            other = _rewritten(path, lambda c, t, key=key, value=value: c.update({key: value}))
            content = json.loads((other / "recipe.json").read_text())
            if key == "tensors":
                (other / "recipe.json").write_text(json.dumps({**content, key: value}))
            if (key, value) in (("module", "text"), ("origin", {"a": 1})):
                Recipe.load(other)
                continue
            with pytest.raises(RecipeError, match=r"is damaged|schema version"):
                Recipe.load(other)
        other = _rewritten(path, lambda c, t, key=key: c.pop(key))
        if key != "tensors":
            with pytest.raises(RecipeError, match=rf"damaged: KeyError: '{key}'|schema version None"):
                Recipe.load(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c["network"].update(path="nowhere"), "can not be put on the model: .* no module 'nowhere'"),
        (lambda c, t: c.update(module="nowhere"), "can not be put on the model: `module` must name a sub-module"),
        (lambda c, t: c["target"].update(quantizer="nowhere.Own"), "can not be put on the model: .*'nowhere.Own'"),
        (lambda c, t: c.update(exclude=["*"]), "it has no|can not be put on the model"),
    ],
)
def test_what_the_model_does_not_have_is_an_error_of_the_recipe(
    made: tuple[nn.Module, Path], change: Any, message: str
) -> None:
    model, path = made
    other = _rewritten(path, change)
    quantizer = json.loads((other / "recipe.json").read_text())["target"]["quantizer"]
    with pytest.raises(RecipeError, match=message):
        apply_recipe(model, other, quantizer=quantizer)(torch.randn(2, 4))


def test_a_quantizer_too_many_is_told(made: tuple[nn.Module, Path]) -> None:
    model, path = made
    other = _rewritten(path, lambda c, t: c["wiring"]["operations"]["1"].update(quantizers=[]))
    with pytest.raises(
        RecipeError, match=r"The quantizers of the operation '1' are \['1'\], the recipe has \[\] there"
    ):
        apply_recipe(model, other)(torch.randn(2, 4))


def test_models_that_run_nothing_or_something_else_are_refused(made: tuple[nn.Module, Path]) -> None:
    model, path = made

    class Nothing(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return input

    class Else(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return torch.tanh(F.linear(input, self[0].weight, self[0].bias))

    with pytest.raises(RecipeError, match=r"can not be put on the model: Nothing in Nothing can be quantized"):
        apply_recipe(Nothing(*model), path)(torch.randn(2, 4))
    with pytest.raises(RecipeError, match=r"runs other operations .* it has no \['1', .*Either its code has changed"):
        apply_recipe(Else(*model), path)(torch.randn(2, 4))


def test_weights_without_values_are_refused(made: tuple[nn.Module, Path]) -> None:
    _, path = made
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    for model in (empty, nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(2))):
        with pytest.raises(RecipeError, match=r"weights of Sequential have no values yet .*: load them before"):
            apply_recipe(model, path)


def test_a_session_without_ranges_or_a_network_without_quantizers_has_no_recipe(tmp_path: Path) -> None:
    model, batch = nn.Sequential(nn.Linear(4, 2), nn.Flatten()), torch.randn(4, 4)
    with instrument(model, batch) as session:
        with pytest.raises(RecipeError, match="No quantizer has a range yet"):
            save_recipe(session, batch, tmp_path / "recipe")
        session.calibrate([batch])
        with pytest.raises(RecipeError, match="No recipe can be made: Nothing in Sequential can be quantized"):
            Recipe.of(session, Network(model, "1", ("",)), NetworkCall((batch,), {}))
    assert not list(tmp_path.iterdir())


def _example(*args: Any, **kwargs: Any) -> NetworkCall:
    """What is made of the description of a call."""
    from lightning_quantdebug.recipe import _example_of

    described = json.loads(json.dumps(_example_of(NetworkCall(args, kwargs))))
    fields: dict[str, Any] = dict.fromkeys(("target", "scope", "exclude", "path", "inputs", "state", "reached"))
    return Recipe(**fields, wiring=None, tensors={}, example=described, origin={}).example_call()  # type: ignore[arg-type]


def test_an_example_has_structure_dtypes_and_ranges() -> None:
    whole = {
        "image": torch.rand(2, 3) + 4,
        "half": torch.randn(3).half(),
        "exact": torch.tensor([-1e300, 1e300], dtype=torch.float64),
        "wide": torch.tensor([-3.4e38, 3.4e38]),
        "holes": torch.tensor([float("nan"), 2.0, float("-inf")]),
        "no_number": torch.tensor([float("nan")]),
        "classes": torch.tensor([3, 7]),
        "mask": torch.tensor([True, True]),
        "complex": torch.ones(2, dtype=torch.complex64),
        "empty": torch.zeros(0, 3),
        "nested": [(torch.ones(1), 3, "text", None), {"deep": 1.5}],
    }
    call = _example(torch.ones(2, 2), **whole)
    assert torch.equal(call.args[0], torch.ones(2, 2))
    assert call.kwargs.keys() == whole.keys()
    for name, tensor in whole.items():
        found = call.kwargs[name]
        if isinstance(tensor, Tensor):
            assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype), name
            if name not in ("holes", "no_number", "complex", "empty"):
                assert tensor.min() <= found.min() <= found.max() <= tensor.max(), name
    assert call.kwargs["holes"].tolist() == [2.0] * 3
    assert call.kwargs["no_number"].tolist() == [0.0]
    assert call.kwargs["nested"][0][1:] == (3, "text", None)
    assert call.kwargs["nested"][1] == {"deep": 1.5}
    assert len(set(_example(torch.randn(99)).args[0].tolist())) > 90
    alike = torch.full((1000,), 1.7, dtype=torch.float64)
    assert torch.equal(_example(alike).args[0], alike)


@pytest.mark.parametrize("value", [{1, 2}, object(), torch.float32, zoo.BertOutput(torch.ones(1), ())])
def test_what_can_not_be_written_down_has_no_example(value: Any) -> None:
    with pytest.raises(RecipeError, match=r"no example of what the network takes .*: give an example batch"):
        _example(torch.ones(2), value)


@settings(max_examples=30, deadline=None)
@given(low=st.floats(width=32, allow_nan=False), high=st.floats(width=32, allow_nan=False))
def test_examples_stay_in_their_range(low: float, high: float) -> None:
    given_tensor = torch.tensor([low, high])
    (found,) = _example(given_tensor).args
    finite = given_tensor[given_tensor.isfinite()]
    if len(finite):
        assert finite.min() <= found.min() <= found.max() <= finite.max()


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from _places(item, (*path, key))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, dict[str, Any]]:
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(4, 2), nn.ReLU()), torch.randn(4, 4)
    with instrument(model, batch) as session:
        session.calibrate([batch])
        equalize(session, batch_runs(session, [batch]))
        path = save_recipe(session, batch, tmp_path_factory.mktemp("fuzz") / "recipe")
    return model, path, json.loads((path / "recipe.json").read_text())


@settings(max_examples=50, deadline=None)
@given(data=st.data(), value=_VALUES)
def test_any_json_is_a_recipe_or_refused(plain: tuple[nn.Module, Path, dict[str, Any]], data: Any, value: Any) -> None:
    model, path, whole = plain
    content = copy.deepcopy(whole)
    place = data.draw(st.sampled_from(sorted(_places(content), key=str)))
    owner: Any = content
    for key in place[:-1]:
        owner = owner[key]
    owner[place[-1]] = value
    (path / "recipe.json").write_text(json.dumps(content))
    for use in (Recipe.check, lambda recipe, _: recipe.example_call(), lambda recipe, _: QuantizedModel(model, recipe)):
        with contextlib.suppress(RecipeError):
            use(Recipe.load(path), model)
