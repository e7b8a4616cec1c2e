"""Tests of the adapter to lm-evaluation-harness."""
