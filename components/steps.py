"""The components: the steps of a pipeline, and two that complete a cluster job's records in MLflow.

KFP ships the source of each body, so every body does its own imports.
"""

from collections.abc import Callable

from kfp import dsl

IMAGE = "sogclr-python"
"""Placeholder. The local runner uses the current interpreter; compiling replaces the name with real images."""


def _component(body: Callable) -> dsl.base_component.BaseComponent:
    """Makes a component whose process ends as soon as its work is done, see `components.ending`."""
    made = dsl.component(base_image=IMAGE, install_kfp_package=False)(body)
    start, command = "python3 -m kfp.dsl.executor_main", made.component_spec.implementation.container.command
    assert sum(start in part for part in command) == 1, "KFP starts components in another way than 2.17 does"
    command[:] = [part.replace(start, start.replace("-m", "-m components.ending")) for part in command]
    return made


@_component
def build_tfrecords(
    raw: str,
    raw_identity: str,
    data_settings: list[str],
    beam_args: list[str],
    code_version: str,
    dataset: dsl.Output[dsl.Dataset],
) -> None:
    """Converts raw ImageNet archives to TFRecords with image IDs.

    Args:
        raw: Folder of the raw archives.
        raw_identity: Part of the cache key. Changes when the archives change.
        data_settings: key=value for each setting of the conversion that differs from its default, for example
            data.subset=imagenet_s.
        beam_args: Options of Beam, for example to run on Dataflow. If empty, the conversion runs in this container.
        code_version: Part of the cache key. Changes when the code changes.
        dataset: A TFDS folder with a manifest. If SOGCLR_DATASETS is set, the folder is under it, and the step goes on from the
            shards of an interrupted conversion of the same raw data, settings and code.
    """
    import logging
    import os
    import sys

    from beam_jobs import inspect_dataset
    from beam_jobs.job import build
    from beam_jobs.plan import options_of
    from components import datasets, tracking, variables
    from components.dataflow import JOB_LABEL, label_of
    from components.showing import progress_bars
    from trainer.config import data_from
    from trainer.shared.data import values_of_data
    from trainer.shared.files import sha256_of_file
    from trainer.shared.records import Split

    arguments = {
        "raw": raw,
        "raw_identity": raw_identity,
        "data_settings": data_settings,
        "beam_args": beam_args,
        "code_version": code_version,
    }
    if tracking.recorded_before("build-tfrecords", arguments, {"dataset": dataset}):
        return
    with progress_bars() as bars, tracking.step("build-tfrecords", arguments, {"dataset": dataset}) as run:
        on_progress = run.phase.of(bars.of("build-tfrecords"))
        if beam_args:
            # Dataflow's runner logs the job's link, its states and its errors at this level.
            logging.basicConfig(stream=sys.stderr, format="%(message)s")
            logging.getLogger("apache_beam.runners.dataflow").setLevel(logging.INFO)
            beam_args = [*beam_args, f"--labels={JOB_LABEL}={label_of(tracking.job_of(dataset.uri))}"]
        settings = data_from(data_settings)
        contents = {f"{key}_sha256": sha256_of_file(path) for key, path in settings.files.items()}
        run.log_params({**values_of_data(settings), **contents})
        about = {"raw": raw_identity, "settings": data_settings, "code_version": code_version}
        claim = datasets.claim(dataset.uri, run.job, about)
        run.at_end(claim.release)
        dataset.uri = claim.folder
        manifest = build(
            raw,
            dataset.uri,
            beam_args=beam_args,
            listing=os.environ.get(variables.LISTING, ""),
            on_progress=on_progress,
            **options_of(settings),
        )
        train, validation = manifest.splits["train"], manifest.splits.get("validation", Split(0, (), ()))
        dataset.metadata.update(
            name=manifest.name,
            fingerprint=manifest.fingerprint,
            train_images=train.records,
            validation_images=validation.records,
            classes=manifest.num_classes,
        )
        run.datasets.log(dataset, "output")
        run.log_text(inspect_dataset.page(dataset.uri), tracking.DATASET_PAGE)
        run.metrics.log(
            {
                "data/train_images": train.records,
                "data/validation_images": validation.records,
                "data/repaired_images": len(train.repaired) + len(validation.repaired),
                "data/rejected_images": len(train.rejected) + len(validation.rejected),
            },
            step=0,
        )


@_component
def pretrain(
    preset: str,
    overrides: list[str],
    init_from: str,
    init_identity: str,
    code_version: str,
    dataset: dsl.Input[dsl.Dataset],
    model: dsl.Output[dsl.Model],
) -> None:
    """Pretrains an encoder without labels.

    Args:
        preset: Name of the experiment.
        overrides: key=value for each pretraining setting that differs from the preset. Settings of the linear eval are not
            allowed, nor are those of the conversion, except data.allow_other_counts.
        init_from: Checkpoint of another run, whose encoder, heads and u this run starts with; empty for none.
        init_identity: Part of the cache key. Changes when that checkpoint changes.
        code_version: Part of the cache key. Changes when the code changes.
        dataset: The output of build-tfrecords.
        model: A folder with checkpoints, config.json, result.json, and the exported encoder in export/. If AIP_CHECKPOINT_DIR is
            set, the folder is under it, and the step resumes from the checkpoints of an earlier attempt with the same settings
            and data.
    """
    import os

    from components import tracking, variables, workspace
    from components.devices import claimed_devices
    from components.showing import progress_bars
    from eval.export.encoder import export
    from eval.show.figures import curves
    from trainer.checkpoint import sha256_of
    from trainer.config import BOOKKEEPING, pretraining_of
    from trainer.initial import open_source
    from trainer.preemption import ending_noted, exits_if_preempted
    from trainer.presets import resolve_pretraining
    from trainer.train import train

    arguments = {"preset": preset, "overrides": overrides, "code_version": code_version}
    if init_from:
        arguments |= {"init_from": init_from, "init_identity": init_identity}
    if tracking.recorded_before("pretrain", arguments, {"model": model}):
        return
    with (
        exits_if_preempted(),
        progress_bars() as bars,
        tracking.step("pretrain", arguments, {"model": model}, {"dataset": dataset}) as run,
    ):
        on_progress = run.phase.of(bars.of("pretrain"))
        strategy = claimed_devices(run, on_progress, say=lambda line: bars.note("pretrain", line))
        config = resolve_pretraining(preset, overrides)
        settings = pretraining_of(config)
        run.log_params(settings)
        run.datasets.log(dataset, "training")
        claim = workspace.Claim(model.uri)
        lasting = {key: value for key, value in settings.items() if key not in BOOKKEEPING}
        about = {"settings": lasting, "dataset": dataset.metadata["fingerprint"]}
        if init_from:
            source, _ = open_source(init_from, config)
            about["init_from"] = sha256_of(source.arrays)
            run.encoders.start_from(source.path, about["init_from"])
        if checkpoints := os.environ.get("AIP_CHECKPOINT_DIR"):
            reuses = bool(os.environ.get(variables.REUSE))
            claim = workspace.claim(checkpoints, run.job, reuses, **about, code_version=code_version)
            run.at_end(claim.release)
        model.uri = claim.folder
        run.metrics.keep_in(claim.folder, run.run_in(claim.finished_by))
        with ending_noted() as should_stop:
            result = train(
                config,
                dataset.uri,
                model.uri,
                init_from=init_from,
                preset=preset,
                code_version=code_version,
                strategy=strategy,
                log_metrics=run.metrics.log,
                on_progress=on_progress,
                before_checkpoint=run.metrics.settle,
                should_stop=claim.stopping(should_stop),
                say=lambda line: bars.note("pretrain", line),
            )
        claim.require()
        if drawn := curves({"": run.metrics.history()}):
            run.log_figure(drawn, tracking.CURVES)
        model.metadata.update(preset=preset, steps=result.steps, state_sha256=result.state_sha256)
        exported = export(result.checkpoint, f"{model.uri}/export", data_dir=dataset.uri)
        run.encoders.log(
            model,
            dataset,
            [result.checkpoint, f"{model.uri}/config.json", f"{model.uri}/result.json"],
            exported.folder,
            params={"preset": preset, "steps": result.steps, "state_sha256": result.state_sha256, **settings},
            metrics={**result.metrics, "export/largest_feature_difference": exported.comparison.difference},
            step=result.steps,
        )


@_component
def import_encoder(
    preset: str,
    overrides: list[str],
    encoder: str,
    encoder_identity: str,
    code_version: str,
    model: dsl.Output[dsl.Model],
) -> None:
    """Imports an encoder of other code, in place of pretraining one.

    Args:
        preset: Name of the experiment whose views and linear eval the encoder is evaluated with.
        overrides: key=value for each setting of the views that differs from the preset, for example image_size=64.
        encoder: The checkpoint of other code: a file, the prefix of a TensorFlow checkpoint, or a folder that holds one.
        encoder_identity: Takes the checkpoint's place in the cache key. Changes when its content changes.
        code_version: Part of the cache key. Changes when the code changes.
        model: A folder with a checkpoint, config.json, and the exported encoder in export/.
    """
    import hashlib
    import json

    from components import tracking
    from components.showing import progress_bars
    from eval.export.encoder import export
    from trainer.config import as_dict, pretraining_of
    from trainer.importing.importer import base_of, import_checkpoint
    from trainer.shared.errors import UserError

    arguments = {
        "preset": preset,
        "overrides": overrides,
        "encoder": encoder,
        "encoder_identity": encoder_identity,
        "code_version": code_version,
    }
    if tracking.recorded_before("import-encoder", arguments, {"model": model}):
        return
    with progress_bars() as bars, tracking.step("import-encoder", arguments, {"model": model}) as run:
        on_progress = run.phase.of(bars.of("import-encoder"))
        on_progress("reading the checkpoint and comparing features")
        base, published = base_of(preset, overrides)
        side = base.views.image_size
        # An earlier attempt may have left the same import.
        found = import_checkpoint(
            encoder, model.uri, image_size=side, preset=published, code_version=code_version, base=base, replaces=True
        )
        if encoder_identity.startswith("sha256:") and encoder_identity != f"sha256:{found.sha256}":
            raise UserError(f"{encoder} changed since the pipeline began: its identity was {encoder_identity}; run it again")
        settings = {key: pretraining_of(found.config)[key] for key in found.translation.settings}
        form = found.translation.format
        run.log_params(settings)
        run.log_text(json.dumps(found.describe(), indent=1, sort_keys=True), tracking.IMPORT_FILE)
        origin = run.encoders.import_from(found.source, found.sha256, form)
        on_progress("exporting the encoder")
        exported = export(found.checkpoint, f"{model.uri}/export")
        model.metadata.update(
            preset=published,
            steps=found.translation.step,
            state_sha256=found.state_sha256,
            format=form,
            source_sha256=found.sha256,
            config=hashlib.sha256(json.dumps(as_dict(found.config), sort_keys=True).encode()).hexdigest(),
        )
        run.encoders.log(
            model,
            None,
            [found.checkpoint, f"{model.uri}/config.json"],
            exported.folder,
            params={"preset": published, "steps": found.translation.step, "state_sha256": found.state_sha256, **settings},
            metrics={
                "import/largest_feature_difference": found.comparison.difference,
                "import/largest_feature": found.comparison.largest,
                "import/arrays_taken": found.translation.mapped,
                "import/arrays_left_out": sum(found.translation.left_out.values()),
                "export/largest_feature_difference": exported.comparison.difference,
            },
            step=found.translation.step,
            origin=origin,
        )
        on_progress("imported", 1, 1, form)


@_component
def linear_eval(
    overrides: list[str],
    code_version: str,
    dataset: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
) -> None:
    """Fits a linear classifier on the frozen encoder and measures its accuracy. Does the same for an untrained encoder.

    Args:
        overrides: key=value for each setting of the linear eval that differs from the preset.
        code_version: Part of the cache key. Changes when the code changes.
        dataset: The output of build-tfrecords.
        model: The output of pretrain or import-encoder.
        metrics: Accuracies between 0 and 1, and a folder with result.json. If AIP_CHECKPOINT_DIR is set, the step resumes from an
            earlier attempt with the same settings and inputs. If SOGCLR_FEATURES is set, the features are stored under it, and an
            evaluation with other settings finds them again.
        report: A page with the results and the images they were measured on.
    """
    import os

    from components import tracking, variables, workspace
    from components.devices import claimed_devices
    from components.showing import progress_bars
    from eval.export.card import evaluated_card
    from eval.measure.linear_eval import evaluation_config
    from eval.measure.linear_eval import linear_eval as evaluate
    from eval.show.report import write_report
    from trainer.folder import read_config
    from trainer.named_files import FILES_SHA256
    from trainer.preemption import ending_noted, exits_if_preempted

    arguments = {"overrides": overrides, "code_version": code_version}
    inputs, outputs = {"model": model, "dataset": dataset}, {"metrics": metrics, "report": report}
    if tracking.recorded_before("linear-eval", arguments, outputs):
        return
    with exits_if_preempted(), progress_bars() as bars, tracking.step("linear-eval", arguments, outputs, inputs) as run:
        on_progress = run.phase.of(bars.of("linear-eval"))
        strategy = claimed_devices(run, on_progress, say=lambda line: bars.note("linear-eval", line))
        run.datasets.log(dataset, "eval")
        run.encoders.use(model)
        digest = evaluation_config(read_config(model.uri)[0], overrides).linear_eval.files_sha256
        run.log_params({FILES_SHA256: digest} if digest else {})
        claim = workspace.Claim(metrics.uri)
        if checkpoints := os.environ.get("AIP_CHECKPOINT_DIR"):
            about = {"model": model.metadata["state_sha256"], "dataset": dataset.metadata["fingerprint"]}
            # The same file can be imported for images of another side.
            about |= {"config": model.metadata["config"]} if "config" in model.metadata else {}
            reuses = bool(os.environ.get(variables.REUSE))
            about |= {"files": digest} if digest else {}
            claim = workspace.claim(checkpoints, run.job, reuses, linear_eval=overrides, **about, code_version=code_version)
            run.at_end(claim.release)
        run.metrics.keep_in(claim.folder, run.run_in(claim.finished_by))
        features = os.environ.get(variables.FEATURES, "")
        with ending_noted() as should_stop, workspace.in_use(features):
            result = evaluate(
                dataset.uri,
                model.uri,
                metrics.uri,
                overrides,
                workspace=claim.folder,
                features_dir=features,
                strategy=strategy,
                log_metrics=run.metrics.log,
                on_progress=on_progress,
                should_stop=claim.stopping(should_stop),
            )
        claim.require()
        run.metrics.log_final(result.metrics, model.metadata["model_id"], dataset, int(model.metadata["steps"]))
        run.encoders.rate(model, dataset, evaluated_card(model.uri, metrics.uri), result.metrics["eval/top_1_accuracy"])
        run.datasets.log_features(dataset, result.features)
        history, runs = run.history_behind("pretrain"), run.sources()
        page = write_report(report.uri, metrics.uri, dataset.uri, history=history, runs=runs)
        run.log_text(page.html, tracking.REPORT)
        for file, figure in page.figures.items():
            run.log_figure(figure, file)
        for name, value in result.metrics.items():
            metrics.log_metric(name.removeprefix("eval/"), value)


@_component
def record_lineage(
    job: str, dataset: dsl.Input[dsl.Dataset], model: dsl.Input[dsl.Model], metrics: dsl.Input[dsl.Metrics]
) -> None:
    """Records in MLflow which runs a pipeline job consists of. Steps taken from the cache did not run, so cannot record it.

    Args:
        job: Name of the pipeline job.
        dataset: The output of build-tfrecords.
        model: The output of pretrain or import-encoder.
        metrics: The output of linear-eval.
    """
    from components import tracking

    tracking.join(tracking.open_job_store(), job, [one.metadata.get("run_id", "") for one in (dataset, model, metrics)])


@_component
def end_pipeline(job: str, status: dsl.PipelineTaskFinalStatus) -> None:
    """Closes the MLflow run of a pipeline job, whether the job succeeded or not.

    Args:
        job: Name of the pipeline job.
        status: How the job ended.
    """
    from components import tracking

    tracking.end_job(tracking.open_job_store(), job, status.state)


COMPONENTS = {
    "build-tfrecords": build_tfrecords,
    "pretrain": pretrain,
    "import-encoder": import_encoder,
    "linear-eval": linear_eval,
}
