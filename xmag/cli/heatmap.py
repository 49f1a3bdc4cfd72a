"""The command heatmap: a classifier's attention over a slide."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from xmag.cli.arguments import Commands, add_mpp
from xmag.cli.console import ALL_DONE, write
from xmag.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from xmag.bag import FeatureBag
    from xmag.encoder import Encoder
    from xmag.mil import MILClassifier

_EPILOG = """\
Without --features they are extracted, with the encoder that is in MODEL if it was fine-tuned, with
xmag-mini if MODEL was trained on its features, or else with that of --model.

examples:
  xmag heatmap slide.svs --classifier classifier --features features/slide.h5
  xmag heatmap slide.svs --classifier classifier -o slide.png --gallery --geojson
"""


def add_commands(commands: Commands) -> None:
    """Add heatmap to the commands."""
    heatmap = commands.add_parser(
        "heatmap", help="draw what a classifier looked at on a slide", epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    heatmap.add_argument("slide", metavar="SLIDE", help="a slide file")
    heatmap.add_argument("--classifier", metavar="MODEL", required=True, help="of xmag train")
    heatmap.add_argument("--features", metavar="FILE", help="the features of the slide")
    heatmap.add_argument(
        "-o", "--out", metavar="PNG", help="default: the slide's name with -heatmap.png"
    )
    heatmap.add_argument("--model", metavar="NAME", help="the encoder, where there are no features")
    heatmap.add_argument(
        "--gallery", action="store_true", help="also the tiles with most attention (-gallery.png)"
    )
    heatmap.add_argument(
        "--geojson", action="store_true", help="also the tiles for QuPath (.geojson)"
    )
    add_mpp(heatmap)
    heatmap.set_defaults(run=_heatmap)


def _heatmap(args: argparse.Namespace) -> int:
    if args.features is not None and args.model is not None:
        raise InputError("--features and --model are given; leave one of them out")
    from xmag import draw
    from xmag.bag import FeatureBag
    from xmag.extract import extract_features
    from xmag.files import write_text
    from xmag.mil import MILClassifier
    from xmag.slide import Slide

    classifier = MILClassifier.load(args.classifier)
    out = Path(f"{Path(args.slide).stem}-heatmap.png" if args.out is None else args.out)
    with Slide(args.slide, mpp=args.mpp) as slide:
        if args.features is None:
            bag = extract_features(slide, model=_encoder(classifier, args.classifier, args.model))
        else:
            bag = FeatureBag.load(args.features).on(slide)
        attention = classifier.attention(bag)
        _save(draw.heatmap(slide, attention), out)
        written = [out]
        stem = out.stem.removesuffix("-heatmap")
        if args.gallery:
            written.append(out.with_name(f"{stem}-gallery.png"))
            _save(draw.gallery(slide, attention), written[-1])
        if args.geojson:
            written.append(out.with_name(f"{stem}.geojson"))
            write_text(written[-1], json.dumps(draw.attention_geojson(attention)))
        write(sys.stdout, f"{slide.name}: {_prediction(classifier, bag)}")
    for path in written:
        write(sys.stdout, f"written   {path}")
    return ALL_DONE


def _encoder(classifier: "MILClassifier", folder: str, model: str | None) -> "Encoder":
    """The encoder whose features the classifier takes, in the precision that it takes.

    That is known for certain by its weights alone; any other is refused when its bag is used.
    """
    from xmag.encoder import load_model
    from xmag.hub.registry import DEFAULT_MODEL, MINI

    wanted = classifier.fingerprint_ or {}
    dtype = "float32" if wanted.get("dtype_class") == "fp32" else "auto"
    if model is not None:
        return load_model(model, dtype=dtype)
    if (Path(folder) / "model.safetensors").is_file():
        return load_model(folder, dtype=dtype)
    mini = load_model(MINI, dtype=dtype)
    if mini.provenance["weights_sha256"] == wanted.get("weights_sha256"):
        return mini
    return load_model(DEFAULT_MODEL, dtype=dtype)


def _prediction(classifier: "MILClassifier", bag: "FeatureBag") -> str:
    row = classifier.predict_proba([bag])[0]
    classes = classifier.classes_.tolist()
    each = ", ".join(f"{label} {p:.3f}" for label, p in zip(classes, row, strict=True))
    return f"{classes[row.argmax()]} ({each})"


def _save(picture: "Image.Image", path: Path) -> None:
    from xmag.files import atomic_path

    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")
