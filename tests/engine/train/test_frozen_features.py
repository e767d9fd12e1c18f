"""What a frozen vision tower, or its frozen blocks, gives is computed once for each picture and changes nothing."""

import pytest
import torch
from clips import random_clip
from image_folders import labels_folder
from PIL import Image

from clip_finetune.engine import TrainConfig, load_dataset, train
from clip_finetune.engine.clip.tensor_files import same_bits
from clip_finetune.engine.data import feature_cache
from clip_finetune.engine.data.feature_cache import FeatureCache, FeatureSpec
from clip_finetune.engine.data.images.image_cache import ImageCache
from clip_finetune.engine.data.images.transforms import Transform
from clip_finetune.engine.train import frozen_features, master_weights

QUICK = dict(epochs=3, learning_rate=1e-3, batch_size=6, precision="fp32", towers="text")
BLOCKS = dict(towers="both", freeze_embeddings=True, freeze_vision_blocks=1)


class Stop(Exception):
    pass


@pytest.fixture
def data(tmp_path):
    return load_dataset(labels_folder(tmp_path / "colours", 20))


@pytest.fixture
def computed(monkeypatch):
    """(sample, view, features) of each time that the frozen part ran on a picture."""
    seen, put = [], FeatureCache.put

    def noted(self, sample, view, features):
        seen.append((sample, view, features.clone()))
        put(self, sample, view, features)

    monkeypatch.setattr(FeatureCache, "put", noted)
    return seen


def run(data, folder, *, seed=0, progress=lambda progress: None, cache_folder=None, validation=None, **settings):
    config = TrainConfig.from_flat(**(QUICK | settings))
    return train(
        random_clip(seed=seed),
        data,
        validation,
        config,
        run_folder=folder,
        device="cpu",
        cache_folder=cache_folder,
        on_progress=progress,
    )


def losses(result):
    return [step["loss"] for step in result.steps]


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("settings", [{}, BLOCKS, {"gmp": True}, {"gmp": True, **BLOCKS}])
def test_a_training_is_the_same_with_and_without(data, tmp_path, monkeypatch, computed, settings, at_once):
    """In float64: losses and weights after steps in which every picture came several times; with 4 at once the last
    part of a batch of 6 is filled."""
    monkeypatch.setattr(frozen_features, "_at_once", lambda device, micro_batch: at_once)
    monkeypatch.setattr(master_weights, "MASTER_DTYPE", torch.float64)
    kept = run(data, tmp_path / "kept", **settings)
    assert len(computed) == len(data)
    computed.clear()
    each = run(data, tmp_path / "each", cache_features=False, **settings)
    assert not computed
    assert losses(kept) == pytest.approx(losses(each), rel=1e-12)
    for name, tensor in each.full_clip.state_dict.items():
        torch.testing.assert_close(kept.full_clip.state_dict[name], tensor, rtol=1e-9, atol=1e-12)


def test_nothing_is_kept_of_a_tower_that_trains(data, tmp_path, computed):
    run(data, tmp_path / "both", towers="both", epochs=1)
    run(data, tmp_path / "random", horizontal_flip=True, epochs=1)
    run(data, tmp_path / "embeddings", towers="both", freeze_vision_blocks=1, epochs=1)
    assert not computed


@pytest.mark.parametrize("settings", [{}, BLOCKS, {"horizontal_flip": True, "color_jitter": 0.5, "cached_views": 2}])
@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_run_that_goes_on_gets_the_same_bits_with_the_cache_and_without(data, tmp_path, settings, stop):
    """Pictures come beside others then."""

    def stops(progress):
        if progress.step == stop:
            raise Stop

    whole = run(data, tmp_path / "whole", micro_batch=4, **settings)
    for cache_folder in (None, tmp_path / "cache"):
        folder = tmp_path / f"run{bool(cache_folder)}"
        with pytest.raises(Stop):
            run(data, folder, progress=stops, micro_batch=4, cache_folder=cache_folder, **settings)
        again = run(data, folder, micro_batch=4, cache_folder=cache_folder, **settings)
        assert losses(again) == losses(whole)
        for name, tensor in whole.full_clip.state_dict.items():
            assert same_bits(again.full_clip.state_dict[name], tensor), name


def test_runs_share_what_is_kept_until_the_tower_or_a_picture_changes(data, tmp_path, computed):
    cache = tmp_path / "cache"

    def new(folder, **options):
        computed.clear()
        run(options.pop("data", data), tmp_path / folder, cache_folder=cache, epochs=4, **options)
        return len(computed)

    assert new("first") == 20
    assert new("second", learning_rate=2e-3) == 0
    assert new("another precision", precision="bf16") == 20
    assert new("another tower", seed=1) == 20
    assert new("blocks", **BLOCKS) == 20
    assert new("another square", resize_mode="pad", background="red") == 20
    picture = data.path(3)
    Image.new("RGB", (40, 30), "teal").save(picture)
    assert new("another picture", data=load_dataset(data.folder)) == 1


def test_each_picture_has_so_many_views_and_they_differ(data, tmp_path, computed):
    run(data, tmp_path / "run", color_jitter=0.8, cached_views=3, epochs=9)
    by_view = {(sample, view): features for sample, view, features in computed}
    assert len(computed) == 60 and set(by_view) == {(sample, view) for sample in range(20) for view in range(3)}
    assert all(not torch.equal(by_view[sample, 0], by_view[sample, 1]) for sample in range(20))


def test_what_has_no_room_is_computed_again(data, tmp_path, monkeypatch, computed):
    monkeypatch.setattr(feature_cache, "MEMORY_BYTES", 7 * 32 * 4)
    run(data, tmp_path / "run")
    # Of 54 turns, the 7 pictures that came first are in 7 to 7 · 3.
    assert 54 - 2 * 7 <= len(computed) < 54


def test_blocks_that_give_more_than_may_be_kept_run_each_time_and_it_is_said(data, tmp_path, monkeypatch, computed):
    monkeypatch.setattr(frozen_features, "MEMORY_BYTES", 1000)
    result = run(data, tmp_path / "run", **BLOCKS)
    assert not computed and any("run in every step" in note for note in result.notes)


def test_the_tensors_come_back_from_the_disk_with_their_bits(data, tmp_path):
    for dtype, shape in ((torch.float32, (7,)), (torch.bfloat16, (5, 3)), (torch.float64, (2, 2))):
        features = torch.randn(shape, dtype=torch.float64).to(dtype)
        for made_by in ("one", "other"):
            cache = ImageCache(tmp_path / "cache")
            kept = FeatureCache(data, Transform(image_size=32), FeatureSpec(shape, dtype, made_by), cache)
            if made_by == "one":
                kept.put(2, 0, features)
                cache.close()
                cache = ImageCache(tmp_path / "cache")
                kept = FeatureCache(data, Transform(image_size=32), FeatureSpec(shape, dtype, made_by), cache)
                assert same_bits(kept.get(2, 0), features)
            assert kept.get(3, 0) is None and kept.get(2, 1) is None
            if made_by == "other":
                assert kept.get(2, 0) is None
            cache.close()


def test_the_pictures_of_the_validation_are_encoded_once(data, tmp_path, monkeypatch):
    from clip_finetune.engine.evaluate import encoder as encoder_module

    images, encoded = encoder_module.Encoder.encode_batches, []

    def counted(self, batches, total):
        encoded.append(total)
        return images(self, batches, total)

    monkeypatch.setattr(encoder_module.Encoder, "encode_batches", counted)
    result = run(data, tmp_path / "text", validation=data)
    assert len(result.validations) == 4 and encoded == [20]
    assert len({line["loss"] for line in result.validations}) == 4
    encoded.clear()
    run(data, tmp_path / "both", validation=data, towers="both")
    assert encoded == [20] * 4
