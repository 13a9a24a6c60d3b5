"""Models: where things are in each architecture, and how to load one."""
