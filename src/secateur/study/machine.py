"""What a study ran on"""

from __future__ import annotations

import os
import platform
from typing import Any

import psutil
import torch


def machine() -> dict[str, Any]:
    """Processor, cores, memory and system."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory_bytes": int(psutil.virtual_memory().total),
        "threads": torch.get_num_threads(),
        "accelerator": str(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "none"),
    }
