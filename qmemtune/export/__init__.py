"""Write a trained adapter as something that others load: the adapter itself, a plain LoRA, or a merged model."""

from qmemtune.export.run import export_run

__all__ = ["export_run"]
