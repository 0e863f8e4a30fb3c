"""op -> kernel: registers what computes each topk_fx op. ATen chunks serve every device."""

from topk_fx.ops import library

from . import aten
from .choice import choose, pays

for _name in ("attention_forward", "attention_backward", "ffn_forward", "ffn_backward"):
    library.impl(_name, getattr(aten, _name), "CompositeExplicitAutograd")

__all__ = ["aten", "choose", "pays"]
