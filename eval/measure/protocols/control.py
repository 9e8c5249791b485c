"""The control: the protocol `cached` on an untrained encoder of the same architecture.

It uses at most `linear_eval.control_images` training images, so it is cheap on a large dataset.
"""

from dataclasses import replace

import numpy as np

from eval.measure.features import StoredFeatures, extract
from eval.measure.protocols import cached
from eval.measure.protocols.cached import CACHED, drawn_order
from eval.measure.protocols.protocol import Context, Protocol, Scores, Sizes, Work
from trainer.config import Config
from trainer.encoder import make_encoder
from trainer.shared.progress import of_batches


def scores(context: Context) -> Scores:
    count, most = context.train.count, context.settings.control_images
    chosen = np.sort(drawn_order(count, context.settings.seed)[:most]) if most < count else None
    with context.strategy.scope():
        encoder = make_encoder(context.config.encoder, context.config.views.image_size, context.config.run.seed)
    images = {"train": min(count, most), "validation": len(context.validation.labels)}

    def features(split: str, image_ids: np.ndarray | None = None) -> StoredFeatures:
        return extract(
            encoder,
            context.config,
            context.data_dir,
            context.manifest,
            split,
            context.features_dir,
            image_ids,
            shared=context.shares_features,
            strategy=context.strategy,
            on_progress=of_batches(context.on_progress, f"untrained control, features of {split}", images[split]),
            should_stop=context.should_stop,
        )

    def on_fit(phase: str, done: int = 0, total: int = 0, text: str = "") -> None:
        context.on_progress(f"untrained control, {phase}", done, total, text)

    train, validation = features("train", chosen), features("validation").whole()
    found = cached.scores(replace(context, encoder=encoder, train=train, validation=validation, on_progress=on_fit))
    return replace(found, arrays={})


def work(config: Config, sizes: Sizes) -> Work:
    fitted = replace(sizes, train=min(sizes.train, config.linear_eval.control_images))
    return replace(cached.work(config, fitted), forward=fitted.train + fitted.validation)


CONTROL = Protocol(CACHED.name, CACHED.description, work, scores, encoder="untrained")
