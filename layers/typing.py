"""The letters of array shapes, and the array types used in annotations.

Layout is `b t h d` everywhere: batch, time, head, feature.

    b   batch                       d   width of the model, or channels of a layer
    t   time (queries)              s   time of the keys, where it differs from t
    h   heads                       g   key/value heads, or groups; g divides h
    k   key features of a head      v   value features of a head
    n   state size                  l   length of a convolution kernel
    w   width of a short convolution
    c   classes, or input channels  p   complex conjugate pairs of a state
"""

from jax import Array
from jaxtyping import Bool, Complex, Float, Int, Integer, Key, Num, PyTree

__all__ = ["Array", "Bool", "Complex", "Float", "Int", "Integer", "Key", "Num", "PyTree"]
