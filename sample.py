"""Samples images from a trained model, and looks at how it samples: `python sample.py runs/sprites-conditional`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sprite_diffusion.common.errors import exits_on_user_error
from sprite_diffusion.sampling.flags import parse_args

if TYPE_CHECKING:
    from sprite_diffusion.sampling.figures import Figure


@exits_on_user_error
def main() -> None:
    args = parse_args(__doc__)
    # These imports take seconds, which `--help` and a wrong flag need not wait for.
    import torch

    from sprite_diffusion.sampling.figures import find_snapshots
    from sprite_diffusion.sampling.pipeline_loading import load_pipeline, speed_up
    from sprite_diffusion.sampling.views import make_figure, make_forward_figure, write_picture, write_samples

    if args.model is None and args.snapshots is None:
        figure = make_forward_figure(args)
        write_picture(args, figure.render(args.scale), figure.record)
        return
    model = str(find_snapshots(args.snapshots)[-1]) if args.model is None else args.model
    pipeline = load_pipeline(model, getattr(torch, args.dtype), args.process)
    pipeline = pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    speed_up(pipeline, args.compile, args.num_threads)
    if args.view == "samples":
        write_samples(args, pipeline)
        return
    figure = make_figure(args, pipeline)
    if args.logger != "none":
        log_comparison(args, figure)
    write_picture(args, figure.render(args.scale), figure.record)


def log_comparison(args: argparse.Namespace, figure: "Figure") -> None:
    """Gives the comparison to the trackers of the model's run, or to those of the current folder if it has no run.

    Raises `UserInputError` if the configuration of the run can't be read.
    """
    from sprite_diffusion.common.run_files import find_logging_dir, find_run, read_saved_config
    from sprite_diffusion.sampling.figures import comparison_table
    from sprite_diffusion.sharing.trackers import Trackers

    run_dir, logging_dir, project = find_run(Path(args.model)), Path("logs"), args.tracker_project
    if run_dir is not None:
        logging_dir = find_logging_dir(run_dir)
        project = project or (read_saved_config(run_dir) or {}).get("tracker_project")
    trackers = Trackers(args.logger, logging_dir, {"compare": args.compare}, project, args.tracker_job_type)
    trackers.log_image("comparison", figure.render(args.scale), caption=args.compare)
    trackers.log_table("comparison_table", *comparison_table(figure))
    trackers.finish()


if __name__ == "__main__":
    main()
