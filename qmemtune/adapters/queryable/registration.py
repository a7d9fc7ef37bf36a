"""The seam to PEFT: one more member of its closed enum of methods.

PEFT's ``register_peft_method`` insists that the method is already a member of ``PeftType``; nothing else of PEFT is
changed. Written against peft 0.21.
"""

from __future__ import annotations

from typing import Any

from peft.utils.peft_types import PeftType, register_peft_method

NAME = "queryable"


def _extend_peft_type(name: str) -> Any:
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    PeftType._member_map_[name] = member
    PeftType._member_names_.append(name)
    PeftType._value2member_map_[name] = member
    # From Python 3.12 on members are looked up as plain class attributes; Enum's own __setattr__ would refuse.
    type.__setattr__(PeftType, name, member)
    return member


QUERYABLE = _extend_peft_type(NAME.upper())


def register(config_cls: type, model_cls: type) -> None:
    """Make ``get_peft_model`` and ``PeftModel.from_pretrained`` know the method; once a process."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if QUERYABLE not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME, config_cls=config_cls, model_cls=model_cls, prefix="queryable_")
