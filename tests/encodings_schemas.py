"""JSON schemas of AIMET's encodings after its documentation (Docs/techniques/encoding_spec), without further keys."""

from __future__ import annotations

from typing import Any

_NAME = {"type": "string", "minLength": 1}
_SCALE = {"type": "number", "exclusiveMinimum": 0}
_WIDTH = {"type": "integer", "minimum": 2, "maximum": 32}
_SIZE = {"type": "integer", "minimum": 1}
_PRODUCER = {
    "type": "object",
    "properties": {"package": _NAME, "version": _NAME},
    "required": ["package", "version"],
    "additionalProperties": False,
}


def _object(properties: dict[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """An object with these properties and no others."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _nested(item: dict[str, Any], depth: int) -> dict[str, Any]:
    """Arrays in arrays."""
    for _ in range(depth):
        item = {"type": "array", "items": item, "minItems": 1}
    return item


def _entry_1_0_0(kind: str) -> dict[str, Any]:
    """A tensor in schema 1.0.0."""
    length = {"maxItems": 1} if kind == "PER_TENSOR" else {}
    properties = {
        "name": _NAME,
        "enc_type": {"const": kind},
        "dtype": {"const": "INT"},
        "bw": _WIDTH,
        "is_sym": {"type": "boolean"},
        "scale": {**_nested(_SCALE, 1), **length},
        "offset": {**_nested({"type": "integer", "maximum": 0}, 1), **length},
    }
    return _object({**properties, "block_size": _SIZE} if kind == "PER_BLOCK" else properties)


def _entry_2_0_0(depth: int) -> dict[str, Any]:
    """A tensor in schema 2.0.0, whose scales are nested that deep: per tensor, per channel, per block."""
    properties = {
        "name": _NAME,
        "output_dtype": {"type": "string", "pattern": "^u?int([2-9]|1[0-6]|32)$"},
        "y_scale": _nested(_SCALE, depth),
        "y_zero_point": _nested({"type": "integer"}, depth),
    }
    if depth:
        properties["axis"] = {"type": "integer", "minimum": 0}
    if depth == 2:
        properties["block_size"] = _SIZE
    return _object(properties, ("y_zero_point",))


_ANY_1_0_0 = {"oneOf": [_entry_1_0_0(kind) for kind in ("PER_TENSOR", "PER_CHANNEL", "PER_BLOCK")]}

SCHEMA_1_0_0 = _object(
    {
        "version": {"const": "1.0.0"},
        "activation_encodings": {"type": "array", "items": _ANY_1_0_0},
        "param_encodings": {"type": "array", "items": _ANY_1_0_0},
        "excluded_layers": {"type": "array", "items": _NAME},
        "quantizer_args": _object(
            {
                "activation_bitwidth": _WIDTH,
                "dtype": {"enum": ["int", "float"]},
                "is_symmetric": {"type": "boolean"},
                "param_bitwidth": _WIDTH,
                "per_channel_quantization": {"type": "boolean"},
                "quant_scheme": _NAME,
            }
        ),
        "producer": _PRODUCER,
    }
)
SCHEMA_2_0_0 = _object(
    {
        "version": {"const": "2.0.0"},
        "encodings": {"type": "array", "items": {"oneOf": [_entry_2_0_0(depth) for depth in range(3)]}},
        "producer": _PRODUCER,
    }
)
