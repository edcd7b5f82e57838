"""Measures how good a model's images are, and whether it copies: `python calculate_metrics.py runs/sprites`.

A run is compared with what it was trained on, unless other data is named, by the data flags of the training scripts
(docs/data.md).
"""

import json
from pathlib import Path
from typing import Any

from sprite_diffusion.common.errors import DAMAGED_JSON, UserInputError, exits_on_user_error, first_line
from sprite_diffusion.common.files import write_text
from sprite_diffusion.common.run_files import CARD_FILE, CONFIG_FILE, INDEX_FILE, SUMMARY_FILE, find_run
from sprite_diffusion.data.config import parse_data_flags
from sprite_diffusion.metrics.flags import parse_args
from sprite_diffusion.metrics.report import format_table, write_report
from sprite_diffusion.sharing.card import make_card


@exits_on_user_error
def main() -> None:
    args, data_flags = parse_args(__doc__)
    model = Path(args.model)
    run_dir = find_run(model)
    config = parse_data_flags(data_flags, None if run_dir is None else run_dir / CONFIG_FILE)
    run_facts = read_run_facts(model / SUMMARY_FILE)
    # These imports take seconds, which `--help` and a wrong flag need not wait for.
    from sprite_diffusion.metrics.calculation import calculate

    result = calculate(args, config, data_flags, run_facts)
    if result is None:  # on every process but the main one
        return
    report, closest_pairs, facts = result
    print(format_table(report))
    default_folder = model if (model / INDEX_FILE).is_file() else Path()
    written = write_report(report, closest_pairs, args.output_dir or default_folder, facts)
    if run_facts and args.output_dir is None:
        write_text(model / CARD_FILE, make_card(model, None, None))
        written.append(model / CARD_FILE)
    print("\n".join(f"wrote {path}" for path in written))


def read_run_facts(summary: Path) -> dict[str, Any]:
    """Returns the step of a run's weights for the record; an empty dictionary if there is no summary.

    Raises `UserInputError` if the summary is damaged.
    """
    if not summary.is_file():
        return {}
    try:
        return {"global_step": int(json.loads(summary.read_text())["global_step"])}
    except DAMAGED_JSON as error:
        raise UserInputError(f"{summary} is not the summary of a run: {first_line(error)}") from None


if __name__ == "__main__":
    main()
