"""Which families the coverage table has a row for: read from the maps of the installed transformers, not chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MAPS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "encoder": modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
}
"""Kind -> transformers' map of model types to classes. An encoder gets a row when it is in no map before."""


@dataclass(frozen=True)
class Family:
    """One row: a model type and the class that one of the maps gives it."""

    kind: str
    model_type: str
    class_name: str

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.model_type}"

    @property
    def config_class(self) -> Any:
        """The config class of the model type.

        Raises:
            KeyError: when transformers has none, as for a class name that stands in a map by mistake.
        """
        return CONFIG_MAPPING[self.model_type]

    @property
    def model_class(self) -> Any:
        return getattr(transformers, self.class_name)


def families() -> list[Family]:
    """All rows. A class that serves several model types with one config class, or stands in two maps, comes once."""
    found: list[Family] = []
    seen: set[tuple[str, str]] = set()
    types: set[str] = set()
    for kind, names in MAPS.items():
        for model_type, classes in names.items():
            class_name = classes if isinstance(classes, str) else classes[0]
            known = CONFIG_MAPPING.get(model_type, None)
            if known is not None and known.model_type in names and known.model_type != model_type:
                continue  # an old name beside that of the config
            config = known.__name__ if known is not None else model_type
            if (config, class_name) in seen or (kind == "encoder" and model_type in types):
                continue
            seen.add((config, class_name))
            found.append(Family(kind, model_type, class_name))
        types |= set(names)
    return found
