"""Triton's interpreter as the tests want it: outputs start as NaN, and 16-bit numbers are rounded as the hardware rounds them."""

import numpy
import torch
from triton.runtime import interpreter


def _convert(values, source, target, _rounding):
    """float32 <-> bfloat16 by bits, to the nearest: the interpreter cuts bits off, or carries them into nowhere."""
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    integers = {4: torch.int32, 2: torch.int16}
    source, target = types[source.name], types[target.name]
    bits = torch.from_numpy(numpy.ascontiguousarray(values).view(f"int{8 * source.itemsize}"))
    found = bits.view(source).to(target).view(integers[target.itemsize]).numpy()
    return found.view(f"uint{8 * target.itemsize}")


def prepare() -> None:
    numpy.seterr(all="ignore")  # infinities are cases like others here
    interpreter._convert_float = _convert
    torch.use_deterministic_algorithms(True)  # which fills what `empty` returns with NaN
