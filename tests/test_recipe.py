"""A recipe rebuilds what was accepted bit for bit, and refuses every other model."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_quantdebug import RecipeError, apply_recipe, instrument, save_recipe
from lightning_quantdebug.adaround import AdaRoundSettings, adaround
from lightning_quantdebug.bias_correction import correct_bias
from lightning_quantdebug.equalization import equalize
from lightning_quantdebug.instrument import batch_runs
from lightning_quantdebug.model_loan import call_with
from lightning_quantdebug.network import Network, NetworkCall, output_tensors
from lightning_quantdebug.recipe import Recipe, origin_of
from tests import zoo
from tests.exporting import PER_GROUP, quantized, simulated


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
    assert _equal(_outputs(apply_recipe(model, tmp_path / "recipe"), batch), accepted)
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
    from lightning_quantdebug import Instrumentation, QuantTarget

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
    with pytest.raises(RecipeError, match="is damaged: SafetensorError"):
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

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in ("save_file", "_put_in_place"):
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


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(key=st.integers(0, 9), inner=st.booleans(), value=_VALUES)
def test_any_json_is_a_recipe_or_refused(
    tmp_path_factory: pytest.TempPathFactory, key: int, inner: bool, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    model, batch = nn.Linear(4, 2), torch.randn(4, 4)
    with instrument(model, batch) as session:
        session.calibrate([batch])
        save_recipe(session, batch, folder / "recipe")
    file = folder / "recipe" / "recipe.json"
    content = json.loads(file.read_text())
    name = sorted(content)[key % len(content)]
    if inner and isinstance(content[name], dict) and content[name]:
        content[name][sorted(content[name])[key % len(content[name])]] = value
    else:
        content[name] = value
    file.write_text(json.dumps(content))
    try:
        recipe = Recipe.load(folder / "recipe")
        recipe.check(model)
        recipe.example_call()
    except RecipeError:
        pass
