"""What an exported model is worth in ONNX Runtime: file size, latency, score, and how much of it runs as integers.

    python benchmarks/deploy.py --json benchmarks/results/deploy.json

Each network is exported twice: in float by torch's own exporter (as any user would, batch normalizations folded by
ONNX Runtime), and quantized by `export_onnx`. Latency is that of one thread, as the median of runs of both in turn, so
that a busy machine slows both down alike. "Integer" are the operations with arithmetic (convolutions, matrix products,
additions, pooling ...) that ONNX Runtime runs on integers after its own optimizations.

The separable network is trained on the CIFAR-10 subset where that is at hand (two minutes), so that it has a score; the
others have random weights and show size, speed and agreement with the simulation alone.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import trained_networks
from networks import MobileNetV2, ResNet18, TransformerClassifier, images
from torch import Tensor, nn

from lightning_quantdebug import export_onnx, instrument

FLOAT_WORK = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Add", "Mul", "Concat")
FLOAT_WORK += ("ConvTranspose", "Tanh", "Exp", "Sqrt", "Pow", "Sub")
FLOAT_WORK += ("AveragePool", "GlobalAveragePool", "ReduceMean", "Softmax", "Sigmoid", "LayerNormalization", "Gelu")
FLOAT_WORK += ("LSTM", "Relu", "Clip", "HardSwish", "BiasGelu", "SkipLayerNormalization", "NhwcFusedConv", "Div", "Erf")
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mobilenet_v2": (MobileNetV2, lambda batch: images(batch, 224)),
    "resnet18": (ResNet18, lambda batch: images(batch, 224)),
    "transformer_encoder": (TransformerClassifier, lambda batch: torch.randn(batch, 64, 256)),
}


def session(content: bytes, optimized: str | None = None) -> onnxruntime.InferenceSession:
    """A session on one thread; ``optimized`` is where the graph that really runs is written."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if optimized is not None:
        options.optimized_model_filepath = optimized
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def is_integer(op: str) -> bool:
    """Whether an operation of ONNX Runtime computes with integers."""
    return op.startswith(("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "NhwcMaxPool"))


def integer_share(content: bytes) -> tuple[float, dict[str, int]]:
    """Share of the operations with arithmetic that run as integers, and all operations that run."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/optimized.onnx"
        session(content, path)
        counts = Counter(node.op_type for node in onnx.load(path).graph.node)
    integer = sum(count for op, count in counts.items() if is_integer(op))
    in_float = sum(count for op, count in counts.items() if op in FLOAT_WORK)
    return integer / max(integer + in_float, 1), dict(counts)


def float_file(net: nn.Module, batch: Tensor) -> bytes:
    """The network in float, by torch's exporter."""
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.onnx.export(net, (batch,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    buffer = io.BytesIO()
    onnx.save(program.model_proto, buffer)
    return buffer.getvalue()


def latencies(files: dict[str, bytes], batch: Tensor, seconds: float) -> dict[str, float]:
    """Median seconds of one run of each file, taken in turn."""
    runs = {name: session(content) for name, content in files.items()}
    feeds = {name: {run.get_inputs()[0].name: batch.numpy()} for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        run.run(None, feeds[name])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["float"]) < 5:
        for name, run in runs.items():
            started = time.perf_counter()
            run.run(None, feeds[name])
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def accuracy(content: bytes, x: Tensor, y: Tensor) -> float:
    """Share of images with the right class."""
    run = session(content)
    name = run.get_inputs()[0].name
    logits = np.concatenate([run.run(None, {name: part.numpy()})[0] for part in x.split(100)])
    return float((logits.argmax(1) == y.numpy()).mean())


def measure(net: nn.Module, batch: Tensor, calibration: list[Tensor], seconds: float) -> dict[str, Any]:
    """One network, in float and quantized."""
    _settle(net, calibration)
    with tempfile.TemporaryDirectory() as folder, instrument(net, batch) as q:
        q.calibrate(calibration)
        q.set_mode("quantize")
        started = time.perf_counter()
        export = export_onnx(q, f"{folder}/model.onnx", batch, class_axis=1)
        took = time.perf_counter() - started
        quantized = Path(f"{folder}/model.onnx").read_bytes()
        quantizers = len(q.quantizers)
    files = {"float": float_file(net, batch), "quantized": quantized}
    share, operations = integer_share(files["quantized"])
    single = latencies(files, batch[:1], seconds)
    many = latencies(files, batch, seconds)
    return {
        "quantizers": quantizers,
        "agreement": export.agreement.value,
        "comparisons": [vars(comparison) for comparison in export.comparisons],
        "export_and_verify_seconds": round(took, 2),
        "bytes": {name: len(content) for name, content in files.items()},
        "size_ratio": round(len(files["float"]) / len(quantized), 2),
        "seconds_batch_1": {name: round(value, 5) for name, value in single.items()},
        "speed_up_batch_1": round(single["float"] / single["quantized"], 2),
        f"seconds_batch_{len(batch)}": {name: round(value, 5) for name, value in many.items()},
        f"speed_up_batch_{len(batch)}": round(many["float"] / many["quantized"], 2),
        "integer_share": round(share, 3),
        "operations": operations,
        "files": files,
    }


def _settle(net: nn.Module, batches: list[Tensor]) -> None:
    """Batch normalizations with the statistics of their inputs: with random ones signals die out layer by layer."""
    if any(isinstance(module, nn.BatchNorm2d) and not module.running_mean.any() for module in net.modules()):
        net.train()
        with torch.no_grad():
            for batch in batches * 5:
                net(batch)
    net.eval()


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=6.0, help="time for each latency")
    parser.add_argument("--only", nargs="*", help="names of networks")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    if trained_networks.DATA.exists() and (not given.only or "separable_cifar" in given.only):
        data = trained_networks.load_images()
        net = trained_networks.train(data, epochs=3)
        calibration = list(data.x_train[:512].split(64))
        found = measure(net, data.x_test[:32], calibration, given.seconds)
        scores = {name: accuracy(content, data.x_test, data.y_test) for name, content in found["files"].items()}
        results["separable_cifar"] = {**found, "accuracy": scores}
    for name, (make, batch) in NETWORKS.items():
        if not given.only or name in given.only:
            torch.manual_seed(0)
            results[name] = measure(make(), batch(8), [batch(8) for _ in range(2)], given.seconds)
    for name, result in results.items():
        result.pop("files")
        print(name, json.dumps(result, indent=1), flush=True)
    if given.json is not None:
        about = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__, "threads": 1}
        given.json.write_text(json.dumps({"about": about, **results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
