"""What a malicious file would do, for tests that it does not."""

import os
from collections.abc import Callable
from pathlib import Path


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


# Entries of a configuration of Transformers that name other code.
FOREIGN = {
    "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    "attn_implementation": "someone/evil-kernel",
    "_attn_implementation": "someone/evil-kernel",
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "trust_remote_code": True,
}
