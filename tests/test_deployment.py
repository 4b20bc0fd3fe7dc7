"""What a walk leaves: files that were proven, the user's score with each of them, and reasons where there is none."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from lightning_quantdebug import Report, apply_recipe
from lightning_quantdebug.cli import main
from lightning_quantdebug.export_files import Exporter
from lightning_quantdebug.network import Network, NetworkCall, argument_names, named_outputs, with_output_tensors
from lightning_quantdebug.report import Agreement, Cause
from tests.callback_runs import debugger
from tests.torture import loader, simple_class, trainer

ALL = ("onnx", "encodings", "pt2")


def _exports(report: Report | None) -> dict[str, Any]:
    assert report is not None
    return {export.name: export for export in report.final.exports}


def _walk(tmp_path: Path, module: nn.Module, **settings: Any) -> Report:
    callback = debugger(**{"tolerance": 1.0, "dirpath": str(tmp_path / "out"), **settings})
    trainer(tmp_path, callbacks=callback).fit(module, loader(), loader(31, 1))
    assert callback.report is not None
    return callback.report


@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
def test_every_format_is_proven_and_scored(tmp_path: Path, namespace: str) -> None:
    callback = debugger(tolerance=1.0, export=ALL, dirpath=str(tmp_path / "out"))
    module = simple_class(namespace)()
    trainer(tmp_path, namespace, callbacks=callback).fit(module, loader(), loader(31, 1))
    report = callback.report
    assert report is not None
    exports = _exports(report)
    assert list(exports) == ["recipe", *ALL]
    assert {export.agreement for export in exports.values()} == {Agreement.VERIFIED}
    for name in ("recipe", "onnx", "pt2"):
        assert exports[name].score == pytest.approx(report.final.score, abs=0.04)
        assert exports[name].simulated_score == report.final.score
    names = {"recipe", "model.onnx", "model.pt2", "model_float.onnx", "model.encodings", "model_2.0.0.encodings"}
    assert names <= set(report.final.files)
    assert all(Path(report.final.files[name]).exists() for name in names)
    assert Report.from_json(tmp_path / "out" / "report.json").to_dict() == report.to_dict()
    assert exports["onnx"].comparisons[0].samples == 31
    # Anywhere else, with the weights alone.
    rebuilt = apply_recipe(module.cpu(), tmp_path / "out" / "recipe")
    x = torch.cat([batch[0] for batch in loader(31, 1)])
    found = torch.export.load(str(tmp_path / "out" / "export" / "model.pt2")).module()(x)[0]
    assert torch.equal(rebuilt(x), found)


@pytest.mark.parametrize(("precision", "written"), [("bf16-mixed", True), ("bf16-true", False)])
def test_half_precision(tmp_path: Path, precision: str, written: bool) -> None:
    callback = debugger(tolerance=1.0, export=ALL, dirpath=str(tmp_path / "out"))
    trainer(tmp_path, callbacks=callback, precision=precision).fit(simple_class()(), loader(), loader(31, 1))
    exports = _exports(callback.report)
    assert exports.pop("recipe").agreement is Agreement.VERIFIED
    for export in exports.values():
        assert export.agreement is (Agreement.VERIFIED if written else Agreement.NOT_WRITTEN), export.reason
        assert written or "is torch.bfloat16, only float32 networks are exported" in export.reason


def test_the_recipe_is_always_written_and_nothing_else(tmp_path: Path) -> None:
    report = _walk(tmp_path, simple_class()())
    assert list(_exports(report)) == ["recipe"]
    assert _exports(report)["recipe"].agreement is Agreement.VERIFIED
    assert sorted(path.name for path in (tmp_path / "out" / "recipe").iterdir()) == [
        "recipe.json",
        "tensors.safetensors",
    ]
    assert not (tmp_path / "out" / "export").exists()
    origin = json.loads((tmp_path / "out" / "recipe" / "recipe.json").read_text())["origin"]
    assert origin["score"] == report.final.score


@pytest.mark.parametrize("qat_epochs", [0, 2])
def test_files_of_averaged_weights_are_scored_with_the_average(tmp_path: Path, qat_epochs: int) -> None:
    callback = debugger(tolerance=1.0, export=("pt2",), qat_epochs=qat_epochs)
    averaging = EMAWeightAveraging(decay=0.9)
    running = trainer(tmp_path, callbacks=[callback, averaging], max_epochs=2)
    running.fit(simple_class()(), loader(), loader(31, 1))
    exports = _exports(callback.report)
    assert {name: export.agreement for name, export in exports.items()} == dict.fromkeys(
        ("recipe", "pt2"), Agreement.VERIFIED
    )
    assert all(export.score == export.simulated_score for export in exports.values())


def test_what_qat_has_trained_is_exported(tmp_path: Path) -> None:
    module = simple_class()()
    report = _walk(tmp_path, module, tolerance=0.0, qat_epochs=1, remedies=(), export=("onnx", "pt2"), target="w2a8")
    assert report.step(importlib.import_module("lightning_quantdebug.report").StepName.QAT) is not None
    exports = _exports(report)
    assert {name: export.agreement.value for name, export in exports.items()} == dict.fromkeys(
        ("recipe", "onnx", "pt2"), "verified"
    )
    assert exports["onnx"].score == pytest.approx(report.final.score, abs=0.04)
    apply_recipe(module, tmp_path / "out" / "recipe")


def _module(step: Any, **parts: nn.Module) -> nn.Module:
    """A LightningModule with parts and a function of them and the input."""

    class Module(simple_class()):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            del self.net
            for name, part in parts.items():
                setattr(self, name, part)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(step(self, batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            outputs = step(self, batch[0])
            self.accuracy(outputs, batch[1])
            self.log("accuracy", self.accuracy)
            self.losses.append(outputs.mean())

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)

    return Module()


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))


def test_forward_a_part_and_preprocessing_are_found(tmp_path: Path) -> None:
    ways = {
        "self(x)": (lambda m, x: m(x), "", ["input"]),
        "self.forward(x)": (lambda m, x: m.forward(x), "", ["input"]),
        "a part": (lambda m, x: m.a(x), "a", ["input"]),
        "an addition ahead": (lambda m, x: m.a(x + x.flip(0)), "a", ["add"]),
        "a reshape ahead": (lambda m, x: m.a(x.reshape(-1, 8)), "a", ["input"]),
    }
    for index, (name, (step, path, inputs)) in enumerate(ways.items()):
        report = _walk(tmp_path / str(index), _module(step, a=_mlp()), export=("onnx",))
        exports = _exports(report)
        assert exports["onnx"].agreement is Agreement.VERIFIED, (name, exports["onnx"].reason)
        assert exports["recipe"].agreement is Agreement.VERIFIED, name
        content = json.loads((tmp_path / str(index) / "out" / "recipe" / "recipe.json").read_text())
        assert content["network"]["path"] == path, name
        assert content["network"]["inputs"] == inputs, name
        # A tie between classes that an int32 bias breaks is one sample of 31; what the step itself quantizes in the
        # simulation, such as the input of an addition, is in float around a file.
        assert exports["onnx"].score == pytest.approx(report.final.score, abs=0.1), name


def test_a_step_without_one_network_is_said(tmp_path: Path) -> None:
    module = _module(lambda m, x: m.b(torch.relu(m.a(x))), a=nn.Linear(8, 12), b=nn.Linear(12, 3))
    report = _walk(tmp_path, module, export=("onnx",))
    for export in _exports(report).values():
        assert export.agreement is Agreement.NOT_WRITTEN
        assert r"calls ['a', 'b'], each of which is quantized" in export.reason
        assert "Put what it computes into `forward`" in export.reason
    (finding,) = [finding for finding in report.findings if finding.cause is Cause.NOT_EXPORTABLE]
    assert finding.evidence.startswith("recipe, onnx: ")
    assert report.verdict is not None


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else self.b(x)


def test_data_dependent_code_is_named_and_the_recipe_still_written(tmp_path: Path) -> None:
    report = _walk(tmp_path, _module(lambda m, x: m(x), a=_Branching()), export=ALL)
    exports = _exports(report)
    assert exports["recipe"].agreement is Agreement.VERIFIED
    for name in ALL:
        assert exports[name].agreement is Agreement.NOT_WRITTEN
        assert "test_deployment.py:" in exports[name].reason
        assert "(return self.a(x) if x.sum() > 0 else self.b(x))" in exports[name].reason
    (finding,) = [finding for finding in report.findings if finding.cause is Cause.NOT_EXPORTABLE]
    assert finding.evidence.startswith("onnx, encodings, pt2: ")
    assert not (tmp_path / "out" / "export").exists()


def test_a_file_that_differs_is_unverified_and_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_quantdebug.onnx_runtime import OnnxFile

    plain = OnnxFile.__call__
    monkeypatch.setattr(OnnxFile, "__call__", lambda self, tensors: [t.roll(1, -1) for t in plain(self, tensors)])
    report = _walk(tmp_path, simple_class()(), export=("onnx",), tolerance=0.5)
    export = _exports(report)["onnx"]
    assert export.agreement is Agreement.UNVERIFIED
    assert "it differs from the simulation by itself" in export.reason
    assert [f.cause for f in report.findings if "onnx" in f.evidence] == [Cause.EXPORT_DIFFERS]
    assert export.score != pytest.approx(report.final.score, abs=1e-3)


def test_a_file_that_scores_worse_is_unverified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lightning_quantdebug.deployment.run_of", lambda *_: lambda tensors: [torch.zeros(len(tensors[0]), 3) - 9.0]
    )
    module = simple_class()()
    with torch.no_grad():
        module.net[3].bias[2] += 20.0
    report = _walk(tmp_path, module, export=("onnx",), monitor="loss", mode="min", tolerance=1e-3)
    export = _exports(report)["onnx"]
    better = export.score < report.final.score
    assert better or "with the file the score is worse by" in export.reason
    assert (export.agreement is Agreement.VERIFIED) is better


def test_a_full_disk_fails_one_format_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if str(target).endswith("model.onnx"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("os.replace", full)
    module = simple_class()()
    report = _walk(tmp_path, module, export=("onnx", "pt2"))
    exports = _exports(report)
    assert exports["onnx"].agreement is Agreement.NOT_WRITTEN
    assert "No space left on device" in exports["onnx"].reason
    assert exports["pt2"].agreement is Agreement.VERIFIED
    assert sorted(path.name for path in (tmp_path / "out" / "export").iterdir()) == ["model.pt2"]


def test_an_unexpected_failure_keeps_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, path: Any) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(Exporter, "write_pt2", broken)
    with pytest.warns(UserWarning, match="QuantDebug failed, .*planted"):
        report = _walk(tmp_path, simple_class()(), export=("pt2",), on_error="warn")
    assert report.verdict is not None
    assert report.verdict.value == "accepted"
    assert (tmp_path / "out" / "report.json").exists()


def test_the_module_and_its_forward_are_as_before(tmp_path: Path) -> None:
    module = simple_class()()
    callback = debugger(tolerance=1.0, export=ALL)
    running = trainer(tmp_path, callbacks=callback)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    running.validate(module, loader(31, 1), verbose=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert not {"forward"} & (set(vars(module)) | set(vars(module.net)))
    assert callback.report is not None


# Structures of what goes in and comes out.


def test_outputs_of_any_structure_are_taken_apart_and_put_together() -> None:
    from collections import OrderedDict, namedtuple

    Pair = namedtuple("Pair", "one two")  # as users write it
    tensors = [torch.full((2,), float(index)) for index in range(6)]
    output = OrderedDict(
        logits=tensors[0], states=[tensors[1], None, (tensors[2],)], pair=Pair(tensors[3], "text"), last=tensors[4]
    )
    assert [name for name, _ in named_outputs(output)] == ["logits", "states_0", "states_2_0", "pair_0", "last"]
    doubled = with_output_tensors(output, [2 * tensor for _, tensor in named_outputs(output)])
    assert type(doubled) is OrderedDict
    assert type(doubled["pair"]) is Pair
    assert doubled["states"][1] is None
    assert doubled["pair"].two == "text"
    assert [float(t[0]) for _, t in named_outputs(doubled)] == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert float(output["last"][0]) == 4.0


def test_arguments_are_called_as_in_forward() -> None:
    class Takes(nn.Module):
        def forward(self, image: Tensor, sizes: Any, *, mask: Tensor | None = None) -> Tensor:
            return image

    x = [torch.zeros(1) for _ in range(4)]
    call = NetworkCall((x[0], {"a": x[1], "b": [x[2]]}), {"mask": x[3]})
    assert argument_names(Network(Takes()), call) == ["image", "sizes_a", "sizes_b_0", "mask"]


# The command line.

_MODULE = """
import torch
from torch import nn
from lightning_quantdebug import instrument, save_recipe

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

def with_argument(x):
    return make()

number = 3

def write(folder):
    model, batch = make(), torch.randn(16, 4)
    torch.save({"state_dict": model.state_dict()}, f"{folder}/last.ckpt")
    with instrument(model, batch) as q:
        q.calibrate([batch])
        q.set_mode("quantize")
        save_recipe(q, batch, f"{folder}/recipe")
"""


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe, a checkpoint and the module that makes the model."""
    (tmp_path / "exported_model.py").write_text(_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    module = importlib.import_module("exported_model")
    importlib.reload(module).write(str(tmp_path))
    return tmp_path


def test_the_command_line_exports(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["export", str(written), "--model", "exported_model:make", "--format", *ALL]
    assert main([*given, "--checkpoint", str(written / "last.ckpt")]) == 0
    printed = capsys.readouterr().out
    for line in ("onnx: verified model.onnx", "encodings: verified model_float.onnx", "pt2: verified model.pt2"):
        assert line in printed
    assert "onnxruntime, as usual: 16 samples, at most 0 steps apart" in printed
    assert main(["export", str(written / "recipe"), "--model", "exported_model:make", "--output", f"{written}/o"]) == 0
    assert [path.name for path in (written / "o").iterdir()] == ["model.onnx"]


def test_the_command_line_tells_a_file_that_differs(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_quantdebug.onnx_runtime import OnnxFile

    plain = OnnxFile.__call__
    monkeypatch.setattr(OnnxFile, "__call__", lambda self, tensors: [t + 1 for t in plain(self, tensors)])
    assert main(["export", str(written), "--model", "exported_model:make"]) == 1
    assert "onnx: unverified" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("exported_model", [], "must be like 'package.module:name'"),
        ("nowhere_at_all:make", [], "can not be imported"),
        ("exported_model:nothing", [], "can not be imported"),
        ("exported_model:with_argument", [], "must make the model without arguments"),
        ("exported_model:number", [], "must make a torch module, got int"),
        ("torch.nn:Identity", [], "belongs to another model"),
        ("exported_model:make", ["--checkpoint", "nowhere.ckpt"], "can not be loaded"),
        ("exported_model:make", ["--checkpoint", "exported_model.py"], "can not be loaded"),
        ("exported_model:make", ["--quantizer", "a.B"], "made with the quantizer class None"),
    ],
)
def test_the_command_line_refuses(
    written: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: str,
    more: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(written)
    assert main(["export", str(written), "--model", model, *more]) == 2
    assert message in capsys.readouterr().err


def test_the_command_line_needs_a_recipe_and_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tmp_path), "--model", "torch.nn:Identity"]) == 2
    assert "Can not read the recipe" in capsys.readouterr().err
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "onnx" else find(name, *a))
    assert main(["export", str(tmp_path), "--model", "torch.nn:Identity"]) == 2
    assert "pip install 'lightning-quantdebug[onnx]'" in capsys.readouterr().err
