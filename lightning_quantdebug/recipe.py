"""The recipe: what turns a user's float weights into the quantized model that was accepted, anywhere.

A recipe is a directory with two files, both of them data and none of them code:

* ``recipe.json``: target, network, the grid of each quantizer, and a fingerprint of the weights that it belongs to.
* ``tensors.safetensors``: scales and zero points, and what remedies have changed of weights and biases.

:func:`apply_recipe` puts it on a model without a Trainer and without data: where its quantizers sit is found out when
the model is called first. What it computes is, on the same machine, equal bit for bit to what was accepted.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from lightning_quantdebug.adjustment import Adjustment
from lightning_quantdebug.analysis_store import hash_bytes
from lightning_quantdebug.encoding import Encoding
from lightning_quantdebug.errors import CaptureError, RecipeError, SettingsError
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.interception import clean_path
from lightning_quantdebug.model_loan import eval_mode, lent
from lightning_quantdebug.network import Network, NetworkCall, Wiring, argument_names, sites_at, sites_of_runs
from lightning_quantdebug.quantizer import load_custom_quantizer
from lightning_quantdebug.recorder import input_names
from lightning_quantdebug.session_state import load_state, state_of
from lightning_quantdebug.target import Mode, QuantSpec, QuantTarget

SCHEMA_VERSION = 1
_SETTINGS, _TENSORS = "recipe.json", "tensors.safetensors"
_PARTS = tuple(item.name for item in fields(Adjustment))


@dataclass(frozen=True, eq=False)
class Recipe:
    """A recipe in memory.

    Args:
        target: What was quantized to.
        scope: Path of the sub-module that is quantized; ``""``: all.
        exclude: Name patterns of quantizers that were left out.
        path: Path of the module that is called; ``""``: the root.
        inputs: For each tensor that is given to the network, by the name of the argument, the name that a quantizer of
            it has; ``""``: it has none.
        state: Quantizers and adjustments by name, as :func:`~lightning_quantdebug.session_state.state_of` gives them.
        reached: Names of the quantizers that every call of the network must reach.
        wiring: What tells the operations apart in another process.
        tensors: Shape, dtype and SHA-256 of each parameter and buffer that the network reads, by name.
        example: What a call looks like: its structure and the shape, dtype and range of each tensor.
        origin: Versions, the model's class and what the model scored.
    """

    target: QuantTarget
    scope: str
    exclude: tuple[str, ...]
    path: str
    inputs: Mapping[str, str]
    state: Mapping[str, Any]
    reached: tuple[str, ...]
    wiring: Wiring
    tensors: Mapping[str, Mapping[str, Any]]
    example: Mapping[str, Any]
    origin: Mapping[str, Any]

    @classmethod
    def of(
        cls, session: Instrumentation, network: Network, call: NetworkCall, origin: Mapping[str, Any] | None = None
    ) -> Recipe:
        """The recipe of a session as it is now.

        Args:
            session: A calibrated session.
            network: What of its root is called.
            call: One call of the network, which is recorded to find out what it reads; the tensors are not kept.
            origin: What is known of where it comes from.

        Raises:
            RecipeError: If no quantizer has a range, or the network reaches none.
        """
        if not any(quantizer.is_calibrated for quantizer in session.quantizers.values()):
            raise RecipeError("No quantizer has a range yet: call `calibrate` before the recipe is made.")
        wiring = Wiring.of(session, network)
        with _own_errors("No recipe can be made"):
            own = _recorded(session, network, call, wiring)
        always = set.intersection(*sites_of_runs(own), *(found for found in sites_of_runs(session) if found))
        reached = tuple(name for name in own.quantizers if name in session.quantizers and name in always)
        if not reached:
            raise RecipeError(
                f"The network {network.path or type(network.root).__name__!r} reaches none of the quantizers of "
                "validation, so that no recipe can be made of it."
            )
        recipe = cls(
            target=session.target,
            scope=session.scope,
            exclude=session.exclude,
            path=network.path,
            inputs=dict(zip(argument_names(network, call), network.inputs, strict=False)),
            state=_settled(session),
            reached=reached,
            wiring=wiring,
            tensors=fingerprints(network.root, _read_by(own, network) | _read_by(session, network)),
            example=_example_of(call),
            origin=dict(origin or {}),
        )
        recipe.check_sites(own)
        return recipe

    def save(self, directory: str | Path) -> Path:
        """Write the recipe; a directory of an older one is replaced as a whole.

        Returns:
            The directory.

        Raises:
            RecipeError: If it can not be written; nothing is left half-written then.
        """
        directory = Path(directory)
        settings, tensors = self._content()
        try:
            place = directory.resolve()
            _refuse_others(place)
            place.parent.mkdir(parents=True, exist_ok=True)
            fresh = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}-"))
            try:
                save_file(tensors, fresh / _TENSORS)
                settings["tensors"] = hashlib.sha256((fresh / _TENSORS).read_bytes()).hexdigest()
                (fresh / _SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf-8")
                fresh.chmod(0o755)
                _put_in_place(fresh, place)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            raise RecipeError(
                f"Can not write the recipe to {str(directory)!r}: {error}. Give a writable directory with room."
            ) from error
        return directory

    @classmethod
    def load(cls, directory: str | Path) -> Recipe:
        """Read a recipe.

        Raises:
            RecipeError: If there is none, it is damaged, or another version of this package wrote it.
        """
        directory = Path(directory)
        try:
            settings = json.loads((directory / _SETTINGS).read_text(encoding="utf-8"))
            version = settings.get("schema_version") if isinstance(settings, dict) else None
            if version != SCHEMA_VERSION or isinstance(version, bool):
                raise RecipeError(
                    f"The recipe {str(directory)!r} has the schema version {version!r}, this version of "
                    f"lightning-quantdebug reads {SCHEMA_VERSION}. Install the version that wrote it."
                )
            content = (directory / _TENSORS).read_bytes()
            if hashlib.sha256(content).hexdigest() != settings["tensors"]:
                raise ValueError(f"{_TENSORS} is not the file that {_SETTINGS} was written with")
            return cls._from_content(settings, load(content))
        except OSError as error:
            raise RecipeError(
                f"Can not read the recipe {str(directory)!r}: {error}. Give the directory `recipe` that QuantDebug "
                "wrote beside its report."
            ) from error
        except (
            *(ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError),
            *(SettingsError, SafetensorError),
        ) as error:
            if isinstance(error, RecipeError):
                raise
            raise RecipeError(
                f"The recipe {str(directory)!r} is damaged: {type(error).__name__}: {error}. Copy it again."
            ) from error

    # As JSON and tensors.

    def _content(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain values, and tensors by key."""
        tensors: dict[str, Tensor] = {}
        quantizers: dict[str, Any] = {}
        for name, values in self.state["quantizers"].items():
            quantizers[name] = {key: values[key] for key in ("spec", "channel_axis", "frozen")}
            quantizers[name]["calibrated"] = values["scale"] is not None
            for key in ("scale", "zero_point"):
                if values[key] is not None:
                    tensors[f"{key}/{name}"] = values[key]
        for name, parts in self.state["adjustments"].items():
            tensors |= {f"{part}/{name}": tensor for part, tensor in parts.items()}
        settings = {
            "schema_version": SCHEMA_VERSION,
            "origin": dict(self.origin),
            "target": self.target.to_dict(),
            "module": self.scope,
            "exclude": list(self.exclude),
            "network": {
                "path": self.path,
                "arguments": list(self.inputs),
                "inputs": list(self.inputs.values()),
                "example": dict(self.example),
            },
            "model": {name: dict(values) for name, values in self.tensors.items()},
            "quantizers": quantizers,
            "adjustments": {name: sorted(parts) for name, parts in self.state["adjustments"].items()},
            "reached": list(self.reached),
            "wiring": self.wiring.to_dict(),
        }
        return settings, {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}

    @classmethod
    def _from_content(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Recipe:
        """The recipe that :meth:`_content` was taken of."""
        quantizers = {
            str(name): _quantizer_state(str(name), values, tensors) for name, values in settings["quantizers"].items()
        }
        adjustments = {
            str(name): {part: tensors[f"{part}/{name}"] for part in _texts(parts, _PARTS)}
            for name, parts in settings["adjustments"].items()
        }
        network = settings["network"]
        # Lists are what JSON makes of tuples.
        target = {key: tuple(item) if isinstance(item, list) else item for key, item in settings["target"].items()}
        return cls(
            target=_checked_target(QuantTarget.from_value(target)),
            scope=_text(settings["module"]),
            exclude=_texts(settings["exclude"]),
            path=_text(network["path"]),
            inputs=dict(zip(_texts(network["arguments"]), _texts(network["inputs"]), strict=True)),
            state={"quantizers": quantizers, "adjustments": adjustments},
            reached=_texts(settings["reached"]),
            wiring=Wiring.from_dict(settings["wiring"]),
            tensors={str(name): _known_tensor(values) for name, values in settings["model"].items()},
            example=dict(network["example"]),
            origin=dict(settings["origin"]),
        )

    # Belonging to a model.

    def check(self, model: nn.Module) -> None:
        """Find out whether the recipe belongs to a model with these weights.

        Raises:
            RecipeError: If not; the message names what differs.
        """
        found = {name for name, _ in _named(model)}
        missing = [name for name in self.tensors if name not in found]
        if missing:
            raise RecipeError(
                f"The recipe belongs to another model ({self.origin.get('model', 'unknown')}): {type(model).__name__} "
                f"has no {missing[:3]}{_and_more(missing)}; it has {sorted(found)[:3]}."
            )
        try:
            now = fingerprints(model, self.tensors)
        except (RuntimeError, ValueError) as error:
            raise RecipeError(
                f"The weights of {type(model).__name__} have no values yet ({error}): load them before."
            ) from error
        for what in ("shape", "dtype", "sha256"):
            other = [name for name, values in self.tensors.items() if values[what] != now[name][what]]
            if other and what == "sha256":
                raise RecipeError(
                    f"{len(other)} of {len(now)} weights have other values than the recipe was made for: {other[:3]}"
                    f"{_and_more(other)}. Load the checkpoint that was diagnosed (after QAT: the trained one), or "
                    "diagnose the model as it is now."
                )
            if other:
                was, is_now = self.tensors[other[0]][what], now[other[0]][what]
                raise RecipeError(
                    f"The recipe belongs to a model of other sizes: the {what} of {other[0]!r} is {is_now}, the recipe "
                    f"was made for {was}{_and_more(other)}. Build the model with the same arguments."
                )

    def example_call(self, seed: int = 0) -> NetworkCall:
        """A call with random tensors of the shapes, dtypes and ranges that the recipe was made with."""
        generator = torch.Generator().manual_seed(seed)
        try:
            args, kwargs = (_made(self.example[part], generator) for part in ("args", "kwargs"))
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError, RecursionError) as error:
            raise RecipeError(
                f"The recipe has no example of what the network takes ({type(error).__name__}: {error}): give an "
                "example batch."
            ) from error
        return NetworkCall(tuple(args), dict(kwargs))

    def check_sites(self, session: Instrumentation) -> None:
        """Find out whether quantizers sit where they sat.

        Raises:
            RecipeError: If not; the message names the operation.
        """
        known = self.state["quantizers"].keys()
        # What comes into the network may have been put on its grid ahead of it.
        ahead = set(self.inputs.values())
        for name, found in sites_at(session).items():
            was, sites = self.wiring.quantizers.get(name), found & known
            if was is not None and not was <= sites <= was | ahead:
                raise RecipeError(
                    f"The quantizers of the operation {name!r} are {sorted(sites)}, the recipe has "
                    f"{sorted(was)} there. Either the code of the model has changed since (recipe: "
                    f"{_versions(self.origin)}), or the network takes several paths, and where quantizers sit depends "
                    "on paths that these data do not take: call it with data first that take them."
                )


def _text(value: Any) -> str:
    """A value that must be a string."""
    if not isinstance(value, str):
        raise TypeError(f"a string is expected, not {value!r}")
    return value


def _texts(values: Any, known: Iterable[str] | None = None) -> tuple[str, ...]:
    """A value that must be a list of strings, of those that are known."""
    if not isinstance(values, list):
        raise TypeError(f"a list is expected, not {values!r}")
    texts = tuple(map(_text, values))
    if known is not None and not set(texts) <= set(known):
        raise ValueError(f"{sorted(set(texts) - set(known))} are not known")
    return texts


def _checked_target(target: QuantTarget) -> QuantTarget:
    """A target whose fields are of their types."""
    _text(target.name)
    if target.quantizer is not None:
        _text(target.quantizer)
    _check_flags(target.weights, target.activations)
    return target


def _check_flags(*specs: QuantSpec) -> None:
    """Raise unless what says yes or no does."""
    for spec in specs:
        if not isinstance(spec.symmetric, bool) or not isinstance(spec.narrow_range, bool):
            raise TypeError(f"yes or no are expected in {spec!r}")


def _known_tensor(values: Mapping[str, Any]) -> dict[str, Any]:
    """Shape, dtype and hash of a tensor, as JSON holds them."""
    shape = [int(size) for size in values["shape"]]
    return {"shape": shape, "dtype": _text(values["dtype"]), "sha256": _text(values["sha256"])}


def _quantizer_state(name: str, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What :func:`~lightning_quantdebug.session_state.load_state` takes of a quantizer, checked to be a grid."""
    spec, axis = QuantSpec(**values["spec"]), values["channel_axis"]
    scale, zero_point = tensors.get(f"scale/{name}"), tensors.get(f"zero_point/{name}")
    _check_flags(spec)
    if not isinstance(values["frozen"], bool):
        raise TypeError(f"yes or no is expected for {name!r}, not {values['frozen']!r}")
    if (scale is not None and zero_point is not None) is not values["calibrated"]:
        raise ValueError(f"{name!r} has no scale and zero point")
    if scale is not None and zero_point is not None:
        Encoding(spec, scale, zero_point, axis)
    known = {"spec": dict(values["spec"]), "channel_axis": axis, "frozen": values["frozen"]}
    return {**known, "scale": scale, "zero_point": zero_point, "ratio": None, "count": None}


def apply_recipe(model: nn.Module, path: str | Path, *, quantizer: str | None = None) -> QuantizedModel:
    """The quantized model that was accepted, from its float weights and a recipe.

    Args:
        model: The LightningModule that was diagnosed, or the network in it that the recipe was made of, with the
            weights that it was diagnosed with (after QAT: the trained ones). It is not changed.
        path: The directory ``recipe`` that QuantDebug wrote.
        quantizer: Import path of your own quantizer class, where the model was diagnosed with one. A recipe can not
            bring code along: you say here that this class may run.

    Returns:
        A module that is called as the network is, and runs it in eval mode with the quantizers on.

    Raises:
        RecipeError: If the recipe can not be read, or belongs to another model or to other weights.

    Examples:
        >>> from lightning_quantdebug import instrument
        >>> from lightning_quantdebug.recipe import save_recipe
        >>> model, batch = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 4)
        >>> with instrument(model, batch) as q:
        ...     q.calibrate([batch])
        ...     q.set_mode("quantize")
        ...     accepted = model(batch)
        ...     directory = save_recipe(q, batch, f"{tempfile.mkdtemp()}/recipe")
        >>> torch.equal(apply_recipe(model, directory)(batch), accepted)
        True
    """
    recipe = Recipe.load(path)
    named = recipe.target.quantizer
    if named != quantizer:
        raise RecipeError(
            f"The recipe was made with the quantizer class {named!r}, `quantizer` is {quantizer!r}: pass the same "
            "import path, so that it is you who says which code runs."
        )
    return QuantizedModel(model, recipe)


def save_recipe(session: Instrumentation, example_batch: Any, path: str | Path) -> Path:
    """Write the recipe of a model inside ``with instrument(...) as session``.

    Args:
        session: What :func:`~lightning_quantdebug.instrument.instrument` yields, calibrated. Every quantizer with a
            range is in the recipe, whatever its mode.
        example_batch: What ``forward`` takes, as given to ``instrument``.
        path: The directory to write.

    Returns:
        The directory.

    Raises:
        RecipeError: If it can not be written, or no quantizer has a range.
    """
    call = call_of(example_batch)
    return Recipe.of(session, network_of(session, call), call, origin_of(session.root)).save(path)


class QuantizedModel(nn.Module):
    """A model with a recipe on it.

    Args:
        model: See :func:`apply_recipe`.
        recipe: The recipe.

    Attributes:
        model: The model, as it was given.
        recipe: The recipe.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        """Check that both belong together; nothing runs yet."""
        super().__init__()
        root = _root_of(model, recipe)
        recipe.check(root)
        self.model = model
        self.recipe = recipe
        with _own_errors():
            self.__dict__["network"] = Network(root, recipe.path, tuple(recipe.inputs.values()))
            load_custom_quantizer(recipe.target.quantizer)
        self._session: Instrumentation | None = None
        self._never_seen: set[str] = set()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network in eval mode with the quantizers on.

        Raises:
            RecipeError: If the model runs other operations than the recipe was made of.
        """
        call = NetworkCall(args, kwargs)
        with eval_mode(self.model):
            session = self.session(call)
            before = dict(session.unseen)
            output = self.network.run(session, args, kwargs)
            new = {name for name, count in session.unseen.items() if count != before.get(name)} - self._never_seen
            if not new:
                return output
            # A branch that no call has taken before: its quantizers are placed, and the call is run again.
            self._session = None
            self._place(session, call)
            self._session = session
            output = self.network.run(session, args, kwargs)
            self._never_seen |= session.unseen.keys()
            return output

    @property
    def network(self) -> Network:
        """What is called."""
        found: Network = self.__dict__["network"]
        return found

    def session(self, call: NetworkCall) -> Instrumentation:
        """The quantizers on the network; they are placed when it is called first."""
        if self._session is None:
            recipe = self.recipe
            with _own_errors():
                session = Instrumentation(
                    self.network.root, recipe.target, module=recipe.scope or None, exclude=recipe.exclude
                )
            session.topology = recipe.wiring.topology(taken=(*recipe.state["quantizers"], *recipe.state["adjustments"]))
            self._place(session, call)
            self._session = session
        return self._session

    def _place(self, session: Instrumentation, call: NetworkCall) -> None:
        """Record a call, and give every quantizer what the recipe says."""
        recipe = self.recipe
        names = argument_names(self.network, call)
        inputs = tuple(recipe.inputs.get(name, "") for name in names)
        if not recipe.inputs.keys() & set(names):
            # A forward whose arguments are called otherwise: their order is all that is left.
            inputs = self.network.inputs
        with lent(self.model), _own_errors():
            replace(self.network, inputs=inputs).record(session, call.args, call.kwargs)
            session.place()
            missing = [name for name in recipe.reached if name not in session.quantizers]
            if missing:
                raise RecipeError(
                    f"The model runs other operations than the recipe was made of: it has no {missing[:3]}"
                    f"{_and_more(missing)}; it has {sorted(session.quantizers)[:3]}. Either its code has changed since "
                    f"(recipe: {_versions(recipe.origin)}), or these data take a path that was never calibrated."
                )
            recipe.check_sites(session)
            load_state(session, recipe.state)
        for item in session.quantizers.values():
            item.mode = Mode.QUANTIZE

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedModel:
        """A copy of the model with the same recipe."""
        return QuantizedModel(copy.deepcopy(self.model, memo), self.recipe)

    def __reduce__(self) -> Any:
        """Pickle as model and recipe."""
        return QuantizedModel, (self.model, self.recipe)


@contextmanager
def _own_errors(what: str = "The recipe can not be put on the model") -> Iterator[None]:
    """What can not be captured or set with a recipe is an error of the recipe."""
    try:
        yield
    except (CaptureError, SettingsError) as error:
        raise RecipeError(f"{what}: {error}") from error


def network_of(session: Instrumentation, call: NetworkCall) -> Network:
    """The network of a session that was recorded by calling its root with such a batch."""
    batch: Any = call.kwargs if call.kwargs else call.args
    names = input_names(batch)
    return Network(session.root, "", tuple(names.get(id(tensor), "") for tensor in call.tensors))


def call_of(batch: Any) -> NetworkCall:
    """A batch as ``instrument`` takes it, as a call."""
    if isinstance(batch, Mapping):
        return NetworkCall((), dict(batch))
    return NetworkCall(tuple(batch) if isinstance(batch, (tuple, list)) else (batch,), {})


def origin_of(model: nn.Module, **further: Any) -> dict[str, Any]:
    """What a recipe tells of where it comes from."""
    kind = type(model)
    versions = {"lightning_quantdebug": own_version(), "torch": str(torch.__version__)}
    return {**versions, "model": f"{kind.__module__}.{kind.__qualname__}", **further}


def own_version() -> str:
    """Version of this package, ``unknown`` where it runs without being installed."""
    try:
        return importlib.metadata.version("lightning-quantdebug")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def fingerprints(model: nn.Module, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Shape, dtype and SHA-256 of the bytes of parameters and buffers, by their names."""
    wanted = set(names)
    return {name: _fingerprint(tensor) for name, tensor in _named(model) if name in wanted}


def _fingerprint(tensor: Tensor) -> dict[str, Any]:
    """Shape, dtype and SHA-256 of one tensor."""
    digest = hashlib.sha256()
    hash_bytes(digest, tensor)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"shape": list(tensor.shape), "dtype": dtype, "sha256": digest.hexdigest()}


def _named(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Parameters and buffers by the names that recording gives them."""
    both = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return [(clean_path(name), tensor) for name, tensor in both]


def _recorded(session: Instrumentation, network: Network, call: NetworkCall, wiring: Wiring) -> Instrumentation:
    """Quantizers as those of a session on what one call of the network runs."""
    root = network.root
    own = Instrumentation(root, session.target, module=session.scope or None, exclude=session.exclude)
    own.topology = wiring.topology()
    with lent(root):
        network.record(own, call.args, call.kwargs)
    own.place()
    return own


def _read_by(session: Instrumentation, network: Network) -> set[str]:
    """Names of the parameters and buffers that the network's operations read, and that belong to their layers."""
    own = {name for name, _ in _named(session.root)}
    operations = [operation for operation in session.topology if network.holds(operation)]
    return {value.name for operation in operations for _, value in operation.inputs if value.name in own}


def _settled(session: Instrumentation) -> dict[str, Any]:
    """The state of a session, with trained scales as they are now."""
    state = state_of(session)
    for name, values in state["quantizers"].items():
        encoding = session.quantizers[name].encoding
        if encoding is not None:
            values |= {"scale": encoding.scale, "zero_point": encoding.zero_point, "ratio": None, "count": None}
    return state


def _root_of(model: nn.Module, recipe: Recipe) -> nn.Module:
    """The model, or a holder that gives the network the path that it had in the LightningModule."""
    names = {name for name, _ in _named(model)}
    prefix = f"{recipe.path}."
    is_whole = recipe.tensors.keys() <= names if recipe.tensors else recipe.path in dict(model.named_modules())
    if not recipe.path or is_whole:
        return model
    if not all(name.removeprefix(prefix) in names for name in recipe.tensors):
        return model
    holder: nn.Module = model
    for part in reversed(recipe.path.split(".")):
        outer = nn.Module()
        outer.add_module(part, holder)
        holder = outer
    return holder


def _example_of(call: NetworkCall) -> dict[str, Any]:
    """What a call looks like, without its values; empty where it holds what can not be written down."""
    try:
        return {"args": _described(call.args), "kwargs": _described(call.kwargs)}
    except (TypeError, RuntimeError):
        return {}


def _described(value: Any) -> dict[str, Any]:
    """A tensor's shape, dtype and range, a plain value, or tuples, lists and dicts of them."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _described(item) for key, item in value.items()}}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_described(item) for item in value]}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    if not isinstance(value, Tensor):
        raise TypeError(f"{type(value).__name__} is no plain value")
    dtype = str(value.dtype).removeprefix("torch.")
    described: dict[str, Any] = {"shape": list(value.shape), "dtype": dtype}
    if value.numel() and not value.is_complex():
        finite = value.detach()[value.isfinite()] if value.is_floating_point() else value.detach()
        if finite.numel():
            described |= {"min": finite.min().item(), "max": finite.max().item()}
    return described


def _made(described: Mapping[str, Any], generator: torch.Generator) -> Any:
    """Random tensors as :func:`_described` tells, in the same structure."""
    if "value" in described:
        return described["value"]
    if "dict" in described:
        return {key: _made(item, generator) for key, item in described["dict"].items()}
    for kind in (tuple, list):
        if kind.__name__ in described:
            return kind(_made(item, generator) for item in described[kind.__name__])
    dtype = getattr(torch, described["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{described['dtype']!r} is no dtype")
    shape, low, high = described["shape"], described.get("min", 0), described.get("max", 0)
    if dtype.is_floating_point:
        share = torch.rand(shape, generator=generator, dtype=torch.float64)
        return (float(low) * (1.0 - share) + float(high) * share).clamp(low, high).to(dtype)
    return torch.randint(int(low), int(high) + 1, shape, generator=generator).to(dtype)


def _refuse_others(directory: Path) -> None:
    """Raise unless a directory is none, is empty or holds a recipe alone: what is in it will be deleted.

    Raises:
        RecipeError: If something else is in the way.
    """
    others = [item.name for item in directory.iterdir()] if directory.exists() else []
    others = sorted(set(others) - {_SETTINGS, _TENSORS})
    if others:
        raise RecipeError(
            f"{str(directory)!r} holds other files than a recipe ({others[:3]}{_and_more(others)}), which writing it "
            "would delete: give a directory of its own."
        )


def _put_in_place(fresh: Path, directory: Path) -> None:
    """Let a finished directory take the place of an older one, which stays where it is if that fails."""
    if not directory.exists():
        fresh.replace(directory)
        return
    away = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-old-"))
    old = away / directory.name
    try:
        directory.replace(old)
        try:
            fresh.replace(directory)
        except OSError:
            old.replace(directory)
            raise
    finally:
        shutil.rmtree(away, ignore_errors=True)


def _and_more(names: list[str]) -> str:
    """How many more there are than the three that are named."""
    return f" and {len(names) - 3} more" if len(names) > 3 else ""


def _versions(origin: Mapping[str, Any]) -> str:
    """The versions that a recipe was made with."""
    return ", ".join(f"{name} {origin[name]}" for name in ("lightning_quantdebug", "torch") if name in origin)
