"""Tests of reports on run directories."""
