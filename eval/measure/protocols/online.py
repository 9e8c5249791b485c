"""The protocol `online`: the classifier in the checkpoint, which was trained alongside the encoder."""

from eval.measure.protocols.protocol import Context, Protocol, Scores, Sizes, Work
from trainer import checkpoint as checkpoints
from trainer.config import Config
from trainer.heads import make_classifier
from trainer.state import model_variables


def scores(context: Context) -> Scores:
    classifier = make_classifier(context.train.dim, context.manifest.num_classes)
    checkpoints.restore(model_variables("classifier", classifier), context.checkpoint)
    return Scores(classifier(context.validation.values).numpy(), {})


def work(config: Config, sizes: Sizes) -> Work:
    return Work()


PROTOCOLS = (
    Protocol(
        "online",
        "classifier trained alongside the encoder, without gradients to it",
        work,
        scores,
        uses_features_of=("validation",),
        needs="classifier",
    ),
)
