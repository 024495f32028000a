"""The quantiser that transformers runs while it loads a model: weights are packed, or read packed, one at a time.

    dense checkpoint          weight -> device, dtype -> _Pack -> NF4Linear in the layer's place
    bitsandbytes checkpoint   weight, weight.absmax, ... -> _Unpack -> NF4Linear in the layer's place

transformers reads a weight only when it converts it, so no more than one dense weight is alive beside the packed ones.
It catches whatever is raised during a conversion and ends with a general error, so what is wrong with the weights is
noted, and raised as one message when all have been seen.

Registered under a name of fastpeft's own by importing this module; nothing of transformers is changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from fastpeft.errors import UserError
from fastpeft.models.choose import PACKABLE, choose_layers
from fastpeft.models.nf4_config import QUANT_METHOD, NF4Config
from fastpeft.models.replace import linear_sizes
from fastpeft.nn import NF4Linear
from fastpeft.ops import NF4Weight, nf4_quantize
from fastpeft.ops.nf4_weight import STATE_KEY

_FP4_KEY = "weight.quant_state.bitsandbytes__fp4"
# The tensors of one packed weight; also an FP4 one's, so that it can be named in the complaint.
_STORED = (
    *("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
    *(f"weight.{STATE_KEY}", _FP4_KEY),
)
_MOST_LISTED = 8


@register_quantizer(QUANT_METHOD)
class NF4Quantizer(HfQuantizer):
    """Packs linear layers into NF4 while a model is loaded, and reads those that are packed already.

    Args:
        quantization_config: how.
        kwargs: transformers' ``pre_quantized``: whether the checkpoint is packed.
    """

    requires_calibration = False
    quantization_config: NF4Config

    def __init__(self, quantization_config: NF4Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._planned: set[str] = set()
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
        return [WeightConverter(list(_STORED), "weight", [_Unpack(self)])] if self.pre_quantized else []

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            names = set(choose_layers(model, self.quantization_config.skip_modules))
        else:  # an estimate for the device map: which layers are packed, the file says
            dense = self.get_modules_to_not_convert(model, self.quantization_config.dense_patterns)
            names = {
                name
                for name, module in model.named_modules()
                if type(module) in PACKABLE and should_convert_module(name, dense)
            }
        self._planned = {f"{name}.weight" for name in names}
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            self._pack_the_rest(model)
        if self._wrong:
            more = len(self._wrong) - _MOST_LISTED
            lines = [*self._wrong[:_MOST_LISTED], *([f"and {more} more"] if more > 0 else [])]
            raise UserError(
                f"{model.name_or_path or type(model).__name__}: {len(self._wrong)} weights cannot be used:\n"
                + "\n".join(f"  {line}" for line in lines)
                + "\n  Copy or download the checkpoint again, or use an earlier one"
            )
        for layer in _packed(model):
            if layer.bias is not None:
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
        """Pack the dense weight of one layer and put the packed layer in its place.

        Args:
            model: being loaded.
            name: the weight's full name.
            value: the weight.
        Returns:
            What becomes the parameter of that name.
        """
        if name not in self._planned:
            return value
        path = name.removesuffix(".weight")
        layer = model.get_submodule(path)
        value = value.t() if isinstance(layer, Conv1D) else value
        if tuple(value.shape) != linear_sizes(layer):
            self._wrong.append(f"{name} has shape {tuple(value.shape)}, the model's layer {linear_sizes(layer)}")
        elif not value.isfinite().all():
            self._wrong.append(f"{name} holds NaN or Inf")
        else:
            config = self.quantization_config
            return _put(model, path, nf4_quantize(value, config.block_size, config.double_quant))
        return value

    def unpack(self, model: PreTrainedModel, name: str, stored: dict[str, Tensor]) -> Tensor | None:
        """Put a packed layer in the place of the dense one, from its stored tensors.

        Args:
            model: being loaded.
            name: the weight's full name.
            stored: tensors by the keys from "weight" on; "weight" alone is a dense weight.
        Returns:
            What becomes the parameter of that name; None where it cannot be used.
        """
        path = name.removesuffix(".weight")
        layer = model.get_submodule(path)
        if set(stored) == {"weight"}:
            return self._dense(model, name, stored["weight"])
        try:
            nf4 = _read(stored)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._wrong.append(f"{name}: {error}")
            return None
        if type(layer) not in PACKABLE:
            self._wrong.append(f"{name} is packed, and the model has a {type(layer).__name__} there")
        elif nf4.shape != linear_sizes(layer):
            self._wrong.append(f"{name} has shape {nf4.shape}, the model's layer {linear_sizes(layer)}")
        else:
            return _put(model, path, nf4)
        return None

    def note_missing(self, missing: set[str] | None) -> None:
        """Keep the set in which transformers holds the parameters it has not met yet.

        Args:
            missing: that set.
        """
        self._missing = missing

    def _dense(self, model: PreTrainedModel, name: str, value: Tensor) -> Tensor | None:
        """A weight that the file holds dense, in the model's dtype: transformers casts none that pass a conversion."""
        place = model.get_parameter_or_buffer(name)
        if value.dtype == torch.uint8 and name in self._planned:
            self._wrong.append(f"{name} is packed, but its scales (weight.absmax, ...) are missing")
            return None
        if name in self._planned and value.shape != place.shape:
            self._wrong.append(f"{name} has shape {tuple(value.shape)}, the model's layer {tuple(place.shape)}")
            return None
        if not value.is_floating_point():
            return value
        kept = model._keep_in_fp32_modules or ()
        return value.to(torch.float32 if any(part in kept for part in name.split(".")) else place.dtype)

    def _pack_the_rest(self, model: PreTrainedModel) -> None:
        """Pack layers whose weight came out of a conversion under another layer's name; note those that never came."""
        loaded = self._missing is not None
        for name in sorted(self._planned):
            layer = model.get_submodule(name.removesuffix(".weight"))
            if isinstance(layer, NF4Linear) or any(wrong.startswith(f"{name} ") for wrong in self._wrong):
                continue
            if not loaded or (self._missing is not None and name in self._missing):
                self._wrong.append(f"{name} is not in the checkpoint")
            else:
                assert isinstance(layer.weight, Tensor)
                self.pack(model, name, layer.weight.detach())


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
        stored = {key: _single(value) for key, value in input_dict.items()}
        value = self.hf_quantizer.unpack(kwargs["model"], kwargs["full_layer_name"], stored)
        return {} if value is None else {"weight": value}

    @property
    def reverse_op(self) -> ConversionOps:
        return _AsItIs()


class _AsItIs(ConversionOps):
    """The way back when a model is saved: a packed layer's state dict has the file's keys already."""

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
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:  # saving would run them backwards
        model._weight_conversions = [  # type: ignore[assignment]
            conversion
            for conversion in conversions
            if not any(isinstance(op, _Unpack) for op in getattr(conversion, "operations", ()))
        ]


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
    dense = [name for name, module in model.named_modules() if type(module) in PACKABLE]
    # Never empty: bitsandbytes takes an empty list as "choose by yourself", which leaves another set dense.
    config.dense_patterns = dense or ["no_module_is_left_dense"]
    config.double_quant = packed[0].nf4.double_quant
    config.block_size = packed[0].nf4.block_size
    config.compute_dtype = config.compute_dtype or model.dtype
    model.config.quantization_config = config


def _packed(model: nn.Module) -> Iterator[NF4Linear]:
    return (module for module in model.modules() if isinstance(module, NF4Linear))


def _single(value: Tensor | list[Tensor]) -> Tensor:
    return value[0] if isinstance(value, list) else value


def _read(stored: dict[str, Tensor]) -> NF4Weight:
    """Read and check a packed weight; ValueError says what is wrong."""
    if _FP4_KEY in stored:
        raise ValueError("is packed as FP4; fastpeft reads NF4 only")
    nf4 = NF4Weight.from_state_dict(stored)
    if nf4.absmax.dtype != (torch.uint8 if nf4.double_quant else torch.float32):
        raise ValueError(f"its scales are {nf4.absmax.dtype}")
    for scales in (nf4.absmax, nf4.nested_absmax, nf4.offset):
        if scales is not None and scales.is_floating_point() and not scales.isfinite().all():
            raise ValueError("its scales hold NaN or Inf")
    return nf4


def _put(model: PreTrainedModel, path: str, nf4: NF4Weight) -> Tensor:
    """Replace a layer by a packed one; its weight is returned for transformers to register once more."""
    old = model.get_submodule(path)
    new = NF4Linear(nf4).train(old.training)
    new.bias = old.bias  # type: ignore[assignment]  # the object itself: transformers marked it as loaded
    new._is_hf_initialized = True  # type: ignore[assignment]
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    return new.weight
