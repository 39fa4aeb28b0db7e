"""Sweeps: one number per variant and sample, from as few model flops as the algebra allows."""
