"""What the bits of a quantized tensor mean. Knows values, not where kernels want the bytes."""

from cutemoe.formats.format import Format
from cutemoe.formats.tensor import FORMATS, QuantizedTensor, broken_scales, find_format, quantize

__all__ = ["FORMATS", "Format", "QuantizedTensor", "broken_scales", "find_format", "quantize"]
