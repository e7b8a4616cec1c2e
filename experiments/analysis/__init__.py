"""Analysis of programs: operation counts and their places in the sources."""
