"""The run that a report shows, read from its evaluation, its dataset and its checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from eval.measure.evaluation import Evaluation, read_evaluation
from eval.measure.features import StoredFeatures, read_features
from eval.show import pictures
from eval.show.figures import History
from trainer import checkpoint as checkpoints
from trainer.checkpoint import Checkpoint
from trainer.config import Config
from trainer.folder import read_config
from trainer.shared.errors import UserError
from trainer.shared.records import Manifest, read_manifest

SIDE = 96
"""Maximum side of a picture, pixels."""


@dataclass(frozen=True)
class Run:
    evaluation: Evaluation
    data_dir: str
    manifest: Manifest
    config: Config
    about: Mapping[str, Any]
    """Content of config.json in the checkpoint's folder."""
    checkpoint: Checkpoint
    history: History
    runs: Mapping[str, str]
    """Component -> ID of its MLflow run."""

    @property
    def preset(self) -> str:
        return str(self.about.get("preset") or "")

    def features(self, split: str) -> StoredFeatures | None:
        """Returns the features of a split, or None if they were deleted.

        Looks in the folder that the evaluation recorded, then in the evaluation's own folder, in case both were moved.
        """
        path = str(self.evaluation.result["features"][split]["path"])
        for folder in (path, f"{self.evaluation.folder}/{path.rpartition('/')[2]}"):
            try:
                return read_features(folder)
            except UserError:
                continue
        return None

    def thumbnails(self, split: str, image_ids: Sequence[int], side: int = SIDE) -> dict[int, Image.Image]:
        """Returns the evaluation crops of images at thumbnail size, by ID in the given order."""
        jpegs = pictures.read_jpegs(self.data_dir, self.manifest, split, image_ids)
        proportion = self.config.views.eval_crop_proportion
        return {int(image_id): pictures.thumbnail(jpegs[int(image_id)], side, proportion) for image_id in image_ids}

    def drawn(self, count: int, number: int) -> list[int]:
        """Returns at most `number` of the numbers 0..count-1, drawn by the evaluation's seed, sorted."""
        random = np.random.Generator(np.random.Philox(key=[self.config.linear_eval.seed, 1]))
        return [int(i) for i in np.sort(random.choice(count, min(number, count), replace=False))]


def read_run(evaluation: str, data_dir: str, history: History, runs: Mapping[str, str]) -> Run:
    """Reads a run from the folder of its evaluation. Raises UserError if evaluation, dataset or checkpoint is missing."""
    found = read_evaluation(evaluation)
    checkpoint = checkpoints.load(found.result["checkpoint"])
    config, about = read_config(checkpoints.run_folder(checkpoint.path))
    return Run(found, data_dir, read_manifest(data_dir), config, about, checkpoint, history, runs)
