"""xmag-mini: a small trained ViT inside the package, so that everything runs without a network.

Its model card is docs/models.md. The weights are stored in float16, and computed with in float32.
"""

from pathlib import Path

MINI_WEIGHTS = Path(__file__).with_name("mini.safetensors")
MINI_SHA256 = "77bf3e1ab76ec1ffc30f1c8da6898eced822e7b5c357aa0220a6bf178ba1ff1a"
