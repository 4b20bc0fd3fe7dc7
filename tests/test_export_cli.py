"""``python -m lightning_quantdebug export``: what it reads, what it writes, and how it refuses."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch

from lightning_quantdebug.cli import main
from lightning_quantdebug.errors import SettingsError
from lightning_quantdebug.made_model import made_model

torch.set_num_threads(1)

_MODULE = """
import torch
from torch import nn
from lightning_quantdebug import instrument, save_recipe

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

def untrained():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(*make())

def wants(x, *, y):
    return make()

def fails():
    raise RuntimeError("no GPU here")

def wrong():
    return 1 + "1"

def silent():
    raise KeyError

def nothing():
    return None

made = make()

def write(folder):
    model, batch = make(), torch.randn(16, 4)
    torch.save(model.state_dict(), f"{folder}/plain.pt")
    torch.save({"epoch": 3, "state_dict": model.state_dict(), "loops": {}}, f"{folder}/last.ckpt")
    torch.save({"state_dict": [1]}, f"{folder}/list.ckpt")
    torch.save([1], f"{folder}/no_dict.ckpt")
    torch.save({"state_dict": nn.Linear(4, 2).state_dict()}, f"{folder}/other.ckpt")
    with instrument(model, batch) as q:
        q.calibrate([batch])
        save_recipe(q, batch, f"{folder}/run/recipe")
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, checkpoints and modules that make models."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "models_to_export.py").write_text(_MODULE)
    (folder / "broken_model.py").write_text("import torch\nraise ValueError('half done')\n")
    (folder / "unfinished_model.py").write_text("def make(:\n")
    (folder / "empty.ckpt").write_bytes(b"")
    spec = importlib.util.spec_from_file_location("models_to_export", folder / "models_to_export.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write(str(folder))
    return folder


@pytest.fixture(autouse=True)
def inside(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory is the folder, as `python -m` finds modules there."""
    monkeypatch.chdir(written)
    monkeypatch.syspath_prepend(str(written))
    importlib.invalidate_caches()


def export(*more: object, model: str = "models_to_export:make") -> int:
    return main(["export", "run", "--model", model, *map(str, more)])


@pytest.mark.parametrize("model", ["models_to_export:make", "models_to_export:Net", "models_to_export:made"])
def test_onnx_is_written_beside_the_recipe(model: str, written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(model=model) == 0
    assert [path.name for path in (written / "run" / "export").iterdir()] == ["model.onnx"]
    assert capsys.readouterr().out.startswith("onnx: verified model.onnx")


@pytest.mark.parametrize("checkpoint", ["last.ckpt", "plain.pt"])
def test_weights_come_from_a_checkpoint(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export("--output", tmp_path, model="models_to_export:untrained") == 2
    assert "4 of 4 weights have other values than the recipe was made for" in capsys.readouterr().err
    more = ["--checkpoint", checkpoint, "--output", tmp_path / "deep" / "out", "--format", "onnx", "pt2", "encodings"]
    assert export(*more, model="models_to_export:untrained") == 0
    names = ["model.encodings", "model.onnx", "model.pt2", "model_2.0.0.encodings", "model_float.onnx"]
    assert sorted(path.name for path in (tmp_path / "deep" / "out").iterdir()) == names
    told = [line.split(": ")[0] for line in capsys.readouterr().out.splitlines() if ": verified " in line]
    assert told == ["onnx", "pt2", "encodings"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("models_to_export", "`--model` must be like 'package.module:name', got 'models_to_export'"),
        ("models_to_export:", "must be like 'package.module:name'"),
        (":make", "must be like 'package.module:name'"),
        ("nowhere.at_all:make", "can not be imported: ModuleNotFoundError: No module named 'nowhere'"),
        (".relative:make", "can not be imported: TypeError"),
        ("models_to_export:absent", "can not be imported: AttributeError"),
        ("broken_model:make", "can not be imported: ValueError: half done."),
        ("unfinished_model:make", "can not be imported: SyntaxError"),
        ("models_to_export:wants", "must make the model without arguments: wants() missing"),
        ("models_to_export:fails", "can not make the model: RuntimeError: no GPU here."),
        ("models_to_export:wrong", "can not make the model: TypeError: unsupported operand"),
        ("models_to_export:silent", "can not make the model: KeyError."),
        ("models_to_export:nothing", "must make a torch module, got NoneType"),
        ("models_to_export:write", "must make the model without arguments"),
        ("torch.nn:Identity", "The recipe belongs to another model"),
    ],
)
def test_models_that_can_not_be_made_are_told(
    model: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export("--output", tmp_path, model=model) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("quantdebug: ")
    assert message in captured.err
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["missing.ckpt", "run", "empty.ckpt", "models_to_export.py", "list.ckpt", "no_dict.ckpt", "other.ckpt"]
)
def test_checkpoints_that_can_not_be_loaded_are_told(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert export("--checkpoint", name) == 2
    assert f"The checkpoint '{name}' can not be loaded: " in capsys.readouterr().err


def test_no_recipe_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path), "--model", "models_to_export:make"]) == 2
    assert f"Can not read the recipe '{tmp_path}/recipe': " in capsys.readouterr().err


def test_a_place_that_can_not_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert export("--output", tmp_path / "file") == 2
    assert "quantdebug: Can not write" in capsys.readouterr().err


def test_packages_are_only_needed_for_what_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "onnxruntime" else found(name, *a))
    for wanted in ("onnx", "encodings"):
        assert export("--format", wanted, "--output", tmp_path) == 2
        assert "needs onnxruntime, which can not be imported: pip install" in capsys.readouterr().err
    assert export("--format", "pt2", "--output", tmp_path) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


def test_wrong_arguments_are_argparses_own_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["export", "run"], ["export", "run", "--model", "a:b", "--format", "tflite"], ["export"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    assert "--format: invalid choice: 'tflite'" in capsys.readouterr().err


def test_a_model_is_made_in_eval_mode_with_the_weights_of_the_file() -> None:
    model = made_model("models_to_export:untrained", "plain.pt")
    assert not any(part.training for part in model.modules())
    assert torch.equal(model[0].weight, made_model("models_to_export:make")[0].weight)  # type: ignore[index,union-attr]
    with pytest.raises(SettingsError, match=r"Missing key\(s\) in state_dict"):
        made_model("models_to_export:untrained", "other.ckpt")
