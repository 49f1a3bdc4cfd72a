"""xmag-mini: a small trained ViT inside the package, so that everything runs without a network.

Its model card is docs/models.md. The weights are stored in float16, and computed with in float32.
"""

from pathlib import Path

MINI_WEIGHTS = Path(__file__).with_name("mini.safetensors")
MINI_SHA256 = "7c70c6c0caf86dca66cfea67a9de99532cb88ea82f298902753d45ea0f77ac4e"
