"""Trains a diffusion model on images by class or caption: `accelerate launch train_conditional.py`."""

import sys

from sprite_diffusion.common.errors import exits_on_user_error
from sprite_diffusion.runs.presets import parse_config


@exits_on_user_error
def main() -> None:
    config = parse_config(sys.argv[1:], default_preset="sprites_conditional.yaml")
    # Imported here, as it takes seconds, which `--help` and a wrong flag need not wait for.
    from sprite_diffusion.data.sources import find_captions

    config.caption_column, table = find_captions(config, config.streaming)
    if config.caption_column is None:
        from sprite_diffusion.training.conditional import train
    else:
        from sprite_diffusion.training.captioned import train

    train(config, table=table)


if __name__ == "__main__":
    main()
