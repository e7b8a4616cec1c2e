"""Tests of published checkpoints."""
