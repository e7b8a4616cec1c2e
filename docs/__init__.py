"""The documentation site: what MkDocs needs beside the pages to build it from docstrings, README, results and code."""
