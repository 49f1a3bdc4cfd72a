"""The table of all commands and their flags; nothing heavy is imported here."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

_Flag = tuple[list[str], dict[str, Any]]


class Command(NamedTuple):
    """A command: the module of `xmag.cli` whose function of its name runs it, help, and flags."""

    module: str
    help: str
    flags: tuple[_Flag, ...]
    epilog: str = ""


def _flag(names: str, text: str | None, metavar: str | None = None, **options: Any) -> _Flag:
    """A flag with a value that is shown as `metavar`, or one of its choices; or a switch."""
    if metavar is None and options.keys().isdisjoint({"action", "choices"}):
        options["action"] = "store_true"
    if metavar is not None:
        options["metavar"] = metavar
    return names.split(), {"help": text, **options}


def _gpus(text: str) -> int | Literal["all"]:
    if text == "all":
        return "all"
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of GPUs; expected 'all' or 2")
    return int(text)


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type of flags that takes "none" for None."""

    def value(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    value.__name__ = kind.__name__  # argparse names it in its message
    return value


def _tissue(text: str) -> str:
    if text != "auto":
        raise argparse.ArgumentTypeError(f"{text!r} finds no tissue; expected 'auto' or 'none'")
    return text


def _size(text: str) -> int:
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    power = "KMGT".find(unit) + 1 if unit else 0
    if not number.isdecimal() or (unit and not power):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected bytes, or such as 4G")
    return int(number) << 10 * power


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no share; expected I/N such as 0/4 or 3/4")
    return int(index), int(count)


_OF_EXTRACT = "the folder that xmag extract wrote to (or: a column 'features' in the CSV)"

# Flags that several commands share.
VERBOSE = _flag("-v --verbose", "log to stderr")
_MPP = _flag(
    "--mpp", "µm per px of level 0, where the file's own is missing or wrong", "UM", type=float
)
_REGION = _flag("--region", "which scan of a file that holds several, from 0 on", "N", type=int)
_TILES = (
    _flag(
        "--tissue",
        "'auto' finds it, 'none' takes every tile (default: auto)",
        "auto|none",
        type=_or_none(_tissue),
    ),
    _flag(
        "--min-tissue",
        "smallest share of a tile that is tissue, or 'none' (default: 0.25)",
        "SHARE",
        type=_or_none(float),
    ),
    _flag(
        "--border",
        "what becomes of tiles that would reach over the border of the slide: they"
        " move inwards, or are left out (default: shift)",
        choices=("shift", "drop"),
    ),
)
_GIVEN = (
    _flag(
        "--mask",
        "given tissue masks: a folder of GeoJSON or PNG files called as the slides, or the file"
        " of one slide",
        "DIR|FILE",
    ),
    _flag(
        "--roi",
        "regions of interest: a folder of GeoJSON files called as the slides, or the file of one"
        " slide",
        "DIR|FILE",
    ),
)
_DEVICE = _flag(
    "--device",
    "such as cpu or cuda:1; auto takes CUDA, then MPS, then the CPU (default: auto)",
    "NAME",
)
_ENCODING = (
    _DEVICE,
    _flag(
        "--dtype",
        "what the model computes in: float32, bfloat16, float16; auto is float32 on CPUs and half"
        " of it on GPUs (default: auto)",
        "NAME",
    ),
)
_COHORT = (
    _flag("csv", "columns: slide, patient, and what is to be predicted", "CSV", type=Path),
    _flag("--features", _OF_EXTRACT, "DIR"),
    _flag(
        "--task",
        "classification (default), regression or survival",
        choices=("classification", "regression", "survival"),
    ),
    _flag(
        "--label",
        "the column of labels (default: label), or of numbers; several are as many"
        " numbers to predict, or labels that are 0 or 1",
        "COLUMN",
        nargs="+",
    ),
    _flag("--time", "survival: the column of times (default: time)", "COLUMN"),
    _flag("--event", "survival: the column of events, 0 or 1 (default: event)", "COLUMN"),
)
_BY = _flag(
    "--by",
    "what is a case: each slide (default), or all slides of a patient together",
    choices=("slide", "patient"),
)
_CLASSIFIER = _flag("--classifier", "of xmag train", "MODEL", required=True)
_TRAINING = (
    _flag("--aggregator", "abmil (default), mean, max, transmil or clam_sb", "NAME"),
    _flag(
        "--epochs", "at most; training stops where validation gets no better (default: 100)", "N",
        type=int,
    ),
    _flag("--fusion", "slides of a patient: one bag (early, default), or a mean of predictions",
          choices=("early", "late")),
    _flag("--loss", "survival: Cox's partial likelihood (cox, default), or hazards of intervals",
          choices=("cox", "nll")),
    _flag("--ordinal", "classes have an order: that of these labels, or without any, of numbers",
          "LABEL", nargs="*"),
    _flag("--seed", "of all draws (default: 0)", "N", type=int, dest="random_state"),
)  # fmt: skip

COMMANDS = {
    "info": Command("info", "show what slides hold, and files and folders that xmag wrote", (
        _flag("slides", "slides; files of features; folders of xmag extract, train or evaluate",
              "FILE|DIR", nargs="+"),
        _MPP,
        _REGION,
        _flag("--properties", "also what the scanner wrote, which may name the patient"),
    )),
    "extract": Command("slides", "extract the features of slides", (
        _flag("slides", "slide files; or one folder; or one CSV file", "SLIDE", nargs="+"),
        _flag("-o --out", "where to write", "DIR", required=True),
        _flag(
            "--model", "a Hub name, a path, or xmag-mini (default: AI4PATH/XMAG); given again, for"
            " several models of the same tiles, which then have a folder each", "NAME",
            action="append",
        ),
        _flag("--format", "of the files (default: h5)", choices=("h5", "safetensors")),
        _flag("--overlay", "also draw tissue and tiles (.png)"),
        *_TILES,
        *_GIVEN,
        _flag("--overlap", "px of the tiles that neighbours share (default: 0)", "PX", type=int),
        _flag(
            "--redo", "replace features that were made differently",
            action="store_const", const="redo", dest="on_mismatch",
        ),
        _flag(
            "--damaged", "what becomes of a slide with damaged tiles: it fails, or loses those"
            " tiles (default: error)", choices=("error", "drop"),
        ),
        *_ENCODING,
        _flag(
            "--batch-size", "tiles a batch; 256 on an accelerator without it, 32 on a CPU", "N",
            type=int,
        ),
        _flag(
            "--processes", "child processes that open and decode slides; 0 is none; without it one"
            " a core where the model is on CUDA, else one", "N", type=int,
        ),
        _flag("--slide-timeout", "seconds that decoding a slide may take", "S", type=float),
        _flag(
            "--memory-limit", "bytes, or such as 4G, that a decoding process may allocate", "SIZE",
            type=_size,
        ),
        _flag(
            "--gpus", "on how many GPUs of this machine, or 'all': a process on each; without it,"
            " one GPU", "N", type=_gpus,
        ),
        _flag(
            "--shard", "do every N-th slide alone, from the I-th on, counted from 0: for N"
            " machines", "I/N", type=_shard,
        ),
        _MPP,
        _REGION,
    ), """\
Features, and report.csv, are written below DIR at the paths that the slides have below their common
folder. What is there already is kept, so that the same command goes on where it was stopped.

examples:
  xmag extract a.svs b.svs -o features
  xmag extract slides/ -o features --model xmag-mini --format safetensors
  xmag extract scan.tif -o features --mpp 0.25
  xmag extract slides/ -o features --gpus all
  xmag extract slides.csv -o s3://bucket/features --shard 0/4
"""),
    "demo": Command("slides", "run the main job on a small slide", (
        _flag("slide", "your slide; without it, one of real tissue is made", "SLIDE", nargs="?"),
        _flag("-o --out", "default: demo", "DIR"),
        _MPP,
        _REGION,
    )),
    "train": Command("classify", "train a classifier, or for another task", (
        *_COHORT,
        _BY,
        _flag("-o --out", "the folder to write", "MODEL", required=True),
        *_TRAINING,
        _DEVICE,
    ), """\
CSV has the columns slide and patient, and label, or for survival event and time. A fifth of the
patients is held out to choose the epoch whose weights are kept; xmag evaluate tells how good such
a classifier is.

examples:
  xmag train cohort.csv --features features -o classifier
  xmag train cohort.csv --features features -o model --task survival --by patient
  xmag train cohort.csv --features features -o model --task regression --label tmb purity
"""),
    "predict": Command("classify", "predict slides or patients from their features", (
        _flag("inputs", "a CSV with a column slide, or feature files", "CSV|FILE", nargs="+",
              type=Path),
        _flag("--features", _OF_EXTRACT, "DIR"),
        _CLASSIFIER,
        _BY,
        _flag("--times", "survival: when (default: at quarters of the training's times)", "T",
              nargs="+", type=float),
        _DEVICE,
        _flag("-o --out", "also write the predictions there", "CSV"),
    )),
    "evaluate": Command("classify", "cross-validate, or test a classifier on an external cohort", (
        *_COHORT,
        _BY,
        _flag("-o --out", "where to write", "FOLDER", required=True),
        _flag("--folds", "default: 5", "N", type=int),
        _flag("--repeats", "default: 1", "N", type=int),
        _flag("--folds-table", "a table of given splits instead", "FILE", type=Path),
        _flag("--classifier", "test this one instead of training others", "MODEL"),
        *_TRAINING,
        _DEVICE,
    ), """\
CSV has the columns of xmag train; no patient is in two folds. FOLDER gets report.json and pictures.
With --classifier, the cohort is an external one: nothing is trained, and the task is that of MODEL.

examples:
  xmag evaluate cohort.csv --features features -o evaluation
  xmag evaluate cohort.csv --features features -o evaluation --task survival --by patient
  xmag evaluate other.csv --features others --classifier classifier -o external
"""),
    "compare": Command("classify", "compare encoders on a cohort: accuracy and cost", (
        *(flag for flag in _COHORT if flag[0] != ["--features"]),
        _flag("--models", "Hub names, paths, or xmag-mini; differences are to the first", "NAME",
              nargs="+", required=True),
        _flag("-o --out", "where to write features and table", "FOLDER", required=True),
        _flag("--external", "other cohorts, for models fitted on the first", "CSV", nargs="+",
              type=Path),
        _flag("--metric", "without it AUROC, R² or Harrell's C", "NAME"),
        _flag("--folds", "default: 5", "N", type=int),
        _flag("--repeats", "default: 1", "N", type=int),
        _flag("--finetune", "also train each model end to end in each fold, which takes long"),
        *_ENCODING,
        _flag("--gpus", "on how many GPUs, or 'all', features are extracted", "N", type=_gpus),
        _MPP,
        _REGION,
        *_TRAINING,
    ), """\
CSV has the columns of xmag train, and optionally mpp and id. Each model's features and reports go
to FOLDER/<model>; the same command again does what is missing. FOLDER gets compare.csv, .md, .json
and .png: the cost of each model a slide, and its accuracy in the same folds.

examples:
  xmag compare cohort.csv --models AI4PATH/XMAG other-model -o comparison
  xmag compare cohort.csv --models a b --external other.csv -o comparison --folds 10
"""),
    "heatmap": Command("classify", "draw what a classifier looked at on a slide", (
        _flag("slides", "a slide file; several are those of one patient", "SLIDE", nargs="+"),
        _CLASSIFIER,
        _flag("--features", "the features of the slide, or a folder of xmag extract", "FILE|DIR"),
        _flag("-o --out", "default: the slide's name with -heatmap.png; of several, a folder",
              "PNG|DIR"),
        _flag("--model", "the encoder, where there are no features", "NAME"),
        _flag("--gallery", "also the tiles with most attention (-gallery.png)"),
        _flag("--gallery-mpp", "the same, read at this finer µm/px", "UM", type=float),
        _flag("--geojson", "also the tiles for QuPath (.geojson)"),
        _flag("--scale", "colours show a tile's rank, or its weight (default: rank)",
              choices=("rank", "weight")),
        _DEVICE,
        _flag("--dtype", "of the encoder, without --features; by default as in the training of"
              " MODEL", "NAME"),
        _MPP,
        _REGION,
    ), """\
MODEL may be of any task. Several slides are one case: their colours have one scale. Without
--features they are extracted, with the encoder that is in MODEL if it was fine-tuned, with
xmag-mini if MODEL was trained on its features, or else with that of --model.

examples:
  xmag heatmap slide.svs --classifier classifier --features features/slide.h5
  xmag heatmap slide.svs --classifier classifier -o slide.png --gallery --geojson
  xmag heatmap block-a.svs block-b.svs --classifier classifier --features features -o pictures
"""),
    "finetune": Command("finetune", "train an encoder and a classifier together, on slides", (
        _flag("csv", "columns: slide, label, patient, and optionally mpp and region", "CSV",
              type=Path),
        _flag("-o --out", "the folder to write", "MODEL", required=True),
        _flag("--label", "the column of labels (default: label)", "COLUMN"),
        _flag("--model", "to start from (default: AI4PATH/XMAG)", "NAME"),
        _flag("--aggregator", "abmil, mean, max, transmil or clam_sb (default: abmil)", "NAME"),
        _flag("--mode", "learn from every tile of a slide at each step, or from some: sampled"
              " (default: exact)", choices=("exact", "sampled")),
        _flag("--sampled-tiles", "a slide and step (default: 256)", "N", type=int),
        _flag("--epochs", "at most (default: 20)", "N", type=int),
        _flag("--patience", "epochs without getting better before it stops, or 'none' (default: 5)",
              "N", type=_or_none(int)),
        _flag("--slides-per-step", "of all GPUs (default: 4)", "N", type=int),
        _flag("--chunk-tiles", "tiles with a graph at a time, which decides the memory", "N",
              type=int),
        _flag("--learning-rate", "of the last block, at its peak (default: 5e-05)", "RATE",
              type=float),
        _flag("--frozen-blocks", "how many of the first stay as they are", "N", type=int),
        _flag("--precision", "auto is bfloat16 on CUDA that has it, else float32 (default: auto)",
              choices=("auto", "float32", "bfloat16")),
        _flag("--seed", "of all draws (default: 0)", "N", type=int, dest="random_state"),
        _DEVICE,
        *_TILES,
        _flag("--memory-gib", "of tiles; more go to files (default: 8)", "GIB", type=float),
        _MPP,
    ), """\
A fifth of the patients is held out to choose the epoch whose weights are kept. MODEL is then a
model for --model and for --classifier of the other commands. The same command again goes on where
it was stopped, from MODEL/run. Several GPUs: torchrun --nproc-per-node=4 -m xmag finetune ...

examples:
  xmag finetune cohort.csv -o model --epochs 10
  xmag heatmap slide.svs --classifier model
"""),
    "report": Command("report", "write the page of a cohort, an evaluation or a comparison", (
        _flag("folder", "that xmag extract, evaluate or compare wrote to", "DIR"),
        _flag("-o --out", "default: report.html in the folder", "FILE"),
        _flag("--slides", "slide files, one folder, or one CSV file, as for xmag extract: for"
              " pictures of them", "SLIDE", nargs="+"),
        *_GIVEN,
        _flag("--classifier", "of xmag train: for its attention and predictions", "MODEL"),
        _flag("--title", "of the page", "TEXT"),
        _flag("--max-mb", "most megabytes of cards and pictures (default: 40)", "MB", type=float),
    ), """\
The page is one file, which a browser shows without server or network: a table of the slides that
sorts and filters, and a card for each: its thumbnail to pan and zoom, tissue, tiles and the reasons
of dropped cells, features and attention as layers; where the time went, and why tiles are missing.
Names of slides are in it; labels, macro images and what a slide's file says of its patient are not.

examples:
  xmag report features --slides slides/
  xmag report features --slides slides.csv --classifier classifier -o report.html
  xmag report evaluation
  xmag report comparison
"""),
    "export": Command("bags", "write features as other software reads them", (
        _flag("bag", "a file of features", "BAG"),
        _flag("-o --out", "the file to write: .pt for clam, .h5 for stamp", "FILE", required=True),
        _flag("--layout", "whose files", choices=("clam", "stamp"), required=True),
    ), """\
examples:
  xmag export features/a.h5 -o pt_files/a.pt --layout clam
  xmag export features/a.h5 -o stamp/a.h5 --layout stamp
"""),
    "check": Command("bags", "verify the features in a folder", (
        _flag("folder", "the folder that xmag extract wrote to", "DIR"),
    ), """\
Each file is read whole: its checksum is compared, all values are finite, one model made all with
the same tiles and preprocessing (or one a folder, of several models), and report.csv lists no
slide without features. Each fault is a line on stdout; exit status 1 where there is one.
"""),
    "doctor": Command("doctor", "say what this machine has for xmag, and what it lacks", (), """\
Versions, extras, the CPU and the dtype that pays on it, memory, GPUs, whether the official weights
are in the cache or can be fetched, and the speed of a small model; what could be better comes with
its remedy. Exit status 1 where xmag cannot work. It asks the Hub only for weights that are not in
the cache.
"""),
    "examples": Command("examples", "copy the examples that come with the package", (
        _flag("folder", "where to", "DIR"),
    )),
    "completion": Command("completion", "print the script by which a shell completes commands", (
        _flag("shell", "yours", choices=("bash", "zsh")),
    ), """\
examples:
  source <(xmag completion bash)      for this shell; in ~/.bashrc, for all
  source <(xmag completion zsh)       the same in ~/.zshrc
"""),
    "distill": Command(
        "distill", "train an encoder to see at one scale what another sees at a finer one", (
        _flag("config", "what is done", "CONFIG.toml", type=Path),
        _flag("--dry-run", "say what memory and time it needs; write nothing"),
    )),
}  # fmt: skip
