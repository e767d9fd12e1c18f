"""What is checked and decided before a training begins."""

import pytest
from clips import broken_clip
from image_folders import labels_folder
from train_runs import run

from clip_finetune.engine import TrainConfig, UserError, load_dataset, train


def test_a_validation_set_that_cannot_tell_models_apart_is_not_used(model, data, tmp_path):
    result = run(model, data, tmp_path / "run", validation=data.subset([0]))
    assert result.best_step == 9 and not result.validations
    assert any("cannot tell a better model from a worse one" in note for note in result.notes)


def test_a_dataset_smaller_than_the_batch_reduces_the_batch_and_says_so(model, data, tmp_path):
    result = run(model, data.subset(range(3)), tmp_path / "run")
    assert result.total_steps == 3 and any("reduced from 4 to 3" in note for note in result.notes)


def test_a_single_image_is_refused(model, data, tmp_path):
    with pytest.raises(UserError, match="at least 2 are needed"):
        run(model, data.subset([0]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_images_are_left_out_and_named(model, tmp_path):
    folder = labels_folder(tmp_path / "colours")
    (folder / "003.png").unlink()
    result = run(model, load_dataset(folder), tmp_path / "run", batch_size=11)
    assert result.total_steps == 3 and any("1 of the 12" in note and "003.png" in note for note in result.notes)


def test_a_broken_image_is_left_out_and_named(model, tmp_path):
    folder = labels_folder(tmp_path / "colours")
    (folder / "005.png").write_bytes((folder / "005.png").read_bytes()[:40])
    result = run(model, load_dataset(folder), tmp_path / "run")
    assert result.total_steps == 9 and any("005.png" in note for note in result.notes)


@pytest.mark.parametrize(
    "name, settings",
    [("logit_scale", {"loss": "fixed_temperature"}), ("token_embedding.weight", {}), ("positional_embedding", {})],
)
def test_no_training_begins_whose_model_could_not_be_saved(tmp_path, name, settings):
    """No caption has this token or is this long, so the loss would not show it."""
    dataset = load_dataset(labels_folder(tmp_path / "colours"))
    model = broken_clip(name, row=49000 if name == "token_embedding.weight" else -1)
    config = TrainConfig.from_flat(batch_size=4, **settings)
    with pytest.raises(UserError, match=f"^The training did not start: .*{name} holds values that are not numbers"):
        train(model, dataset, None, config, run_folder=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
