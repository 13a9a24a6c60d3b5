"""Widgets: a traitlets class, a .js and a .css of the same name, side by side."""
