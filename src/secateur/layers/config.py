"""Registers the model type ``secateur``: the config of a converted folder becomes one of its architecture's class."""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from secateur.layers.spec import NAME, stock_config


class ConvertedConfig(PreTrainedConfig):
    """Stands for the model type only: reading it gives the config of the architecture, its layers as they are."""

    model_type = NAME

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of the architecture.

        Raises:
            CheckpointError: when the dictionary does not say which it is.
        """
        stock = stock_config(config_dict)
        return CONFIG_MAPPING[stock["model_type"]].from_dict(stock, **kwargs)


if NAME not in CONFIG_MAPPING:
    AutoConfig.register(NAME, ConvertedConfig)
