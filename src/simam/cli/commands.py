"""What `simam report` and `simam maps` do with their options."""

import argparse
import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

from ..attach import attach
from .figure import check_output, draw, save
from .maps import collect, read_image
from .models import build, load_weights, user_errors
from .progress import progress_bar
from .report import measure
from .report_text import report_text


def run_report(options: argparse.Namespace) -> None:
    """Measure a model without and with SimAM, and print the report."""
    with progress_bar() as progress:
        progress(f"building {options.model}", 0, 1)
        subject = build(options.model, options.weights)
        report = measure(
            subject,
            subject.shape(options.batch, options.input_size),
            e_lambda=options.e_lambda,
            statistics=options.statistics,
            place=options.place,
            where=options.where,
            exclude=options.exclude,
            repeats=options.repeats,
            progress=progress,
        )
    print(json.dumps(asdict(report)) if options.json else report_text(report))


def run_maps(options: argparse.Namespace) -> None:
    """Draw the attention maps of a model for images, and write the figure to a file."""
    check_output(options.output, options.images)
    images = [read_image(path) for path in options.images]
    with progress_bar() as progress:
        progress(f"building {options.model}", 0, 1)
        subject = build(options.model)
        with user_errors():
            attach(
                subject.model,
                e_lambda=options.e_lambda,
                statistics=options.statistics,
                place=options.place,
                where=options.where,
                exclude=options.exclude,
            )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if options.weights:  # after attach, to compare the SimAM layers that the file records
                load_weights(subject.model, options.weights)
        inputs, layers = collect(
            subject,
            images,
            options.layers,
            statistics=options.statistics,
            progress=progress,
        )
        progress("drawing", 0, 1)
        weights = f"weights: {Path(options.weights).name if options.weights else 'random'}"
        statistics = f", statistics={options.statistics!r}" * (options.statistics != "shared")
        place = f", place={options.place!r}" * (options.place != "conv")
        title = (
            f"{subject.name}, {weights}, SimAM(e_lambda={options.e_lambda:g}{statistics}){place}"
        )
        names = [Path(path).name for path in options.images]
        save(draw(names, inputs, layers, title), options.output)
    for warning in caught:
        print(f"simam: warning: {warning.message}", file=sys.stderr)
    print(f"{options.output}: {', '.join(layer.path for layer in layers)} of {title}")
