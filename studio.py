"""Draws with a trained model on a page in the browser: `python studio.py runs/sprites-conditional`."""

import argparse
import os
import sys
from importlib.util import find_spec

from sprite_diffusion.common.errors import UserInputError, exits_on_user_error
from sprite_diffusion.common.flags import ArgumentParser, Range
from sprite_diffusion.sampling.flags import MODEL_HELP, RANGES, add_speed_flags, with_underscores


@exits_on_user_error
def main() -> None:
    args = parse_args()
    # These imports take seconds, which `--help` and a wrong flag need not wait for.
    import torch

    from sprite_diffusion.sampling.pipeline_loading import speed_up
    from sprite_diffusion.studio.drawing import open_model
    from sprite_diffusion.studio.page import build_notice, build_page, serve

    try:
        model = open_model(args.model, getattr(torch, args.dtype))
        speed_up(model.pipeline, args.compile, args.num_threads)
        page = build_page(model)
    except UserInputError as error:
        if "SPACE_ID" not in os.environ:  # a visitor of a Space sees the page alone
            raise
        page = build_notice(args.model, str(error))
    print(f"open {serve(page, args.host, args.port)} in a browser; Ctrl-C ends it", flush=True)
    page.block_thread()


def parse_args() -> argparse.Namespace:
    """Reads the command line. Raises `UserInputError` for a wrong one, and where gradio is missing."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model", help=MODEL_HELP)
    # The variables of gradio, which a Space sets.
    host, port = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), os.environ.get("GRADIO_SERVER_PORT", "7860")
    parser.add_argument(
        "--host", default=host, help="Address to listen at; 0.0.0.0 lets others in. Default: %(default)s."
    )
    parser.add_argument("--port", type=int, default=port, help="Default: %(default)s.")
    add_speed_flags(parser)
    args = parser.parse_args(with_underscores(sys.argv[1:]))
    Range(at_least=1, at_most=65535).check("port", args.port)
    RANGES["num_threads"].check("num_threads", args.num_threads)
    if find_spec("gradio") is None:
        raise UserInputError("studio.py needs gradio: run pip install -e '.[studio]' first")
    return args


if __name__ == "__main__":
    main()
