"""What a model is quantized to: specs, presets, and what they refuse."""

import json
from typing import Any

import pytest

from lightning_quantdebug.errors import SettingsError
from lightning_quantdebug.target import PRESETS, Granularity, Kind, Placement, QuantSpec, QuantTarget, RangeSetting


@pytest.mark.parametrize(
    ("spec", "low", "high"),
    [
        (QuantSpec(8), 0, 255),
        (QuantSpec(8, symmetric=True), -128, 127),
        (QuantSpec(8, symmetric=True, narrow_range=True), -127, 127),
        (QuantSpec(4), 0, 15),
        (QuantSpec(4, symmetric=True), -8, 7),
        (QuantSpec(2, symmetric=True, narrow_range=True), -1, 1),
        (QuantSpec(16), 0, 65535),
        (QuantSpec(32, symmetric=True), -(2**31), 2**31 - 1),
    ],
)
def test_the_grid_of_a_spec(spec: QuantSpec, low: int, high: int) -> None:
    assert (spec.quant_min, spec.quant_max) == (low, high)


@pytest.mark.parametrize("width", [0, 1, 17, 31, 33, 8.0, True, "8", None])
def test_a_bit_width_out_of_range_is_refused(width: Any) -> None:
    with pytest.raises(SettingsError, match=rf"`bit_width` must be an integer from 2 to 16, or 32, got {width!r}"):
        QuantSpec(width)


@pytest.mark.parametrize(("granularity", "size"), [("per_group", None), ("per_tensor", 4), ("per_channel", 4)])
def test_a_group_size_belongs_to_groups(granularity: Any, size: int | None) -> None:
    with pytest.raises(SettingsError, match=rf"`group_size` must be given with granularity 'per_group'.*got {size!r}"):
        QuantSpec(4, symmetric=True, granularity=granularity, group_size=size)


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_a_group_size_must_be_positive(size: Any) -> None:
    with pytest.raises(SettingsError, match=rf"`group_size` must be a positive integer, got {size!r}"):
        QuantSpec(4, granularity=Granularity.PER_GROUP, group_size=size)


def test_a_narrow_range_needs_a_symmetric_grid() -> None:
    with pytest.raises(SettingsError, match=r"`narrow_range` needs `symmetric=True`"):
        QuantSpec(8, narrow_range=True)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("granularity", "'per_tensor', 'per_channel', 'per_group'"),
        ("range_setting", "'min_max', 'percentile', 'mse', 'cross_entropy', 'batchnorm'"),
    ],
)
def test_a_wrong_choice_in_a_spec_lists_the_right_ones(name: str, choices: str) -> None:
    with pytest.raises(SettingsError, match=rf"`{name}` must be one of \[{choices}\], got 'fine'"):
        QuantSpec(8, **{name: "fine"})


def test_range_setting_follows_the_bit_width_unless_given() -> None:
    assert QuantSpec(8).effective_range_setting is RangeSetting.MIN_MAX
    assert QuantSpec(7).effective_range_setting is RangeSetting.MSE
    assert QuantSpec(8, range_setting=RangeSetting.MSE).effective_range_setting is RangeSetting.MSE


@pytest.mark.parametrize("share", [50, 50.0, 100.1, 0.9999, -1, float("nan"), True, "99", None])
def test_a_percentile_out_of_range_is_refused(share: Any) -> None:
    with pytest.raises(SettingsError, match=rf"`percentile` must be a number above 50 and at most 100, got {share!r}"):
        QuantSpec(8, percentile=share)


@pytest.mark.parametrize("share", [50.1, 99, 99.99, 100])
def test_a_percentile_of_more_than_half_is_kept(share: float) -> None:
    assert QuantSpec(8, range_setting="percentile", percentile=share).percentile == share  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["weights", "activations"])
@pytest.mark.parametrize("setting", ["cross_entropy", "batchnorm"])
def test_a_range_setting_of_single_quantizers_is_none_of_a_target(kind: str, setting: str) -> None:
    message = rf"`range_setting` of all {kind} must be one of \['min_max', 'percentile', 'mse'\], got '{setting}'"
    with pytest.raises(SettingsError, match=message):
        QuantTarget.from_value({kind: {"range_setting": setting}})
    assert QuantSpec(8, range_setting=setting).effective_range_setting.value == setting  # type: ignore[arg-type]


def test_activations_have_one_encoding_per_tensor() -> None:
    with pytest.raises(SettingsError, match=r"Activations are quantized per tensor, got granularity 'per_channel'"):
        QuantTarget.from_value({"activations": {"granularity": "per_channel"}})


def test_a_spec_is_found_by_kind() -> None:
    target = QuantTarget.from_value("w4a8")
    assert target.spec(Kind.WEIGHT) is target.weights
    assert target.spec(Kind.ACTIVATION) is target.activations
    assert (target.weights.bit_width, target.activations.bit_width) == (4, 8)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_found_by_its_name_and_survives_a_round_trip(name: str) -> None:
    target = QuantTarget.from_value(name)
    assert target.name == name
    assert QuantTarget.from_value(target.to_dict()) == target


def test_presets_follow_the_engines() -> None:
    tensorrt, xnnpack, qnn = (QuantTarget.from_value(name) for name in ("tensorrt", "xnnpack", "qnn"))
    assert (tensorrt.activations.symmetric, tensorrt.placement) == (True, Placement.TENSORRT)
    assert (xnnpack.weights.quant_min, xnnpack.activations.symmetric) == (-127, False)
    assert (qnn.weights.granularity, qnn.placement) == (Granularity.PER_TENSOR, Placement.QNN)
    assert QuantTarget.from_value("int8_per_tensor").weights.granularity is Granularity.PER_TENSOR
    assert QuantTarget.from_value("w8a8_per_tensor").weights.granularity is Granularity.PER_TENSOR


@pytest.mark.parametrize("name", ["int7", "w4", "a8w4", "W4A8", "w4a8_per_channel", ""])
def test_an_unknown_preset_lists_the_known_ones(name: str) -> None:
    with pytest.raises(SettingsError, match=rf"`target` must be one of \['int8', .*or like 'w4a8'.*got {name!r}"):
        QuantTarget.from_value(name)


def test_a_preset_of_widths_that_no_grid_has_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"`bit_width` must be an integer from 2 to 16, or 32, got 64"):
        QuantTarget.from_value("w64a8")


@pytest.mark.parametrize("value", [8, None, ["int8"]])
def test_a_target_of_another_type_is_refused(value: Any) -> None:
    with pytest.raises(SettingsError, match=r"`target` must be a preset's name, a mapping or a QuantTarget, got"):
        QuantTarget.from_value(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"bits": 8}, r"`target` has no field \['bits'\]; the fields are \['activation_bit_widths', 'activ"),
        ({"weights": {"bits": 8}}, r"`target.weights` has no field \['bits'\]; the fields are \['bit_width'"),
        ({"weights": 8}, r"`target.weights` must be a mapping of QuantSpec fields, got 8"),
        ({"placement": "tpu"}, r"`placement` must be one of \['generic', .*got 'tpu'"),
    ],
)
def test_a_mapping_with_a_wrong_field_says_which(value: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        QuantTarget.from_value(value)


def test_a_mapping_changes_only_the_fields_it_gives() -> None:
    target = QuantTarget.from_value({"preset": "qnn", "activations": {"bit_width": 16}})
    qnn = QuantTarget.from_value("qnn")
    assert target.activations == QuantSpec(16)
    assert (target.weights, target.placement, target.name) == (qnn.weights, qnn.placement, "custom")
    assert QuantTarget.from_value({"preset": "qnn"}) == qnn
    spec = QuantSpec(4, symmetric=True)
    assert QuantTarget.from_value({"weights": spec}).weights is spec


def test_with_bit_width_changes_both_kinds_and_nothing_else() -> None:
    target = QuantTarget.from_value("tensorrt")
    wide = target.with_bit_width(32)
    assert (wide.weights.bit_width, wide.activations.bit_width) == (32, 32)
    assert wide.with_bit_width(8) == target


def finest(value: Any) -> str:
    """The finest granularity that a target allows; all coarser ones must be allowed as well."""
    target = QuantTarget.from_value(value)
    allowed = [choice for choice in Granularity if target.allows(choice)]
    assert allowed == list(Granularity)[: len(allowed)]
    assert target.effective_finest_granularity is allowed[-1]
    return allowed[-1].value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("int8", "per_channel"),
        ("onnxruntime", "per_channel"),
        ("tensorrt", "per_channel"),
        ("xnnpack", "per_channel"),
        ("qnn_per_channel", "per_channel"),
        ("qnn", "per_tensor"),
        ("int8_per_tensor", "per_tensor"),
        ("w8a8_per_tensor", "per_tensor"),
        ("w4a8_per_tensor", "per_tensor"),
        ("w8a16", "per_channel"),
        ("w7a8", "per_group"),
        ({"preset": "int8", "weights": {"granularity": "per_tensor"}}, "per_channel"),
        ({"preset": "int8", "weights": {"granularity": "per_tensor", "bit_width": 4}}, "per_group"),
        ({"preset": "int8", "weights": {"granularity": "per_group", "group_size": 8}}, "per_group"),
        ({"preset": "onnxruntime", "weights": {"bit_width": 4}}, "per_channel"),
        ({"preset": "int8", "finest_granularity": "per_group"}, "per_group"),
        ({"preset": "qnn", "finest_granularity": "per_channel"}, "per_channel"),
    ],
)
def test_the_finest_granularity_is_the_given_one_or_that_of_the_bit_width(value: Any, expected: str) -> None:
    assert finest(value) == expected
    assert finest(QuantTarget.from_value(value).to_dict()) == expected


def test_weights_finer_than_the_engine_has_kernels_for_are_refused() -> None:
    message = r"no finer than `finest_granularity`, got 'per_channel' with 'per_tensor'.*set `finest_granularity` to 'p"
    with pytest.raises(SettingsError, match=message):
        QuantTarget.from_value({"preset": "qnn", "weights": {"granularity": "per_channel"}})


def test_a_wrong_granularity_lists_the_right_ones() -> None:
    with pytest.raises(SettingsError, match=r"`finest_granularity` must be one of \['per_tensor', .*got 'per_row'"):
        QuantTarget.from_value({"finest_granularity": "per_row"})
    with pytest.raises(SettingsError, match=r"`granularity` must be one of \['per_tensor', .*got 'per_row'"):
        QuantTarget.from_value("int8").allows("per_row")


@pytest.mark.parametrize(
    ("value", "weights", "activations"),
    [
        ("int8", (16,), (16,)),
        ("w4a4", (8, 16), (8, 16)),
        ("w16a16", (), ()),
        ("onnxruntime", (16,), (16,)),
        ("qnn", (16,), (16,)),
        # TensorRT has no 16-bit integers; LiteRT has them for activations alone (its 16x8 mode).
        ("tensorrt", (), ()),
        ("xnnpack", (), (16,)),
        ({"preset": "xnnpack", "weights": {"bit_width": 4}}, (8,), (16,)),
        ({"weight_bit_widths": [16, 12, 8, 12], "activation_bit_widths": []}, (12, 16), ()),
    ],
)
def test_single_quantizers_may_be_raised_to_what_the_engine_has(
    value: Any, weights: tuple[int, ...], activations: tuple[int, ...]
) -> None:
    target = QuantTarget.from_value(value)
    for one in (target, QuantTarget.from_value(json.loads(json.dumps(target.to_dict())))):
        assert one.wider(Kind.WEIGHT, one.weights.bit_width) == weights
        assert one.wider(Kind.ACTIVATION, one.activations.bit_width) == activations
        assert one == target


@pytest.mark.parametrize("name", ["weight_bit_widths", "activation_bit_widths"])
@pytest.mark.parametrize("widths", [[8, 32], [1], "16", [8.0], [True], [None], {"8": 1}])
def test_bit_widths_that_no_engine_has_are_refused(name: str, widths: Any) -> None:
    with pytest.raises(SettingsError, match=rf"`{name}` must be a list of integers from 2 to 16, got "):
        QuantTarget.from_value({name: widths})
