"""Streaming cosine-to-singular-vector monitoring of a running model."""
