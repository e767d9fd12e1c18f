"""Images on their way into a training: the same batches every time, and what happens to broken ones."""

import os
import random
import time

import pytest
import torch
from image_runs import QUICK, RANDOM, Stop, blocks, blocks_folder, damage, identical, run, stop_after

from clip_finetune.engine import TrainConfig, UserError, eval_retrieval, load_dataset, load_full_clip, train
from clip_finetune.engine.data import loader as loader_module
from clip_finetune.engine.data.images.transforms import Transform
from clip_finetune.engine.data.loader import LoaderOptions, TrainLoader
from clip_finetune.engine.data.sampler import CaptionsConfig
from clip_finetune.engine.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_dataset(blocks_folder(tmp_path_factory.mktemp("data") / "noise"))


def loader_of(data, transform=None, **options):
    transform = transform or Transform(image_size=32)
    return TrainLoader(data, Tokenizer(77), transform, CaptionsConfig(), LoaderOptions(**options))


def test_batches_do_not_depend_on_the_number_or_order_of_threads(data, monkeypatch):
    base = Transform.base

    def slow(self, path):
        time.sleep(random.random() * 0.01)
        return base(self, path)

    monkeypatch.setattr(Transform, "base", slow)
    seen = []
    for threads in (1, 3, 16):
        monkeypatch.setattr(loader_module, "THREADS", threads)
        loader = loader_of(data, Transform(image_size=32, **RANDOM), batch_size=5)
        batches = loader.iterate(1)
        seen.append([next(batches) for _ in range(6)])
        loader.close()
    for other in seen[1:]:
        for (step, one), (other_step, two) in zip(seen[0], other, strict=True):
            assert step == other_step and one.indices == two.indices
            assert all(torch.equal(a, b) for a, b in zip(one[:4], two[:4], strict=True))


@pytest.mark.parametrize("cached", [False, True])
def test_a_resumed_run_gets_the_same_random_draws(data, tmp_path, cached):
    """Stopped in the middle of an epoch: random parts, flips, colours, captions, dropout and tags."""
    changes = RANDOM | dict(caption_dropout=0.3, shuffle_tags=True, save_every_steps=1)
    cache = tmp_path / "cache" if cached else None
    whole = run(data, tmp_path / "whole", **changes)
    for step in (1, 4, 8):
        with pytest.raises(Stop):
            run(data, tmp_path / "stopped", progress=stop_after(step), cache=cache, **changes)
    resumed = run(data, tmp_path / "stopped", cache=cache, **changes)
    assert identical(resumed, whole)
    assert not identical(whole, run(data, tmp_path / "other", **(changes | dict(seed=1))))


def test_a_model_is_evaluated_with_the_transform_it_was_trained_with(data, tmp_path):
    result = run(data, tmp_path / "run", data, resize_mode="pad", background="black")
    best = next(line for line in result.validations if line["step"] == result.best_step)
    model = load_full_clip(tmp_path / "run" / "best.safetensors")
    assert model.provenance["pictures"] == {"resize_mode": "pad", "background": "black", "resize_backend": "exact"}
    assert eval_retrieval(model, data).loss == best["loss"]
    again = train(model, data, data, TrainConfig.from_flat(**QUICK), run_folder=tmp_path / "again", device="cpu")
    assert "pictures" not in again.full_clip.provenance


@pytest.mark.parametrize("how", ["cut", "empty", "text", "gone"])
def test_a_run_with_too_many_broken_images_does_not_begin(tmp_path, how):
    folder = blocks_folder(tmp_path / "noise", 20)
    if how == "gone":
        for name in ("003.jpg", "007.jpg"):
            (folder / name).unlink()
    else:
        damage(folder, ("003.jpg", "007.jpg"), how)
    data = load_dataset(folder)
    with pytest.raises(UserError, match=r"2 of 20 images of noise cannot be used \(00[37].jpg: .*max_broken") as told:
        run(data, tmp_path / "run")
    assert "\n" not in str(told.value) and not list((tmp_path / "run").glob("*.safetensors"))
    result = run(data, tmp_path / "run", max_broken=0.1)
    assert result.total_steps > 0 and any("003.jpg" in note or "007.jpg" in note for note in result.notes)


def test_one_broken_image_is_left_out_unless_max_broken_is_zero(tmp_path):
    folder = blocks_folder(tmp_path / "noise", 12)
    damage(folder, ["005.jpg"])
    data = load_dataset(folder)
    assert any("005.jpg" in note for note in run(data, tmp_path / "run").notes)
    with pytest.raises(UserError, match="1 of 12"):
        run(data, tmp_path / "none", max_broken=0.0)


def test_broken_images_found_later_stop_the_run_and_it_can_resume(tmp_path, monkeypatch):
    """Of a large set a part is looked at first; here none of it is broken."""
    monkeypatch.setattr(loader_module, "_PROBED", 4)
    folder = blocks_folder(tmp_path / "noise", 40)
    damage(folder, [f"{index:03}.jpg" for index in (3, 13, 23, 33)])  # 0, 10, 20 and 30 are looked at
    with pytest.raises(UserError, match="of 40 images of noise cannot be used"):
        run(load_dataset(folder), tmp_path / "run")
    result = run(load_dataset(folder), tmp_path / "run", max_broken=0.1)
    assert result.total_steps == 30 and any("4 training images cannot be opened" in note for note in result.notes)


@pytest.mark.skipif(os.name == "nt", reason="links and long names are POSIX's here")
def test_odd_file_names_and_a_link_to_the_own_folder_can_be_trained_on(tmp_path):
    folder = tmp_path / "a folder with spaces"
    folder.mkdir()
    for name in ("ünï 猫 😀", "n" * 246, "two  spaces", 'quote\'s "name"', "semi;colon,comma", "hash#and%percent"):
        blocks(40, 40, seed=len(name)).save(folder / f"{name}.jpg")
        (folder / f"{name}.txt").write_text(f"a caption of {len(name)}")
    (folder / "itself").symlink_to(folder)
    data = load_dataset(folder)
    assert len(data) == 6
    result = run(data, tmp_path / "run", cache=tmp_path / "cache", batch_size=3)
    assert result.total_steps == 6 and not any("cannot be opened" in note for note in result.notes)


def test_nothing_is_written_beside_the_images(tmp_path):
    folder = blocks_folder(tmp_path / "noise")
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()} | {folder: folder.stat().st_mtime_ns}
    run(load_dataset(folder), tmp_path / "run", cache=tmp_path / "cache", **RANDOM)
    assert {file: file.stat().st_mtime_ns for file in (*folder.iterdir(), folder)} == before
    assert list((tmp_path / "cache").iterdir())
