"""Which cause the symptoms speak for, at both sides of each limit; the patients and healthy networks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_quantdebug.activation_symptoms import ActivationSymptoms
from lightning_quantdebug.causes import (
    MOST_FINDINGS,
    activation_causes,
    activation_findings,
    weight_causes,
    weight_findings,
)
from lightning_quantdebug.instrument import batch_runs, instrument
from lightning_quantdebug.report import Cause, Finding
from lightning_quantdebug.settings import REMEDIES
from lightning_quantdebug.weight_symptoms import WeightSymptoms
from tests.patients import PATIENTS, Patient

torch.set_num_threads(1)

ILL = WeightSymptoms("layer.weight", 4, sqnr_db=12.0, narrowest=3)
GUILTY = ActivationSymptoms("relu", 8, damage=0.3, observed=(0.0, 9.0), channels=16, outlier_channels=(7,))


def of_weights(*layers: WeightSymptoms) -> list[tuple[Cause, str | None]]:
    return [(finding.cause, finding.remedy) for finding in weight_findings(layers)]


def of_activation(**changes: Any) -> tuple[Cause, str | None]:
    (finding,) = activation_findings([replace(GUILTY, **changes)])
    return finding.cause, finding.remedy


ROUNDING = (Cause.ROUNDING_DOMINATES, "adaround")
UNEVEN = (Cause.UNEVEN_CHANNEL_RANGES, "cle")
BIASED = (Cause.BIASED_ERROR, "bias_correction")
OUTLIERS = (Cause.WEIGHT_OUTLIERS, "range_setting")
FEW_BITS = (Cause.TOO_FEW_BITS, "bit_width")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ROUNDING),
        ({"even_gain": 12.1, "output_ratio": 4.1}, UNEVEN),
        ({"even_gain": 12.1, "input_ratio": 4.1}, UNEVEN),
        ({"even_gain": 12.0, "output_ratio": 4.1}, ROUNDING),
        ({"even_gain": 12.1, "input_ratio": 3.9}, ROUNDING),
        ({"unbiased_gain": 12.1}, BIASED),
        ({"unbiased_gain": 12.0}, ROUNDING),
        ({"clipping_gain": 6.1, "peak": 6.1}, OUTLIERS),
        ({"clipping_gain": 6.0, "peak": 6.1}, ROUNDING),
        ({"clipping_gain": 6.1, "peak": 5.9}, ROUNDING),
        ({"sqnr_db": 2.9}, FEW_BITS),
        ({"sqnr_db": 3.1}, ROUNDING),
        ({"sqnr_db": 2.9, "sign_gain": 6.1}, ROUNDING),
        ({"sqnr_db": 2.9, "sign_gain": 6.0}, FEW_BITS),
    ],
)
def test_the_cause_of_a_layer(changes, expected):
    assert of_weights(replace(ILL, **changes)) == [expected]


def test_several_causes_of_one_layer_come_with_the_costliest_first():
    both = replace(ILL, even_gain=13.0, input_ratio=9.0, unbiased_gain=20.0, clipping_gain=15.0, peak=9.0)
    assert of_weights(both) == [BIASED, OUTLIERS, UNEVEN]
    assert of_weights(replace(both, even_gain=30.0)) == [UNEVEN, BIASED, OUTLIERS]


def test_only_the_worst_layers_are_named_and_the_worst_one_first():
    ill = replace(ILL, unbiased_gain=20.0)
    layers = [replace(ill, quantizer=f"{db}.weight", sqnr_db=db) for db in (30.0, 17.0, 12.0, 19.0, 18.0)]
    found = weight_findings(layers)
    assert [finding.quantizer for finding in found] == ["12.0.weight", "17.0.weight", "18.0.weight"]
    many = [replace(ill, quantizer=f"{index}.weight") for index in range(9)]
    assert len(weight_findings(many)) == MOST_FINDINGS


def test_layers_that_have_nothing_but_few_bits_are_one_finding():
    def found_of(count: int) -> list[Finding]:
        return weight_findings([replace(ILL, quantizer=f"{index}.weight") for index in range(count)])

    (alone,), (two,), (six,) = found_of(1), found_of(2), found_of(6)
    assert two.evidence == f"{alone.evidence}; likewise 1.weight"
    assert six.evidence == f"{alone.evidence}; likewise 1.weight, 2.weight, 3.weight and 2 more"
    assert six.quantizer == "0.weight"
    (four,) = found_of(4)
    assert four.evidence.endswith("likewise 1.weight, 2.weight, 3.weight")
    biased = replace(ILL, quantizer="biased.weight", unbiased_gain=20.0, sqnr_db=11.0)
    lost = [replace(ILL, quantizer=name, sqnr_db=10.5) for name in ("one", "two")]
    assert [finding.quantizer for finding in weight_findings([biased, *lost])] == ["one", "biased.weight"]


def test_a_layer_that_loses_nothing_is_not_named():
    assert weight_findings([]) == []
    assert weight_findings([replace(ILL, sqnr_db=30.1)]) == []
    assert weight_findings([replace(ILL, sqnr_db=29.9)])


def test_dead_channels_are_named_last_and_have_a_place():
    many = [replace(ILL, quantizer=f"{index}.weight", unbiased_gain=20.0) for index in range(9)]
    found = weight_findings([*many, replace(ILL, quantizer="dead.weight", sqnr_db=44.0, dead=(1, 2, 3, 4, 5))])
    assert len(found) == MOST_FINDINGS
    assert (found[-1].cause, found[-1].quantizer) == (Cause.DEAD_CHANNELS, "dead.weight")
    assert found[-1].evidence == "all weights are 0 in channels 1, 2, 3, 4 and 1 more of the outputs"


def evidence_of(**changes: Any) -> str:
    return weight_findings([replace(ILL, **changes)])[0].evidence


def test_the_evidence_has_the_numbers():
    assert evidence_of(even_gain=30.0, input_ratio=25.0, output_ratio=2.0) == (
        "the range of the weight is 25 times that of its median input channel (the least range has channel 3); with "
        "even channels the SQNR of the output would be 42.0 dB instead of 12.0 dB"
    )
    assert "4.5 times that of its median output channel" in evidence_of(even_gain=30.0, output_ratio=4.5)
    assert evidence_of(unbiased_gain=20.0) == (
        "99.0% of the output's error is the same for every sample, a shift of the channels; without it the SQNR of the "
        "output would be 32.0 dB instead of 12.0 dB"
    )
    assert evidence_of(clipping_gain=8.0, peak=17.04) == (
        "the greatest weight is 17.0 times the root mean square; with a clipped range the SQNR of the output would be "
        "20.0 dB instead of 12.0 dB"
    )
    assert evidence_of() == (
        "4 bits: the SQNR of the output is 12.0 dB, with even channels, without outliers, and with errors that are no "
        "shift"
    )
    assert evidence_of(sign_gain=9.0) == (
        "4 bits: the SQNR of the output is 12.0 dB, as the rounding errors add up over inputs that go together; with "
        "random signs it would be 21.0 dB"
    )
    assert evidence_of(sqnr_db=2.0).endswith(
        "is 2.0 dB, and neither even channels nor a clipped range nor unbiased errors would make up for it"
    )


# Activations.


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (Cause.TOO_FEW_BITS, "bit_width")),
        ({"bulk_gain": 12.1}, (Cause.ACTIVATION_OUTLIERS, "range_setting")),
        ({"bulk_gain": 12.0}, (Cause.TOO_FEW_BITS, "bit_width")),
        ({"bulk_gain": 50.0, "outlier_gain": 50.0}, (Cause.ACTIVATION_OUTLIERS, "range_setting")),
        ({"outlier_gain": 12.1}, (Cause.OUTLIER_CHANNEL, "activation_cle")),
        ({"outlier_gain": 12.0}, (Cause.TOO_FEW_BITS, "bit_width")),
        ({"outlier_gain": 12.1, "is_output": True}, (Cause.ROUNDING_DOMINATES, "range_setting")),
        ({"outlier_gain": 30.0, "uneven_gain": 42.0}, (Cause.OUTLIER_CHANNEL, "activation_cle")),
        ({"outlier_gain": 30.0, "uneven_gain": 42.1}, (Cause.UNEVEN_CHANNEL_RANGES, "activation_cle")),
        ({"uneven_gain": 18.1}, (Cause.UNEVEN_CHANNEL_RANGES, "activation_cle")),
        ({"uneven_gain": 18.0}, (Cause.TOO_FEW_BITS, "bit_width")),
        ({"uneven_gain": 18.1, "is_output": True}, (Cause.TOO_FEW_BITS, "bit_width")),
        ({"range_gain": 6.1, "clipping_share": 0.4}, (Cause.ROUNDING_DOMINATES, "range_setting")),
        ({"range_gain": 6.1, "clipping_share": 0.6}, (Cause.CLIPPING_DOMINATES, "range_setting")),
        ({"range_gain": 6.0, "clipping_share": 0.6}, (Cause.TOO_FEW_BITS, "bit_width")),
        ({"clipping_share": 0.81}, (Cause.CLIPPING_DOMINATES, "range_setting")),
        ({"clipping_share": 0.79}, (Cause.TOO_FEW_BITS, "bit_width")),
        ({"unused_gain": 6.0, "short_levels": 99}, (Cause.SKEWED_TAIL, "range_setting")),
        ({"unused_gain": 5.4, "short_levels": 99}, (Cause.TOO_FEW_BITS, "bit_width")),
        ({"short_levels": 15, "short_share": 0.26}, (Cause.SKEWED_TAIL, "range_setting")),
        ({"short_levels": 16, "short_share": 0.26}, (Cause.TOO_FEW_BITS, "bit_width")),
        ({"short_levels": 15, "short_share": 0.24}, (Cause.TOO_FEW_BITS, "bit_width")),
        ({"short_levels": 0, "short_share": 0.26, "bit_width": 4}, (Cause.SKEWED_TAIL, "range_setting")),
        ({"dead": tuple(range(9))}, (Cause.DEAD_CHANNELS, None)),
        ({"dead": tuple(range(8))}, (Cause.TOO_FEW_BITS, "bit_width")),
    ],
)
def test_the_cause_of_a_quantizer(changes, expected):
    assert of_activation(**changes) == expected


def test_a_quantizer_without_damage_is_not_named():
    quiet = [replace(GUILTY, quantizer=name, damage=share) for name, share in (("a", 0.4), ("b", 0.021), ("c", 0.019))]
    quiet = [replace(item, outlier_gain=30.0) for item in quiet]
    assert [finding.quantizer for finding in activation_findings(quiet)] == ["a", "b"]
    assert activation_findings([]) == []


def test_constant_tensors_are_named_last():
    guilty = [replace(GUILTY, quantizer=str(index), bulk_gain=30.0) for index in range(7)]
    found = activation_findings(guilty, ["still", "also"])
    assert [finding.quantizer for finding in found] == ["0", "1", "2", "3", "still"]
    assert (found[-1].cause, found[-1].evidence) == (
        Cause.CONSTANT_TENSOR,
        "every value that calibration saw is the same",
    )


def activation_evidence(**changes: Any) -> str:
    return activation_findings([replace(GUILTY, **changes)])[0].evidence


HARM = "; alone it moves the output by 30.0% of what two samples differ by"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"bulk_gain": 40.0, "bulk": (-1.0, 2.0), "observed": (-50.0, 250.0)},
            "99.9% of the values lie in [-1, 2], the range is [-50, 250]: the few others cost 40.0 dB of rounding "
            "noise",
        ),
        (
            {"outlier_gain": 30.0},
            "channel 7 of 16 carries the range [0, 9], which costs the others 30.0 dB of rounding noise",
        ),
        (
            {"outlier_gain": 30.0, "outlier_channels": (7, 9)},
            "channels 7, 9 of 16 carry the range [0, 9], which costs the others 30.0 dB of rounding noise",
        ),
        (
            {"uneven_gain": 20.0},
            "the range of the median channel is 10 times narrower than the whole [0, 9], which costs it 20.0 dB of "
            "rounding noise",
        ),
        (
            {"range_gain": 9.0, "clipping_share": 0.25},
            "25% of the noise is clipping, the rest rounding; the range of least squared error would have 9.0 dB less",
        ),
        ({"unused_gain": 6.0}, "the grid is wider than the values by 6.0 dB, as the values reach from 0 to 9"),
        (
            {"short_levels": 3, "short_share": 0.5},
            "50% of the values share 3 levels on one side of 0, as the values reach from 0 to 9",
        ),
        ({"dead": tuple(range(9))}, "channels 0, 1, 2, 3 and 5 more of 16 are 0 throughout"),
        (
            {},
            "8 bits: neither rare values nor single channels nor the ends of the range are to blame",
        ),
    ],
)
def test_the_evidence_of_an_activation_has_the_numbers(changes, text):
    assert activation_evidence(**changes) == text + HARM


# On networks.


def causes(net: nn.Module, batches: list[Tensor], target: Any) -> tuple[list[Finding], list[Finding]]:
    net.eval()
    with instrument(net, batches[0], target) as session:
        session.calibrate(batches)
        runs = batch_runs(session, batches)
        return weight_causes(session, runs), activation_causes(session, runs)


@pytest.mark.parametrize("patient", PATIENTS, ids=lambda patient: patient.name)
def test_the_planted_cause_is_the_first_that_is_named(patient: Patient):
    module = patient.build()
    found = [*causes(module.net, [batch[0] for batch in module.batches], patient.target)]
    of_weight, of_activations = found
    assert all(finding.remedy in (None, *REMEDIES) for finding in (*of_weight, *of_activations))
    if patient.cause is None:
        assert not of_weight
        assert not of_activations
        return
    first = (of_weight or of_activations)[0]
    assert (first.cause, first.remedy) == (patient.cause, patient.remedy)
    # One disease each; only uneven channels are as uneven in the activation between the layers.
    if patient.cause is not Cause.UNEVEN_CHANNEL_RANGES:
        assert not (of_weight and of_activations)


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).float().div(16.0).sub(0.5).view(-1, 1, 8, 8), torch.from_numpy(labels)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A small network with batch normalization and depthwise convolutions, trained for two seconds."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        nn.Conv2d(16, 32, 1, stride=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    x, y = digits()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for epoch in range(4):
        for batch in torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    return net.eval()


@pytest.mark.parametrize("target", ["int8", "int8_per_tensor", "qnn"])
def test_a_healthy_network_has_no_cause_at_eight_bits(trained, target):
    assert causes(trained, list(digits()[0][:256].split(32)), target) == ([], [])


def test_a_healthy_network_at_few_bits_has_nothing_but_its_bits(trained):
    of_weight, of_activations = causes(trained, list(digits()[0][:256].split(32)), "w4a3")
    assert {finding.cause for finding in of_weight} == {Cause.ROUNDING_DOMINATES}
    assert 1 <= len(of_activations) <= MOST_FINDINGS
    named = {finding.cause for finding in of_activations}
    assert named <= {Cause.TOO_FEW_BITS, Cause.CLIPPING_DOMINATES, Cause.SKEWED_TAIL}


def test_a_constant_tensor_is_found():
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.relu(self.one(x)) * 0.0 + 1.0)

    _, found = causes(Constant(), [torch.randn(16, 4)], "int8")
    assert Cause.CONSTANT_TENSOR in {finding.cause for finding in found}
