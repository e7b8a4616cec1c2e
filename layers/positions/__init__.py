"""Encodings of position: rotary (RoPE, CLEX), relative (ALiBi, T5, FIRE) and absolute (sinusoidal)."""

from layers.positions.absolute import sinusoidal
from layers.positions.clex import Clex
from layers.positions.position import Position, PositionConfig, read_position
from layers.positions.rotary import Rotary, rotary

__all__ = ["Clex", "Position", "PositionConfig", "Rotary", "read_position", "rotary", "sinusoidal"]
