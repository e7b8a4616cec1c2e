"""The letters of array shapes, and the array types used in annotations.

Layout is `b t h d` everywhere: batch, time, head, feature.

    b   batch                       d   width of the model, or channels of a layer
    t   time (queries)              s   time of the keys, where it differs from t
    h   heads                       g   key/value heads, or groups; g divides h
    b   batch                       d   width of the model, or channels of a layer
    t   time (queries)              s   time of the keys, where it differs from t
    h   heads                       g   key/value heads, or groups; g divides h
    k   key features per head       v   value features per head
    n   state size                  l   length of a convolution kernel
    w   width of a short convolution
    c   classes, or input channels  p   complex conjugate pairs of a state

In kernels and chunked forms, c is the length of a chunk.

Four words for parts of a sequence or an array:

    segment   one of the sequences packed into a row
    chunk     a fixed number of consecutive tokens, the unit of a chunked form
    block     a tile of an array: of tokens, of channels, or of a matrix
    piece     the group of consecutive chunks that a kernel gives to one program
"""

from jax import Array
from jaxtyping import Bool, Complex, Float, Int, Integer, Key, Num, PyTree

__all__ = ["Array", "Bool", "Complex", "Float", "Int", "Integer", "Key", "Num", "PyTree"]
