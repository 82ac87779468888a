"""iskd: compress causal language models while they train.

    import iskd
    model = iskd.load("runs/.../model")    # a student, as the teacher's own class with its record applied

After `import iskd`, `AutoModelForCausalLM.from_pretrained` opens exported students too.
"""

from __future__ import annotations

from iskd.loading import load, register
from iskd.plan import Convert, Record, Remove, Replace, Spec, Stage

__version__ = "0.1.0"
__all__ = ["Convert", "Record", "Remove", "Replace", "Spec", "Stage", "load"]

register()
