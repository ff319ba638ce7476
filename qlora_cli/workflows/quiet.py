"""Keeps the libraries' own chatter away from the console.

Knows their switches. Invariant: what a library has to say that a user must know is said by this program instead.
"""

from __future__ import annotations

import logging
import warnings

import transformers


def quiet_libraries() -> None:
    """Errors only, no progress bars for work on this machine; downloads keep theirs."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("bitsandbytes", "accelerate", "torch.distributed", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|transformers|accelerate|bitsandbytes)\.")
