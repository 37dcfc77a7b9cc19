"""GPU kernels in Triton, one stem per operator, each with its plain-torch reference beside it (``*_ref``).

Needs torch and triton; no device to be imported. ``TRITON_INTERPRET=1`` before the import runs everything on CPU
tensors, slowly.
"""

from prunekern_triton.epilogue import Epilogue
from prunekern_triton.launch import Config, Launch

__all__ = ["Config", "Epilogue", "Launch"]
