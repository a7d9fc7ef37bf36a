"""qmemtune: fine-tune language models with LoRA or a queryable memory of shared low-rank update atoms.

Importing this package is cheap and loads no torch. ``import qmemtune.adapters`` makes PEFT know the
queryable memory, so that ``PeftModel.from_pretrained`` loads it.
"""

__version__ = "0.1.0"
