"""Training images out of sprite sheets: pictures that are cut into cells of one size."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from sprite_diffusion.common.errors import UserInputError
from sprite_diffusion.data.config import DataConfig, parse_size
from sprite_diffusion.data.decoding import BadImageError, SkippedImage, open_image, skip_image
from sprite_diffusion.data.image_folder import find_local_files, list_image_folder
from sprite_diffusion.data.labels import spread_over_classes, to_class_ids
from sprite_diffusion.data.sources import Source, find_image_folder


class Cell(NamedTuple):
    """A cell of a sheet, by its column and row, which count from 0."""

    sheet: str
    column: int
    row: int


def cut_sheets(config: DataConfig, with_labels: bool | None) -> Source:
    """Cuts the sheets that `config` names into cells, and leaves out those with nothing in them.

    `with_labels` is as in `load_image_data`. Raises `UserInputError` if a sheet can't be cut, or `--sheet_labels` does
    not fit its rows.
    """
    assert config.cell is not None
    size = parse_size("cell", config.cell)
    name, paths, skipped_images = _find_sheets(config)
    if with_labels and config.sheet_labels is None:
        raise UserInputError(f"{name} has no labels: name the class of each row of a sheet by --sheet_labels")
    cells: list[Cell] = []
    for path in paths:
        try:
            cells += _find_cells(path, size, config)
        except BadImageError as error:
            skipped_images.append(skip_image(path, str(error), config))
    if not cells:
        raise UserInputError(f"--cell {config.cell}: every cell of {name} is empty")
    class_labels = class_names = None
    if config.sheet_labels is not None and with_labels is not False:
        labels = [config.sheet_labels[cell.row] for cell in cells]
        class_labels, class_names = to_class_ids(labels, None, config, "--sheet_labels")
    rows = spread_over_classes(class_labels, len(cells), config.max_train_samples)
    files = find_local_files(paths)
    return Source(
        name,
        ("sheets", "" if files is None else files.identity),
        rows,
        len(cells),
        _cut([cells[row] for row in rows], size, config),
        class_labels=None if class_labels is None else class_labels[rows],
        class_names=class_names,
        skipped_images=skipped_images,
    )


def _find_sheets(config: DataConfig) -> tuple[str, list[str], list[SkippedImage]]:
    """Returns the name of the data, the files of its sheets, and files that can't be used."""
    if config.dataset_name is not None:
        path = Path(config.dataset_name)
        if path.suffix.lower() != ".png" or not path.is_file():
            raise UserInputError(
                f"--cell {config.cell} cuts a sheet, and --dataset_name {path} is no .png file: name one, or a folder "
                "of sheets by --train_data_dir"
            )
        return str(path), [str(path)], []
    assert config.train_data_dir is not None
    path = Path(config.train_data_dir)
    if path.is_file():
        return str(path), [str(path)], []
    folder = find_image_folder(path, config.dataset_split)
    found = list_image_folder(folder, config)
    return str(folder), found.images, found.skipped_images


def _find_cells(path: str, size: tuple[int, int], config: DataConfig) -> list[Cell]:
    """Returns the cells of a sheet that hold something, in reading order."""
    sheet = open_image(path, config)
    height, width = size
    num_rows, num_columns = sheet.height // height, sheet.width // width
    if sheet.height % height or sheet.width % width:
        raise UserInputError(
            f"--cell {width}x{height}: {path} is {sheet.width}x{sheet.height}, no multiple of it: give the size of a "
            "cell"
        )
    if config.sheet_labels is not None and len(config.sheet_labels) != num_rows:
        raise UserInputError(
            f"--sheet_labels gives {len(config.sheet_labels)} names: {path} has {num_rows} rows, each needs one"
        )
    cells = [Cell(path, column, row) for row in range(num_rows) for column in range(num_columns)]
    return [cell for cell in cells if not _is_empty(_crop(sheet, cell, size))]


def _crop(sheet: Image.Image, cell: Cell, size: tuple[int, int]) -> Image.Image:
    height, width = size
    left, top = cell.column * width, cell.row * height
    return sheet.crop((left, top, left + width, top + height))


def _is_empty(cell: Image.Image) -> bool:
    """Returns whether a cell is of one colour, or has nothing but transparent pixels."""
    if cell.has_transparency_data:
        cell = cell.convert("RGBA")
        if cell.getchannel("A").getextrema() == (0, 0):  # whatever colours are hidden there
            return True
    lowest, highest = np.atleast_2d(cell.getextrema()).T  # of each channel
    return bool((lowest == highest).all())


def _cut(cells: list[Cell], size: tuple[int, int], config: DataConfig) -> Iterator[tuple[str, Image.Image]]:
    """Yields the name and the pixels of each cell; each sheet is decoded once, as its cells follow each other."""
    path = None
    for cell in cells:
        if cell.sheet != path:
            path, sheet = cell.sheet, open_image(cell.sheet, config)
        yield f"cell {cell.column},{cell.row} of {cell.sheet}", _crop(sheet, cell, size)
