"""Makes a pipeline folder of any model that sample.py draws from, such as a checkpoint of the sprite course.

python -m sprite_diffusion.sampling.convert context_model_trained.pth runs/course
"""

from pathlib import Path

from models import ContextUNet2DModel
from sprite_diffusion.common.errors import UserInputError, exits_on_user_error, printable
from sprite_diffusion.common.flags import SEED_RANGE, ArgumentParser
from sprite_diffusion.sampling.flags import MODEL_HELP, add_process_flags, read_process_flags
from sprite_diffusion.sampling.pipeline_loading import Pipeline, load_pipeline


def give_random_shortcut(pipeline: Pipeline, seed: int) -> None:
    """Lets the network draw its shortcut anew at each call, as the course's code does.

    Raises `UserInputError` if it is not a network of the course.
    """
    if not isinstance(pipeline.unet, ContextUNet2DModel):
        raise UserInputError(f"--shortcut_seed {seed}: the model has a {type(pipeline.unet).__name__}, leave it out")
    pipeline.unet.register_to_config(shortcut_seed=seed)


@exits_on_user_error
def main() -> None:
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("output_dir", type=Path, help="Folder to write; new or empty.")
    parser.add_argument("--shortcut_seed", type=int, help="Draw the course's shortcut at random, from this seed.")
    add_process_flags(parser)
    args = parser.parse_args()
    SEED_RANGE.check("shortcut_seed", args.shortcut_seed)
    process = read_process_flags(args)
    if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
        raise UserInputError(f"{args.output_dir} is there already: name a folder that is new or empty")
    pipeline = load_pipeline(args.model, process=process)
    if args.shortcut_seed is not None:
        give_random_shortcut(pipeline, args.shortcut_seed)
    pipeline.save_pretrained(str(args.output_dir))
    print(f"wrote {printable(str(args.output_dir))}")


if __name__ == "__main__":
    main()
