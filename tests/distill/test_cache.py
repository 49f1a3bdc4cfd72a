"""Cached features against the teacher asked again, and what a folder refuses to serve for."""

import json
import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.slides import texture
from torch import Tensor

from xmag.distill import cache
from xmag.distill.cache import CacheSettings, FeatureCache, cache_features
from xmag.distill.regions import REGION_SPEC, Manifest, ManifestSource
from xmag.distill.teachers import TileTeacher, load_teacher
from xmag.distill.views import low_view, teacher_tiles
from xmag.errors import DamagedSlideError, InputError, MismatchError, ModelError, OutputError
from xmag.training import Ranks
from xmag.training.augmentation import Augmentation, augment, draw, map_tokens

REGIONS = 5
LOW = CacheSettings(low=True)


class Memory:
    """A source of regions in memory, which counts what is read."""

    def __init__(self, damaged: Sequence[int] = ()) -> None:
        tissue = np.tile(texture(500, 400), (3, 3, 1))
        self.pixels = np.stack([tissue[n : n + 896, 7 * n : 7 * n + 896] for n in range(REGIONS)])
        self.damaged, self.reads = damaged, 0

    def __len__(self) -> int:
        return REGIONS

    def read(self, indices: Sequence[int], /) -> np.ndarray:
        if bad := sorted(set(indices) & set(self.damaged)):
            raise DamagedSlideError(f"region {bad[0]}")
        self.reads += len(indices)
        return self.pixels[list(indices)]


def statistics(tiles: Tensor) -> Tensor:
    pixels = tiles.float()
    corner = pixels[:, :50, :100].mean((1, 2))
    return torch.cat([pixels.mean((1, 2)), pixels.std((1, 2)), corner], 1)


def teacher_of(name: str = "statistics", **identity: str) -> TileTeacher:
    return load_teacher(statistics, name=name, dim=9, identity=identity)


@pytest.fixture
def teacher() -> TileTeacher:
    return teacher_of(weights_sha256="1")


@pytest.fixture
def manifest() -> Manifest:
    source = ManifestSource(
        path="a.svs",
        site=".",
        fingerprint={"name": "a.svs", "size_bytes": 1, "content_sample_sha256": "00"},
        mpp=0.5,
        mpp_source="given",
        size=(9000, 9000),
        region_mpp=0.5,
        candidates=REGIONS,
    )
    places = np.array([[0, 1000 * n, 0] for n in range(REGIONS)])
    return Manifest(spec=REGION_SPEC, sources=(source,), places=places, options={})


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_LEAST_SHARD_REGIONS", 2)


def asked_again(source: Memory, regions: Sequence[int]) -> Tensor:
    high = torch.from_numpy(source.pixels[list(regions)])
    return statistics(teacher_tiles(high)).view(-1, 16, 9).half()


def test_features_are_what_the_teacher_says(tmp_path, manifest, teacher) -> None:
    source = Memory()
    with cache_features(tmp_path / "kept", source, manifest, teacher, batch_regions=2) as kept:
        assert (len(kept), kept.dim, kept.settings.low) == (REGIONS, 9, False)
        found = kept.features([4, 0, 3, 3])
        assert found.dtype == torch.float16
        assert torch.equal(found, asked_again(source, [4, 0, 3, 3]))
        assert kept.good.all()
        assert kept.features([]).shape == (0, 16, 9)
    assert len(list((tmp_path / "kept").glob("features-*.npy"))) == 3
    assert sorted(p.name for p in (tmp_path / "kept").glob("targets*")) == ["targets.json"]


def test_features_fit_flipped_and_turned_images_once_mapped(tmp_path, manifest, teacher) -> None:
    """For a teacher to whom a turned tile is the same tile."""
    means = load_teacher(lambda t: t.float().mean((1, 2)), name="means", dim=3)
    source, numbers = Memory(), [0, 3, 1, 4, 2]
    draws = draw(
        5, 0, numbers, 0, augmentation=Augmentation(brightness=0, contrast=0, saturation=0, hue=0)
    )
    with cache_features(tmp_path, source, manifest, means) as kept:
        mapped = map_tokens(kept.features(numbers).view(-1, 4, 4, 3), draws)
    turned = augment(torch.from_numpy(source.pixels[numbers]), draws)
    expected = means.features(teacher_tiles(turned)).view(-1, 4, 4, 3)
    torch.testing.assert_close(mapped.float(), expected, atol=0.1, rtol=0)
    assert draws.flips.any()
    assert draws.turns.any()


def test_low_views_are_kept_where_asked_for(tmp_path, manifest, teacher) -> None:
    source = Memory()
    with cache_features(tmp_path / "low", source, manifest, teacher, settings=LOW) as kept:
        assert torch.equal(kept.low([4, 1]), low_view(torch.from_numpy(source.pixels[[4, 1]])))
    with (
        cache_features(tmp_path / "none", source, manifest, teacher) as kept,
        pytest.raises(InputError, match=r"holds features alone.*low=True"),
    ):
        kept.low([0])


def test_damaged_regions_are_counted_and_never_served(tmp_path, manifest, teacher, caplog) -> None:
    caplog.set_level(logging.WARNING)
    source = Memory(damaged=[3])
    with cache_features(tmp_path, source, manifest, teacher, settings=LOW, batch_regions=3) as kept:
        assert kept.good.tolist() == [True, True, True, False, True]
        assert torch.equal(kept.features([4, 2]), asked_again(source, [4, 2]))
        for read in (kept.features, kept.low):
            with pytest.raises(InputError, match="region 3 is damaged"):
                read([2, 3])
    assert "region 3 (a.svs at 3000, 0) cannot be decoded" in caplog.text
    assert np.isnan(np.load(tmp_path / "features-001.npy")[1]).all()


def test_finished_targets_are_used_and_begun_ones_go_on(tmp_path, manifest, teacher) -> None:
    class Stops(Memory):
        def read(self, indices: Sequence[int], /) -> np.ndarray:
            if 4 in indices:
                raise OSError("the cable was pulled")
            return super().read(indices)

    with pytest.raises(OSError, match="cable"):
        cache_features(tmp_path, Stops(), manifest, teacher)
    assert len(list(tmp_path.glob("features-*.npy"))) == 2
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(InputError, match="none that is finished"):
        FeatureCache(tmp_path, manifest=manifest)
    with pytest.raises(MismatchError, match=r"teacher\.name: 'statistics' there, 'other' here"):
        cache_features(tmp_path, Memory(), manifest, teacher_of("other", weights_sha256="1"))
    source = Memory()
    with cache_features(tmp_path, source, manifest, teacher) as kept:
        assert source.reads == 1  # the last shard alone
        expected = asked_again(source, range(REGIONS))
        assert torch.equal(kept.features(range(REGIONS)), expected)
    with cache_features(tmp_path, source, manifest, teacher) as kept:
        assert source.reads == 1
        assert torch.equal(kept.features(range(REGIONS)), expected)


def test_a_shard_that_is_no_whole_one_is_written_again(tmp_path, manifest, teacher) -> None:
    cache_features(tmp_path, Memory(), manifest, teacher).close()
    shard = tmp_path / "features-001.npy"
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(InputError, match=r"features-001\.npy of the cache is not there"):
        FeatureCache(tmp_path, manifest=manifest)
    (tmp_path / "targets.json").unlink()
    source = Memory()
    with cache_features(tmp_path, source, manifest, teacher) as kept:
        found = kept.features(range(REGIONS))
    assert torch.equal(found, asked_again(source, range(REGIONS)))


def test_processes_share_the_shards(tmp_path, manifest, teacher) -> None:
    class Waits(Ranks):
        """One of three: by the time it waits, the others have done theirs."""

        def wait(self) -> None:
            waited.append(self.rank)

    waited: list[int] = []
    first = Memory()
    cache_features(tmp_path / "one", first, manifest, teacher).close()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    begun = json.loads((tmp_path / "two" / "targets.json").read_text())
    (tmp_path / "two" / "targets.json").unlink()
    (tmp_path / "two" / "targets.begun.json").write_text(json.dumps(begun))
    (tmp_path / "two" / "features-001.npy").unlink()
    second = Memory()
    with pytest.raises(InputError, match="none that is finished"):  # its leader is not done
        cache_features(tmp_path / "two", second, manifest, teacher, ranks=Waits(rank=1, world=3))
    assert waited == [1, 1, 1]
    assert second.reads == 2
    third = Memory()
    with cache_features(
        tmp_path / "two", third, manifest, teacher, ranks=Waits(rank=0, world=3)
    ) as kept:
        assert third.reads == 0
        expected = asked_again(first, range(REGIONS))
        assert torch.equal(kept.features(range(REGIONS)), expected)


def test_targets_of_something_else_are_refused_with_the_differences(
    tmp_path, manifest, teacher
) -> None:
    cache_features(tmp_path, Memory(), manifest, teacher).close()
    FeatureCache(tmp_path, manifest=manifest, teacher=teacher, settings=CacheSettings()).close()
    FeatureCache(tmp_path, manifest=manifest).close()
    moved = replace(manifest, places=manifest.places + np.array([0, 1, 0]))
    with pytest.raises(MismatchError, match=r"manifest_sha256: '.*' there, '.*' here"):
        FeatureCache(tmp_path, manifest=moved)
    with pytest.raises(MismatchError, match=r"teacher\.weights_sha256: '1' there, '2' here"):
        FeatureCache(tmp_path, manifest=manifest, teacher=teacher_of(weights_sha256="2"))
    with pytest.raises(MismatchError, match=r"kept\.low: False there, True here"):
        FeatureCache(tmp_path, manifest=manifest, settings=LOW)
    with pytest.raises(MismatchError, match=r"kept\.low: False there, True here"):
        cache_features(tmp_path, Memory(), manifest, teacher, settings=LOW)
    header = json.loads((tmp_path / "targets.json").read_text())
    header["provenance"]["fingerprint"]["preprocessing_version"] = 0
    (tmp_path / "targets.json").write_text(json.dumps(header))
    with pytest.raises(MismatchError, match="preprocessing_version: 0 there, 2 here"):
        FeatureCache(tmp_path, manifest=manifest)


PLAIN_1 = {"kind": "plain", "variants": 1, "augmentation": None, "seed": None, "low": False}
"""What version 1 recorded of its settings; its features were (regions, variants, 16, D)."""


def test_plain_features_of_version_1_load(tmp_path, manifest, teacher) -> None:
    features = np.random.default_rng(0).normal(size=(REGIONS, 1, 16, 9)).astype(np.float16)
    np.save(tmp_path / "features-000.npy", features)
    provenance = {
        "fingerprint": {
            "manifest_sha256": manifest.sha256,
            "teacher": dict(teacher.identity),
            "kept": PLAIN_1,
            "preprocessing_version": 2,
        },
        "record": {"xmag": "1.0.0"},
    }
    about = {"regions": REGIONS, "dim": 9, "shard_regions": 512, "damaged": [1]}
    header = {"format": "xmag-kept-targets", "schema_version": 1, **about, "provenance": provenance}
    (tmp_path / "targets.json").write_text(json.dumps(header))
    source = Memory()
    with cache_features(tmp_path, source, manifest, teacher) as kept:
        assert source.reads == 0
        assert torch.equal(kept.features([4, 0]), torch.from_numpy(features[[4, 0], 0]))
        assert kept.good.tolist() == [True, False, True, True, True]


def test_augmented_features_of_version_1_are_refused_with_the_remedy(
    tmp_path, manifest, teacher
) -> None:
    cache_features(tmp_path, Memory(), manifest, teacher).close()
    header = json.loads((tmp_path / "targets.json").read_text())
    kept = header["provenance"]["fingerprint"]["kept"]
    assert kept == PLAIN_1
    kept |= {"kind": "augmented", "variants": 3, "augmentation": {"hue": 0.05}, "seed": 11}
    (tmp_path / "targets.json").write_text(json.dumps(header))
    message = "augmented views, which version 1 of xmag wrote.*again with cache_features"
    with pytest.raises(InputError, match=message):
        FeatureCache(tmp_path, manifest=manifest)
    with pytest.raises(InputError, match=message):
        cache_features(tmp_path, Memory(), manifest, teacher)
    (tmp_path / "targets.json").rename(tmp_path / "targets.begun.json")
    with pytest.raises(InputError, match=message):
        cache_features(tmp_path, Memory(), manifest, teacher)


def test_a_header_that_makes_no_sense_is_refused(tmp_path, manifest, teacher) -> None:
    cache_features(tmp_path, Memory(), manifest, teacher).close()
    header = json.loads((tmp_path / "targets.json").read_text())
    assert str(tmp_path) not in json.dumps(header)
    for text, message in (
        ("{", "not what cache_features wrote"),
        (json.dumps({**header, "schema_version": 2}), "schema_version 2, .*upgrade"),
        (json.dumps({**header, "provenance": {}}), r"provenance\.fingerprint is missing"),
    ):
        (tmp_path / "targets.json").write_text(text)
        with pytest.raises(InputError, match=message):
            FeatureCache(tmp_path, manifest=manifest)


def test_features_that_float16_cannot_hold_are_an_error(tmp_path, manifest) -> None:
    huge = load_teacher(lambda t: t.float().mean((1, 2)) * 1e4, name="huge", dim=3)
    with pytest.raises(ModelError, match=r"huge gave features that are not finite in float16"):
        cache_features(tmp_path, Memory(), manifest, huge)
    assert not list(tmp_path.glob("features-*"))


def test_what_does_not_fit_is_refused(tmp_path, manifest, teacher) -> None:
    fewer = replace(manifest, places=manifest.places[:2])
    with pytest.raises(InputError, match="source has 5 regions, the manifest 2"):
        cache_features(tmp_path, Memory(), fewer, teacher)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot be made.*give another"):
        cache_features(tmp_path / "file", Memory(), manifest, teacher)
    kept = cache_features(tmp_path / "kept", Memory(), manifest, teacher)
    with pytest.raises(InputError, match="regions -1 to 2 are asked for"):
        kept.features([2, -1])
    kept.close()
    with pytest.raises(InputError, match="kept is closed"):
        kept.features([0])


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_disk_that_takes_no_more_is_an_output_error_and_leaves_no_part(
    tmp_path, manifest, teacher
) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OutputError, match="File too large; raise the limit"):
            cache_features(tmp_path, Memory(), manifest, teacher, settings=LOW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["targets.begun.json"]
    with cache_features(tmp_path, Memory(), manifest, teacher, settings=LOW) as kept:
        assert torch.equal(kept.features([4]), asked_again(Memory(), [4]))


def test_turned_features_are_the_mean_over_the_positions_of_each_tile(
    tmp_path, manifest, teacher
) -> None:
    source, settings = Memory(), CacheSettings(turned=True)
    with cache_features(tmp_path / "turned", source, manifest, teacher, settings=settings) as kept:
        assert kept.settings == settings
        found = kept.features([3, 0])
    tiles = teacher_tiles(torch.from_numpy(source.pixels[[3, 0]])).numpy()
    positions = [np.rot90(side, k, (1, 2)) for side in (tiles, tiles[:, ::-1]) for k in range(4)]
    each = [statistics(torch.from_numpy(p.copy())).numpy() for p in positions]
    assert np.ptp(each, axis=0).max() > 5  # the corner is another one
    expected = np.mean(each, axis=0).reshape(2, 16, 9)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-3, atol=0.05)


def test_a_cache_of_plain_features_does_not_serve_for_turned_ones(
    tmp_path, manifest, teacher
) -> None:
    cache_features(tmp_path, Memory(), manifest, teacher).close()
    turned = CacheSettings(turned=True)
    with pytest.raises(MismatchError, match="turned"):
        FeatureCache(tmp_path, manifest=manifest, teacher=teacher, settings=turned)
