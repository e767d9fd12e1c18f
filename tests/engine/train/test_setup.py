"""What is checked before a training begins."""

import pytest
from clips import broken_clip
from image_folders import labels_folder

from clip_finetune.engine import TrainConfig, UserError, load_dataset, train


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
