"""The eight array primitives.

Each is a package with one public function of the same name, for example
`from layers.kernels.linear_recurrence import linear_recurrence`. They import jax and nothing of the library above
them. CONTRIBUTING.md describes the files of a primitive and its conventions.
"""
