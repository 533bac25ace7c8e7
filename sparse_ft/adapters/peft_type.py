"""One more member in PEFT's closed enumeration of methods.

PEFT looks methods up by `PeftType`, which is an enum without an extension point, so `register_peft_method` refuses any
name that is not in it. An own type is what makes a saved adapter fail loudly where this package is not imported,
instead of being loaded as ordinary LoRA.
"""

from __future__ import annotations

from peft import PeftType


def add_peft_type(name: str) -> PeftType:
    """The member of `PeftType` called `name`, added if there is none yet.

    Args:
        name: upper case, as PEFT writes it into adapter_config.json.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(PeftType)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member
