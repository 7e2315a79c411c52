"""Storage formats of expert weights: what they are, and their codecs in NumPy."""

from ktjax.quant.blocks import dequantize_blocks
from ktjax.quant.codec import decode, encode
from ktjax.quant.formats import FORMATS, Encoding, Format, Quantized

__all__ = [
    "FORMATS",
    "Encoding",
    "Format",
    "Quantized",
    "decode",
    "dequantize_blocks",
    "encode",
]
