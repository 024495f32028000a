"""The quantiser that transformers runs while it loads a model: weights are packed, or read packed, one at a time.

    dense checkpoint          weight -> device, dtype -> _Pack -> NF4Linear in the layer's place
    bitsandbytes checkpoint   weight, weight.absmax, ... -> _Unpack -> NF4Linear in the layer's place

The experts of a mixture have two weights. transformers joins each from the tensors of single experts and converts it
then; the first that is packed waits for the other, and both go into one NF4Experts. Saved, packed experts stay joined,
under the names that bitsandbytes gives to packed parameters; transformers would split them by expert.

transformers reads a weight only when it converts it, so no more than one dense weight is alive beside the packed ones.
It catches whatever is raised during a conversion and ends with a general error, so what is wrong with the weights is
noted, and raised as one message when all have been seen.

Registered under a name of fastpeft's own by importing this module; nothing of transformers is changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, PrefixChange, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from fastpeft.errors import UserError
from fastpeft.models.choose import LINEAR, choose_layers, is_packable, weight_names
from fastpeft.models.nf4_config import QUANT_METHOD, NF4Config
from fastpeft.models.replace import linear_sizes
from fastpeft.nn import NF4Experts, NF4Linear, NF4Module
from fastpeft.nn.experts import EXPERT_WEIGHTS, is_experts
from fastpeft.ops import NF4Weight, nf4_quantize
from fastpeft.ops.nf4_weight import STATE_KEY

_FP4_KEY = ".quant_state.bitsandbytes__fp4"
# What follows a packed weight's name in the keys of its tensors; also of an FP4 one's, to name it in the complaint.
_STORED = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", f".{STATE_KEY}", _FP4_KEY)
_MOST_LISTED = 8


@register_quantizer(QUANT_METHOD)
class NF4Quantizer(HfQuantizer):
    """Packs linear layers and experts into NF4 while a model is loaded, and reads those that are packed already.

    Args:
        quantization_config: how.
        kwargs: transformers' ``pre_quantized``: whether the checkpoint is packed.
    """

    requires_calibration = False
    quantization_config: NF4Config

    def __init__(self, quantization_config: NF4Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._planned: set[str] = set()
        self._experts: set[str] = set()  # names of the modules that can be packed as such
        self._waiting: dict[str, dict[str, NF4Weight]] = {}  # of these, what came first, by its name in them
        self._wrong: list[str] = []
        self._missing: set[str] | None = None

    # What transformers asks.

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on the packed model."""
        return True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether ``save_pretrained`` works: always."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``torch.compile`` takes the packed model."""
        return True

    @property
    def quantized_element_size(self) -> float:
        """Bytes a packed weight takes, of which a device map is made."""
        scales = 1 + 4 / 256 if self.quantization_config.double_quant else 4
        return 0.5 + scales / self.quantization_config.block_size

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a device map by which layers would wait in host memory or on disk for their turn.

        Raises:
            UserError: it places modules on a GPU and on the CPU or disk.
        """
        device_map = kwargs.get("device_map")
        places = {str(place) for place in device_map.values()} if isinstance(device_map, Mapping) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise UserError(
                f"NF4Config: the device map places modules on {', '.join(sorted(places))}; packed layers stay where "
                "they are, so use GPUs only, or the CPU only (device_map='cpu'), or free memory on the GPUs"
            )

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter becomes a packed weight.

        Args:
            model: the model.
            param_name: its full name.
            kwargs: not used.
        """
        return param_name in self._planned

    def get_quantize_ops(self) -> ConversionOps:
        """What packs a dense weight."""
        return _Pack(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """What collects the tensors of a packed weight."""
        if not self.pre_quantized:
            return []
        last_parts = sorted({name.rpartition(".")[2] for name in self._experts})
        # Linear layers first: that their keys end otherwise than the experts' is told from "weight" alone.
        names = ["weight", *(f".{part}.{weight}" for part in last_parts for weight in EXPERT_WEIGHTS)]
        return [
            WeightConverter([name.replace(".", r"\.") + stored for stored in _STORED], name, [_Unpack(self)])
            for name in names
        ]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self._experts = {name for name, module in model.named_modules() if is_experts(module)}
        if not self.pre_quantized:
            config = self.quantization_config
            layers = choose_layers(model, config.skip_modules, config.block_size)
        else:  # an estimate for the device map: which layers are packed, the file says
            dense = self.get_modules_to_not_convert(model, self.quantization_config.dense_patterns)
            layers = {
                name: module
                for name, module in model.named_modules()
                if is_packable(module) and should_convert_module(name, dense)
            }
        self._planned = set(weight_names(layers))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            self._pack_the_rest(model)
        self._complain_of_halves()
        if self._wrong:
            more = len(self._wrong) - _MOST_LISTED
            lines = [*self._wrong[:_MOST_LISTED], *([f"and {more} more"] if more > 0 else [])]
            raise UserError(
                f"{model.name_or_path or type(model).__name__}: {len(self._wrong)} weights cannot be used:\n"
                + "\n".join(f"  {line}" for line in lines)
                + "\n  Copy or download the checkpoint again, or use an earlier one"
            )
        for layer in _packed(model):
            if isinstance(layer, NF4Linear) and layer.bias is not None:
                layer.bias.requires_grad_(False)
        self._planned.clear()
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel, *args: Any) -> tuple[None, dict[str, Any]]:
        """Called before a model is saved: its configuration comes to say which layers are packed at that time.

        Args:
            model: the model to save.
            args: not used.
        Returns:
            None, for the model's own state dict, and no metadata.
        """
        describe(model, self.quantization_config)
        return None, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        from fastpeft.models.quantize import dequantize  # which imports this file

        return dequantize(model, dtype)

    # What the conversions call.

    def pack(self, model: PreTrainedModel, name: str, value: Tensor) -> Tensor:
        """Pack a dense weight, and put the packed layer in the layer's place.

        Args:
            model: being loaded.
            name: the weight's full name.
            value: the weight.
        Returns:
            What becomes the parameter of that name.
        """
        if name not in self._planned:
            return value
        value = value.t() if isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) else value
        if not self._fits(model, name, tuple(value.shape)):
            return value
        if not value.isfinite().all():
            self._wrong.append(f"{name} holds NaN or Inf")
            return value
        config = self.quantization_config
        return self._put(model, name, nf4_quantize(value, config.block_size, config.double_quant))

    def unpack(self, model: PreTrainedModel, name: str, stored: dict[str, Tensor]) -> Tensor | None:
        """Put a packed layer in the place of the dense one, from its stored tensors.

        Args:
            model: being loaded.
            name: the weight's full name.
            stored: tensors by the keys from the last part of the name on; that part alone is a dense weight.
        Returns:
            What becomes the parameter of that name; None where it cannot be used.
        """
        path, _, leaf = name.rpartition(".")
        if set(stored) == {leaf}:
            return self._dense(model, name, stored[leaf])
        try:
            nf4 = _read(stored, leaf)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._wrong.append(f"{name}: {error}")
            return None
        layer = model.get_submodule(path)
        if type(layer) not in LINEAR and path not in self._experts:
            self._wrong.append(f"{name} is packed, and the model has a {type(layer).__name__} there")
        elif self._fits(model, name, nf4.shape):
            self._planned.add(name)  # so that transformers expects another shape
            return self._put(model, name, nf4)
        return None

    def note_missing(self, missing: set[str] | None) -> None:
        """Keep the set in which transformers holds the parameters it has not met yet.

        Args:
            missing: that set.
        """
        self._missing = missing

    def _fits(self, model: PreTrainedModel, name: str, shape: tuple[int, ...]) -> bool:
        path, _, leaf = name.rpartition(".")
        layer = model.get_submodule(path)
        own = linear_sizes(layer) if type(layer) in LINEAR else tuple(layer.get_parameter(leaf).shape)
        if shape != own:
            self._wrong.append(f"{name} has shape {shape}, the model's layer {own}")
        return shape == own

    def _put(self, model: PreTrainedModel, name: str, nf4: NF4Weight) -> Tensor:
        """Replace a layer by a packed one; its weight is returned for transformers to register once more."""
        path, _, leaf = name.rpartition(".")
        old = model.get_submodule(path)
        new: NF4Module
        if path in self._experts:
            weights = self._waiting.setdefault(path, {})
            weights[leaf] = nf4
            if len(weights) < len(EXPERT_WEIGHTS):
                return nn.Parameter(nf4.codes, requires_grad=False)
            new = NF4Experts(old, **self._waiting.pop(path))
        else:
            new = NF4Linear(nf4).train(old.training)
            new.bias = old.bias  # type: ignore[assignment]  # the object itself: transformers marked it as loaded
        new._is_hf_initialized = True  # type: ignore[assignment]
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
        return new.get_parameter(leaf)

    def _dense(self, model: PreTrainedModel, name: str, value: Tensor) -> Tensor | None:
        """A weight that the file holds dense, in the model's dtype: transformers casts none that pass a conversion."""
        place = model.get_parameter_or_buffer(name)
        leaf = name.rpartition(".")[2]
        if value.dtype == torch.uint8 and name in self._planned:
            self._wrong.append(f"{name} is packed, but its scales ({leaf}.absmax, ...) are missing")
            return None
        if name in self._planned and value.shape != place.shape:
            self._wrong.append(f"{name} has shape {tuple(value.shape)}, the model's layer {tuple(place.shape)}")
            return None
        if not value.is_floating_point():
            return value
        kept = model._get_dtype_plan(place.dtype)  # patterns of what stays float32 in a model of this dtype
        return value.to(next((kept[p] for p in kept if re.search(p.replace("*", ".*"), name)), place.dtype))

    def _pack_the_rest(self, model: PreTrainedModel) -> None:
        """Pack layers whose weight came out of a conversion under another layer's name; note those that never came."""
        loaded = self._missing is not None
        for name in sorted(self._planned):
            path, _, leaf = name.rpartition(".")
            layer = model.get_submodule(path)
            done = isinstance(layer, NF4Module) or leaf in self._waiting.get(path, ())
            if done or self._is_wrong(name):
                continue
            if not loaded or (self._missing is not None and name in self._missing):
                self._wrong.append(f"{name} is not in the checkpoint")
            else:
                self.pack(model, name, layer.get_parameter(leaf).detach())

    def _complain_of_halves(self) -> None:
        """Note experts of which one weight is packed and the other is not."""
        for path, weights in self._waiting.items():
            (one,) = weights
            (other,) = (f"{path}.{weight}" for weight in EXPERT_WEIGHTS if weight != one)
            if not self._is_wrong(other):
                self._wrong.append(f"{other} is dense or missing, and {path}.{one} packed")

    def _is_wrong(self, name: str) -> bool:
        return any(wrong.startswith((f"{name} ", f"{name}:")) for wrong in self._wrong)


class _Pack(ConversionOps):
    def __init__(self, quantizer: NF4Quantizer) -> None:
        self._quantizer = quantizer

    def convert(self, input_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        model = kwargs["model"]
        self._quantizer.note_missing(kwargs.get("missing_keys"))
        return {name: self._quantizer.pack(model, name, _single(value)) for name, value in input_dict.items()}


class _Unpack(ConversionOps):
    def __init__(self, quantizer: NF4Quantizer) -> None:
        self.hf_quantizer = quantizer  # by this name transformers knows not to cast what comes in

    def __deepcopy__(self, memo: dict[int, Any]) -> _Unpack:
        return self  # transformers copies the conversion for each weight; what is noted must reach the one quantiser

    def convert(self, input_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        (target,) = kwargs["target_patterns"]
        before = target.rpartition(".")[0] + "." if "." in target else ""
        stored = {key.replace("\\", "").removeprefix(before): _single(value) for key, value in input_dict.items()}
        value = self.hf_quantizer.unpack(kwargs["model"], kwargs["full_layer_name"], stored)
        return {} if value is None else {target: value}

    @property
    def reverse_op(self) -> ConversionOps:
        return _AsItIs()


class _AsItIs(ConversionOps):
    """The way back when a model is saved: a packed layer's state dict has the file's keys already."""

    @property
    def reverse_op(self) -> ConversionOps:
        return self

    def convert(self, input_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return dict(input_dict)


def remember_quantizer(model: PreTrainedModel, config: NF4Config) -> None:
    """Tell a model that was packed after loading what one that was packed while loading knows.

    Args:
        model: the packed model.
        config: how it was packed.
    """
    quantizer = NF4Quantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    model.is_quantized = True  # type: ignore[assignment]
    model.quantization_method = config.quant_method  # type: ignore[assignment]
    describe(model, config)


def forget_quantizer(model: PreTrainedModel) -> None:
    """Take away what a model knows of having been packed.

    Args:
        model: a model without packed layers.
    """
    for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if name in vars(owner):
            delattr(owner, name)
    model.is_quantized = False  # type: ignore[assignment]
    _set_conversions(model)


def describe(model: PreTrainedModel, config: NF4Config) -> None:
    """Make a model's configuration say which of its layers are packed, by full names; nothing if none is.

    Args:
        model: any model; merging adapters may have unpacked its layers.
        config: what the model was packed by; changed.
    """
    packed = list(_packed(model))
    if not packed:
        forget_quantizer(model)
        return
    dense = [name for name, module in model.named_modules() if is_packable(module)]
    # Never empty: bitsandbytes takes an empty list as "choose by yourself", which leaves another set dense.
    config.dense_patterns = dense or ["no_module_is_left_dense"]
    nf4 = next(iter(packed[0].packed.values()))
    config.double_quant = nf4.double_quant
    config.block_size = nf4.block_size
    config.compute_dtype = config.compute_dtype or model.dtype
    model.config.quantization_config = config
    _set_conversions(model)


def _set_conversions(model: PreTrainedModel) -> None:
    """Say what saving runs backwards: nothing on packed weights, and on dense experts what splits them.

    transformers runs what it used while it loaded, and of a file with packed experts it used nothing for dense ones.
    """
    own: list[Any] | None = getattr(model, "_weight_conversions", None)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, NF4Module)}
    experts = [name for name, module in packed.items() if isinstance(module, NF4Experts)]
    if not experts and not any(_is_ours(conversion) for conversion in own or ()):
        return
    known = get_model_conversion_mapping(model, add_legacy=False)
    if own is None:  # as transformers has it for a model that it has not loaded
        kept = [conversion for conversion in known if not isinstance(conversion, PrefixChange)]
    else:
        kept = [conversion for conversion in own if not _is_ours(conversion)]
        targets = {target for conversion in kept for target in conversion.target_patterns}
        kept += [c for c in known if _makes_experts(c) and targets.isdisjoint(c.target_patterns)]
        if len(packed) > len(experts):
            kept += [c for c in own if _is_ours(c) and c.target_patterns == ["weight"]]
    names = [f"{name}.{weight}" for name in experts for weight in EXPERT_WEIGHTS]
    kept += [WeightConverter([name], [name], [_AsItIs()]) for name in names]
    model._weight_conversions = kept  # type: ignore[assignment]


def _is_ours(conversion: Any) -> bool:
    return any(isinstance(op, (_Unpack, _AsItIs)) for op in getattr(conversion, "operations", ()))


def _makes_experts(conversion: Any) -> bool:
    ends = {target.rpartition(".")[2] for target in conversion.target_patterns}
    return isinstance(conversion, WeightConverter) and not ends.isdisjoint(EXPERT_WEIGHTS)


def _packed(model: nn.Module) -> Iterator[NF4Module]:
    return (module for module in model.modules() if isinstance(module, NF4Module))


def _single(value: Tensor | list[Tensor]) -> Tensor:
    return value[0] if isinstance(value, list) else value


def _read(stored: dict[str, Tensor], name: str) -> NF4Weight:
    """Read and check a packed weight; ValueError says what is wrong."""
    if name + _FP4_KEY in stored:
        raise ValueError("is packed as FP4; fastpeft reads NF4 only")
    nf4 = NF4Weight.from_state_dict(stored, name=name)
    if nf4.absmax.dtype != (torch.uint8 if nf4.double_quant else torch.float32):
        raise ValueError(f"its scales are {nf4.absmax.dtype}")
    for scales in (nf4.absmax, nf4.nested_absmax, nf4.offset):
        if scales is not None and scales.is_floating_point() and not scales.isfinite().all():
            raise ValueError("its scales hold NaN or Inf")
    return nf4
