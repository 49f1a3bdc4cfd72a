"""The script that compares us with a model card's own code, on a card made here."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file
from support.models import TINY, random_state, to_huggingface

from xmag.hub.registry import SCHEMA, ModelConfig

SCRIPT = Path(__file__).parents[1] / "examples" / "verify_official.py"
CODE = """
import torch
from transformers import Dinov2Config, Dinov2Model, PretrainedConfig, PreTrainedModel


class CardConfig(PretrainedConfig):
    model_type = "a_card"


class CardModel(PreTrainedModel):
    config_class = CardConfig

    def __init__(self, config):
        super().__init__(config)
        self.backbone = Dinov2Model(Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=70,
            patch_size=14, use_mask_token=False,
        ))
        self.post_init()

    def forward(self, images):
        return {"cls_embedding": self.backbone(images).pooler_output * FACTOR}
"""


def _run(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        env={**os.environ, "HF_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("factor", "status"), [("1.0", 0), ("1.01", 1)])
def test_a_card_is_compared_with_its_own_code(factor: str, status: int, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    card = tmp_path / "card"
    card.mkdir()
    config = replace(TINY, position_rule="size")
    auto = {"AutoConfig": "code.CardConfig", "AutoModel": "code.CardModel"}
    about = {"model_type": "a_card", "auto_map": auto, "architectures": ["CardModel"]}
    ours = {"format": SCHEMA, **ModelConfig(vit=config).to_dict()}
    (card / "config.json").write_text(json.dumps({**about, **ours}))
    (card / "code.py").write_text(CODE.replace("FACTOR", factor))
    state = to_huggingface(random_state(config))
    state = {f"backbone.{key}": tensor.contiguous() for key, tensor in state.items()}
    save_file(state, card / "model.safetensors", metadata={"format": "pt"})
    done = _run("--trust-remote-code", "--model", str(card), home=tmp_path / "home")
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("EQUAL" if status == 0 else "DIFFERENT")


def test_no_code_is_run_unasked(tmp_path: Path) -> None:
    done = _run(home=tmp_path)
    assert (done.returncode, done.stderr) == (2, "")
    assert "Read that code, then add --trust-remote-code" in done.stdout


def test_offline_is_said_plainly(tmp_path: Path) -> None:
    done = _run("--trust-remote-code", home=tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert done.stdout.startswith("not compared: AI4PATH/XMAG is not in the cache")
