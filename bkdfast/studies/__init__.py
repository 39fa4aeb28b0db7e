"""Methods on top of the engines."""
