"""Writes tests/data/timm/: small models as timm saves them, and timm's embeddings of random tiles.

``python tests/data/make_timm_models.py`` where timm can be imported. Weights are rounded to half
precision, in which they are stored; the embeddings are computed with them in float32.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from support.models import random_tiles  # noqa: E402
from support.timm_models import PLAIN, timm_model  # noqa: E402


def main() -> None:
    import timm

    shutil.rmtree(HERE / "timm", ignore_errors=True)
    for name, (architecture, args) in PLAIN.items():
        folder = HERE / "timm" / name.replace(" ", "-")
        model = timm_model(architecture, args).half().float()
        timm.models.save_for_hf(model, folder.parent, safe_serialization=True, model_args=args)
        folder.mkdir()
        (folder.parent / "config.json").rename(folder / "config.json")
        (folder.parent / "model.safetensors").unlink()
        config = json.loads((folder / "config.json").read_text())
        mean, std = (torch.tensor(config["pretrained_cfg"][key]) for key in ("mean", "std"))
        tiles = torch.from_numpy(random_tiles(3, args["img_size"]))
        images = ((tiles / 255 - mean) / std).permute(0, 3, 1, 2)
        tokens = model.forward_features(images)
        patches = tokens[:, model.num_prefix_tokens :].mean(1)
        expected = {
            "embedding": model.forward_head(tokens, pre_logits=True),
            "token+mean": torch.cat((tokens[:, 0], patches), 1),
        }
        state = {key: t.half().contiguous() for key, t in model.state_dict().items()}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        expected = {key: t.contiguous() for key, t in expected.items()}
        save_file(expected, folder / "expected.safetensors", {"timm": timm.__version__})


if __name__ == "__main__":
    with torch.inference_mode():
        main()
