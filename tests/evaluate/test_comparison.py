"""Encoders compared: planted signals rank them, and all numbers are those of the single functions.

One cohort has dark and bright tiles at 20x in equal shares, and differs only in how they lie beside
each other, which a tile at 5x sees whole. The other has a pattern of 1 µm that 5x averages out.
"""

import csv
import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from support.cohorts import NearestMeanOfBags
from support.encoders import ColourEncoder
from support.models import TINY, random_vit
from support.slides import write_svs

from xmag.bag import FeatureBag
from xmag.cli import main
from xmag.cohort import extract_cohort
from xmag.encoder import Encoder, load_model
from xmag.errors import InputError, XmagWarning
from xmag.evaluate import Folds, compare, cross_validate, external
from xmag.evaluate.comparison import costs_of
from xmag.extract import extract_features
from xmag.finetune import Settings, TileOptions, finetune_slides
from xmag.geometry import TileSpec
from xmag.hub.registry import ModelConfig
from xmag.metrics.bootstrap import drawn_weights
from xmag.mil import MILClassifier
from xmag.tiles import decoder

PX = 56  # of a tile, so that one at 5x is 224 px of these slides at 0.5 µm/px
OPTIONS = {"tissue": None, "processes": 0, "estimator": NearestMeanOfBags(), "folds": 4}
OPTIONS["resamples"] = 200


def pixels(kind, label, rng):
    side = 4 * PX
    if kind == "coarse":  # 20x tiles of two shades; alternating, or each 5x tile of one shade
        cell = PX if label else side
        shades = np.indices((2 * side, 4 * side)) // cell
        image = np.where(shades.sum(0) % 2, 190.0, 90.0)
    else:
        cells = np.indices((2 * side, 4 * side)) // 2
        image = 140 + (30 if label else 0) * np.where(cells.sum(0) % 2, 1.0, -1.0)
    image = image + 3 * rng.standard_normal(image.shape)
    return np.repeat(np.clip(image, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def write_cohort(folder, kind, count, seed):
    rng = np.random.default_rng(seed)
    folder.mkdir()
    labels = [number % 2 for number in range(count)]
    for number, label in enumerate(labels):
        path = folder / f"{number:02}.svs"
        write_svs(path, pixels=pixels(kind, label, rng), mpp=0.5, power=20, levels=(1, 4))
    slides = sorted(folder.iterdir())
    return slides, labels, [f"{folder.name} {number // 2}" for number in range(count)]


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory):
    root = tmp_path_factory.mktemp("cohorts")
    return {
        "coarse": write_cohort(root / "coarse", "coarse", 24, 0),
        "fine": write_cohort(root / "fine", "fine", 24, 1),
        "elsewhere": write_cohort(root / "elsewhere", "fine", 8, 2),
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same small ViT at 5x and at 20x, in folders."""
    root = tmp_path_factory.mktemp("models")
    for name, mpp in (("vit-5x", 2.0), ("vit-20x", 0.5)):
        config = ModelConfig(vit=TINY, tile_spec=TileSpec(mpp=mpp, size_px=PX))
        about = {"name": name, "weights_sha256": "0" * 64, "trained": True}
        (root / name).mkdir()
        Encoder(random_vit(TINY), config, provenance=about).save(root / name)
    return [str(root / "vit-5x"), str(root / "vit-20x")]


@pytest.fixture(scope="module")
def made(cohorts, models, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    others = {"elsewhere": cohorts["elsewhere"]}
    return out, compare(cohorts["fine"], models=models, out=out, external=others, **OPTIONS)


def test_models_are_ranked_as_planted(cohorts, models, made, tmp_path):
    coarse = compare(cohorts["coarse"], models=models, out=tmp_path, **OPTIONS)
    for comparison, best in ((coarse, 0), (made[1], 1)):
        values = [one.estimates["internal"].value for one in comparison.models]
        assert values[best] > 0.95
        assert values[1 - best] < 0.8
        ends = comparison.models[1].differences["internal"].interval
        assert ends.low > 0 if best else ends.high < 0


def test_numbers_are_those_of_the_single_functions(cohorts, models, made, tmp_path):
    out, comparison = made
    _, y, groups = cohorts["fine"]
    for model, one in zip(models, comparison.models, strict=True):
        bags = {}
        for name in ("fine", "elsewhere"):
            place = tmp_path / one.model / name
            report = extract_cohort(cohorts[name][0], place, model=model, tissue=None, processes=0)
            bags[name] = [str(place / row.output) for row in report]
        alone = cross_validate(
            NearestMeanOfBags(), bags["fine"], y, groups=groups, folds=4, resamples=200
        )
        assert comparison.reports[one.model][0] == alone
        assert one.estimates["internal"] == alone.estimate("auroc_ovr")
        across = external(
            NearestMeanOfBags(),
            {"internal": (bags["fine"], y, groups),
             "elsewhere": (bags["elsewhere"], *cohorts["elsewhere"][1:])},
            train="internal", folds=None, resamples=200,
        )  # fmt: skip
        assert comparison.reports[one.model][1] == across
        assert one.estimates["elsewhere"] == across.estimate("auroc_ovr")
        encoder = load_model(model)
        assert one.parameters == sum(p.numel() for p in encoder.vit.parameters())
        assert one.tiles == {2.0: 8, 0.5: 128}[one.mpp]
        assert one.gflop == pytest.approx(one.tiles * costs_of(encoder)[1])
        files = [*(out / one.model).rglob("*.h5")]
        assert len(files) == 32
        assert one.megabytes == pytest.approx(sum(f.stat().st_size for f in files) / 32e6)
        assert one.slides_per_minute > 0
    (first, second) = (comparison.reports[one.model][0].folds for one in comparison.models)
    assert first == second


def test_gflop_are_those_of_the_matrix_products_of_a_vit(models):
    d, tokens, patches = TINY.width, 1 + (PX // 14) ** 2, (PX // 14) ** 2
    block = 2 * tokens * (4 * d * d + 2 * d * TINY.hidden) + 4 * tokens * tokens * d
    whole = 2 * patches * 3 * 14 * 14 * d + TINY.depth * block
    # The last block goes on with the class token alone, once queries, keys and values are there.
    last = 2 * (tokens - 1) * (d * d + 2 * d * TINY.hidden) + 4 * (tokens - 1) * tokens * d
    assert costs_of(load_model(models[0]))[1] * 1e9 == whole - last


def test_differences_are_a_paired_bootstrap_of_the_patients(made):
    results = [made[1].reports[one.model][1].results[0] for one in made[1].models]
    truth, patients = results[0].truth, results[0].patients
    scores = [result.scores[:, 1] for result in results]
    drawn = []
    for weights in drawn_weights(truth, patients, resamples=200, random_state=0):
        for one in weights:
            first, second = (roc_auc_score(truth, s, sample_weight=one) for s in scores)
            drawn.append(second - first)
        if len(drawn) >= 200:
            break
    found = made[1].models[1].differences["elsewhere"]
    expected = np.quantile(drawn[:200], (0.025, 0.975))
    assert tuple(found.interval) == pytest.approx(tuple(expected))
    assert made[1].models[0].differences["elsewhere"].value == 0


def test_interrupted_it_goes_on(cohorts, models, tmp_path, monkeypatch):
    cohort = cohorts["elsewhere"]
    whole = compare(cohort, models=models, out=tmp_path / "whole", **OPTIONS)

    class Interrupted(NearestMeanOfBags):
        def fit(self, *args, **options):
            if len(self.fitted) == before + 6:
                raise KeyboardInterrupt
            return super().fit(*args, **options)

    Interrupted.__name__ = "NearestMeanOfBags"
    before = len(NearestMeanOfBags.fitted)
    options = {**OPTIONS, "estimator": Interrupted()}
    with pytest.raises(KeyboardInterrupt):
        compare(cohort, models=models, out=tmp_path / "out", **options)
    (removed,) = (tmp_path / "out").rglob("vit-20x/*/03.h5")
    removed.unlink()
    decoded, read = [], decoder.read_rows

    def reading(slide, *args, **options):
        decoded.append(slide.name)
        return read(slide, *args, **options)

    monkeypatch.setattr(decoder, "read_rows", reading)
    before = len(NearestMeanOfBags.fitted)
    again = compare(cohort, models=models, out=tmp_path / "out", **OPTIONS)
    assert decoded == ["03.svs"]
    assert len(NearestMeanOfBags.fitted) - before == 4  # the first model's folds are kept
    assert again.reports == whole.reports
    other = {**OPTIONS, "estimator": NearestMeanOfBags(scale=2.0)}
    compare(cohort, models=models, out=tmp_path / "out", **other)
    assert len(NearestMeanOfBags.fitted) - before == 12


def test_a_slide_that_one_model_cannot_have_is_left_out_for_all(cohorts, models, tmp_path):
    slides, y, _ = cohorts["elsewhere"]
    low = tmp_path / "low.svs"
    write_svs(low, size=(500, 500), mpp=2.0, power=5, levels=(1,))
    data = ([low, *slides], [0, *y], [f"p{n}" for n in range(9)])
    with pytest.warns(XmagWarning, match=r"1 of 9 slides of internal .*low.svs \(vit-20x"):
        found = compare(data, models=models, out=tmp_path / "out", **OPTIONS)
    assert [found.reports[one.model][0].results[0].cases for one in found.models] == [8, 8]


def test_the_table_is_written_as_csv_markdown_json_and_a_picture(made, tmp_path):
    made[1].save(tmp_path)
    table = (tmp_path / "compare.md").read_text()
    assert str(made[1]) + "\n" == table
    assert "| vit-20x | 0.5 " in table
    with (tmp_path / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    plain = json.loads((tmp_path / "compare.json").read_text())
    for row, entry, one in zip(rows, plain["models"], made[1].models, strict=True):
        value = one.estimates["elsewhere"]
        assert float(row["elsewhere auroc_ovr low"]) == value.interval.low
        assert entry["estimates"]["elsewhere"]["value"] == value.value
        assert float(row["gflop"]) == entry["gflop"] == one.gflop
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": []}, "expected a model"),
        ({"external": {"internal": ()}}, "other than 'internal'"),
        ({"metric": "r2"}, "expected one of"),
        ({"folds": Folds.from_pairs([([0], [1])], samples=2)}, "2"),
    ],
)
def test_what_makes_no_sense_is_refused(cohorts, models, made, change, message):
    options = {**OPTIONS, "models": models, **change}
    with pytest.raises(InputError, match=message):
        compare(cohorts["fine"], out=made[0], **options)


def test_models_given_by_name_compute_where_and_in_what_they_are_told(
    cohorts, models, made, tmp_path
):
    options = {**OPTIONS, "models": models[:1], "device": "cpu", "dtype": "bfloat16"}
    compare(cohorts["elsewhere"], out=tmp_path, **options)
    for out, dtype in ((tmp_path, "bfloat16"), (made[0] / "vit-5x", "float32")):
        (first, *_) = sorted(out.rglob("*.h5"))
        assert FeatureBag.load(first).provenance.record["dtype"] == dtype


def test_the_command_compares_what_its_csv_lists(models, tmp_path, monkeypatch, capsys):
    seen = []

    def record(cohort, **options):
        seen.append((cohort, options))
        return made_up

    made_up = type("MadeUp", (), {"save": lambda *_: None, "__str__": lambda _: "the table"})()
    monkeypatch.setattr("xmag.evaluate.compare", record)
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text("slide,patient,label\nx.svs,1,no\ny.svs,2,yes\n")
    args = ["compare", tmp_path / "a.csv", "--models", *models, "-o", tmp_path / "out"]
    args += ["--external", tmp_path / "b.csv", "--folds", 2, "--seed", 3, "--aggregator", "mean"]
    args += ["--finetune"]
    assert main([str(arg) for arg in args]) == 0
    ((cohort, options),) = seen
    assert cohort == (tmp_path / "a.csv", ["no", "yes"], ["1", "2"])
    assert options["external"] == {"b": (tmp_path / "b.csv", ["no", "yes"], ["1", "2"])}
    assert (options["models"], options["folds"], options["random_state"]) == (models, 2, 3)
    assert options["finetune"] is True
    assert options["estimator"].get_params()["aggregator"] == "mean"
    assert "the table" in capsys.readouterr().out


class Runs:
    """finetune_slides, which notes the checkpoints, and stops in the given run after an epoch."""

    def __init__(self, stop=None):
        self.stop, self.checkpoints = stop, []

    def __call__(self, *args, checkpoint, settings, **options):
        self.checkpoints.append(checkpoint)
        if len(self.checkpoints) == self.stop:
            finetune_slides(*args, checkpoint=checkpoint, settings=settings, **options)
            assert checkpoint.exists()
            raise KeyboardInterrupt
        return finetune_slides(*args, checkpoint=checkpoint, settings=settings, **options)


def test_end_to_end_is_a_row_beside_the_frozen_one(cohorts, models, tmp_path, monkeypatch):
    slides, y, groups = cohorts["elsewhere"]
    settings = Settings(epochs=1, patience=None, slides_per_step=2, chunk_tiles=8)
    options = {
        **OPTIONS, "estimator": MILClassifier(aggregator="mean", epochs=2, random_state=0),
        "folds": 2, "finetune": settings, "random_state": 3, "models": models[:1], "out": tmp_path,
    }  # fmt: skip
    monkeypatch.setattr("xmag.evaluate.end_to_end.finetune_slides", stopped := Runs(stop=2))
    with pytest.raises(KeyboardInterrupt):
        compare(cohorts["elsewhere"], **options)
    monkeypatch.setattr("xmag.evaluate.end_to_end.finetune_slides", runs := Runs())
    found = compare(cohorts["elsewhere"], **options)
    assert runs.checkpoints == stopped.checkpoints
    assert not [*tmp_path.rglob("*.checkpoint")]
    assert [one.label for one in found.models] == ["vit-5x", "vit-5x, end to end"]
    (report,) = found.reports["vit-5x, end to end"]
    result = report.results[0]
    for number, split in enumerate(report.folds.splits):
        alone = finetune_slides(
            [slides[row] for row in split.train], [y[row] for row in split.train],
            model=models[0], aggregator="mean", groups=[groups[row] for row in split.train],
            settings=settings, tiles=TileOptions(tissue=None), random_state=3,
        )  # fmt: skip
        rows = result.rows[result.splits == number]
        bags = [extract_features(slides[row], model=alone.encoder, tissue=None) for row in rows]
        expected = alone.classifier.predict_proba(bags)
        assert result.scores[result.splits == number] == pytest.approx(expected, abs=1e-5)
    assert "| vit-5x, end to end | 2 " in str(found)
    assert "\nvit-5x,end to end,2" in found.to_csv()
    again = compare(cohorts["elsewhere"], **options)
    assert (again.reports, len(runs.checkpoints)) == (found.reports, 2)


def test_a_model_that_cannot_be_fine_tuned_has_the_frozen_row_alone(cohorts, tmp_path):
    options = {**OPTIONS, "estimator": MILClassifier(aggregator="mean", epochs=2), "folds": 2}
    with pytest.warns(XmagWarning, match="no ViT of xmag's"):
        found = compare(
            cohorts["elsewhere"], models=[ColourEncoder()], out=tmp_path, finetune=True, **options
        )
    assert [one.training for one in found.models] == ["frozen"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": NearestMeanOfBags()}, "no NearestMeanOfBags"),
        ({"estimator": MILClassifier(ordinal=True)}, "no MILClassifier of this kind"),
        ({"overlap": 28}, "overlap is 28; end to end it is always 0"),
        ({"roi": "areas"}, "roi is 'areas'; end to end it is always None"),
        ({"tissue": "masks"}, "tissue is a place of masks; end to end it is found"),
    ],
)
def test_fine_tuning_is_refused_before_any_work(cohorts, models, tmp_path, change, message):
    options = {**OPTIONS, "estimator": MILClassifier(), "finetune": True, **change}
    with pytest.raises(InputError, match=message):
        compare(cohorts["elsewhere"], models=models, out=tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()
