"""Validation during a training: retrieval on the whole validation set."""

from __future__ import annotations

from ..data.dataset import ClipDataset
from ..data.images.image_cache import ImageCache
from ..errors import UserError
from ..evaluate.encoder import BrokenModel, EncodedImages, Encoder, Host, encode_images
from ..evaluate.retrieval import RetrievalResult, retrieval_of
from .setup import TrainSetup
from .step import TrainingStep


class Validator:
    """Measures a network on the validation set, with nothing random. A frozen vision tower encodes the images once."""

    def __init__(self, dataset: ClipDataset, encoder: Encoder, *, vision_trains: bool) -> None:
        self.dataset, self.encoder, self.vision_trains = dataset, encoder, vision_trains
        self._images: EncodedImages | None = None

    @classmethod
    def of(cls, setup: TrainSetup, training_step: TrainingStep, image_cache: ImageCache | None) -> Validator | None:
        """Return the validator of a training; None without a validation set."""
        if setup.validation is None:
            return None
        encoder = Encoder(
            training_step.network,
            setup.transform.deterministic,
            setup.tokenizer,
            host=Host(check_cancelled=setup.callbacks.check_cancelled, cache=image_cache),
        )
        return cls(setup.validation, encoder, vision_trains=setup.config.towers != "text")

    def measure(self, step: int) -> RetrievalResult:
        """Measure after `step` optimizer steps; raises `UserError` for a network whose features are not finite."""
        network = self.encoder.network
        network.eval()
        try:
            images = self._images or encode_images(self.encoder, self.dataset)
            if not self.vision_trains:
                self._images = images
            return retrieval_of(self.encoder, self.dataset, images=images)
        except BrokenModel as error:
            raise UserError(f"The validation at step {step} failed: {error} Try a lower learning_rate.") from error
        finally:
            network.train()
