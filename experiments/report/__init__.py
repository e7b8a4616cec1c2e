"""Reports on run directories: tables and plots of what was trained, beside what was published (see `__main__`)."""
