"""Configs of experiments: loading, checks and command-line flags."""
