"""Queryable memory as a PEFT tuner: import this package, then use PEFT's own functions.

Example:
    >>> from peft import get_peft_model
    >>> from qmemtune.adapters.queryable import QueryableMemoryConfig
    >>> model = get_peft_model(base, QueryableMemoryConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
"""

from qmemtune.adapters.queryable.config import QueryableMemoryConfig
from qmemtune.adapters.queryable.fixed import FixedWeights, fixed_weights
from qmemtune.adapters.queryable.layer import QueryableLinear
from qmemtune.adapters.queryable.memory import QueryableMemory, has_means, memory_of
from qmemtune.adapters.queryable.model import QueryableMemoryModel
from qmemtune.adapters.queryable.registration import QUERYABLE, register

register(QueryableMemoryConfig, QueryableMemoryModel)

__all__ = [
    "QUERYABLE",
    "FixedWeights",
    "QueryableLinear",
    "QueryableMemory",
    "QueryableMemoryConfig",
    "QueryableMemoryModel",
    "fixed_weights",
    "has_means",
    "memory_of",
]
