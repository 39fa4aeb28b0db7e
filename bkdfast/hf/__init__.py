"""What is known about HuggingFace models, and the hooks that survive `torch.compile`."""

from bkdfast.hf.families import describe
from bkdfast.hf.spec import BlockSpec, ModelSpec

__all__ = ["BlockSpec", "ModelSpec", "describe"]
