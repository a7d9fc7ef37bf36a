"""What a base model consists of, read from its config alone: no weight is loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from qmemtune.config.model import ModelConfig, QuantizationConfig
from qmemtune.models.bitsandbytes import bitsandbytes_config
from qmemtune.models.configs import empty_model, read_config
from qmemtune.models.loading import refuse_stored_quantised
from qmemtune.models.sources import Source


@dataclass(frozen=True)
class Layout:
    """The modules of a base model and how their weights are called in its files."""

    model: PreTrainedModel
    """On the meta device."""
    quantised: frozenset[str]
    """Paths of the layers that the run kept in 4 or 8 bits."""
    tied: dict[str, str]
    """Name of a weight that the files need not hold -> name of the one that it is."""

    def is_transposed(self, path: str) -> bool:
        """Whether the weight is stored (in_features, out_features)."""
        return isinstance(self.model.get_submodule(path), Conv1D)

    def is_linear(self, path: str) -> bool:
        """Whether ``path`` is a layer whose weight a low-rank update can be added to."""
        try:
            return isinstance(self.model.get_submodule(path), nn.Linear | Conv1D)
        except AttributeError:
            return False

    def names(self, stored: Iterable[str]) -> dict[str, str]:
        """Name of each weight in the model -> its name in the files, where the two are one tensor.

        Older files, and those of bare decoders, use other names; transformers renames them on loading. A tensor that
        is put together from several, or cut up, is left out.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        known = self.model.state_dict()
        found = {}
        for name in stored:
            renamed, converter = rename_source_key(
                name, renamings, converters, self.model.base_model_prefix or None, known
            )
            if converter is None and renamed in known:
                found[renamed] = name
        return found


def read_layout(config: ModelConfig, quantization: QuantizationConfig, source: Source, dtype: torch.dtype) -> Layout:
    """The layout of a base model.

    Args:
        source: where the model lies.
        dtype: the compute dtype of a quantised base.

    Raises:
        UserError: the config cannot be read, or the files are stored quantised.
    """
    found = read_config(source, config)
    refuse_stored_quantised(source, found)
    model = empty_model(source, config, found)
    tied = dict(model.all_tied_weights_keys or {})
    quantised: frozenset[str] = frozenset()
    bits = bitsandbytes_config(quantization, dtype)
    if bits is not None:
        # The same choice of layers as on loading, made on a copy: names and kinds of the layers are asked for later.
        replaced = copy.deepcopy(model)
        quantiser = AutoHfQuantizer.from_config(bits)
        quantiser.preprocess_model(model=replaced, device_map={"": "cpu"})
        before = dict(model.named_modules())
        quantised = frozenset(
            path
            for path, module in replaced.named_modules()
            if path in before and type(module) is not type(before[path]) and not isinstance(module, PreTrainedModel)
        )
    return Layout(model, quantised, tied)
