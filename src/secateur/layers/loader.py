"""Registers with transformers what puts the layers of a converted model in place before its weights are loaded.

The hook is the one for quantised models, the only one that transformers has for layers of other packages. Nothing here
is quantised.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from secateur.layers.spec import ENTRY, METHOD, read_spec

if METHOD not in AUTO_QUANTIZER_MAPPING:

    @register_quantization_config(METHOD)
    class LayersConfig(QuantizationConfigMixin):
        """The entry of the config, as it is."""

        def __init__(self, **entry: Any) -> None:
            self.__dict__.update(entry)

    @register_quantizer(METHOD)
    class LayersLoader(HfQuantizer):
        """Replaces the layers that the config names."""

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            from secateur.layers.replace import replace_layers

            replace_layers(model, read_spec({ENTRY: self.quantization_config.to_dict()}))
            return model

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            # Ordinary numbers: they may be cast and trained, which transformers refuses for quantised ones.
            model.is_quantized = False
            return model

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

        @property
        def is_qat_trainable(self) -> bool:
            return True
